"""Modules that train several linear branches at the cost of one layer: their kernel is merged in every step.

A branch without a live activation, whose norms have frozen statistics, is a kernel that depends on its parameters
alone: output and gradients are the same. Kernels in a row that on few pixels cost less MACs than their product run
beside it. Grown modules change their class while they are online, and nothing else.

Source: online re-parameterisation (OREPA, Hu et al., arXiv:2204.00826) and collapsed training (SESR, Bhardwaj et al.,
arXiv:2103.09404); norms and the mix with branches that are not linear are ours.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

Maps = tuple[ConvMap, list[list[ConvMap]]]


class OnlineModule(nn.Module):
    """What the online classes share.

    Attributes:
        collapsed: Run the merged kernel; False runs the same parts one by one, as before.
        timing: Milliseconds of a step of the branch form and of the merged form, where they were measured.
        pixels: How many there were, all images together, in the last forward pass; 0 before the first.
        held: What `merge_once` merged, and for which state.
    """

    collapsed = True
    timing: tuple[float, float] | None = None
    pixels: int = 0
    held: tuple[Any, Maps] | None = None
    maps: Callable[..., Maps]

    def maps_for(self, pixels: int) -> Maps:
        """The maps for so many pixels, in float32 at least; what `merge_once` holds of them where it is still right."""
        if not torch.compiler.is_compiling():
            self.pixels = int(pixels)
            if self.held is not None and self.held[0] == self.merge_state():
                return self.held[1]
        like = next(self.parameters())
        with no_autocast(like.device.type):
            return self.maps(torch.promote_types(like.dtype, torch.float32), pixels)

    def merge_state(self) -> tuple[Any, ...]:
        """What the maps depend on: pixels, widths, and the version of every parameter."""
        parts = [(vars(part).get("width"), vars(part).get("skipped")) for part in self.modules()]
        return self.pixels, parts, [(id(p), p._version) for p in self.parameters()]

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

    def maps(self, dtype: torch.dtype, pixels: float = math.inf) -> Maps:
        """The layer with its linear branches, and of those the chains that on so many pixels are not multiplied out."""
        total, rest = ConvMap.from_conv2d(self.as_conv(), dtype), []
        if isinstance(self, nn.Linear):  # whose kernel was detached
            total = replace(total, kernel=self.weight.to(dtype)[:, :, None, None])
        linear = [branch for branch in self.branches if branch.merged and not branch.skipped]
        if not all(branch.parallel for branch in linear):  # one is to find the others in the output
            pixels = math.inf
        for branch in linear:
            for chain in branch.as_chains(total):
                if cheaper_apart(chain, pixels, total.kernel.numel()):
                    rest.append(chain)
                else:
                    total = total + compose(chain)
        return total, rest

    def run_merged(self, image: Tensor, run: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """The output for an image, where `run` applies the layer with a given weight and bias."""
        total, rest = self.maps_for(image[:, 0].numel())
        weight, bias = (tensor.to(self.weight.dtype) for tensor in self.values_of(total))
        out = run(weight, bias if total.biased else None)
        for chain in rest:
            out = out + reduce(lambda x, part: part(x), chain, image).to(out.dtype)  # norms are no part of autocast
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

    def maps(self, dtype: torch.dtype, pixels: float = math.inf) -> Maps:
        """As in `OnlineLayer`."""
        return self.as_convmap(dtype), []

    def forward(self, x: Tensor) -> Tensor:
        if not self.collapsed:
            return super().forward(x)
        total, dtype = self.maps_for(x[:, 0].numel())[0], self.pointwise.weight.dtype
        return self.conv._conv_forward(x, total.kernel.to(dtype), total.bias.to(dtype) if total.biased else None)


@contextmanager
def merge_once(model: nn.Module) -> Iterator[None]:
    """Merge all kernels of a collapsed net first, once for all forward and backward passes inside.

    Gradients are those of merging in every pass; the branches have theirs once the block ends, so clip and step behind
    it. One pass is a little faster so, accumulated ones more. A layer whose image size, width or weights change inside
    merges on its own, as in its first pass ever, and compiled. No `torch.autograd.grad`, no second derivative inside.

    >>> online = gs.collapse_online(gs.grow(net, "repvgg"), choose="always").train()
    >>> with gs.layers.merge_once(online):
    ...     for images in torch.randn(2, 8, 3, 32, 32):
    ...         online(images).sum().backward()
    """
    layers = [m for m in model.modules() if isinstance(m, OnlineModule) and m.collapsed and m.pixels]
    made: dict[OnlineModule, dict[Tensor, Tensor]] = {layer: {} for layer in layers}

    def cut(layer: OnlineModule, of: ConvMap) -> ConvMap:
        tensors = (of.kernel, of.bias)
        kernel, bias = (t if t.is_leaf else made[layer].setdefault(t, t.detach().requires_grad_()) for t in tensors)
        return replace(of, kernel=kernel, bias=bias)

    try:
        for layer in layers:
            with torch.enable_grad():
                total, rest = layer.maps_for(layer.pixels)
            rest = [[cut(layer, part) for part in chain] for chain in rest]
            layer.held = layer.merge_state(), (cut(layer, total), rest)
        yield
        while made:  # layer by layer, so that what one kept is free when the next begins
            layer, leaves = made.popitem()
            reached = {tensor: leaf.grad for tensor, leaf in leaves.items() if leaf.grad is not None}
            with no_autocast(next(layer.parameters()).device.type):
                torch.autograd.backward([*reached], [*reached.values()])
    finally:
        for layer in layers:
            layer.__dict__.pop("held", None)


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Leave autocast, for what must be computed in the tensors' own precision."""
    if not torch.amp.is_autocast_available(device_type):  # meta
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
