"""Analysis of subnets: angle tables, scores, random pruning, and the statistics to judge them by."""

from growshrink.analysis.angle import AngleScores as AngleScores
from growshrink.analysis.angle import AngleTable as AngleTable
from growshrink.analysis.angle import angle as angle
from growshrink.analysis.angle import supernet_table as supernet_table
from growshrink.analysis.prune import random_prune as random_prune
from growshrink.analysis.rank import Ranking as Ranking
from growshrink.analysis.rank import rank as rank
