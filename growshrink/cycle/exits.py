"""How the grown part of a round ends: one class each.

A new exit is one class statement, `class Mine(Exit, kind="mine")`, a frozen dataclass of its options, wherever it
stands: plans, costs, checkpoints and reports ask it and know no exit by name.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from growshrink.base.config import Checked, Variant
from growshrink.base.limits import NotNegative
from growshrink.base.ranks import broadcast_nets_
from growshrink.cycle.records import Fused, Rewound, Undone
from growshrink.cycle.running import Run
from growshrink.cycle.surgery import CALIBRATION_BATCHES, fuse_nets
from growshrink.layers.widths import Width, set_width, width_space
from growshrink.supernet import WidthChoice, choose_width, default_candidates
from growshrink.training.calibrate import calibrate_bn


@dataclass(frozen=True, kw_only=True)
class Exit(Checked, Variant, ABC):
    """What becomes of the branches when the grown part of a round is over."""

    #: The net must be linear by then, and its statistics settled.
    linear: ClassVar[bool] = True
    #: Only a round with sampled widths has it.
    needs_widths: ClassVar[bool] = False
    #: Layers need kernels of their own, which a net that is built grown does not have.
    needs_kernels: ClassVar[bool] = False
    #: An augmented net fades out with lam.
    fades: ClassVar[bool] = False
    #: The grown net is prepared as a teacher alone: the plain net from before comes back.
    rewinds: ClassVar[bool] = False

    @property
    def may_go_back(self) -> bool:
        """Whether the net from before the growth has to be kept."""
        return self.rewinds

    @property
    def decides(self) -> bool:
        """Whether scores on the val split have a say in it."""
        return False

    @abstractmethod
    def leave(self, run: Run) -> None:
        """End the grown part of a round: afterwards the net is plain."""

    def macs(self, forward: int, train: int) -> int:
        """Training MACs of an image that leaving takes, beyond the updates of the round; it must spend just these.

        The plain net takes `forward` MACs an image, and `train` forward and backward.
        """
        return 0


@dataclass(frozen=True, kw_only=True)
class _Merge(Exit, kind=""):
    """Base of the exits that merge the grown net, at some width.

    Attributes:
        accept_within: How many points of top-1 on the val split the round may cost. Where the fused net has lost more
            than this against the net that was grown, the round is undone: net, average, optimizer and random states
            are those from before the growth again, bit for bit, and the tail continues from there. None accepts all.
    """

    accept_within: NotNegative | None = None

    @property
    def may_go_back(self) -> bool:
        return self.accept_within is not None

    decides = may_go_back

    def width(self, run: Run) -> tuple[Width, WidthChoice | None]:
        """The width to merge at, and what was tried to find it."""
        return width_space(run.trainer.model).full, None

    def leave(self, run: Run) -> None:
        trainer, record = run.trainer, run.record
        trainer.calibrate_average()
        if run.augmentation is not None:
            run.save_supernet("supernet")
            record.top1.base = run.top1()
        width, choice = self.width(run)
        if run.augmentation is not None:
            record.left_by = run.augmentation.describe(self.kind, width, choice)
        moved = run.augmentation is not None and width != run.augmentation.space.base
        images = list(trainer.recent_images(CALIBRATION_BATCHES)) if moved else []
        for net in trainer.nets:
            set_width(net, width)
            if moved:
                calibrate_bn(net, images)
        run.augment(None, None)
        broadcast_nets_(trainer.nets)
        merged = fuse_nets(trainer, run.top1, run.size)
        record.take(merged)
        run.changed(Fused(update=trainer.update, round=record.number, max_rel=merged.max_rel, effect=merged.effect))
        if self.accept_within is not None:
            assert record.top1.before is not None
            self.judge(run, record.top1.before, merged.fused)

    def judge(self, run: Run, before: float, fused: float) -> None:
        """Undo the round if it has cost too much."""
        assert self.accept_within is not None and run.before is not None
        run.record.undone = before - fused > self.accept_within
        if run.record.undone:
            run.go_back()
            values = {"before": before, "fused": fused, "accept_within": self.accept_within}
            run.changed(Undone(update=run.trainer.update, round=run.record.number, **values))
        run.before = None


@dataclass(frozen=True, kw_only=True)
class Fuse(_Merge, kind="fuse"):
    """Merge the net at full width."""


@dataclass(frozen=True, kw_only=True)
class Drop(_Merge, kind="drop"):
    """Cut the branches off; vanish and settle may be 0, and sampled widths fade out with lam."""

    linear = False
    needs_kernels = True
    fades = True

    def width(self, run: Run) -> tuple[Width, WidthChoice | None]:
        """The base: no branch is merged."""
        return width_space(run.trainer.model).base, None


@dataclass(frozen=True, kw_only=True)
class Choose(_Merge, kind="choose"):
    """Fuse copies at several widths and keep the best on the val split; for rounds with sampled widths."""

    needs_widths = True

    @property
    def decides(self) -> bool:
        return True

    def width(self, run: Run) -> tuple[Width, WidthChoice | None]:
        """The best of `default_candidates`."""
        assert run.augmentation is not None
        space = run.augmentation.space
        choice = choose_width(
            run.trainer.best,
            default_candidates(space),
            batches=list(run.trainer.recent_images(CALIBRATION_BATCHES)),
            score=run.top1,
            keep_statistics=space.base,
            input_size=run.size,
        )
        return choice.width, choice


@dataclass(frozen=True, kw_only=True)
class Rewind(Exit, kind="rewind"):
    """Merge nothing: the plain net from before the growth comes back, to be taught by what it grew into.

    The grown net has a learning rate of its own over the hold; weights, average and optimizer of the plain net are
    those it had when the round began. Needs `vanish=0, settle=0, teacher=Teacher("peak")`.
    """

    linear = False
    needs_kernels = True
    rewinds = True

    def leave(self, run: Run) -> None:
        run.changed(Rewound(update=run.trainer.update, round=run.record.number))
        run.go_back()
