"""The branches: what grow attaches to a convolution, from ReduceNet's own to those of the literature."""

from growshrink.branches.bottleneck import Bottleneck as Bottleneck
from growshrink.branches.bottleneck import Insert as Insert
from growshrink.branches.bottleneck import Nest as Nest
from growshrink.branches.chains import ExpandNet as ExpandNet
from growshrink.branches.chains import ExpandNetStack as ExpandNetStack
from growshrink.branches.chains import LowRank as LowRank
from growshrink.branches.chains import PointwiseAverage as PointwiseAverage
from growshrink.branches.chains import PointwiseConv as PointwiseConv
from growshrink.branches.implicit import Implicit as Implicit
from growshrink.branches.kernels import Mixture as Mixture
from growshrink.branches.kernels import Orepa as Orepa
from growshrink.branches.published import OwnNorm as OwnNorm
from growshrink.branches.small import Copy as Copy
from growshrink.branches.small import Horizontal as Horizontal
from growshrink.branches.small import Identity as Identity
from growshrink.branches.small import Pointwise as Pointwise
from growshrink.branches.small import Vertical as Vertical
from growshrink.branches.spec import PRESETS as PRESETS
from growshrink.branches.spec import BranchSpec as BranchSpec
from growshrink.branches.spec import check_ratio as check_ratio
from growshrink.branches.spec import format_skipped as format_skipped
from growshrink.layers.branch import Branch as Branch
from growshrink.layers.branch import middle_width as middle_width
