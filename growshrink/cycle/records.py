"""What a run writes down: the changes of structure, rows of the log, and a record for each round.

All are plain values, taken to JSON and back by `growshrink.base.config`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.config import Variant
from growshrink.base.copying import copy_net
from growshrink.branches import BranchSpec
from growshrink.errors import RunError
from growshrink.layers.activations import set_lambda
from growshrink.layers.grown import grown_modules
from growshrink.transforms import collapse_online, fuse, grow


@dataclass(frozen=True, kw_only=True)
class Change(Variant):
    """A change of structure before update number `update`, in round number `round`: enough to make it again."""

    update: int = 0
    round: int = 0

    def apply(self, model: nn.Module, plain: nn.Module, input_size: InputSize) -> nn.Module:
        """`model`, as the changes before have left it, after this one, perhaps in place; the run began with `plain`."""
        return model


@dataclass(frozen=True, kw_only=True)
class Grew(Change, kind="grow"):
    """Branches of these kinds and this ratio were attached to the layers `names` (none in a net that had its own).

    `shapes` are those of every parameter of every grown module afterwards, by dotted name.
    """

    branches: list[str] = field(default_factory=list)
    ratio: float = 2.0
    names: list[str] = field(default_factory=list)
    init: str = "silent"
    seed: int = 0
    guide: str | None = None
    shapes: dict[str, list[int]] = field(default_factory=dict)

    def grow(self, model: nn.Module, input_size: InputSize, where: str | None = None) -> None:
        """Grow a plain net in place; again by exact names, so that nothing is decided twice."""
        specs = [BranchSpec(kind=kind, ratio=self.ratio) for kind in self.branches]
        options: dict[str, Any] = {"where": self.names or where, "init": self.init, "seed": self.seed}
        grow(model, specs, **options, guide=self.guide, inplace=True, input_size=input_size)

    def apply(self, model: nn.Module, plain: nn.Module, input_size: InputSize) -> nn.Module:
        if self.names:
            self.grow(model, input_size)
        if shapes_of(model) != self.shapes:
            raise RunError("the growth log is of another model: its shapes differ.")
        return model


@dataclass(frozen=True, kw_only=True)
class Collapsed(Change, kind="collapse"):
    """Branches that are linear at `lam` became part of their layers' kernels, for training."""

    lam: float
    names: list[str]

    def apply(self, model: nn.Module, plain: nn.Module, input_size: InputSize) -> nn.Module:
        set_lambda(model, self.lam)
        return collapse_online(model, choose=self.names, inplace=True)


@dataclass(frozen=True, kw_only=True)
class Fused(Change, kind="fuse"):
    """The branches were merged; `max_rel` and `effect` as in `Merged`."""

    max_rel: float = 0.0
    effect: float = 0.0

    def apply(self, model: nn.Module, plain: nn.Module, input_size: InputSize) -> nn.Module:
        set_lambda(model, 0.0)
        return fuse(model, inplace=True, input_size=input_size)


@dataclass(frozen=True, kw_only=True)
class Undone(Change, kind="undo"):
    """A round was undone: its fused net lost more than `accept_within` points against the net before the growth."""

    before: float
    fused: float
    accept_within: float


@dataclass(frozen=True, kw_only=True)
class Rewound(Change, kind="rewind"):
    """The plain net from before the growth came back."""

    def apply(self, model: nn.Module, plain: nn.Module, input_size: InputSize) -> nn.Module:
        return plain_net(plain, input_size)


def replay(model: nn.Module, changes: Sequence[Change], input_size: InputSize) -> nn.Module:
    """A copy of the initial `model` in the structure of `changes`; RunError for those of another model."""
    plain, model = model, copy_net(model)
    for change in changes:
        model = change.apply(model, plain, input_size)
    return model


