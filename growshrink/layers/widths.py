"""Widths: how much of a net is active, and the family of nets (the supernet) that this spans.

All widths share one set of weights, each a prefix of the next wider one. Those of branches all fuse into the same plain
net: the deployed cost does not depend on them. Those of a slim net (`growshrink.slim`) are what is deployed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate

from torch import nn

from growshrink.base.config import check_fields, from_dict
from growshrink.base.limits import Count, Positive, Share, SomeOrAll, Whole, checked
from growshrink.base.reading import parse_json
from growshrink.errors import WidthError, check_model, did_you_mean
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.branch import Branch, middle_width
from growshrink.layers.slim import ChannelGroup, OwnStatistics, SkippableBlock, SlimLayer

Width = Mapping[str, int]
"""Active channels by name of the slot: middle channels of a branch (`layer1.0.conv1.branches.0`) or of a
`PureBottleneck` that is a convolution itself (`stages.0.0.conv`); of a slim net the channels of a group, by its first
layer. 0 skips a branch; a branch without a middle (`insert`), and a residual block of a slim net, is 1 or 0."""

DIVERSITY = 3
#: A branch without a middle of its own: skipped, or there.
_ON = 1


@dataclass(frozen=True)
class _Slot:
    """Something that has a width."""

    branch: Branch | SkippableBlock | None
    body: PureBottleneck | ChannelGroup | None

    @property
    def full(self) -> int:
        if isinstance(self.body, ChannelGroup):
            return self.body.levels[-1]
        return self.body.conv.out_channels if self.body is not None else _ON

    @property
    def groups(self) -> int:
        return self.body.conv.groups if isinstance(self.body, PureBottleneck) else 1

    def get(self) -> int:
        if self.branch is not None and self.branch.skipped:
            return 0
        return self.body.width if self.body is not None else _ON

    def set(self, width: int) -> None:
        if self.branch is not None:
            self.branch.skipped = width == 0
        if self.body is not None and width:
            self.body.width = width


class Slots:
    """Every width of a model, looked up once; stale after a change of structure.

    Raises:
        WidthError: The model has none.
    """

    def __init__(self, model: nn.Module) -> None:
        check_model(model)
        self._slots: dict[str, _Slot] = {}
        self._statistics: OwnStatistics | None = None
        #: The layers in which a group of a slim net has channels, by name.
        self.layers: dict[str, dict[str, SlimLayer]] = {}
        bodies: set[int] = set()
        for name, module in model.named_modules():
            _check_slim(name, module)
            if isinstance(module, SlimLayer):
                self._statistics = module.slim.statistics
                for group, _ in (part for axis in module.slim[:2] if axis for part in axis.parts):
                    self._slots.setdefault(group.name, _Slot(None, group))
                    self.layers.setdefault(group.name, {})[name] = module
            elif isinstance(module, SkippableBlock):
                self._slots[name] = _Slot(module, None)
            elif isinstance(module, Branch):
                body = getattr(module, "body", None)
                self._slots[name] = _Slot(module, body if isinstance(body, PureBottleneck) else None)
                bodies.add(id(body))
            elif isinstance(module, PureBottleneck) and id(module) not in bodies:
                self._slots[name] = _Slot(None, module)
        if not self._slots:
            raise WidthError(
                "the model carries no branches, so it has no widths: growshrink.grow (or growshrink.slim) comes first."
            )

    def __iter__(self) -> Iterator[tuple[str, _Slot]]:
        return iter(self._slots.items())

    def levels(self) -> dict[str, tuple[int, ...]]:
        """Width of a slim net's slots at each level; a block is on at all of them."""
        groups = {name: slot.body.levels for name, slot in self if isinstance(slot.body, ChannelGroup)}
        return groups | {name: (_ON,) for name, slot in self if isinstance(slot.branch, SkippableBlock)}

    def get(self) -> dict[str, int]:
        """The active width."""
        return {name: slot.get() for name, slot in self._slots.items()}

    def set(self, width: Width) -> None:
        """Make a width that `check` accepts the active one."""
        for name, slot in self._slots.items():
            slot.set(width[name])
        if self._statistics is not None:
            self._statistics.choose(width)

    def check(self, width: Width) -> None:
        """WidthError unless `width` names every slot of the model, with a value it can have."""
        if not isinstance(width, Mapping):
            raise WidthError(f"{width!r}: a width is a mapping from names to numbers (`WidthSpace.sample`, `.level`).")
        for name in width:
            if name not in self._slots:
                raise WidthError(
                    f"{name}: the model has no branch of this name, so this is the width of another model"
                    f"{did_you_mean(name, self._slots)}"
                )
        for name, slot in self._slots.items():
            if name not in width:
                raise WidthError(f"{name}: the width does not say how wide this branch is.")
            value = width[name]
            if isinstance(value, bool) or not isinstance(value, int):
                raise WidthError(f"{name}: a width of {value!r} is not a whole number.")
            if value == 0 and slot.branch is None:
                raise WidthError(f"{name}: width 0 would leave nothing, it has no kernel of its own.")
            if not 0 <= value <= slot.full:
                raise WidthError(f"{name}: width {value} lies beyond the supernet, which has 0 to {slot.full}.")
            if value % slot.groups:
                raise WidthError(f"{name}: width {value} cannot be divided among its {slot.groups} groups.")


