"""What training makes linear: the vanishing ReLU becomes the identity, fading numbers their mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.algebra.convmap import ConvMap
from growshrink.base.limits import Share, check_value
from growshrink.errors import AlgebraError, GrowShrinkError, check_model


class Vanishing(nn.Module):
    """Something that does not merge and fades, as `lam` (at first in [0, 1]) falls from 1 to 0, into what does.

    `lam` is a 0-dim float32 buffer: it travels with the state_dict and across devices, `torch.compile` does not
    recompile when it changes, and a cast of the model to another dtype leaves it (and other buffers) float32.
    """

    #: `lam` is 0 and stays so: a map may be taken of it without reading it (see growshrink.collapse_online).
    held = False

    def __init__(self, lam: float = 1.0, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.lam: Tensor  # declared here: TorchScript cannot read an annotation of the class
        self.register_buffer("lam", torch.full((), check_lambda(lam), dtype=torch.float32, device=device))

    def reset_parameters(self) -> None:
        """Back to full strength (what a fresh module has)."""
        self.lam.fill_(1.0)

    @torch.jit.unused
    def check_vanished(self) -> None:
        """AlgebraError unless lam is 0."""
        # a training step must not wait for a device, nor a compiled graph break, to read what is known
        if not (self.held and (self.lam.device.type != "cpu" or torch.compiler.is_compiling())):
            if (lam := float(self.lam)) != 0.0:
                raise AlgebraError(f"lam is {lam!r}, not 0: the activation is still alive.")

    def extra_repr(self) -> str:
        """`lam=...` in the printed model."""
        return "lam=meta" if self.lam.is_meta else f"lam={float(self.lam):g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Vanishing:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != torch.float32:  # model.half() must not round it
                self._buffers[name] = old.to(new.device)
        return self


@register_notrace_module  # stays a module in timm's fx feature extractors, where set_lambda then finds it
class VanishingReLU(Vanishing):
    r"""ReLU whose negative side fades in as `lam` falls from 1 to 0.

    .. math:: f(x) = x \text{ if } x > 0 \text{ else } (1 - \lambda) x

    `lam = 1` is ReLU (of finite values; -inf gives NaN), `lam = 0` is the identity bit for bit (infinities, NaN and
    signed zeros included: no `lam * relu(x) + (1 - lam) * x`, with its `0 * inf`).

    Source: deep training of VanillaNet (arXiv:2305.12972, eq. 1), written as a leaky ReLU.

    >>> act = gs.layers.VanishingReLU()
    >>> gs.set_lambda(act, 0.25), act(torch.tensor([-1.0, 2.0]))
    (1, tensor([-0.7500,  2.0000]))
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape and dtype."""
        if not torch.jit.is_scripting():  # TorchScript compiles no `and` of these two
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


@register_notrace_module
class VanishingAct(Vanishing):
    """Any activation `act` that works on every number alone, fading to the identity as `VanishingReLU` does."""

    def __init__(self, act: nn.Module, lam: float = 1.0, device: torch.device | str | None = None) -> None:
        super().__init__(lam, device)
        self.act = act
        if hasattr(act, "inplace"):
            act.inplace = False  # type: ignore[assignment] # x is needed beside act(x)

    linear_map = VanishingReLU.linear_map

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape and dtype."""
        return torch.lerp(x, self.act(x), self.lam.to(x.dtype))


@register_notrace_module
class Fading(Vanishing):
    r"""Numbers that depend on the data, fading to their running mean as `lam` falls from 1 to 0.

    .. math:: c = m + \lambda (g - m)

    `lam = 1` is g and `lam = 0` is m, bit for bit (of finite g). m, `size` numbers that begin at `start`, follows the
    batches while the module trains and lam is above 0, and rests from then on; ranks average it as they do the
    statistics of batch norms.

    >>> fade = Fading(2, start=0.5, lam=0.0)
    >>> fade(torch.tensor([[0.0, 3.0]])).tolist()
    [[0.5, 0.5]]
    """

    #: Share of a batch in the running mean, as batch norms have it.
    MOMENTUM = 0.1
    #: Buffers that ranks average in every update; see `growshrink.base.ranks`.
    averaged = ("mean",)

    def __init__(self, size: int, start: float = 0.0, lam: float = 1.0) -> None:
        super().__init__(lam)
        self.mean: Tensor
        self.register_buffer("mean", torch.full((size,), start, dtype=torch.float32))

    def forward(self, g: Tensor) -> Tensor:
        """`(N, size)` -> the same shape and dtype."""
        if self.training and len(g):
            with torch.no_grad():
                self.mean.lerp_(g.detach().float().mean(0), self.MOMENTUM * (self.lam > 0))
        return torch.lerp(self.mean.to(g.dtype).expand_as(g), g, self.lam.to(g.dtype))

    def constant(self, dtype: torch.dtype) -> Tensor:
        """What it is for every image, `(size,)`; AlgebraError unless lam is 0."""
        self.check_vanished()
        return self.mean.to(dtype)


def check_lambda(value: float) -> float:
    """`value` if it is a legal lam; GrowShrinkError otherwise (NaN included)."""
    check_value("lam", value, Share, GrowShrinkError)
    return float(value)


def vanishing(model: nn.Module) -> Iterator[tuple[str, Vanishing]]:
    """The vanishing activations of a model with their dotted names."""
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, Vanishing):
            yield name, module


def set_lambda(model: nn.Module, value: float) -> int:
    """Set `lam` of every vanishing activation in `model`; returns how many there were.

    Where there are none (linear branches, what `fuse` or `drop` returned) it does nothing: a loop may run on.

    Raises:
        GrowShrinkError: The net was never grown.
        ValueError: `value` is not in [0, 1], or is not 0 and the branches are collapsed. Nothing was set.

    >>> gs.set_lambda(gs.grow(net), 0.5)
    3
    """
    count = follow_lambda(model, value)
    if not count and not was_grown(model):
        raise GrowShrinkError(f"lam={value!r}: {NEVER_GROWN}")
    return count


def follow_lambda(model: nn.Module, value: float) -> int:
    """`set_lambda` for a schedule's own loop, in which a net that was never grown is no mistake."""
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


#: What is said of a net that no branch has ever been on.
NEVER_GROWN = "the net was never grown. growshrink.grow returns a copy: use what it returns, or inplace=True."


def was_grown(model: nn.Module) -> bool:
    """Whether a net has branches, or had some before `fuse` or `drop`, which leave their mark on what they return."""
    return any(getattr(module, "was_grown", False) for module in model.modules())


def get_lambda(model: nn.Module) -> dict[str, float]:
    """`{dotted name: lam}` of every vanishing activation in `model`. Reads from the device: not for a training step.

    >>> set(gs.get_lambda(gs.grow(net)).values())
    {1.0}
    """
    return {name: float(act.lam) for name, act in vanishing(model)}
