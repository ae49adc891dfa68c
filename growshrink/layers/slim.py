"""Slim layers: layers that run on the first channels of groups of coupled channels, and blocks that can be off.

Every width is a prefix of one set of weights. A slim layer is its plain class with the tensors of the active width in
place of its own while it runs; whatever the class computes, it computes at that width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from growshrink.errors import GrowShrinkError, WidthError

Entries = NDArray[np.intp]
"""Entries of each channel of a group along an axis of a layer's tensors, `(channels, entries each)`."""
#: Keys of the batch norm statistics that belong to one width, before its number, and of those they stand for.
_OWN = {"slim_mean": "running_mean", "slim_var": "running_var"}
#: Attributes that say how many channels a layer has.
_SIZES = (
    ("out_channels", "out_features", "num_features", "num_channels", "num_parameters"),
    ("in_channels", "in_features"),
)


@dataclass(eq=False)
class ChannelGroup:
    """Channels that are kept or removed together, named by their first layer; `levels` has the width of each level."""

    name: str
    levels: tuple[int, ...]  # rising; where they are few channels, some are the same
    width: int


class SlimAxis:
    """One axis of a layer's tensors: which of its `length` entries run at the active widths.

    `parts` are groups with the entries of each of their channels, `(channels, entries each)`; all others always run.
    """

    def __init__(self, length: int, parts: Sequence[tuple[ChannelGroup, Entries]]) -> None:
        self.length, self.parts = length, tuple(parts)
        self._found: dict[Any, int | Tensor] = {}

    def kept(self, device: torch.device | None = None) -> int | Tensor:
        """How many of the first entries run, or which, `(kept,)`, where others come first."""
        key = (device, *(group.width for group, _ in self.parts))
        if key not in self._found:
            stays = np.ones(self.length, dtype=bool)  # no tensor: an exporter may be looking
            for group, entries in self.parts:
                stays[entries[group.width :].ravel()] = False
            count = int(stays.sum())
            found = count if stays[:count].all() else torch.from_numpy(np.flatnonzero(stays)).to(device)
            self._found[key] = found
        return self._found[key]

    def size(self) -> int:
        """How many entries run."""
        kept = self.kept()
        return kept if isinstance(kept, int) else len(kept)

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """The entries that run: a view where they come first."""
        kept = self.kept(tensor.device)
        if isinstance(kept, int):
            return tensor if kept == self.length else tensor.narrow(dim, 0, kept)
        return tensor.index_select(dim, kept)

    def spans(self, group: ChannelGroup) -> list[tuple[int, int]]:
        """Start, and entries of a channel, of each run of a group's channels; WidthError where they lie in no order."""
        found: list[tuple[int, int]] = []
        for entries in (part for own, part in self.parts if own is group):
            counts = np.arange(entries.size)
            columns = [entries.ravel()] if np.array_equal(entries.ravel(), entries[0, 0] + counts) else list(entries.T)
            if not all(np.array_equal(column, column[0] + counts[: len(column)]) for column in columns):
                raise WidthError(f"{group.name}: its channels lie in no order in one of its layers.")
            found += [(int(column[0]), len(column) // len(entries)) for column in columns]
        return found


@dataclass(eq=False)
class OwnStatistics:
    """Widths, or parts of widths, at which batch norms have statistics of their own; `active` are their numbers."""

    widths: list[dict[str, int]] = field(default_factory=list)
    active: tuple[int, ...] = ()

    def choose(self, width: Mapping[str, int]) -> None:
        """Make those that agree with a width the active ones: the latest first, which growshrink.route adds."""
        found = (i for i, own in enumerate(self.widths) if own.items() <= width.items())
        self.active = tuple(found)[::-1]


class SlimAxes(NamedTuple):
    """The output and input channels of a layer (None: all run), and what the layers of a net share."""

    outputs: SlimAxis | None
    inputs: SlimAxis | None
    statistics: OwnStatistics

    def own(self, layer: nn.Module) -> dict[str, Tensor]:
        """The active ones of the layer's own statistics, by the keys of those that they stand for."""
        number = next((n for n in self.statistics.active if f"slim_mean_{n}" in layer._buffers), None)
        return {} if number is None else {key: layer.get_buffer(f"{own}_{number}") for own, key in _OWN.items()}


class SlimLayer(nn.Module):
    """A layer that runs on the channels of the active width; parameters and keys stay. Made by `growshrink.slim`."""

    plain_class: ClassVar[type[nn.Module]]
    slim: SlimAxes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the plain class computes, at the active width."""
        cut = active_values(self)
        if not cut:
            return super().forward(*args, **kwargs)
        own = self.__dict__  # comes before parameters and buffers where an attribute is looked up
        before = {key: own[key] for key in cut if key in own}
        own.update(cut)
        try:
            return super().forward(*args, **kwargs)
        finally:
            for key in cut:
                del own[key]
            own.update(before)
            outputs = self.slim.outputs
            for key in _OWN.values() if self.training and not self.slim.own(self) else ():
                whole = self._buffers.get(key)  # its prefix is a view; another part was a copy that is written back
                if whole is not None and outputs and isinstance(kept := outputs.kept(whole.device), Tensor):
                    whole.data.index_copy_(0, kept, cut[key])  # .data: an earlier pass may have saved it


class Unconvertible(nn.Module):
    """A batch norm that functions which put another in its place would rob of what it carries."""

    refusal: ClassVar[tuple[type[GrowShrinkError], str]]

    @property
    def affine(self) -> bool:
        """Whether it has gamma and beta; raises the `refusal`, error and text, for functions that convert the norm."""
        if (name := sys._getframe(1).f_code.co_name) in ("convert_sync_batchnorm", "freeze_batch_norm_2d"):
            raise self.refusal[0](f"{name} may have converted some of the net: make it again; {self.refusal[1]}.")
        return bool(vars(self)["affine"])


class SlimNorm(Unconvertible, SlimLayer):
    """A batch norm on the channels of the active width."""

    refusal = WidthError, "norms are converted before growshrink.slim, or frozen behind growshrink.cut"


class SkippableBlock(nn.Module):
    """A residual block that is the identity while it is `skipped`. Made by `growshrink.slim`."""

    plain_class: ClassVar[type[nn.Module]]
    skipped = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the block computes, or its input."""
        return x if self.skipped else super().forward(x, *args, **kwargs)


def is_slim(model: nn.Module) -> bool:
    """Whether `growshrink.slim` made it."""
    return any(isinstance(module, (SlimLayer, SkippableBlock)) for module in model.modules())


def tensor_axes(layer: SlimLayer) -> Iterator[tuple[str, int, SlimAxis]]:
    """Key, dim and axis of the parameters and buffers of a layer that have channels in them."""
    for key, tensor in (*layer._parameters.items(), *layer._buffers.items()):
        if tensor is not None and not key.startswith(tuple(_OWN)):
            for dim, axis in enumerate(layer.slim[:2]):
                if axis is not None and tensor.ndim > dim:
                    yield key, dim, axis


def active_values(layer: SlimLayer) -> dict[str, Any]:
    """What a layer has in place of its own attributes at the active width: tensors, and sizes that it reads."""
    found: dict[str, Any] = {}
    for key, dim, axis in tensor_axes(layer):
        tensor = found[key] if key in found else getattr(layer, key)
        if (taken := axis.take(tensor, dim)) is not tensor:
            found[key] = taken
    outputs = layer.slim.outputs
    if outputs is not None and "num_features" in vars(layer) and outputs.size() != outputs.length:
        found["num_features"] = outputs.size()  # what an instance norm without parameters compares with
    if found and outputs is not None:
        if getattr(layer, "groups", 1) > 1:  # depthwise: others are left alone
            found["groups"] = outputs.size()
        if len(getattr(layer, "normalized_shape", ())) == 1:
            found["normalized_shape"] = (outputs.size(),)
    return found | layer.slim.own(layer)


def add_statistics(layer: SlimLayer, number: int) -> None:
    """Give a norm statistics of its own for width number `number`, the active one: those of the shared ones."""
    for own, key in _OWN.items():
        if (shared := layer._buffers.get(key)) is not None:
            taken = shared if layer.slim.outputs is None else layer.slim.outputs.take(shared, 0)
            layer.register_buffer(f"{own}_{number}", taken.detach().clone())


def write_active(layer: SlimLayer) -> None:
    """Make the tensors of the active width the layer's own; its class is to be the plain one from then on."""
    for key, value in active_values(layer).items():
        if (parameter := layer._parameters.get(key)) is not None:
            layer._parameters[key] = nn.Parameter(value.detach().clone(), requires_grad=parameter.requires_grad)
        elif key in layer._buffers:
            layer._buffers[key] = value.detach().clone()
        else:
            setattr(layer, key, value)
    outputs, inputs, _ = layer.slim
    depthwise = getattr(layer, "groups", 1) > 1
    for axis, sizes in zip((outputs, outputs if depthwise else inputs), _SIZES, strict=True):
        for key in sizes:
            if axis is not None and isinstance(vars(layer).get(key), int):
                setattr(layer, key, axis.size())
    for key in [key for key in layer._buffers if key.startswith(tuple(_OWN))]:
        del layer._buffers[key]
