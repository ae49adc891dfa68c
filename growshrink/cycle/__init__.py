"""Rounds of grow -> train -> vanish -> fuse -> train: plan, execution, record."""

from growshrink.cycle.plan import CyclePlan as CyclePlan
from growshrink.cycle.plan import RoundPlan as RoundPlan
from growshrink.cycle.result import CycleResult as CycleResult
from growshrink.cycle.run import run_cycle as run_cycle
from growshrink.cycle.timeline import Timeline as Timeline
