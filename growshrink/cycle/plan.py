"""The plan of a run: rounds and their phases, in shares and epochs; `growshrink.cycle.layout` has it in updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import timm
from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.config import check_fields, from_dict, to_dict
from growshrink.base.limits import NotNegative, OneOf, Positive, Ratio, Regex, Share, SomeOrAll, Whole
from growshrink.branches import Branch, Guided
from growshrink.branches.spec import BranchKind
from growshrink.cycle.augmented import NetAug
from growshrink.cycle.exits import Exit, Fuse
from growshrink.cycle.gradients import MapSource
from growshrink.cycle.teaching import Teacher
from growshrink.errors import PlanError
from growshrink.transforms import INITS, grow

CLOSED_LOOP = "closed_loop"
CONTROLS = ("schedule", CLOSED_LOOP)
#: hold + vanish at most: the rest of a round is linear.
MOST_ALIVE = 0.85
#: Rounding error of sums of shares.
SLACK = 1e-9  # 0.45 + 0.4 is 0.8500000000000001


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round: grow -> hold -> vanish -> settle -> exit -> tail.

    Attributes:
        epochs: Length of the round.
        branch: Branch kinds to attach to each layer, e.g. ("bottleneck",). () grows nothing: all of the round is the
            tail, and another net must be its teacher.
        ratio: Middle width of a branch over the output channels of its layer.
        where: Regular expression on dotted names; None for every layer that can be grown exactly.
        init: How branches start: "silent", or as in the "paper" they come from, which changes what the net computes
            and is meant for a round at the very start; see `grow`.
        guide: Model of timm's that feeds branches of the kinds "guided" and "guided_kernel"; None is a shallow net.
        linear: The activations are not there from the start: lam is 0 throughout.
        rise: Share of the round, at the start of the hold, in which lam rises from 0 (for attention over kernels what a
            large temperature at first is).
        hold: Share of the round with the branches' activations alive (lam = 1).
        vanish: Share of the round in which lam falls to 0.
        settle: Share of the round at lam = 0 before the exit; at least 50 updates whatever the share, where the exit
            merges. What is left of the round is the tail, trained on the plain net at plain cost.
        control: How lam falls: by a "schedule", or in a "closed_loop" as fast as the training loss allows (see
            `ClosedLoop`), 0 after hold + vanish in either case.
        online: Train linear branches as part of their kernels (see `collapse_online`), at about plain cost: from the
            start those without activations, in the settle phase all. Their norms are recalibrated then, and frozen.
        exit: How the grown part ends.
        teacher: Who teaches: another net from the start on, after its own training; a net of the run's from the end of
            the hold on. The shares of the round are shares of what the teacher's training leaves.
        widths: How middle widths are sampled while the net is grown; None trains at full width.

    >>> fused = gs.Round(epochs=30, branch=("dbb",), exit=gs.cycle.Fuse(accept_within=0.5))
    >>> netaug = gs.Round(epochs=30, ratio=4, widths=gs.cycle.NetAug(), exit=gs.cycle.Drop())  # or gs.cycle.Choose()
    >>> taught = gs.Round(epochs=9, vanish=0, settle=0, teacher=gs.cycle.Teacher("peak"), exit=gs.cycle.Rewind())
    """

    epochs: Positive
    branch: tuple[BranchKind, ...] = ("bottleneck",)
    ratio: Ratio = 2.0
    where: Regex | None = None
    init: Annotated[str, OneOf("no such start", INITS)] = "silent"
    guide: Annotated[str, OneOf("timm knows no such model", timm.list_models)] | None = None
    linear: bool = False
    rise: Share = 0.0
    hold: SomeOrAll = 0.20
    vanish: Share = 0.15
    settle: Share = 0.08
    control: Annotated[str, OneOf("no such control", CONTROLS)] = "schedule"
    online: bool = False
    exit: Exit = Fuse()  # noqa: RUF009 - frozen, as all parts are
    teacher: Teacher | None = None
    widths: NetAug | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.branch:
            if self.teacher is None or not self.teacher.is_net or self.widths is not None:
                raise PlanError(f"branch={self.branch!r}: must be at least one kind of branch, or another net teach.")
            return
        kinds = (Branch.kinds[kind] for kind in self.branch if kind in Branch.kinds)
        if self.guide is not None and not any(issubclass(kind, Guided) for kind in kinds):
            raise PlanError(f"guide={self.guide!r}: for branches of the kinds guided and guided_kernel.")
        self._check_shares()
        if self.controlled and not self.vanish:
            raise PlanError(f"control={self.control!r}: times the vanishing of activations, and vanish is 0.")
        if self.controlled and self.linear:
            raise PlanError(f"linear=True: there is no activation whose end a control={self.control!r} could time.")
        if self.rise > (0.0 if self.controlled or self.linear else self.hold):
            raise PlanError(f"rise={self.rise!r}: a part of the hold, without linear=True and control={CLOSED_LOOP!r}.")
        self._check_widths()
        if self.exit.rewinds and (self.vanish or self.settle or self.widths or not self.teaches_peak):
            raise PlanError(f"exit={self.exit.kind!r}: needs vanish=0, settle=0, teacher=Teacher('peak'), no widths.")

    def grown(self, plain: nn.Module, input_size: InputSize) -> nn.Module:
        """A copy of `plain` in the structure, and at the cost, that the round gives it."""
        how = {name: getattr(self, name) for name in ("ratio", "where", "init", "guide")}
        return grow(plain, self.branch, **how, input_size=input_size)

    @property
    def controlled(self) -> bool:
        """Whether lam falls in a closed loop."""
        return self.control == CLOSED_LOOP

    @property
    def teaches_peak(self) -> bool:
        """Whether the teacher is the round's own peak."""
        return self.teacher is not None and self.teacher.is_peak

    def _check_shares(self) -> None:
        if self.exit.linear and not self.vanish:
            raise PlanError(f"vanish={self.vanish!r}: must be above 0, as exit={self.exit.kind!r} merges the branches.")
        total = self.hold + self.vanish + self.settle
        if total > 1.0 + SLACK:
            raise PlanError(f"hold + vanish + settle = {total:g}: more than the round.")
        if self.exit.linear and self.hold + self.vanish > MOST_ALIVE + SLACK:
            alive = self.hold + self.vanish
            raise PlanError(f"hold + vanish = {alive:g}: at most {MOST_ALIVE}, the rest of a round is linear.")

    def _check_widths(self) -> None:
        if self.widths is None:
            if self.exit.needs_widths:
                raise PlanError(f"exit={self.exit.kind!r}: only a round with sampled widths has it.")
            return
        if self.online:
            raise PlanError("online=True: branches with sampled widths are not merged in training.")
        if self.controlled:
            raise PlanError(f"control={self.control!r}: listens to plain training, not to sampled widths.")
        if self.teacher is not None and self.teacher.asked < 1.0:
            raise PlanError("teacher.asked: with sampled widths the teacher is asked in every update.")


