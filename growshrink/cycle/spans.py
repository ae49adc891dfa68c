"""A round laid out in updates."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.cycle.costs import Costs, NetCost
from growshrink.cycle.plan import Round
from growshrink.cycle.running import Run
from growshrink.cycle.teaching import Lessons
from growshrink.schedules import Schedule, hold_then_vanish, linear
from growshrink.supernet import NetAugTask
from growshrink.supernet.cost import StepCost
from growshrink.training.distil import TeacherNet


@dataclass(frozen=True)
class RoundSpan:
    """A round in updates.

    Attributes:
        number: From 1.
        plan: The round.
        seed: Of the run; rounds draw other weights and widths from it.
        start: Its first update, when the net grows.
        hold_stop: The update with which lam begins to fall.
        vanish_stop: The first update with lam 0.
        grown_stop: The first update without branches.
        stop: The first update after the round.
        lessons: When a teacher is asked, or None.
    """

    number: int
    plan: Round
    seed: int
    start: int
    hold_stop: int
    vanish_stop: int
    grown_stop: int
    stop: int
    lessons: Lessons | None

    @property
    def tail_share(self) -> float:
        """Share of the round's updates that train the plain net."""
        return (self.stop - self.grown_stop) / (self.stop - self.start)

    def lam(self, update: int) -> float:
        """Lam by the plan's schedule."""
        if self.plan.linear:
            return 0.0
        hold, vanish = self.hold_stop - self.start, self.vanish_stop - self.hold_stop
        rise = linear(0.0, 1.0, steps=round(self.plan.rise * (self.stop - self.start)))
        return min(rise(update - self.start), hold_then_vanish(hold, vanish)(update - self.start))

    def sampling(self, net: nn.Module, run: Run, teacher: TeacherNet | None) -> NetAugTask:
        """What samples the widths of a grown net in training."""
        return self._task(net, run.lam, run.config.label_smoothing, teacher, run.size)

    def sampling_costs(self, costs: Costs, grown: NetCost, teacher: NetCost | None) -> StepCost:
        """What its updates cost."""
        taught = TeacherNet(copy.deepcopy(teacher.net), 0.5, 1.0) if teacher is not None else None  # it is frozen
        task = self._task(copy.deepcopy(grown.net), self.lam, 0.0, taught, costs.input_size)
        return StepCost(task, costs.input_size)

    def _task(
        self,
        net: nn.Module,
        lam: Schedule,
        label_smoothing: float,
        teacher: TeacherNet | None,
        input_size: InputSize,
    ) -> NetAugTask:
        assert self.plan.widths is not None
        return self.plan.widths.task(
            net,
            lam=lam if self.plan.exit.fades else None,
            seed=self.seed + self.number,
            label_smoothing=label_smoothing,
            teacher=teacher,
            input_size=input_size,
        )