def _check_slim(prefix: str, model: nn.Module) -> None:
    """WidthError if another layer has taken the place of one of a slim net's, and runs at one width only."""
    modules = dict(model.named_modules()) if (names := vars(model).get("slim_layers", ())) else {}
    for name in names:
        if (layer := modules.get(name)) is not None and layer.state_dict() and not isinstance(layer, SlimLayer):
            raise WidthError(
                f"{prefix}{'.' * bool(prefix)}{name} has been replaced, and does not follow the width of the net: "
                "change the plain net (reset_classifier, ...) before growshrink.slim, or behind growshrink.cut."
            )


def get_width(model: nn.Module) -> dict[str, int]:
    """The active width of a grown model; WidthError if it carries no branches.

    >>> gs.layers.get_width(gs.grow(net, ratio=4, where="stages.0"))
    {'stages.0.0.conv.branches.0': 16}
    """
    return Slots(model).get()


def set_width(model: nn.Module, width: Width) -> None:
    """Make `width` the active one: what runs, what is trained, and what `fuse` merges.

    Raises:
        WidthError: It is the width of another model, or a value is impossible; the model is then as it was.

    >>> grown = gs.grow(net, ratio=4)
    >>> gs.set_width(grown, gs.width_space(grown).base)
    """
    slots = Slots(model)
    slots.check(width)
    slots.set(width)


@contextmanager
def active_width(model: nn.Module, width: Width) -> Iterator[nn.Module]:
    """Run the model at `width` within a `with`; restore the width afterwards.

    >>> with gs.active_width(grown := gs.grow(net), gs.width_space(grown).base):
    ...     gs.profile(grown).macs == gs.profile(net).macs
    True
    """
    slots = Slots(model)
    slots.check(width)
    before = slots.get()
    slots.set(width)
    try:
        yield model
    finally:
        slots.set(before)


