"""The vanishing ReLU: an activation that training turns into the identity."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.algebra.convmap import ConvMap
from growshrink.errors import GrowShrinkError, check_model


@register_notrace_module  # stays a module in timm's fx feature extractors, where set_lambda then finds it
class VanishingReLU(nn.Module):
    r"""ReLU whose negative side fades in as `lam` falls from 1 to 0.

    .. math:: f(x) = x \text{ if } x > 0 \text{ else } (1 - \lambda) x

    `lam = 1` is ReLU (of finite values; -inf gives NaN), `lam = 0` is the identity bit for bit (infinities, NaN and
    signed zeros included). The same function as `lam * relu(x) + (1 - lam) * x`, without the `0 * inf` that form has
    at `lam = 0` and without its in-place trap (`relu_` would overwrite the `x` of the second term).

    `lam` is a 0-dim float32 buffer: it travels with the state_dict and across devices, `torch.compile` does not
    recompile when it changes, and a cast of the model to another dtype leaves it float32.

    Args:
        lam: Initial value, in [0, 1].
        device: Where the buffer is made.

    Source: deep training of VanillaNet (arXiv:2305.12972, eq. 1), written as a leaky ReLU.
    """

    #: `lam` is 0 and stays so: a map may be taken of it without reading it (see growshrink.collapse_online).
    held = False

    def __init__(self, lam: float = 1.0, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.lam: Tensor  # declared here: TorchScript cannot read an annotation of the class
        self.register_buffer("lam", torch.full((), check_lambda(lam), dtype=torch.float32, device=device))

    def reset_parameters(self) -> None:
        """Back to ReLU (what a fresh module is)."""
        self.lam.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape and dtype."""
        if not torch.jit.is_scripting():
            if self._lam_is_free_to_read(x):
                return F.leaky_relu(x, 1.0 - float(self.lam))
        # The cast comes first: in the other order torch.fx would bake lam into its graph as a constant.
        return F.prelu(x, (1 - self.lam.to(x.dtype)).reshape(1))

    def linear_map(self, channels: int, dtype: torch.dtype) -> ConvMap:
        """What it is at `lam = 0`, on so many channels."""
        return ConvMap.identity(channels, dtype, self.lam.device)

    @torch.jit.unused
    def _lam_is_free_to_read(self, x: Tensor) -> bool:
        # Eager on the CPU, leaky_relu with a Python slope is 3 times as fast as prelu with a tensor slope
        # (tools/benchmark.py). Anywhere else the read would be a sync, a graph break or a baked-in constant.
        return (
            type(x) is Tensor
            and x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )

    def extra_repr(self) -> str:
        """`lam=...` in the printed model."""
        return "lam=meta" if self.lam.is_meta else f"lam={float(self.lam):g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VanishingReLU:
        before = self.lam
        super()._apply(fn, recurse)
        if self.lam.dtype != torch.float32:  # model.half() moves lam but must not round it
            self.lam = before.to(self.lam.device)
        return self


def check_lambda(value: float) -> float:
    """`value` if it is a legal lam; GrowShrinkError otherwise (NaN included)."""
    if not 0.0 <= value <= 1.0:
        raise GrowShrinkError(f"lam={value!r}: must lie in [0, 1] (1 = ReLU, 0 = identity).")
    return float(value)


def vanishing(model: nn.Module) -> Iterator[tuple[str, VanishingReLU]]:
    """The vanishing activations of a model with their dotted names."""
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, VanishingReLU):
            yield name, module


def set_lambda(model: nn.Module, value: float) -> int:
    """Set `lam` of every vanishing activation in `model`; returns how many there were (0 in a plain net).

    Raises:
        ValueError: `value` is not in [0, 1], or is not 0 and the branches are collapsed. Nothing was set.
    """
    value = check_lambda(value)
    found = list(vanishing(model))
    if value and (held := [name for name, act in found if act.held]):
        raise ValueError(
            f"lam={value!r}: {held[0]} is part of a kernel, so its lam is 0 (growshrink.collapse_online). "
            "growshrink.expand_online makes it an activation again."
        )
    for _, act in found:
        act.lam.fill_(value)
    return len(found)


def get_lambda(model: nn.Module) -> dict[str, float]:
    """`{dotted name: lam}` of every vanishing activation in `model`. Reads from the device: not for a training step."""
    return {name: float(act.lam) for name, act in vanishing(model)}
