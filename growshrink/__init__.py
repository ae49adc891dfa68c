"""Grow fusible branches into a small convolutional net, train it bigger, fuse it back exactly.

`import growshrink as gs` registers the ReduceNets with timm and gives the names below.
"""

from growshrink import models as models
from growshrink import schedules as schedules
from growshrink.activations import VanishingReLU as VanishingReLU
from growshrink.activations import get_lambda as get_lambda
from growshrink.activations import set_lambda as set_lambda
from growshrink.algebra import ConvMap as ConvMap
from growshrink.analysis import AngleTable as AngleTable
from growshrink.analysis import angle as angle
from growshrink.analysis import random_prune as random_prune
from growshrink.analysis import rank as rank
from growshrink.branches import Branch as Branch
from growshrink.branches import BranchSpec as BranchSpec
from growshrink.closed_loop import ClosedLoop as ClosedLoop
from growshrink.compare import assert_equivalent as assert_equivalent
from growshrink.compare import compare as compare
from growshrink.compare import profile as profile
from growshrink.compare import verify as verify
from growshrink.cycle import CyclePlan as CyclePlan
from growshrink.cycle import CycleResult as CycleResult
from growshrink.cycle import RoundPlan as RoundPlan
from growshrink.cycle import run_cycle as run_cycle
from growshrink.depth import MergeReport as MergeReport
from growshrink.depth import affinity_defect as affinity_defect
from growshrink.depth import collapse as collapse
from growshrink.depth import merge_report as merge_report
from growshrink.depth import merge_runs as merge_runs
from growshrink.depth import nonaffine_modules as nonaffine_modules
from growshrink.errors import AlgebraError as AlgebraError
from growshrink.errors import AnalysisError as AnalysisError
from growshrink.errors import DropError as DropError
from growshrink.errors import EquivalenceError as EquivalenceError
from growshrink.errors import FuseError as FuseError
from growshrink.errors import GrowError as GrowError
from growshrink.errors import GrowShrinkError as GrowShrinkError
from growshrink.errors import MergeError as MergeError
from growshrink.errors import NotLinearError as NotLinearError
from growshrink.errors import WidthError as WidthError
from growshrink.grown import GrownConv2d as GrownConv2d
from growshrink.grown import PureBottleneck as PureBottleneck
from growshrink.supernet import NetAugTask as NetAugTask
from growshrink.supernet import choose_width as choose_width
from growshrink.supernet import sort_channels as sort_channels
from growshrink.training import calibrate_bn as calibrate_bn
from growshrink.transforms import drop as drop
from growshrink.transforms import fold as fold
from growshrink.transforms import fuse as fuse
from growshrink.transforms import grow as grow
from growshrink.transforms import growth_report as growth_report
from growshrink.widths import WidthSpace as WidthSpace
from growshrink.widths import active_width as active_width
from growshrink.widths import get_width as get_width
from growshrink.widths import set_width as set_width
from growshrink.widths import width_space as width_space