@dataclass(frozen=True)
class WidthSpace:
    """The widths of a supernet: a few choices for each branch, independent of each other.

    Attributes:
        choices: Rising widths by name of the branch; the first is the base's, the last the full one.
        factor: r, the full width over the output channels; None where that is what the model was grown with.
        diversity: s, the number of steps from base to full.
        divisor: What the widths between base and full are multiples of, where the branch is wide enough.
        shares: How often each choice of a branch is drawn; all as often where none are given.
        levels: Width of a slim net at each level by name, one share of all channels; a block is on at every level.

    Source: NetAug (Cai et al., arXiv:2110.08890, section 3.2), whose r and s these are.
    """

    choices: Mapping[str, tuple[Whole, ...]]
    factor: Positive | None
    diversity: Count
    divisor: Count
    shares: Mapping[str, tuple[Share, ...]] = field(default_factory=dict)
    levels: Mapping[str, tuple[Whole, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, WidthError)
        for name, values in self.choices.items():
            if not values or list(values) != sorted(set(values)):
                raise WidthError(f"{name}: its choices {values} must rise.")
        for name, own in self.shares.items():
            if len(own) != len(self.choices.get(name, ())) or not 0.999 < sum(own) < 1.001:
                raise WidthError(f"{name}: {own} are not the shares of its choices.")
        if not self.choices or not all(self.levels.values()):
            raise WidthError("a width space without slots, or with a slot without levels.")

    @property
    def base(self) -> dict[str, int]:
        """The narrowest net: where every convolution owns a kernel, the plain net itself."""
        return {name: values[0] for name, values in self.choices.items()}

    @property
    def full(self) -> dict[str, int]:
        """The widest net."""
        return {name: values[-1] for name, values in self.choices.items()}

    @property
    def size(self) -> int:
        """How many nets there are."""
        return math.prod(len(values) for values in self.choices.values())

    @checked(WidthError)
    def sample(self, seed: int, step: int) -> dict[str, int]:
        """A net drawn by the `shares`: a function of seed, step and the branches' names, and of nothing else.

        No random stream is read or moved, so every rank and every resumed run draws the same without communication.
        """
        return {name: draw(values, seed, step, name, self.shares.get(name)) for name, values in self.choices.items()}

    @checked(WidthError, last=SomeOrAll)
    def stochastic_depth(self, last: float = 0.5) -> WidthSpace:
        """This space at full width, with block l of L on with probability 1 - l / L (1 - `last`), `last` above 0.

        Source: Huang et al., Deep Networks with Stochastic Depth (arXiv:1603.09382), equation 4.
        """
        blocks = [name for name, values in self.choices.items() if values == (0, _ON)]
        off = {name: number / len(blocks) * (1 - last) for number, name in enumerate(blocks, start=1)}
        choices = {name: values if name in off else values[-1:] for name, values in self.choices.items()}
        return replace(self, choices=choices, shares={name: (share, 1 - share) for name, share in off.items()})

    @checked(WidthError, share=Share)
    def level(self, share: float) -> dict[str, int]:
        """The net in which every branch takes the choice at `share` of its list: 0 the base, 1 the full one.

        For a slim net from the list of its levels, or the nearest to that.
        """
        found = {}
        for name, values in self.choices.items():
            own = self.levels.get(name, values)
            wanted = own[round(share * (len(own) - 1))]
            found[name] = min(values, key=lambda value: abs(value - wanted))
        return found

    @property
    def all_levels(self) -> list[dict[str, int]]:
        """The `diversity` + 1 levels, from the base up."""
        return [self.level(number / self.diversity) for number in range(self.diversity + 1)]

    def __contains__(self, width: object) -> bool:
        if not isinstance(width, Mapping) or set(width) != set(self.choices):
            return False
        return all(width[name] in values for name, values in self.choices.items())

    def check(self, model: nn.Module) -> None:
        """WidthError unless this is a space of `model`."""
        slots = Slots(model)
        for index in range(max(map(len, self.choices.values()), default=1)):
            slots.check({name: values[min(index, len(values) - 1)] for name, values in self.choices.items()})
        nets = slots.levels()
        for name, own in self.levels.items():
            if own != nets.get(name):
                raise WidthError(f"{name}: its levels {own} are not those of the net, {nets.get(name)}.")

    def to_json(self) -> str:
        """A JSON object."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> WidthSpace:
        """The inverse of `to_json`; WidthError if `text` is something else."""
        what = "not the JSON of a width space"
        try:
            values = parse_json(text)
        except (ValueError, TypeError) as error:
            raise WidthError(f"{what} ({error}).") from error
        return from_dict(WidthSpace, values, what, WidthError)


@checked(WidthError, factor=Positive | None, diversity=Count | None, divisor=Count)
def width_space(
    model: nn.Module, *, factor: float | None = None, diversity: int | None = None, divisor: int = 8
) -> WidthSpace:
    """The width space of a grown model: for each branch `diversity` + 1 even steps from the base to `factor` * w.

    w is the number of output channels of the branch's convolution. The base is 0 where that convolution has a kernel
    of its own (the base net is then the plain net), and w in a `PureBottleneck` that is a convolution itself. Steps
    between are rounded to `divisor` (a step that rounding moves onto another is left out); base and full width are
    always choices. A branch without a middle (`insert`) is there or skipped. Grouped convolutions: w, and every width,
    is a multiple of the groups. A slim net's are the levels it was made with, and of blocks 0 and 1.

    Args:
        model: A grown or slim model.
        factor: r; None takes what each branch was grown with.
        diversity: s; None is 3.
        divisor: Widths between are multiples of it.

    Raises:
        WidthError: The model carries no branches, or `factor` lies beyond or below what it was grown with.

    >>> space = gs.width_space(timm.create_model("reducenet20_x4"))
    >>> space.choices["stages.0.0.conv"], space.size == 4**9
    ((16, 32, 48, 64), True)
    """
    slots = Slots(model)
    levels = slots.levels()
    count = max(map(len, levels.values()), default=0)
    steps = (count - 1 if count > 1 else DIVERSITY) if diversity is None else diversity
    choices = {name: _choices(name, slot, factor, steps, divisor) for name, slot in slots}
    return WidthSpace(choices, factor, steps, divisor, levels=levels)


def draw(values: Sequence[int], seed: int, step: int, name: str, shares: Sequence[float] | None = None) -> int:
    """One of `values`, by their shares or all as likely: a function of the arguments, which moves no random stream."""
    number = int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest(), "little")
    if shares is None:
        return values[number % len(values)]
    ends = accumulate(shares)
    return next((value for value, end in zip(values, ends, strict=True) if number < end * 2.0**64), values[-1])


def _choices(name: str, slot: _Slot, factor: float | None, steps: int, divisor: int) -> tuple[int, ...]:
    if slot.body is None:
        return (0, _ON)
    if isinstance(slot.body, ChannelGroup):
        return tuple(sorted({*slot.body.levels}))
    outputs, groups = slot.body.out_channels, slot.groups
    full = slot.full if factor is None else middle_width(outputs, groups, factor)
    base = 0 if slot.branch is not None else min(middle_width(outputs, groups, 1.0), slot.full)
    if full > slot.full:
        most = f"beyond the {slot.full} it was grown with"
        raise WidthError(f"{name}: factor={factor:g} asks for {full} middle channels, {most}.")
    if full < base:
        raise WidthError(f"{name}: factor={factor:g} asks for {full} middle channels, below the base of {base}.")
    unit = math.lcm(divisor, groups)
    between = (round((base + (full - base) * i / steps) / unit) * unit for i in range(1, steps))
    return tuple(sorted({base, full, *(value for value in between if base < value < full)}))
