"""A round laid out in updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from growshrink.base.copying import copy_net
from growshrink.cycle.costs import Costs, NetCost
from growshrink.cycle.plan import Round
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
        begin: Its first update; those before `start` train its teacher.
        start: The first update of the run's own net, when it grows.
        hold_stop: The update with which lam begins to fall.
        vanish_stop: The first update with lam 0.
        grown_stop: The first update without branches.
        stop: The first update after the round.
        lessons: When a teacher is asked, or None.
    """

    number: int
    plan: Round
    seed: int
    begin: int
    start: int
    hold_stop: int
    vanish_stop: int
    grown_stop: int
    stop: int
    lessons: Lessons | None

    @property
    def tail_share(self) -> float:
        """Share of the updates of the round, its teacher's excepted, that train the plain net."""
        return (self.stop - self.grown_stop) / (self.stop - self.start)

    def lam(self, update: int) -> float:
        """Lam by the plan's schedule; a teacher in training keeps its activations."""
        if update < self.start:
            return 1.0
        if self.plan.linear or not self.plan.branch:
            return 0.0
        hold, vanish = self.hold_stop - self.start, self.vanish_stop - self.hold_stop
        rise = linear(0.0, 1.0, steps=round(self.plan.rise * (self.stop - self.start)))
        return min(rise(update - self.start), hold_then_vanish(hold, vanish)(update - self.start))

    def sampling(self, net: nn.Module, lam: Schedule, **values: Any) -> NetAugTask:
        """What samples the widths of a grown net in training; `values` are arguments of `NetAug.task`."""
        assert self.plan.widths is not None
        fading = lam if self.plan.exit.fades else None
        return self.plan.widths.task(net, lam=fading, seed=self.seed + self.number, **values)

    def sampling_costs(self, costs: Costs, grown: NetCost, teacher: NetCost | None) -> StepCost:
        """What its updates cost."""
        taught = TeacherNet(copy_net(teacher.net), 0.5, 1.0) if teacher is not None else None  # it is frozen
        values: dict[str, Any] = {"label_smoothing": 0.0, "teacher": taught, "input_size": costs.input_size}
        return StepCost(self.sampling(copy_net(grown.net), self.lam, **values), costs.input_size)
