"""Modules that train several linear branches at the cost of one convolution: their kernel is merged in every step.

A branch without a live activation, whose norms have frozen statistics, is a kernel that depends on its parameters
alone: output and gradients are the same. Grown modules change their class while they are online, and nothing else.

Source: online re-parameterisation (OREPA, Hu et al., arXiv:2204.00826) and collapsed training (SESR, Bhardwaj et al.,
arXiv:2103.09404); norms and the mix with branches that are not linear are ours.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from growshrink.algebra.convmap import ConvMap
from growshrink.errors import CollapseError
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.grown import GrownConv2d, GrownConv2dSame


class OnlineModule(nn.Module):
    """What the online classes share.

    Attributes:
        collapsed: Run the merged kernel; False runs the same parts one by one, as before.
        timing: Milliseconds of a step of the branch form and of the merged form, where they were measured.
    """

    collapsed = True
    timing: tuple[float, float] | None = None

    def held_parts(self) -> Iterator[nn.Module]:
        """The linear parts, whose statistics are frozen and whose activations are held at lam = 0."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        """Train or evaluate, but the norms of the linear parts always use their running statistics."""
        super().train(mode)
        for part in self.held_parts():
            part.eval()
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        raise CollapseError("merged kernels are no TorchScript: growshrink.expand_online comes before TorchScript.")


@register_notrace_module  # the kernel is made from parameters, whose values are not to be traced
class OnlineConv2d(OnlineModule, GrownConv2d):
    """A `GrownConv2d` whose linear branches (`branch.merged`) run as part of its kernel, and the others beside it."""

    def held_parts(self) -> Iterator[nn.Module]:
        return (branch for branch in self.branches if branch.merged)

    def forward(self, input: Tensor) -> Tensor:
        if not self.collapsed:
            return super().forward(input)
        x = self.padded(input)
        y = self._conv_forward(x, *merged(self, self._map))
        for branch in self.branches:
            if not (branch.merged or branch.skipped):
                y = y + branch(x, y)
        return y

    def _map(self, dtype: torch.dtype) -> ConvMap:
        total = ConvMap.from_conv2d(self, dtype)
        for branch in self.branches:
            if branch.merged and not branch.skipped:
                total = total + branch.as_convmap(total)
        return total


@register_notrace_module
class OnlineConv2dSame(OnlineConv2d, GrownConv2dSame):
    """`OnlineConv2d` for a `GrownConv2dSame`."""


@register_notrace_module
class OnlineBottleneck(OnlineModule, PureBottleneck):
    """A `PureBottleneck` that runs as one convolution."""

    def held_parts(self) -> Iterator[nn.Module]:
        return self.children()

    def forward(self, x: Tensor) -> Tensor:
        if not self.collapsed:
            return super().forward(x)
        return self.conv._conv_forward(x, *merged(self, self.as_convmap))


def merged(module: nn.Module, make: Callable[[torch.dtype], ConvMap]) -> tuple[Tensor, Tensor | None]:
    """Kernel and bias of a map in the dtype of the module's parameters, computed in float32 at least."""
    like = next(module.parameters())
    with no_autocast(like.device.type):
        total = make(torch.promote_types(like.dtype, torch.float32))
    return total.kernel.to(like.dtype), total.bias.to(like.dtype) if total.biased else None


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Leave autocast, for what must be computed in the tensors' own precision."""
    if not torch.amp.is_autocast_available(device_type):  # meta
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
