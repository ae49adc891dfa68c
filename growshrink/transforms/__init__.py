"""Model -> model: grow, drop, fuse, fold, unroll."""

from growshrink.transforms._files import load_grown as load_grown
from growshrink.transforms._files import save_grown as save_grown
from growshrink.transforms._fold import fold as fold
from growshrink.transforms._fold import fold_report as fold_report
from growshrink.transforms._fuse import fuse as fuse
from growshrink.transforms._grow import INITS as INITS
from growshrink.transforms._grow import GrowthReport as GrowthReport
from growshrink.transforms._grow import branch_specs as branch_specs
from growshrink.transforms._grow import drop as drop
from growshrink.transforms._grow import grow as grow
from growshrink.transforms._grow import growth_report as growth_report
from growshrink.transforms._online import CollapseReport as CollapseReport
from growshrink.transforms._online import collapse_online as collapse_online
from growshrink.transforms._online import collapse_report as collapse_report
from growshrink.transforms._unroll import unroll as unroll
