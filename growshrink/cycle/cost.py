"""What a plan will cost, before anything is trained: so that runs can be given equal budgets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.cycle.augmented import Augmentation
from growshrink.cycle.log import replay
from growshrink.cycle.plan import CyclePlan, RoundPlan
from growshrink.cycle.timeline import Timeline
from growshrink.data.feed import UpdateBatches
from growshrink.layers.activations import set_lambda
from growshrink.layers.grown import grown_modules
from growshrink.proofs._profile import profile, training_macs
from growshrink.training.distil import Teacher
from growshrink.training.trainer import TrainConfig, Trainer
from growshrink.transforms import collapse_online, collapse_report, grow


class PlanCost:
    """MACs that training a model by a plan will take: forward and backward of the graphs that are run, and teachers.

    The structures are made once; timelines of any length are then counted at once.

    Args:
        model: As it would be given to `run_cycle`.
        plan: Its rounds; their lengths do not matter.
        batches: Of the run; only their size is looked at.
        input_size: `(C, H, W)`.
    """

    def __init__(self, model: nn.Module, plan: CyclePlan, batches: UpdateBatches, input_size: InputSize) -> None:
        self._batches = batches
        self._size = input_size
        self._born_grown = bool(grown_modules(model))
        plain = replay(model, [{"op": "fuse"}], input_size)
        self._first = self._net(model)
        self._plain = self._net(plain)
        made: dict[tuple[object, ...], _Net] = {}
        self._grown: list[_Net] = []
        for number, entry in enumerate(plan.rounds):
            key = (number == 0 and self._born_grown, entry.branch, entry.ratio, entry.where)
            if key not in made:
                made[key] = self._first
                if not key[0]:
                    grown = grow(plain, entry.branch, ratio=entry.ratio, where=entry.where, input_size=input_size)
                    made[key] = self._net(grown)
            self._grown.append(made[key])

    def macs(self, timeline: Timeline) -> int:
        """Exactly what `run_cycle` reports as `training_macs` of such a run afterwards."""
        total = 0
        for segment in timeline.segments:
            updates = segment.stop - segment.start
            if not segment.round:
                total += updates * self._first.train
                continue
            plan, grown = timeline.plan.rounds[segment.round - 1], self._grown[segment.round - 1]
            teacher = None
            if segment.phase != "hold" and plan.distil != "none":
                teacher = grown if plan.distil == "peak" else self._plain
                if plan.distil == "previous" and segment.round == 1:
                    teacher = self._first
            asked = timeline.asked(segment, segment.start, segment.stop)
            answers = asked * teacher.forward if teacher else 0
            if segment.grown and plan.online:
                total += updates * self._online(grown, timeline.lam(segment.start)) + answers
            elif segment.grown and plan.augment != "none":
                total += self._augmented(grown, plan, timeline, segment.round, teacher)(segment.start, segment.stop)
            else:
                own = grown.train if segment.grown else self._plain.train
                total += updates * own + answers
        return self._batches.batch_size * total

    def _augmented(
        self, grown: _Net, plan: RoundPlan, timeline: Timeline, number: int, teacher: _Net | None
    ) -> Callable[[int, int], int]:
        trainer = Trainer(copy.deepcopy(grown.net), TrainConfig(ema_decay=0.0), self._batches)
        augmentation = Augmentation(
            trainer,
            plan,
            lam=timeline.lam,
            seed=timeline.plan.seed + number,
            teacher=Teacher(copy.deepcopy(teacher.net), 0.5, 1.0) if teacher else None,  # it is frozen
            input_size=self._size,
        )
        augmentation.task.detach()
        return augmentation.macs

    def _online(self, grown: _Net, lam: float) -> int:
        """An update while the branches that are linear at `lam`, where the phase begins, run merged."""
        net = copy.deepcopy(grown.net)
        set_lambda(net, lam)
        if any(row.merged for row in collapse_report(net).rows):
            collapse_online(net, choose="always", inplace=True)
        return training_macs(net, self._size, self._batches.batch_size)

    def _net(self, net: nn.Module) -> _Net:
        return _Net(net, training_macs(net, self._size), profile(net, self._size).macs)


@dataclass(frozen=True)
class _Net:
    """A structure, and the MACs of an image: forward and backward, and forward alone."""

    net: nn.Module
    train: int
    forward: int
