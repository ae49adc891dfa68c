"""Where the channels that have a width lie: which axis of which tensor each of them is an entry of."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from growshrink.branches import Bottleneck
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.equilibrium import ImplicitReLU
from growshrink.layers.grown import GrownConv2d
from growshrink.layers.slim import ChannelGroup, tensor_axes
from growshrink.layers.widths import Slots


class Axis(NamedTuple):
    """Tensor `name` of `module` has one entry a middle channel along `dim`, in `groups` blocks.

    Along dim 1, that of the pointwise kernel, each output channel sees the block of its own group only. Of a group of a
    slim net it has `each` entries for each of the `channels`, from `start` on.
    """

    module: nn.Module
    name: str
    dim: int
    groups: int
    start: int = 0
    each: int = 1
    channels: int = 0

    @property
    def tensor(self) -> Tensor | None:
        """The tensor as it is now (None: a norm without it)."""
        return getattr(self.module, self.name)

    def beyond(self, tensor: Tensor, width: int) -> Tensor:
        """The entries of `tensor`, shaped like this one, that a net of `width` does not use; a view."""
        if self.channels:
            return tensor.narrow(self.dim, self.start + width * self.each, (self.channels - width) * self.each)
        if self.dim == 1:
            return tensor[:, width // self.groups :]
        return tensor.unflatten(0, (self.groups, -1))[:, width // self.groups :]

    def permuted(self, tensor: Tensor, order_GK: Tensor) -> Tensor:
        """`tensor`, shaped like this one, in another order of its channels; `order_GK` permutes within each group."""
        groups, length = order_GK.shape
        if self.dim == 1:
            blocks = tensor.unflatten(0, (groups, -1))
            index = order_GK.view(groups, 1, length, *(1,) * (blocks.dim() - 3))
            return blocks.take_along_dim(index, 2).flatten(0, 1)
        starts = torch.arange(groups, device=order_GK.device)[:, None] * length
        return tensor.index_select(0, (order_GK + starts).flatten())


def slot_axes(slots: Slots) -> dict[str, list[Axis]]:
    """By slot, every parameter and buffer with an axis of its channels; WidthError where they lie in no order."""
    found: dict[str, list[Axis]] = {}
    for slot_name, slot in slots:
        body = slot.body
        found[slot_name] = list(axes(body)) if isinstance(body, PureBottleneck) else []
        for layer in slots.layers.get(slot_name, {}).values():
            assert isinstance(body, ChannelGroup)
            found[slot_name] += [
                Axis(layer, key, dim, 1, start, each, slot.full)
                for key, dim, axis in tensor_axes(layer)
                for start, each in axis.spans(body)
            ]
    return found


def axes(body: PureBottleneck) -> Iterator[Axis]:
    """Every parameter and buffer of `body` that has an axis of middle channels."""
    groups, conv, norms = body.conv.groups, body.conv, [body.bn]
    yield Axis(conv, "weight", 0, groups)
    if isinstance(conv, GrownConv2d):  # the outputs of its branches are middle channels as well
        for branch in conv.branches:
            assert isinstance(branch, Bottleneck), "only `nest` grows inside a branch, and it attaches bottlenecks"
            yield Axis(branch.body.pointwise, "weight", 0, groups)
            norms.append(branch.norm)
    for norm in norms:
        for name in ("weight", "bias", "running_mean", "running_var"):
            if hasattr(norm, name):  # a bottleneck without norms has an identity there
                yield Axis(norm, name, 0, groups)
    if isinstance(body.act, ImplicitReLU):
        yield from (Axis(body.act.recurrence, "weight", dim, groups) for dim in (0, 1))
    yield Axis(body.pointwise, "weight", 1, groups)
