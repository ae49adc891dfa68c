"""The plan of a run: rounds and their phases, in shares and epochs; a `Timeline` is the same in optimizer updates."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from growshrink.branches import BranchSpec, check_ratio
from growshrink.errors import GrowError, PlanError, did_you_mean
from growshrink.supernet.passes import MODES

CONTROLS = ("schedule", "closed_loop")
EXITS = ("fuse", "drop", "choose", "teach")
INITS = ("silent", "paper")
DISTIL = ("none", "peak", "previous")
#: hold + vanish at most: the rest of a round is linear.
MOST_ALIVE = 0.85
#: Of sums of shares.
SLACK = 1e-9  # 0.45 + 0.4 is 0.8500000000000001


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """One round: grow -> hold -> vanish -> settle -> fuse -> tail.

    Attributes:
        epochs: Length of the round.
        branch: Branch kinds to attach to each layer, e.g. ("bottleneck",).
        ratio: Middle width over output channels.
        where: Regular expression on dotted names; None for every eligible convolution or linear layer.
        init: How branches are born: "silent", or as in the "paper" they come from, which changes what the net computes
            and is meant for a round at the very start; see `grow`.
        linear: The activations are not there from the start: lam is 0 throughout.
        hold: Share of the round with lam = 1.
        vanish: Share of the round in which lam falls to 0.
        settle: Share of the round at lam = 0 before fusing; at least 50 updates whatever the share.
            What is left of the round is the tail, trained on the plain net at plain cost.
        control: How lam falls: by a "schedule", or in a "closed_loop" as fast as the training loss allows (see
            `ClosedLoop`), 0 after hold + vanish in either case.
        augment: How middle widths are sampled while the net is grown (NetAug): a mode of `NetAugTask` ("netaug",
            "lazy", "suffix", "single", "sandwich"), or "none" for training at full width.
        alpha: Weight of the loss of the augmented net, on average over updates; None gives its loss, in the updates
            that have one, the weight of the base's.
        inplace_distil: Share of the base net's loss that comes from the augmented net's logits; None is the mode's own.
        exit: How the round ends: "fuse" merges the net at full width; "drop" cuts the branches off (vanish and settle
            may be 0; an augmentation fades out with lam); in a round with sampled widths also "choose", which fuses at
            several widths and keeps the best on the val split. "teach" merges nothing: the grown net, its learning rate
            annealed over the hold, becomes the teacher of the plain net, which goes on in the tail as if the round
            began there, from the weights, the average and the optimizer it had then (vanish and settle must be 0,
            distil "peak").
        distil: Teacher from the end of the hold on: "peak" (this round's grown net, averaged and with its learning
            rate annealed), "previous" (the net the round began with), or "none".
        distil_weight: Of the teacher's loss; the labels get the rest.
        distil_asked: Share of the updates with a teacher in which it is asked, at least an epoch's whatever the share.
            After these the same images come again, changed and batched as they were, with the answers it gave: its
            forward is paid once an answer. (The idea: Shen and Xing, FKD, arXiv:2112.01528.) The answers stay on the
            device.
        temperature: Of both softmaxes of the teacher's loss (Hinton et al., arXiv:1503.02531).
        accept_within: How many points of top-1 on the val split the round may cost. Where the fused net has lost more
            than this against the net that was grown, the round is undone: net, average, optimizer and random states
            are those from before the growth again, bit for bit, and the tail goes on from there. None accepts all.
        online: Train linear branches as part of their kernels (see `collapse_online`): from the start those without
            activations, in the settle phase all. Their norms' statistics are taken anew then, and frozen.
    """

    epochs: float
    branch: tuple[str, ...] = ("bottleneck",)
    ratio: float = 2.0
    where: str | None = None
    init: str = "silent"
    linear: bool = False
    hold: float = 0.20
    vanish: float = 0.15
    settle: float = 0.08
    control: str = "schedule"
    augment: str = "none"
    alpha: float | None = None
    inplace_distil: float | None = None
    exit: str = "fuse"
    distil: str = "none"
    distil_weight: float = 0.5
    distil_asked: float = 1.0
    temperature: float = 3.0
    accept_within: float | None = None
    online: bool = False

    def __post_init__(self) -> None:
        _check_numbers(
            self, "epochs", "ratio", "hold", "vanish", "settle", "distil_weight", "distil_asked", "temperature"
        )
        if not self.epochs > 0:
            raise PlanError(f"epochs={self.epochs!r}: a round must last longer than 0 epochs.")
        if not (isinstance(self.branch, tuple) and self.branch and all(isinstance(kind, str) for kind in self.branch)):
            raise PlanError(f"branch={self.branch!r}: must be a tuple of at least one kind of branch.")
        if self.where is not None and not isinstance(self.where, str):
            raise PlanError(f"where={self.where!r}: must be a regular expression on module names, or None.")
        try:
            check_ratio(self.ratio)
            for kind in self.branch:
                BranchSpec(kind=kind)
        except GrowError as error:
            raise PlanError(str(error)) from error
        for name in ("hold", "vanish", "settle"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise PlanError(f"{name}={getattr(self, name)!r}: a share of the round, must lie in [0, 1].")
        self._check_augment()
        if not isinstance(self.online, bool):
            raise PlanError(f"online={self.online!r}: must be true or false.")
        if self.online and self.augment != "none":
            raise PlanError("online=True: branches with sampled widths (augment) are not merged in training.")
        if self.control not in CONTROLS:
            raise PlanError(f"control={self.control!r}: no such control{did_you_mean(str(self.control), CONTROLS)}")
        if self.control == "closed_loop" and not self.vanish:
            raise PlanError("control='closed_loop': times the vanishing of activations, and vanish is 0.")
        if self.control == "closed_loop" and self.augment != "none":
            raise PlanError("control='closed_loop': listens to plain training, not to sampled widths (augment).")
        self._check_exit()
        for name in ("hold",) if self.exit in ("drop", "teach") else ("hold", "vanish"):
            if getattr(self, name) == 0:
                raise PlanError(f"{name}={getattr(self, name)!r}: must be above 0.")
        if self.hold + self.vanish + self.settle > 1.0 + SLACK:
            raise PlanError(f"hold + vanish + settle = {self.hold + self.vanish + self.settle:g}: more than the round.")
        if self.hold + self.vanish > MOST_ALIVE + SLACK and self.exit not in ("drop", "teach"):
            raise PlanError(
                f"hold + vanish = {self.hold + self.vanish:g}: at most {MOST_ALIVE}, the rest of a round is linear."
            )
        if self.distil not in DISTIL:
            raise PlanError(f"distil={self.distil!r}: no such teacher{did_you_mean(str(self.distil), DISTIL)}")
        for name in ("distil_weight", "distil_asked"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise PlanError(f"{name}={getattr(self, name)!r}: must lie in (0, 1].")
        if self.distil_asked < 1.0 and self.augment != "none":
            raise PlanError("distil_asked: with sampled widths (augment) the teacher is asked in every update.")
        if not self.temperature > 0:
            raise PlanError(f"temperature={self.temperature!r}: must be above 0.")
        if self.accept_within is not None:
            _check_numbers(self, "accept_within")
            if self.accept_within < 0:
                raise PlanError(f"accept_within={self.accept_within!r}: points of top-1, must not be negative.")

    def _check_augment(self) -> None:
        if self.augment not in ("none", *MODES):
            raise PlanError(
                f"augment={self.augment!r}: no such mode{did_you_mean(str(self.augment), ('none', *MODES))}"
            )
        for name in ("alpha", "inplace_distil"):
            if getattr(self, name) is not None:
                _check_numbers(self, name)
        if self.alpha is not None and self.alpha < 0:
            raise PlanError(f"alpha={self.alpha!r}: must not be negative.")
        if self.inplace_distil is not None:
            if not 0.0 <= self.inplace_distil <= 1.0:
                raise PlanError(f"inplace_distil={self.inplace_distil!r}: must lie in [0, 1].")

    def _check_exit(self) -> None:
        if self.init not in INITS:
            raise PlanError(f"init={self.init!r}: no such start{did_you_mean(str(self.init), INITS)}")
        if self.linear and self.control == "closed_loop":
            raise PlanError("linear=True: there is no activation whose end a control='closed_loop' could time.")
        if self.exit not in EXITS:
            raise PlanError(f"exit={self.exit!r}: no such exit{did_you_mean(str(self.exit), EXITS)}")
        if self.exit == "choose" and self.augment == "none":
            raise PlanError("exit='choose': only a round with sampled widths (augment) has it.")
        if self.exit == "teach" and (self.vanish or self.settle or self.distil != "peak" or self.augment != "none"):
            raise PlanError("exit='teach': needs vanish=0, settle=0, distil='peak' and no augment.")
        if self.exit == "teach" and self.accept_within is not None:
            raise PlanError("exit='teach': merges nothing that accept_within could undo.")


@dataclass(frozen=True, kw_only=True)
class CyclePlan:
    """A whole run: some epochs on the plain net, then rounds, under one envelope of the learning rate.

    Attributes:
        rounds: In order.
        base_epochs: Plain training before the first round; growing should not wait for convergence.
        rewarm: Updates over which the learning rate comes back after every change of structure.
        restarts: Epochs at which it is led back up without one: the control of what the restarts alone are worth.
        seed: Of the branches' weights; each round draws others.
    """

    rounds: tuple[RoundPlan, ...]
    base_epochs: float = 0.0
    rewarm: int = 20
    restarts: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self, "base_epochs")
        if not (isinstance(self.restarts, tuple) and all(_is_number(at) and at >= 0 for at in self.restarts)):
            raise PlanError(f"restarts={self.restarts!r}: must be a list of epochs, none negative.")
        if not (isinstance(self.rounds, tuple) and all(isinstance(entry, RoundPlan) for entry in self.rounds)):
            raise PlanError(f"rounds={self.rounds!r}: must be a tuple of RoundPlan.")
        for name in ("rewarm", "seed"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                raise PlanError(f"{name}={getattr(self, name)!r}: must be a whole number.")
        if self.base_epochs < 0:
            raise PlanError(f"base_epochs={self.base_epochs!r}: must not be negative.")
        if self.base_epochs == 0 and not self.rounds:
            raise PlanError("the plan is empty: give it base_epochs or rounds.")
        if self.rewarm < 0:
            raise PlanError(f"rewarm={self.rewarm!r}: updates, must not be negative.")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> CyclePlan:
        """The inverse of `to_dict`; PlanError for unknown or missing keys and values out of range."""
        top = _known(CyclePlan, values, "the plan")
        entries = top.pop("rounds", [])
        if not isinstance(entries, (list, tuple)):
            raise PlanError(f"rounds={entries!r}: must be a list of objects.")
        rounds = []
        for index, entry in enumerate(entries):
            round_values = _known(RoundPlan, entry, f"rounds[{index}]")
            if isinstance(round_values.get("branch"), list):
                round_values["branch"] = tuple(round_values["branch"])
            try:
                rounds.append(RoundPlan(**round_values))
            except TypeError as error:  # a key is missing
                raise PlanError(f"rounds[{index}]: {error}.") from error
            except PlanError as error:
                raise PlanError(f"rounds[{index}]: {error}") from error
        if isinstance(top.get("restarts"), list):
            top["restarts"] = tuple(top["restarts"])
        return CyclePlan(rounds=tuple(rounds), **top)


def _known(cls: type, values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise PlanError(f"{what}: must be an object, got {values!r}.")
    names = [field.name for field in fields(cls)]
    for key in values:
        if key not in names:
            raise PlanError(f"{what}: {key!r} is not an option of {cls.__name__}{did_you_mean(str(key), names)}")
    return dict(values)


def _check_numbers(plan: object, *names: str) -> None:
    for name in names:
        value = getattr(plan, name)
        if not _is_number(value):
            raise PlanError(f"{name}={value!r}: must be a finite number.")


def _is_number(value: object) -> bool:
    # an int may be larger than any float
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
