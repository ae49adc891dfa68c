"""Analysis of subnets: angle tables, scores, random pruning, and the statistics to judge them by."""

from growshrink.analysis._allocate import WidthScore as WidthScore
from growshrink.analysis._allocate import allocate as allocate
from growshrink.analysis._angle import AngleScores as AngleScores
from growshrink.analysis._angle import AngleTable as AngleTable
from growshrink.analysis._angle import angle as angle
from growshrink.analysis._angle import supernet_table as supernet_table
from growshrink.analysis._rank import Ranking as Ranking
from growshrink.analysis._rank import rank as rank
from growshrink.analysis._slim import cut as cut
from growshrink.analysis._slim import left_alone as left_alone
from growshrink.analysis._slim import slim as slim
from growshrink.analysis.channels import ChannelSpace as ChannelSpace
from growshrink.analysis.channels import channel_usage as channel_usage
from growshrink.analysis.headroom import headroom as headroom
from growshrink.analysis.layers import Layer as Layer
from growshrink.analysis.layers import Side as Side
from growshrink.analysis.layers import read_width_table as read_width_table
from growshrink.analysis.prune import random_prune as random_prune
from growshrink.analysis.prune import random_subnets as random_subnets
