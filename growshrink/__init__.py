"""Grow fusible branches into a small convolutional net, train it bigger, fuse it back exactly.

`import growshrink as gs` registers the ReduceNets with timm and gives the names below; everything else stays in its
room: `gs.cycle`, `gs.layers`, `gs.algebra`, `gs.depth`, `gs.analysis`, `gs.transforms`, `gs.proofs`, `gs.errors`, ...
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from growshrink import algebra as algebra
from growshrink import analysis as analysis
from growshrink import cycle as cycle
from growshrink import depth as depth
from growshrink import errors as errors
from growshrink import layers as layers
from growshrink import models as models
from growshrink import proofs as proofs
from growshrink import schedules as schedules
from growshrink import transforms as transforms
from growshrink.analysis import allocate as allocate
from growshrink.analysis import angle as angle
from growshrink.analysis import cut as cut
from growshrink.analysis import random_prune as random_prune
from growshrink.analysis import rank as rank
from growshrink.analysis import slim as slim
from growshrink.branches import Branch as Branch
from growshrink.branches import BranchSpec as BranchSpec
from growshrink.branches import penalties as penalties
from growshrink.cycle import CyclePlan as CyclePlan
from growshrink.cycle import Round as Round
from growshrink.cycle import run_cycle as run_cycle
from growshrink.depth import collapse as collapse
from growshrink.layers.activations import get_lambda as get_lambda
from growshrink.layers.activations import set_lambda as set_lambda
from growshrink.layers.swaps import expand_online as expand_online
from growshrink.layers.widths import active_width as active_width
from growshrink.layers.widths import set_width as set_width
from growshrink.layers.widths import width_space as width_space
from growshrink.proofs import assert_equivalent as assert_equivalent
from growshrink.proofs import compare as compare
from growshrink.proofs import profile as profile
from growshrink.proofs import verify as verify
from growshrink.supernet import NetAugTask as NetAugTask
from growshrink.supernet import choose_width as choose_width
from growshrink.supernet import route as route
from growshrink.supernet import sort_channels as sort_channels
from growshrink.training import LambdaScheduler as LambdaScheduler
from growshrink.training import branch_parameters as branch_parameters
from growshrink.training import calibrate_bn as calibrate_bn
from growshrink.training import compile_gradients as compile_gradients
from growshrink.training import sync_optimizer as sync_optimizer
from growshrink.transforms import collapse_online as collapse_online
from growshrink.transforms import drop as drop
from growshrink.transforms import fold as fold
from growshrink.transforms import fuse as fuse
from growshrink.transforms import grow as grow
from growshrink.transforms import growth_report as growth_report
from growshrink.transforms import load_grown as load_grown
from growshrink.transforms import save_grown as save_grown
from growshrink.transforms import unroll as unroll

try:
    __version__ = _version("growshrink")
except _PackageNotFoundError:  # run from a folder of sources
    __version__ = "0+unknown"
