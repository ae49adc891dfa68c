"""Depth: how much of a net is affine, and what can be merged away."""

from growshrink.depth.affine import affinity_defect as affinity_defect
from growshrink.depth.affine import collapse as collapse
from growshrink.depth.affine import nonaffine_modules as nonaffine_modules
from growshrink.depth.merge import MergeReport as MergeReport
from growshrink.depth.merge import merge_report as merge_report
from growshrink.depth.merge import merge_runs as merge_runs
from growshrink.depth.skips import reserve_skips as reserve_skips
