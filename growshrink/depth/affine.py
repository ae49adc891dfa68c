"""Is a net an affine map of its input, and if not, which module makes it another? Asked is what the net *does*."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from growshrink.algebra.dataflow import InputSize, trace
from growshrink.base.copying import copy_net
from growshrink.proofs._compare import EXACT_FLOAT64
from growshrink.proofs.probes import random_images

#: Sizes of probes, tried in turn: large ones get past a bias that keeps an activation on one side, and its own bounds.
SCALES = (1.0, 1e6)


@torch.no_grad()
def affinity_defect(model: nn.Module, input_size: InputSize | None = None, *, seed: int = 0) -> float:
    r"""How far a net is from being affine: 0 up to rounding if it is, of order 1 for a net with activations.

    .. math:: \max |f(a) + f(b) - f(a + b) - f(0)| \; / \; \max |f(a) - f(0)|

    Computed on a copy, in eval mode and float64, with every lam as it is, for random images a and b, and if these show
    nothing for images a million times as large. `input_size` is `(C, H, W)`; None takes the model's own.
    """
    replica, images = _in_float64(model, input_size, 4, seed)
    return _defect(replica, (images,), {}, seed)


@torch.no_grad()
def nonaffine_modules(model: nn.Module, input_size: InputSize | None = None, *, seed: int = 0) -> dict[str, float]:
    """The modules that keep a net from being affine, with their own defects, in the order in which they run.

    Only the innermost are named. Empty if the net is affine, whatever its parts are. Arguments as for
    `affinity_defect`.
    """
    replica, images = _in_float64(model, input_size, 2, seed)
    if _defect(replica, (images,), {}, seed) <= EXACT_FLOAT64:
        return {}
    calls: dict[str, tuple[Any, Any]] = {}

    def record(module: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        calls.setdefault(name, (args, kwargs))

    hooks = [
        module.register_forward_pre_hook(partial(record, name=name), with_kwargs=True)
        for name, module in replica.named_modules()
    ]
    replica(images.clone())  # a net may normalise its input in place
    for hook in hooks:
        hook.remove()

    found: dict[str, float] = {}

    def visit(name: str) -> bool:
        """Whether the module, called as it was, is not affine; notes who is to blame."""
        module = replica.get_submodule(name)
        defect = _defect(module, *calls[name], seed)
        if defect <= EXACT_FLOAT64:
            return False
        inside = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        ran = sorted((child for child in inside if child in calls), key=list(calls).index)
        if not any([visit(child) for child in ran]):  # a list: all of them are to be noted
            found[name] = defect
        return True

    visit("")
    return found


def _in_float64(model: nn.Module, input_size: InputSize | None, num_images: int, seed: int) -> tuple[nn.Module, Tensor]:
    """A copy to probe, and random images to start from."""
    size = trace(model, input_size).input_size
    return copy_net(model).cpu().double().eval(), random_images(size, num_images, torch.float64, seed)


def _defect(call: Callable[..., Any], args: Any, kwargs: Any, seed: int) -> float:
    """The affinity defect of a call, at the first of the scales that shows one."""
    defect = 0.0
    for scale in SCALES:
        defect = _defect_at(scale, call, args, kwargs, seed)
        if not defect <= EXACT_FLOAT64:
            break
    return defect


def _defect_at(scale: float, call: Callable[..., Any], args: Any, kwargs: Any, seed: int) -> float:
    """The affinity defect of a call, probed with noise `scale` times as large as the arguments it was given."""
    generator = torch.Generator().manual_seed(seed)

    def noise(value: Any) -> Any:
        if not _is_floating(value):
            return value
        size = scale * float(value.abs().max().clamp_min(1.0))
        return size * torch.randn(value.shape, generator=generator, dtype=value.dtype)

    def outputs(values: Any) -> list[Tensor]:
        args, kwargs = values
        return [out for out in tree_leaves(call(*args, **kwargs)) if _is_floating(out)]

    first, second = tree_map(noise, (args, kwargs)), tree_map(noise, (args, kwargs))
    both = tree_map(lambda a, b: a + b if _is_floating(a) else a, first, second)
    zero = tree_map(lambda a: torch.zeros_like(a) if _is_floating(a) else a, first)
    worst = 0.0
    for a, b, ab, nothing in zip(*map(outputs, (first, second, both, zero)), strict=True):
        gap = float((a + b - ab - nothing).abs().max())
        reach = float((a - nothing).abs().max())
        if gap != gap or reach != reach:
            return float("nan")
        worst = max(worst, gap / reach if reach > 0 else float("inf") if gap > 0 else 0.0)
    return worst


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
