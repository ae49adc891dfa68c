"""What a plan will cost, before anything is trained: so that runs can be given equal budgets."""

from __future__ import annotations

import copy

from torch import nn

from growshrink.activations import set_lambda
from growshrink.compare import profile, training_macs
from growshrink.cycle.augmented import Augmentation
from growshrink.cycle.plan import Timeline
from growshrink.cycle.surgery import grow_nets
from growshrink.dataflow import InputSize
from growshrink.grown import grown_modules
from growshrink.training.feed import UpdateBatches
from growshrink.training.trainer import Teacher, TrainConfig, Trainer
from growshrink.transforms import drop, fuse
from growshrink.widths import active_width, set_width, width_space


def planned_macs(model: nn.Module, timeline: Timeline, batches: UpdateBatches, input_size: InputSize) -> int:
    """MACs that training `model` by a plan will take: forward and backward of the graphs that are run, and teachers.

    Exactly what `run_cycle` reports as `training_macs` afterwards. The structure of every phase is made on a copy.

    Args:
        model: As it would be given to `run_cycle`.
        timeline: The plan in updates.
        batches: Of the run; only their size is looked at.
        input_size: `(C, H, W)`.
    """
    trainer = Trainer(copy.deepcopy(model), TrainConfig(ema_decay=0.0), batches)
    total, teacher = 0, None
    for segment in timeline.segments:
        plan = timeline.plan.rounds[segment.round - 1] if segment.round else None
        if plan is not None and segment.phase == "hold":
            teacher = copy.deepcopy(trainer.model) if plan.distil == "previous" else None
            if not grown_modules(trainer.model):
                grow_nets(trainer, plan, timeline.plan.seed, input_size)
        learnt_from = teacher if segment.phase not in ("base", "hold") else None
        updates = segment.stop - segment.start
        if plan is not None and plan.augment != "none" and segment.grown:
            augmentation = Augmentation(
                trainer,
                plan,
                lam=timeline.lam,
                seed=timeline.plan.seed + segment.round,
                teacher=Teacher(learnt_from, 0.5, 1.0) if learnt_from is not None else None,
                input_size=input_size,
            )
            macs = augmentation.macs(segment.start, segment.stop)
            augmentation.task.detach()
        else:
            forward = profile(learnt_from, input_size).macs if learnt_from is not None else 0
            macs = updates * (training_macs(trainer.model, input_size) + forward)
        total += batches.batch_size * macs
        if plan is None:
            continue
        if segment.phase == "hold" and plan.distil == "peak":
            with active_width(trainer.model, width_space(trainer.model).full):
                teacher = copy.deepcopy(trainer.model)
        if timeline.last_grown(segment):
            if plan.exit in ("drop", "teach"):
                drop(trainer.model, inplace=True)
            else:
                set_width(trainer.model, width_space(trainer.model).full)
                set_lambda(trainer.model, 0.0)
                fuse(trainer.model, inplace=True, input_size=input_size)
            trainer.structure_changed()
    return total
