"""Modules that train several linear branches at the cost of one layer: their kernel is merged in every step.

A branch without a live activation, whose norms have frozen statistics, is a kernel that depends on its parameters
alone: output and gradients are the same. Kernels in a row that on few pixels cost less MACs than their product run
beside it. Grown modules change their class while they are online, and nothing else.

Source: online re-parameterisation (OREPA, Hu et al., arXiv:2204.00826) and collapsed training (SESR, Bhardwaj et al.,
arXiv:2103.09404); norms and the mix with branches that are not linear are ours.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.algebra.convmap import ConvMap, cheaper_apart, compose
from growshrink.errors import CollapseError
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.grown import Grown, GrownConv2d, GrownConv2dSame
from growshrink.layers.grown_linear import GrownLinear


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
        return (part for part in self.branches if part.merged) if isinstance(self, Grown) else self.children()

    def train(self, mode: bool = True) -> Any:
        """Train or evaluate, but the norms of the linear parts always use their running statistics."""
        super().train(mode)
        for part in self.held_parts():
            part.eval()
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        raise CollapseError("merged kernels are no TorchScript: growshrink.expand_online comes before TorchScript.")


class OnlineLayer(OnlineModule, Grown):
    """A grown layer whose linear branches (`branch.merged`) run as part of its kernel, and the others beside it."""

    def maps(self, dtype: torch.dtype, pixels: float = math.inf) -> tuple[ConvMap, list[list[ConvMap]]]:
        """The layer with its linear branches, and of those the chains that on so many pixels are not multiplied out."""
        total, rest = ConvMap.from_conv2d(self.as_conv(), dtype), []
        if isinstance(self, nn.Linear):  # whose kernel was detached
            total = replace(total, kernel=self.weight.to(dtype)[:, :, None, None])
        linear = [branch for branch in self.branches if branch.merged and not branch.skipped]
        if not all(branch.parallel for branch in linear):  # one is to find the others in the output
            pixels = math.inf
        for branch in linear:
            for chain in branch.as_chains(total):
                if cheaper_apart(chain, pixels):
                    rest.append(chain)
                else:
                    total = total + compose(chain)
        return total, rest

    def run_merged(self, image: Tensor, run: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """The output for an image, where `run` applies the layer with a given weight and bias."""
        with no_autocast(image.device.type):
            total, rest = self.maps(torch.promote_types(self.weight.dtype, torch.float32), image[:, 0].numel())
            weight, bias = (tensor.to(self.weight.dtype) for tensor in self.values_of(total))
        out = run(weight, bias if total.biased else None)
        for chain in rest:
            out = out + reduce(lambda x, part: part(x), chain, image)
        for branch in self.branches:
            if not (branch.merged or branch.skipped):
                out = out + branch(image, out)
        return out


@register_notrace_module  # the kernel is made from parameters, whose values are not to be traced
class OnlineConv2d(OnlineLayer, GrownConv2d):
    """A `GrownConv2d` that is online."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.collapsed:
            return super().forward(input)
        x = self.padded(input)
        return self.run_merged(x, partial(self._conv_forward, x))


@register_notrace_module
class OnlineConv2dSame(OnlineConv2d, GrownConv2dSame):
    """`OnlineConv2d` for a `GrownConv2dSame`."""


@register_notrace_module
class OnlineLinear(OnlineLayer, GrownLinear):
    """A `GrownLinear` that is online."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.collapsed or input.numel() == 0:
            return super().forward(input)
        out = self.run_merged(self._image(input), lambda *values: self._image(F.linear(input, *values)))
        return out.permute(0, 2, 3, 1).reshape(*input.shape[:-1], -1)


@register_notrace_module
class OnlineBottleneck(OnlineModule, PureBottleneck):
    """A `PureBottleneck` that runs as one convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.collapsed:
            return super().forward(x)
        dtype = self.pointwise.weight.dtype
        with no_autocast(x.device.type):
            total = self.as_convmap(torch.promote_types(dtype, torch.float32))
        return self.conv._conv_forward(x, total.kernel.to(dtype), total.bias.to(dtype) if total.biased else None)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Leave autocast, for what must be computed in the tensors' own precision."""
    if not torch.amp.is_autocast_available(device_type):  # meta
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
