"""A round laid out in updates."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.copying import copy_net
from growshrink.cycle.costs import Costs
from growshrink.cycle.plan import Round
from growshrink.cycle.running import NetCost
from growshrink.cycle.teaching import Lessons
from growshrink.layers.widths import width_space
from growshrink.schedules import Schedule, hold_then_vanish, linear
from growshrink.supernet import NetAugTask
from growshrink.supernet.cost import StepCost
from growshrink.supernet.passes import default_alpha
from growshrink.training.distil import TeacherNet


@dataclass(frozen=True)
class RoundSpan:
    """A round in updates.

    Attributes:
        number: From 1.
        seed: Seed of the run; rounds draw other weights and widths from it.
        begin: Its first update; those before `start`, when the run's own net grows, train its teacher.
        hold_stop: The update with which lam begins to fall.
        vanish_stop: The first update with lam 0.
        grown_stop: The first update without branches.
        stop: The first update after the round.
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

    def sampling(
        self, net: nn.Module, lam: Schedule, input_size: InputSize, smoothing: float, teacher: TeacherNet | None
    ) -> NetAugTask:
        """What computes loss and gradients of a grown net whose widths are sampled; `teacher` teaches its base net."""
        widths, fades = self.plan.widths, self.plan.exit.fades
        assert widths is not None
        alpha = default_alpha(widths.mode) if widths.alpha is None else widths.alpha
        taught: dict[str, Any] = {}
        if teacher is not None:
            taught = {"teacher_weight": teacher.weight, "teacher_temperature": teacher.temperature}
        return NetAugTask(
            net,
            nn.CrossEntropyLoss(label_smoothing=smoothing),
            verbose=False,
            space=width_space(net),
            mode=widths.mode,
            alpha=(lambda update: alpha * lam(update)) if fades else alpha,
            inplace_distil=widths.inplace_distil,
            seed=self.seed + self.number,
            input_size=input_size,
            teacher=None if teacher is None else teacher.model,
            **taught,
        )

    def sampling_costs(self, costs: Costs, grown: NetCost, teacher: NetCost | None) -> StepCost:
        """What its updates cost."""
        taught = TeacherNet(copy_net(teacher.net), 0.5, 1.0) if teacher is not None else None  # it is frozen
        task = self.sampling(copy_net(grown.net), self.lam, costs.input_size, 0.0, taught)
        return StepCost(task, costs.input_size)
