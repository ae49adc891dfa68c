"""Rounds of grow -> train -> vanish -> exit -> train: plan, phases, run, record."""

from growshrink.cycle.augmented import NetAug as NetAug
from growshrink.cycle.exits import Choose as Choose
from growshrink.cycle.exits import Drop as Drop
from growshrink.cycle.exits import Exit as Exit
from growshrink.cycle.exits import Fuse as Fuse
from growshrink.cycle.exits import Rewind as Rewind
from growshrink.cycle.gradients import FromBranches as FromBranches
from growshrink.cycle.gradients import FromPixels as FromPixels
from growshrink.cycle.gradients import MapSource as MapSource
from growshrink.cycle.layout import Phases as Phases
from growshrink.cycle.layout import lay_out as lay_out
from growshrink.cycle.plan import CyclePlan as CyclePlan
from growshrink.cycle.plan import Round as Round
from growshrink.cycle.result import CycleResult as CycleResult
from growshrink.cycle.run import run_cycle as run_cycle
from growshrink.cycle.teaching import Teacher as Teacher
