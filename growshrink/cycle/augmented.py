"""A round whose middle widths are sampled: NetAug in the place of plain training, and the ways out of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.ranks import this_rank
from growshrink.cycle.plan import RoundPlan
from growshrink.cycle.timeline import Segment, Timeline
from growshrink.layers.widths import Width, WidthSpace, set_width, width_space
from growshrink.schedules.functions import Schedule
from growshrink.supernet import NetAugTask, choose_width, default_candidates, save_supernet
from growshrink.supernet.cost import StepCost
from growshrink.supernet.passes import NUM_AUGMENTED, default_alpha
from growshrink.training.calibrate import calibrate_bn
from growshrink.training.distil import Teacher
from growshrink.training.trainer import Trainer

#: Batches that batch norm statistics of a wider net are taken from.
CALIBRATION_BATCHES = 20


class Augmentation:
    """The sampled widths of a round, for as long as the structure and the teacher stay as they are.

    Attributes:
        task: What computes the gradients.
        space: The widths it draws from.
    """

    def __init__(
        self,
        trainer: Trainer,
        plan: RoundPlan,
        *,
        lam: Schedule,
        seed: int,
        teacher: Teacher | None,
        input_size: InputSize,
    ) -> None:
        self.space = width_space(trainer.model)
        # Dropped at its end, the round fades its branches out with lam; fused, it trains them to the end.
        alpha = default_alpha(plan.augment) if plan.alpha is None else plan.alpha
        distilled: dict[str, Any] = {}
        if teacher is not None:
            distilled = {
                "teacher": teacher.model,
                "teacher_weight": teacher.weight,
                "teacher_temperature": teacher.temperature,
            }
        self.task = NetAugTask(
            trainer.model,
            nn.CrossEntropyLoss(label_smoothing=trainer.config.label_smoothing),
            verbose=False,
            space=self.space,
            mode=plan.augment,
            alpha=(lambda update: alpha * lam(update)) if plan.exit == "drop" else alpha,
            inplace_distil=plan.inplace_distil,
            seed=seed,
            input_size=input_size,
            **distilled,
        )
        self.task.attach(trainer.optimizer)
        if trainer.ema is not None:
            set_width(trainer.ema, self.space.base)
        self._cost = StepCost(self.task, input_size)

    def describe(self, start: int, stop: int) -> dict[str, Any]:
        """What the round's record says of it; `step_macs` is of an average update of `start` to `stop`, an image."""
        task = self.task
        return {
            "mode": task.mode,
            "every": task.every,
            "inplace_distil": task.inplace_distil,
            "nets": self.space.size,
            "step_macs": self._cost.mean(start, stop),
        }

    def macs(self, start: int, stop: int) -> int:
        """MACs an image of the updates from `start` to `stop`, all passes and the teacher's."""
        return self._cost.total(start, stop)

    def full_net(self, trainer: Trainer) -> nn.Module:
        """A copy of the net to be judged, at full width, with statistics of its own."""
        return _recalibrated(trainer, self.space.full)

    def leave(
        self, trainer: Trainer, plan: RoundPlan, score: Callable[[nn.Module], float], input_size: InputSize
    ) -> dict[str, Any]:
        """Set all nets to the width that the plan's exit asks for, ready to be fused; returns the record of it."""
        base, width, record = self.space.base, self.space.full, {}
        batches = [] if plan.exit == "drop" else list(trainer.recent_images(CALIBRATION_BATCHES))
        if plan.exit == "drop":
            width = base
        elif plan.exit == "choose":
            choice = choose_width(
                trainer.best,
                default_candidates(self.space),
                batches=batches,
                score=score,
                keep_statistics=base,
                input_size=input_size,
            )
            width = choice.width
            record["candidates"] = [{"width": _name(c.width, self.space), "top1": c.score} for c in choice.candidates]
        for net in trainer.nets:
            set_width(net, width)
            if width != base:
                calibrate_bn(net, batches)
        return {**record, "exit": plan.exit, "width": _name(width, self.space)}


class Augmentations:
    """The augmentation of whatever phase the run is in: kept while the round and its teacher stay, made anew after."""

    def __init__(self, timeline: Timeline, input_size: InputSize) -> None:
        self._timeline = timeline
        self._size = input_size
        self._now: tuple[tuple[int, bool], Augmentation] | None = None

    def of(self, segment: Segment, trainer: Trainer, teacher: Teacher | None) -> Augmentation | None:
        """The augmentation of a phase; None where widths are not sampled."""
        plan = self._timeline.plan.rounds[segment.round - 1] if segment.grown else None
        if plan is None or plan.augment == "none":
            return None
        key = (segment.round, teacher is not None)
        if self._now is None or self._now[0] != key:
            self.close()
            seed = self._timeline.plan.seed + segment.round
            made = Augmentation(
                trainer, plan, lam=self._timeline.lam, seed=seed, teacher=teacher, input_size=self._size
            )
            self._now = (key, made)
        return self._now[1]

    def judged(self, trainer: Trainer) -> nn.Module:
        """The net to score while training: the one to judge, with statistics of its own where no update has any."""
        if self._now is None or NUM_AUGMENTED[self._now[1].task.mode]:
            return trainer.best
        return _recalibrated(trainer, self._now[1].space.base)  # `single` trains no base net

    def close(self) -> None:
        """Let go of the optimizer."""
        if self._now is not None:
            self._now[1].task.detach()
        self._now = None


def _recalibrated(trainer: Trainer, width: Width) -> nn.Module:
    """A copy of the net to be judged at `width`, with statistics of its own."""
    net = copy.deepcopy(trainer.best)
    set_width(net, width)
    calibrate_bn(net, trainer.recent_images(CALIBRATION_BATCHES))
    return net


def save_net(
    path: Path, model: nn.Module, model_about: Mapping[str, Any], grown: Mapping[str, Any], input_size: InputSize
) -> None:
    """Write a supernet of the run, if it is known how to make its model.

    Args:
        path: The file.
        model: The grown net.
        model_about: What the run was told of its model: name and kwargs, and those of the plain net.
        grown: The entry of the growth log that made it.
        input_size: `(C, H, W)`.
    """
    if "name" not in model_about or this_rank() > 0:
        return
    about: dict[str, Any] = {"input_size": list(input_size)}
    if grown["names"]:
        about["name"], about["kwargs"] = model_about["plain_name"], model_about["plain_kwargs"]
        about["grow"] = {
            "branch": [branch["kind"] for branch in grown["branches"]],
            "ratio": grown["branches"][0]["ratio"],
            "where": grown["names"],
            "seed": grown["seed"],
        }
    else:
        about["name"], about["kwargs"], about["grow"] = model_about["name"], model_about["kwargs"], None
    save_supernet(path, model, width_space(model), about)


def _name(width: Width, space: WidthSpace) -> str | dict[str, int]:
    for index in (0, *range(space.diversity, 0, -1)):  # a space of few choices has equal levels
        if width == space.level(index / space.diversity):
            return {0: "base", space.diversity: "full"}.get(index, f"level {index} of {space.diversity}")
    return dict(width)
