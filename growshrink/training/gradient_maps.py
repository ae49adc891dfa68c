"""Growth in the gradient: linear branches as a fixed linear map on the gradient of the kernel they would merge into.

Branches b that are linear in what they train add A_b(theta_b) to their kernel: W = sum over b of A_b(theta_b). One
update by SGD of every theta_b is then one update of W alone,

    G <- (sum over b of A_b A_b^T) dL/dW;   G <- G + decay * W;   the usual momentum of G;   W <- W - lr * (...),

with decay, momentum and Nesterov's form as they are. Training the plain net with that map on its gradient is training
the grown net, to rounding, at the plain net's cost and with nothing to fuse.

AdamW is invariant to the scale of a gradient, so there the map is applied to the update: where every weight of a branch
is one tap of the kernel times a constant a, dW <- (sum of all |a| of the tap) dW, decoupled decay apart; exact but for
Adam's eps, beside which a branch's gradient is a times the kernel's.

Source: gradient re-parameterisation (RepOptimizers, Ding et al., arXiv:2205.15242), for 3x3, 1x1 and identity with
scales; other linear branches, maps that are not elementwise, and the rule for AdamW are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.optim import SGDW, NAdamW
from torch import Tensor, nn

from growshrink.algebra.inputs import ExampleInputs, InputLike
from growshrink.base.copying import copy_net
from growshrink.errors import GradientError, check_model, did_you_mean
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.grown import grown_modules
from growshrink.layers.swaps import expand_online
from growshrink.training.kernel_maps import KernelMap, kernel_map
from growshrink.transforms import fuse

#: Linear in the gradient.
ON_GRADIENT = (torch.optim.SGD, SGDW)
#: Invariant to the gradient's scale, with a decay apart from it.
ON_UPDATE = (torch.optim.AdamW, NAdamW)
#: Options of theirs that are neither.
REFUSED_OPTIONS = ("caution", "corrected_weight_decay", "clipping_threshold")


@dataclass(frozen=True)
class GradientMaps:
    """Linear maps on the gradients of a plain net, by parameter name; see `compile_gradients`.

    A loop that resumes compiles them again from the same grown net, or saves `state_dict`.
    """

    maps: dict[str, KernelMap]

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """Apply the maps in every `optimizer.step()` from now on, without a host sync; returns what detaches them.

        On several ranks the gradients may be averaged before or after: the maps are linear. Clipping comes before the
        step, sees other gradients than the branches', and must be left out.

        Args:
            model: The plain net; not wrapped, as the parameters go by name.
            optimizer: SGD or SGDW (with momentum and decay, Nesterov's or not), where the maps act on the gradient;
                AdamW or NAdamW, where they act on the update.

        Raises:
            GradientError: The optimizer is of another kind, or does not train a mapped parameter; another net's maps.
        """
        parameters, trained = self._parameters(model), [p for group in optimizer.param_groups for p in group["params"]]
        kind, on_update = type(optimizer), type(optimizer) in ON_UPDATE
        if not on_update and kind not in ON_GRADIENT:
            known = ", ".join(cls.__name__ for cls in (*ON_GRADIENT, *ON_UPDATE))
            raise GradientError(f"{kind.__name__}: branches trained by it are no map on the gradient; take {known}.")
        for option in REFUSED_OPTIONS:
            if any(group.get(option) for group in optimizer.param_groups):
                raise GradientError(f"{kind.__name__}: with {option} its updates are not linear in the gradient.")
        for name, parameter in parameters.items():
            if not any(parameter is other for other in trained):
                raise GradientError(f"{name}: the optimizer does not train it. Make it after compile_gradients.")
            if on_update and self.maps[name].update is None:
                raise GradientError(f"{name}: its map is not elementwise, so {kind.__name__} has none; take SGD.")
        hooks = _Hooks({parameter: self.maps[name].beside(parameter) for name, parameter in parameters.items()})
        if not on_update:
            return optimizer.register_step_pre_hook(hooks.map_gradients).remove
        handles = ExitStack()
        handles.callback(optimizer.register_step_pre_hook(hooks.keep).remove)
        handles.callback(optimizer.register_step_post_hook(hooks.map_updates).remove)
        return handles.close

    def state_dict(self) -> dict[str, Any]:
        """Tensors by parameter name."""
        return {name: dict(vars(kernel)) for name, kernel in self.maps.items()}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> GradientMaps:
        """The inverse of `state_dict`."""
        return GradientMaps({name: KernelMap(**values) for name, values in state.items()})

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        named = dict(model.named_parameters())
        for name, kernel in self.maps.items():
            if name not in named:
                raise GradientError(f"{name}: the net has no such parameter to map{did_you_mean(name, named)}")
            if named[name].shape != kernel.factor.shape:
                shape, wanted = tuple(named[name].shape), tuple(kernel.factor.shape)
                raise GradientError(f"{name}: it is {shape}, and its gradient's map is of {wanted}.")
        return {name: named[name] for name in self.maps}


def compile_gradients(
    grown: nn.Module,
    *,
    normalize: bool = True,
    inplace: bool = False,
    input_size: InputLike = None,
    example_inputs: ExampleInputs | None = None,
) -> tuple[nn.Module, GradientMaps]:
    """Turn linear branches into maps on the gradient: the plain net, which trains as the grown net would.

    For branches that are linear in what they train: `BranchSpec(kind=..., norm=None)`, or kinds of your own. Then any
    loop works as it is, without clipping:

    >>> grown = gs.grow(net, gs.BranchSpec(kind="repvgg", norm=None), init="paper")
    >>> plain, maps = gs.compile_gradients(grown)
    >>> optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    >>> detach = maps.attach(plain, optimizer)

    Args:
        grown: A grown net. What its layers and branches do not train (`requires_grad`) is a constant.
        normalize: Divide each layer's map by the mean of its diagonal, so that its learning rate stays what it was;
            False trains exactly as the branches would.
        inplace: Work on `grown` itself; otherwise on a deep copy.
        input_size: See `fuse`.
        example_inputs: See `fuse`.

    Returns:
        The plain net, which computes what `grown` did, and the maps.

    Raises:
        GradientError: Training a branch is no fixed linear map on the gradient: it has norms, live activations, trained
            scales or products of trained factors, or it is a constant that would not decay. Names the module.
        FuseError: See `fuse`.
    """
    check_model(grown)
    modules, maps = grown_modules(expand_online(grown)), {}
    if not modules:
        raise GradientError("the net carries no branches: growshrink.grow returns a copy, was that left unused?")
    for name, module in modules.items():
        if isinstance(module, PureBottleneck):
            raise GradientError(f"{name}: a PureBottleneck is a product of trained factors, and has norms inside.")
        kernel = kernel_map(name, module)
        if kernel is not None:
            maps[f"{name}.weight".lstrip(".")] = kernel.normalized() if normalize else kernel
    return fuse(grown, inplace=inplace, input_size=input_size, example_inputs=example_inputs), GradientMaps(maps)


class _Hooks:
    """What an optimizer calls in its steps."""

    def __init__(self, maps: Mapping[nn.Parameter, KernelMap]) -> None:
        self._maps = maps
        self._before: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def map_gradients(self, *_: object) -> None:
        """Replace gradients by their maps, the elementwise ones in one call."""
        found = [(p.grad, kernel) for p, kernel in self._maps.items() if p.grad is not None]
        if simple := [(grad, kernel.factor) for grad, kernel in found if not kernel.mixes]:
            torch._foreach_mul_(*map(list, zip(*simple, strict=True)))
        for grad, kernel in found:
            if kernel.mixes:
                grad.copy_(kernel(grad))

    @torch.no_grad()
    def keep(self, *_: object) -> None:
        """Keep the parameters as they are before a step."""
        self._before = {p: p.detach().clone() for p in self._maps if p.grad is not None}

    @torch.no_grad()
    def map_updates(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Multiply what has moved the parameters, beside their decay."""
        for group in optimizer.param_groups:
            for parameter in self._before.keys() & group["params"]:
                decayed = self._before[parameter] * (1 - group["lr"] * group["weight_decay"])
                parameter.copy_(torch.addcmul(decayed, parameter - decayed, cast(Tensor, self._maps[parameter].update)))


#: Levels, equally full, that pixels are told apart by.
PIXEL_LEVELS = 16
#: Pixels at most that the limits of the levels are taken from.
SAMPLED_PIXELS = 100_000


@torch.no_grad()
def pixel_maps(model: nn.Module, images_NCHW: Tensor) -> GradientMaps:
    """Scale the gradient of each tap of a kernel by the dependence of the pixel it sees on the pixel its middle sees.

    The dependence is the normalised mutual information I(x; y) / sqrt(H(x) H(y)) of the two pixels of a channel in the
    layer's input, 1 for the middle tap itself; the scales of each layer have mean 1. AdamW takes their square roots, as
    a branch with that scale would have it.

    Args:
        model: Any net; runs in eval mode, on a copy.
        images_NCHW: Some of the training images.

    Source: spatial gradient scaling (arXiv:2303.02733); the estimator is ours.
    """
    net, maps = copy_net(model).eval(), dict[str, KernelMap]()

    def measure(name: str, conv: nn.Conv2d, x_NCHW: Tensor) -> None:
        taps_HW = dependence(x_NCHW, conv)
        factor = (taps_HW / taps_HW.mean()).cpu().expand(conv.weight.shape).contiguous()
        maps[f"{name}.weight".lstrip(".")] = KernelMap(factor, update=factor.sqrt())

    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d) and max(conv.kernel_size) > 1:
            conv.register_forward_pre_hook(lambda conv, args, name=name: measure(name, conv, args[0]))
    net(images_NCHW)
    if not maps:
        raise GradientError("the net has no convolution that sees more than one pixel.")
    return GradientMaps(maps)


