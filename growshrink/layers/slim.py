"""Slim layers: layers that run on the first channels of groups of coupled channels, and blocks that can be off.

Every width is a prefix of one set of weights. A slim layer is its plain class with the tensors of the active width in
place of its own while it runs; whatever the class computes, it computes at that width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from growshrink.errors import WidthError

#: Keys of the batch norm statistics that belong to one width, before its number.
_OWN = ("slim_mean", "slim_var")


class ChannelGroup:
    """Channels that live and die together: what has a width in a slim net.

    Attributes:
        name: Its first layer.
        choices: Rising widths, the last of which is the full one.
        width: How many are active.
    """

    def __init__(self, name: str, choices: Sequence[int]) -> None:
        self.name, self.choices = name, tuple(choices)
        self.width = self.choices[-1]


class SlimAxis:
    """One axis of a layer's tensors: which of its `length` entries run at the active widths.

    `parts` are groups with the entries of each of their channels, `(channels, entries each)`; what is in no part always
    runs.
    """

    def __init__(self, length: int, parts: Sequence[tuple[ChannelGroup, Tensor]]) -> None:
        self.length, self.parts = length, tuple(parts)
        self._found: dict[Any, int | Tensor] = {}

    def kept(self, device: torch.device | None = None) -> int | Tensor:
        """How many of the first entries run, or which, `(kept,)`, where others come first."""
        key = (device, *(group.width for group, _ in self.parts))
        if key not in self._found:
            stays = torch.ones(self.length, dtype=torch.bool)
            for group, entries in self.parts:
                stays[entries[group.width :].flatten()] = False
            count = int(stays.sum())
            self._found[key] = count if bool(stays[:count].all()) else stays.nonzero().flatten().to(device)
        return self._found[key]

    def spans(self, group: ChannelGroup) -> list[tuple[int, int]]:
        """Start, and entries of each channel, of the runs in which the channels of a group follow one another.

        WidthError where they lie in another order.
        """
        found: list[tuple[int, int]] = []
        for entries in (part for own, part in self.parts if own is group):
            each, counts = entries.shape[1], torch.arange(len(entries))
            if torch.equal(entries.flatten(), entries[0, 0] + torch.arange(entries.numel())):
                found.append((int(entries[0, 0]), each))
            elif all(torch.equal(column, column[0] + counts) for column in entries.T):
                found += [(int(column[0]), 1) for column in entries.T]
            else:
                raise WidthError(f"{group.name}: its channels lie in no order in one of its layers.")
        return found

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


@dataclass(eq=False)
class OwnStatistics:
    """Widths of a net at which its batch norms have statistics of their own; `active` is the number of one, or None."""

    widths: list[dict[str, int]] = field(default_factory=list)
    active: int | None = None

    def choose(self, width: Mapping[str, int]) -> None:
        """Make those of a width the active ones; None where it has none."""
        self.active = next((i for i, own in enumerate(self.widths) if own == width), None)


@dataclass(frozen=True, eq=False)
class SlimAxes:
    """The output and input channels of a layer (None: all run), and what the layers of a net share."""

    outputs: SlimAxis | None
    inputs: SlimAxis | None
    statistics: OwnStatistics

    def groups(self) -> Iterator[ChannelGroup]:
        """The groups that take part."""
        for axis in (self.outputs, self.inputs):
            yield from (group for group, _ in axis.parts) if axis is not None else ()


class SlimLayer(nn.Module):
    """A layer that runs on the channels of the active width. Never constructed: see `growshrink.slim`.

    Parameters, buffers and their keys stay what they are in the plain layer.
    """

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
            if self.training:
                self._keep_statistics(cut)

    def _keep_statistics(self, cut: Mapping[str, Any]) -> None:
        """Write statistics back that were updated in a copy."""
        for key in ("running_mean", "running_var"):
            whole, outputs = self._buffers.get(key), self.slim.outputs
            if whole is not None and outputs is not None and key in cut and self.slim.statistics.active is None:
                if isinstance(kept := outputs.kept(whole.device), Tensor):
                    whole.data.index_copy_(0, kept, cut[key])  # .data: an earlier pass may have saved them


class SkippableBlock(nn.Module):
    """A residual block that is the identity while it is `skipped`. Never constructed: see `growshrink.slim`."""

    plain_class: ClassVar[type[nn.Module]]
    skipped = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the block computes, or its input."""
        return x if self.skipped else super().forward(x, *args, **kwargs)


def tensor_axes(layer: SlimLayer) -> Iterator[tuple[str, int, SlimAxis]]:
    """Key, dim and axis of the parameters and buffers of a layer that have channels in them."""
    slim = layer.slim
    for key, tensor in (*layer._parameters.items(), *layer._buffers.items()):
        if tensor is not None and not key.startswith(_OWN):
            if slim.outputs is not None and tensor.ndim:
                yield key, 0, slim.outputs
            if slim.inputs is not None and tensor.ndim > 1:
                yield key, 1, slim.inputs


def active_values(layer: SlimLayer) -> dict[str, Any]:
    """What a layer has in place of its own attributes at the active width: tensors, and sizes that it reads."""
    found: dict[str, Any] = {}
    for key, dim, axis in tensor_axes(layer):
        tensor = found.get(key)
        tensor = getattr(layer, key) if tensor is None else tensor
        taken = axis.take(tensor, dim)
        if taken is not tensor:
            found[key] = taken
    outputs, active = layer.slim.outputs, layer.slim.statistics.active
    if found and outputs is not None:
        if getattr(layer, "groups", 1) > 1:  # depthwise: others are left alone
            found["groups"] = outputs.size()
        if len(getattr(layer, "normalized_shape", ())) == 1:
            found["normalized_shape"] = (outputs.size(),)
    if active is not None and f"{_OWN[0]}_{active}" in layer._buffers:
        found |= {f"running_{own[5:]}": layer._buffers[f"{own}_{active}"] for own in _OWN}
    return found


def add_statistics(layer: SlimLayer, number: int) -> None:
    """Give a norm statistics of its own for width number `number`, the active one: those of the shared ones."""
    if layer._buffers.get("running_mean") is not None:
        for own in _OWN:
            shared = layer._buffers[f"running_{own[5:]}"]
            assert shared is not None
            taken = shared if layer.slim.outputs is None else layer.slim.outputs.take(shared, 0)
            layer.register_buffer(f"{own}_{number}", taken.detach().clone())


#: Attributes that say how many channels a layer has.
_OUTPUT_SIZES = ("out_channels", "out_features", "num_features", "num_channels", "num_parameters")
_INPUT_SIZES = ("in_channels", "in_features")


def write_active(layer: SlimLayer) -> None:
    """Make the tensors of the active width the layer's own; its class is to be the plain one from then on."""
    for key, value in active_values(layer).items():
        if (parameter := layer._parameters.get(key)) is not None:
            layer._parameters[key] = nn.Parameter(value.detach().clone(), requires_grad=parameter.requires_grad)
        elif key in layer._buffers:
            layer._buffers[key] = value.detach().clone()
        else:
            setattr(layer, key, value)
    slim = layer.slim
    depthwise = getattr(layer, "groups", 1) > 1
    for axis, sizes in ((slim.outputs, _OUTPUT_SIZES), (slim.outputs if depthwise else slim.inputs, _INPUT_SIZES)):
        for key in sizes:
            if axis is not None and isinstance(vars(layer).get(key), int):
                setattr(layer, key, axis.size())
    for key in [key for key in layer._buffers if key.startswith(_OWN)]:
        del layer._buffers[key]
