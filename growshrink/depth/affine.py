"""Is a net an affine map of its input, which module makes it another, and the single layer that it is if so.

Tested is what the net *does*, not what it is made of.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from growshrink.algebra.dataflow import InputSize, trace
from growshrink.base.copying import copy_net
from growshrink.errors import GrowShrinkError, NotLinearError, check_model
from growshrink.layers.activations import vanishing
from growshrink.proofs._compare import EXACT_FLOAT64
from growshrink.proofs.probes import random_images
from growshrink.transforms._fuse import relative_error

#: Sizes of probes, tried in turn: large ones get past a bias that keeps an activation on one side, and its own bounds.
SCALES = (1.0, 1e6)


@torch.no_grad()
def affinity_defect(model: nn.Module, input_size: InputSize | None = None, *, seed: int = 0) -> float:
    r"""How far a net is from being affine: 0 up to rounding if it is, of order 1 for a net with activations.

    .. math:: \max |f(a) + f(b) - f(a + b) - f(0)| \; / \; \max |f(a) - f(0)|

    Computed on a copy, in eval mode and float64, with every lam as it is, for random images a and b, and if these show
    nothing for images a million times as large. `input_size` is `(C, H, W)`; None takes the model's own.

    >>> gs.depth.affinity_defect(nn.Conv2d(3, 4, 3), (3, 8, 8)) < 1e-12, gs.depth.affinity_defect(net) > 0.01
    (True, True)
    """
    replica, images = _in_float64(model, input_size, 4, seed)
    return _defect(replica, (images,), {}, seed)


@torch.no_grad()
def nonaffine_modules(model: nn.Module, input_size: InputSize | None = None, *, seed: int = 0) -> dict[str, float]:
    """The modules that keep a net from being affine, with their own defects, in the order in which they run.

    Only the innermost are named. Empty if the net is affine, whatever its parts. Arguments: see `affinity_defect`.

    >>> list(gs.depth.nonaffine_modules(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (3, 8, 8)))
    ['1']
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
    defects = [0.0]
    for scale in SCALES:
        if defects[-1] <= EXACT_FLOAT64:
            defects.append(_defect_at(scale, call, args, kwargs, seed))
    return defects[-1]


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


ROWS = 64  # of the matrix that are computed at a time


def collapse(model: nn.Module, input_size: InputSize) -> nn.Sequential:
    r"""An affine net as `nn.Flatten` and one `nn.Linear`: for images of this size, exactly the same function.

    Row k of the weight is the gradient of output k with respect to the image, and the bias is the output for a black
    image: :math:`A_k = \nabla_x f_k(0), b = f(0)`. Whether the net is affine is tested, not assumed.

    `model` is any net that maps images (N, C, H, W) to (N, K), used as in eval mode, `input_size` is `(C, H, W)`. The
    result, `nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, K))`, computed in float64, is on the model's device, in
    its dtype, in eval mode.

    Raises:
        NotLinearError: The net is not affine; names the first module that is not.

    >>> gs.collapse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)), (3, 8, 8))[1]
    Linear(in_features=192, out_features=5, bias=True)
    """
    check_model(model)
    trace(model, input_size)  # says what is wrong with an image that the net does not take
    replica = copy_net(model).cpu().double().eval().requires_grad_(False)
    x = random_images(input_size, 8, torch.float64, seed=0)
    expected = replica(x.clone())
    if not isinstance(expected, Tensor) or expected.ndim != 2:
        raise GrowShrinkError("collapse needs a net that gives (N, K): one with a classifier, or pooled features.")
    _refuse_nonlinear(replica, input_size)
    weight_KD, bias_K = _jacobian(replica, input_size, expected.shape[1])
    error = relative_error(x.flatten(1) @ weight_KD.T + bias_K, expected)
    if not error <= EXACT_FLOAT64:
        raise NotLinearError(f"the net and the matrix of its gradients at 0 differ by {error:.1e} on random images.")
    like = next(model.parameters(), x)
    linear = nn.utils.skip_init(nn.Linear, weight_KD.shape[1], weight_KD.shape[0], device=like.device, dtype=like.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight_KD)
        linear.bias.copy_(bias_K)
    return nn.Sequential(nn.Flatten(), linear).eval()


def _refuse_nonlinear(model: nn.Module, input_size: InputSize) -> None:
    lams = {name: float(act.lam) for name, act in vanishing(model) if float(act.lam) != 0}
    culprits = nonaffine_modules(model, input_size)
    if not culprits:  # a lam may be too small to be felt, and is alive nevertheless
        ran = trace(model, input_size).calls
        culprits = {name: lam for name, lam in lams.items() if ran.get(name)}
    if not culprits:
        return
    name, defect = next(iter(culprits.items()))
    module = model.get_submodule(name)
    lam = getattr(module, "lam", None)
    advice = "build the net without activations (a ReduceNet with linear=True), and see that none works in place"
    if isinstance(lam, Tensor) and float(lam) != 0:
        advice = f"its lam is {float(lam):g}; growshrink.set_lambda(model, 0), or train until the schedule is there"
    more = f" (and {len(culprits) - 1} more)" if len(culprits) > 1 else ""
    raise NotLinearError(
        f"{name or 'the model itself'} ({type(module).__name__}) is not affine{more}, relative defect {defect:.1e} (of "
        f"the whole net {affinity_defect(model, input_size):.1e}), so the net is not one layer. What to do: {advice}."
    )


def _jacobian(model: nn.Module, input_size: InputSize, num_outputs: int) -> tuple[Tensor, Tensor]:
    """`(K, C * H * W)` and `(K,)`: one vector-Jacobian product per output, at 0."""
    rows = []
    for start in range(0, num_outputs, ROWS):
        count = min(ROWS, num_outputs - start)
        black = torch.zeros(count, *input_size, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            # Image i asks for output start + i; in eval mode no image sees another.
            picked = model(black).diagonal(start).sum()
        rows.append(torch.autograd.grad(picked, black)[0].flatten(1))
    with torch.no_grad():
        bias_K = model(torch.zeros(1, *input_size, dtype=torch.float64))[0]
    return torch.cat(rows), bias_K