@dataclass(frozen=True, kw_only=True)
class CyclePlan:
    """A whole run: some epochs on the plain net, then rounds, under one envelope of the learning rate.

    Attributes:
        rounds: In order.
        base_epochs: Plain training before the first round; growing should not wait for convergence.
        rewarm: Updates over which the learning rate comes back after every change of structure.
        restarts: Epochs at which it is led back up without one: the control of what the restarts alone are worth.
        seed: Seed of the branches' weights; each round draws others.
        gradients: Maps on the gradients, in a plan without rounds.

    >>> plan = gs.CyclePlan(base_epochs=5, rounds=(gs.Round(epochs=30), gs.Round(epochs=30, branch=("insert",))))
    >>> maps = gs.CyclePlan(base_epochs=30, rounds=(), gradients=gs.cycle.FromBranches())  # or gs.cycle.FromPixels()
    """

    rounds: tuple[Round, ...]
    base_epochs: NotNegative = 0.0
    rewarm: Whole = 20
    restarts: tuple[NotNegative, ...] = ()
    seed: int = 0
    gradients: MapSource | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.gradients is not None and self.rounds:
            raise PlanError(f"gradients={self.gradients.kind!r}: for a plan without rounds, which has no branches.")
        if self.base_epochs == 0 and not self.rounds:
            raise PlanError("the plan is empty: give it base_epochs or rounds.")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return to_dict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> CyclePlan:
        """The inverse of `to_dict`; PlanError for unknown or missing keys and values out of range."""
        return from_dict(CyclePlan, {"rounds": (), **values} if isinstance(values, Mapping) else values, "the plan")
