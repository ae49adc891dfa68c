"""A run in progress: what its phases and exits work on, and when it saves itself."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.config import to_dict
from growshrink.base.copying import copy_net
from growshrink.base.ranks import any_rank, num_ranks, run_on_rank0, this_rank
from growshrink.base.stopping import Stopped, finishing
from growshrink.cycle.augmented import Augmentation, save_net
from growshrink.cycle.journal import Journal
from growshrink.cycle.records import Change, Grew, RoundRecord, Row, RunState, plain_net, replay
from growshrink.cycle.surgery import set_values, snapshot, values_of
from growshrink.cycle.teaching import Lessons, Teaching
from growshrink.data.feed import Feed
from growshrink.errors import DivergedError, PlanError
from growshrink.layers.grown import grown_modules
from growshrink.proofs import Profile
from growshrink.proofs._profile import profile, training_macs
from growshrink.runs.checkpoints import find_checkpoints, save_checkpoint
from growshrink.runs.folder import RunFolder
from growshrink.schedules import Schedule
from growshrink.schedules.closed_loop import LamControl
from growshrink.training import Score, TrainConfig, Trainer, evaluate
from growshrink.training._evaluate import Loss
from growshrink.training.distil import TeacherNet

#: Updates between two questions whether some rank was asked to stop, where asking means to wait for the device.
_PATIENCE = 10


class Saving(ExitStack):
    """A context manager: inside it the first SIGTERM or Ctrl-C of a program is only noted, for `due` to tell.

    A checkpoint is due `every` so many updates (None: no more than there are anyway), and `keep` of them are kept; the
    ranks meet on `device`, where the run trains.
    """

    def __init__(self, every: int | None, keep: int, device: torch.device) -> None:
        super().__init__()
        for name, number in (("save_every", every), ("keep", keep)):
            if number is not None and number < 1:
                raise PlanError(f"{name}={number!r}: must be at least 1.")
        self.keep, self.device, self._every, self._asked = keep, device, every, False

    def __enter__(self) -> Saving:
        super().__enter__()
        self._came = self.enter_context(finishing())
        return self

    def due(self, update: int) -> bool:
        """Whether to save after `update` updates; must be called on every rank; all get the same answer."""
        if num_ranks() == 1 or self.device.type == "cpu" or update % _PATIENCE == 0:
            self._asked = self._asked or any_rank(self._came() is not None, self.device)
        return self._asked or bool(self._every and update % self._every == 0)

    def leave_if_asked(self, where: str) -> None:
        """Raise `Stopped`, if `due` said so for that reason."""
        if self._asked:
            number = self._came() or signal.SIGTERM  # it was another rank that was asked
            raise Stopped(number, f"stopped by {signal.Signals(number).name} {where}")


@dataclass(frozen=True)
class NetCost:
    """A net, the MACs of an image forward and backward, and its size, counted on the meta device."""

    net: nn.Module
    train: int
    size: Profile

    @staticmethod
    def of(net: nn.Module, input_size: InputSize, batch_size: int) -> NetCost:
        """Count it."""
        return NetCost(net, training_macs(net, input_size, batch_size), profile(net, input_size))

    @property
    def forward(self) -> int:
        """MACs of an image forward."""
        return self.size.macs


@dataclass(eq=False, kw_only=True)
class Run:
    """What the phases of a run change, and what they need for it.

    Attributes:
        initial: The model as `run_cycle` was given it, `model_about` what it was given of how to make it.
        loss: See `run_cycle`.
        learning_rate: Factor on the config's rate, by update.
        total: Updates of the whole run.
        identity: Everything that the result depends on; the run is resumed with the same only.
        phase: Number of the phase that the next update belongs to.
        augmentation: The sampled widths of the present phase, or None.
        before: A snapshot, in a round that may return to where it began.
        teachers: Nets of `teacher_nets`.
    """

    initial: nn.Module
    feed: Feed
    loss: Loss | None = None
    config: TrainConfig
    folder: RunFolder
    saving: Saving
    progress: InitVar[bool]
    tensorboard: InitVar[bool]
    learning_rate: Schedule
    lam: LamControl
    model_about: Mapping[str, Any]
    num_rounds: int
    total: int
    identity: Mapping[str, Any]
    phase: int = 0
    state: RunState = field(default_factory=RunState)
    augmentation: Augmentation | None = None
    before: Mapping[str, Any] | None = None
    teachers: Mapping[int, nn.Module] = field(default_factory=dict)
    _augmented_for: object = None
    _cost: int | None = None  # MACs of the present structure, see macs

    def __post_init__(self, progress: bool, tensorboard: bool) -> None:
        self.initial = copy_net(self.initial)
        self.size, self.device = self.feed.input_size, self.saving.device
        self.images_per_update = self.feed.train.batch_size * num_ranks()
        self.teaching = Teaching(self.size, self.folder.path)
        self.trainer = self.make_trainer(self.initial)
        self.journal = Journal(self.folder.path, self.total, progress=progress, tensorboard=tensorboard)

    # ---- structure

    @cached_property
    def plain(self) -> NetCost:
        """The plain net, as the run began with it, and what it costs."""
        return NetCost.of(plain_net(self.initial, self.size), self.size, self.feed.train.batch_size)

    @property
    def record(self) -> RoundRecord:
        """Record of the present round."""
        return self.state.rounds[-1]

    @property
    def grew(self) -> Grew:
        """The last growth."""
        return next(change for change in reversed(self.state.log) if isinstance(change, Grew))

    def make_trainer(self, model: nn.Module) -> Trainer:
        """Trainer of a copy of `model`, on the run's device."""
        return Trainer(self.placed(copy_net(model)), self.config, self.feed.train, self.loss)

    def placed(self, model: nn.Module) -> nn.Module:
        """`model` on the run's device and in its memory format."""
        return model.to(self.device).to(memory_format=torch.channels_last)

    def changed(self, change: Change) -> None:
        """Log a change of structure that has just been made."""
        self.state.log.append(change)
        self._cost = None

    def remember(self) -> None:
        """Keep what the round may have to go back to."""
        self.before = snapshot(self.trainer)

    def train_instead(self, model: nn.Module) -> None:
        """Train a copy of `model` from now on."""
        update = self.trainer.update
        self.trainer, self._cost = self.make_trainer(model), None
        self.trainer.update = update

    def go_back(self) -> None:
        """Restore what was remembered, in the structure of the log, bit for bit; the updates count on."""
        assert self.before is not None
        self.train_instead(replay(self.initial, self.state.log, self.size))
        set_values(self.trainer, self.before)
        self.before = None

    def set_teacher(self, net: nn.Module | None, *, of_the_run: bool = True) -> None:
        """A copy of `net` teaches from now on, in the structure of the log or of `teachers`; None ends the teaching."""
        self.teaching.set_teacher(net)
        self.state.teacher_log = len(self.state.log) if net is not None and of_the_run else None

    def augment(self, key: object, make: Callable[[], Augmentation] | None) -> None:
        """Sample widths from now on, or (None) no more; what was made for the same `key`, round and teacher, stays."""
        if make is not None and key == self._augmented_for:
            return
        if self.augmentation is not None:
            self.augmentation.task.detach()
        self.augmentation = None if make is None else make()
        self._augmented_for = None if make is None else key

    def save_supernet(self, name: str) -> None:
        """Write the grown net for the tools, named by its round where there are several."""
        file = f"{name}-{self.grew.round}.safetensors" if self.num_rounds > 1 else f"{name}.safetensors"
        save_net(self.folder.path / file, self.trainer.best, self.model_about, self.grew, self.size)

    # ---- scores and costs

    def score(self, model: nn.Module | None = None) -> Score:
        """Score of a net, by default the one to judge, on the val split."""
        return run_on_rank0(lambda: evaluate(model or self.trainer.best, self.feed.val, self.loss))

    def top1(self, model: nn.Module | None = None) -> float:
        """What the config's metric makes of `score`, in percent."""
        return float(getattr(self.score(model), self.config.metric))

    def macs(self, lessons: Lessons | None, start: int, stop: int) -> int:
        """MACs of an image in each of these updates: forward and backward of the present graph, teacher's forward."""
        if self.augmentation is not None:
            return self.augmentation.cost.total(start, stop)
        if self._cost is None:
            self._cost = training_macs(self.trainer.model, self.size, self.feed.train.batch_size)
        return (stop - start) * self._cost + self.teaching.macs(lessons, start, stop)

    def add_row(self, number: int, phase: str, start: int, loss: float, seconds: float) -> None:
        """Score the net and log the updates since `start`."""
        trainer, last = self.trainer, self.trainer.update - 1
        score = self.score(trainer.best if self.augmentation is None else self.augmentation.judged(trainer))
        row = Row(
            update=trainer.update,
            epoch=trainer.update / self.feed.train.updates_per_epoch,
            round=number,
            phase=phase,
            train_loss=loss,
            val_top1=score.top1,
            val_loss=score.loss,
            lr=self.config.lr * self.learning_rate(last),
            lam=self.lam(last) if grown_modules(trainer.model) else None,
            training_macs=self.state.macs_spent,
            images_per_second=(trainer.update - start) * self.images_per_update / seconds,
            seconds=self.state.seconds,
        )
        self.state.history.append(row)
        self.journal.add(row)

    def end_round(self) -> None:
        """Complete the record of the round and let its teacher go."""
        record = self.record
        record.top1.end = self.top1()
        record.training_macs = self.state.macs_spent - record.macs_before
        self.set_teacher(None)
        self.journal.end_round(record)

    # ---- training

    def train_until(self, stop: int, teacher: TeacherNet | None) -> float:
        """Do updates until `stop`, or until it is time to save; returns their mean loss."""
        loss = self.trainer.train(
            stop,
            learning_rate=self.learning_rate,
            lam=self.lam,
            teacher=teacher,
            task=self.augmentation.task if self.augmentation is not None else None,
            on_loss=self.lam.observe,
            after_update=self.journal.updated,
            stop_early=lambda: self.saving.due(self.trainer.update),
        )
        return float(loss)

    def check_finite(self, loss: float, where: str, start: int, advice: str) -> None:
        """Raise DivergedError if the mean loss of the updates since `start`, or a weight after them, is not finite.

        To be called before every checkpoint, so that all of them are of a sound net. Waits for the device.
        """
        found = find_not_finite(self.trainer) if math.isfinite(loss) else f"the loss is {loss}"
        if found is None:
            return
        kept = find_checkpoints(self.folder.path)
        raise DivergedError(
            f"{found} in {where}, between updates {start} and {self.trainer.update}. "
            f"{f'{kept[0]} is kept' if kept else 'There is no checkpoint yet'}. The same run would end here again: "
            f"start another, with {advice}{', or without amp' if self.config.amp else ''}."
        )

    def checkpoint(self) -> None:
        """Save all that the updates still to come depend on (rank 0 writes it), and stop if a signal asked for it."""
        trainer, update = self.trainer, self.trainer.update
        self.state.lam = self.lam.state_dict()
        values: dict[str, Any] = {"update": update, "next_phase": self.phase, "run": to_dict(self.state)}
        values |= {"identity": self.identity, **values_of(trainer)}
        if trainer.cut_short is not None:
            values["cut_short"] = list(trainer.cut_short)
        if self.teaching.net is not None:
            values["teacher"] = self.teaching.net.state_dict()
        if self.before is not None:
            values["before"] = self.before
        if this_rank() == 0:
            save_checkpoint(self.folder.path, update, values, self.saving.keep)
        if update < self.total:
            self.saving.leave_if_asked(f"after update {update} of {self.total}, saved in {self.folder.path}")


def find_not_finite(trainer: Trainer) -> str | None:
    """Say which tensor of the nets or the optimizer has a NaN or an infinity in it; None if none has.

    Buffers may be infinite (masks are), parameters and what the optimizer keeps may not.
    """
    named: dict[str, Tensor] = dict(trainer.model.named_parameters())
    average = trainer.ema or nn.Module()
    named |= {f"{name} of the average": parameter for name, parameter in average.named_parameters()}
    for name, values in trainer.optimizer_state().items():
        named |= {f"the optimizer's {key} of {name}": v for key, v in values.items() if isinstance(v, Tensor)}
    named = {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}
    device = next(trainer.model.parameters()).device
    finite = torch.stack([torch.isfinite(tensor.detach()).all().to(device) for tensor in named.values()])
    return None if finite.all() else f"{[*named][int(finite.int().argmin())]} is not finite"