def dependence(x_NCHW: Tensor, conv: nn.Conv2d) -> Tensor:
    """Dependence of the pixels that the taps `(kh, kw)` of a convolution see, on that of the middle one; float64."""
    x_NCHW = x_NCHW.float().contiguous()
    pixels = x_NCHW.flatten()
    sample = pixels[:: -(-len(pixels) // SAMPLED_PIXELS)]
    inner = torch.linspace(0, 1, PIXEL_LEVELS + 1, device=sample.device)[1:-1]
    levels_NCHW = torch.bucketize(x_NCHW, sample.quantile(inner).unique())
    height, width = conv.kernel_size
    known: dict[tuple[int, int], Tensor] = {}
    for row in range(height):
        for column in range(width):
            shift = ((row - height // 2) * conv.dilation[0], (column - width // 2) * conv.dilation[1])
            opposite = (-shift[0], -shift[1])
            known[shift] = known[opposite] if opposite in known else _information(levels_NCHW, *shift)
    return torch.stack([*known.values()]).view(height, width)


def _information(levels_NCHW: Tensor, down: int, right: int) -> Tensor:
    """Normalised mutual information of pixels that far apart; 0 where there are none."""
    height, width = levels_NCHW.shape[2:]
    if abs(down) >= height or abs(right) >= width:
        return torch.zeros((), dtype=torch.float64, device=levels_NCHW.device)
    first = levels_NCHW[:, :, max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
    second = levels_NCHW[:, :, max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)]
    counts = (first * PIXEL_LEVELS + second).flatten().bincount(minlength=PIXEL_LEVELS**2)
    joint = counts.view(PIXEL_LEVELS, PIXEL_LEVELS).double() / counts.sum()
    both, one, other = (-torch.special.xlogy(p, p).sum() for p in (joint, joint.sum(1), joint.sum(0)))
    # a constant input tells nothing apart, and depends on itself all the same
    return torch.where(one * other > 0, (one + other - both) / (one * other).sqrt(), float(down == right == 0))