def plain_net(model: nn.Module, input_size: InputSize) -> nn.Module:
    """A copy of a net without branches; one that was built grown is fused."""
    return replay(model, [Fused()] if grown_modules(model) else [], input_size)


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """Shape of every parameter of every grown module, by dotted name."""
    return {
        f"{name}.{key}": list(parameter.shape)
        for name, module in grown_modules(model).items()
        for key, parameter in module.named_parameters()
    }


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of log.jsonl: the end of an epoch or of a phase.

    Losses and rates are means since the last row; `lr` and `lam` (None where nothing is grown) are those of the last
    update; MACs and seconds are spent so far; top-1 is in percent.
    """

    update: int
    epoch: float
    round: int
    phase: str
    train_loss: float
    val_top1: float
    val_loss: float
    lr: float
    lam: float | None
    training_macs: int
    images_per_second: float
    seconds: float


@dataclass
class Top1:
    """Top-1 on the val split at the stages of a round (see the glossary of reports); None where there is no such stage.

    `base` is at the narrowest width, where widths are sampled.
    """

    before: float | None = None
    peak: float | None = None
    base: float | None = None
    vanished: float | None = None
    dropped: float | None = None
    fused: float | None = None
    end: float | None = None

    @property
    def retention(self) -> float | None:
        """(fused - before) / (peak - before); None where the peak is no higher than the start: nothing to retain."""
        before, peak, fused = self.before, self.peak, self.fused
        if before is None or peak is None or fused is None or peak <= before:
            return None
        return (fused - before) / (peak - before)


@dataclass(frozen=True)
class Gradients:
    """Which of the new tensors the last update had a gradient for, and their share of the whole gradient's norm."""

    new_parameters: int
    with_gradient: int
    share_of_norm: float


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What merging a net came to: top-1 on the val split by stage (see `Top1`), effects and errors.

    Attributes:
        dropped: None for a net that has no kernels of its own.
        effect: Relative change of the outputs without the branches, with random norms; `trained_effect` as trained.
        max_rel: Relative difference of the outputs, grown against fused, in float64; `max_rel_float32` in float32.
        top1_agreement: Share of random images on which both say the same.
        recurrence: Norm of A in branches at equilibrium, which starts at 0.5; None where there are none.
    """

    vanished: float
    dropped: float | None
    fused: float
    effect: float
    trained_effect: float
    max_rel: float
    max_rel_float32: float
    top1_agreement: float
    recurrence: float | None = None


@dataclass(frozen=True, kw_only=True)
class Size:
    """A number of the plain net, and of the grown one."""

    plain: int
    grown: int


@dataclass(frozen=True, kw_only=True)
class TriedWidth:
    """A width that was tried at the end of a round, and its top-1 in percent."""

    width: str | dict[str, int]
    top1: float


@dataclass(frozen=True, kw_only=True)
class LeftBy:
    """How a round with sampled widths ended.

    Attributes:
        every: Updates from one augmented net to the next, out of so many `nets`.
        inplace_distil: Share of the base's loss that came from the wider net.
        step_macs: MACs of an average update, an image.
        width: What was merged: "base", "full", a level, or the widths by name.
        candidates: What was tried, the best first.
    """

    mode: str
    every: int
    inplace_distil: float
    nets: int
    step_macs: float
    exit: str
    width: str | dict[str, int]
    candidates: list[TriedWidth] = field(default_factory=list)


@dataclass(kw_only=True)
class RoundRecord:
    """What became of a round.

    Attributes:
        branch: Kinds that were attached; "built grown" where the net had its own.
        widths: Mode of the sampling, or None.
        num_grown: Layers that carry branches; `num_skipped` were left alone.
        macs: MACs of an image forward.
        plain_step_macs: MACs of an image forward and backward through the plain net.
        tail_share: Share of the updates that train the plain net.
        macs_before: Training MACs of the run before the round; those of the round are `training_macs`.
        effect: As in `Merged`, like the next five; None where nothing was merged.
        undone: Whether the round was undone; None where it could not be.
        teacher_updates: In how many updates another net was trained that taught, by `teacher_macs`; 0 if it was given.
        answers_macs: MACs of its answers, where another net taught; `teacher_top1` is its own on the val split.
    """

    number: int
    branch: list[str]
    ratio: float
    widths: str | None
    teacher: str | None
    num_grown: int
    num_skipped: int
    params: Size
    macs: Size
    plain_step_macs: int
    tail_share: float
    macs_before: int
    top1: Top1
    gradients_at_update_2: Gradients | None = None
    gradients_at_peak: Gradients | None = None
    left_by: LeftBy | None = None
    effect: float | None = None
    trained_effect: float | None = None
    max_rel: float | None = None
    max_rel_float32: float | None = None
    top1_agreement: float | None = None
    recurrence: float | None = None
    retention: float | None = None
    undone: bool | None = None
    training_macs: int = 0
    teacher_updates: int = 0
    teacher_macs: int = 0
    answers_macs: int = 0
    teacher_top1: float | None = None

    def take(self, merged: Merged) -> None:
        """Record what merging came to."""
        for name, value in vars(merged).items():
            setattr(self.top1 if hasattr(self.top1, name) else self, name, value)
        self.retention = self.top1.retention


@dataclass
class RunState:
    """What a checkpoint holds beside tensors; `lam` are states of closed loops by number of the round.

    `teacher_log` is the number of entries of the log that make the teacher, None unless it is a net of the run's.
    """

    log: list[Change] = field(default_factory=list)
    history: list[Row] = field(default_factory=list)
    rounds: list[RoundRecord] = field(default_factory=list)
    macs_spent: int = 0
    seconds: float = 0.0
    lam: dict[str, dict[str, Any]] = field(default_factory=dict)
    teacher_log: int | None = None
