"""Growth in the gradient: linear branches as a fixed linear map on the gradient of the kernel they would merge into.

Branches b that are linear in what they train add A_b(theta_b) to their kernel: W = sum over b of A_b(theta_b). One
update by SGD of every theta_b is then one update of W alone,

    G <- (sum over b of A_b A_b^T) dL/dW;   G <- G + decay * W;   the usual momentum of G;   W <- W - lr * (...),

with decay, momentum and Nesterov's form as they are. Training the plain net with that map on its gradient is training
the grown net, to rounding, at the plain net's cost and with nothing to fuse.

AdamW is invariant to the scale of a gradient, so there the map goes on the update: where every weight of a branch is
one tap of the kernel times a constant a, dW <- (sum of all |a| of the tap) dW, decoupled decay apart; exact but for
Adam's eps, beside which a branch's gradient is a times the kernel's.

Source: gradient re-parameterisation (RepOptimizers, Ding et al., arXiv:2205.15242), for 3x3, 1x1 and identity with
scales; other linear branches, maps that are not elementwise, and the rule for AdamW are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import SGDW, NAdamW
from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.errors import GradientError, check_model, did_you_mean
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.grown import grown_modules
from growshrink.layers.online import expand_online
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

    A pure function of the grown net they were compiled from: a loop that resumes compiles them again, or saves
    `state_dict`. They refer to no net and no optimizer.
    """

    maps: dict[str, KernelMap]

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """Apply the maps in every `optimizer.step()` from now on, without a host sync.

        On several ranks the gradients may be averaged before or after: the maps are linear. Clipping comes before the
        step, sees other gradients than the branches', and must be left out.

        Args:
            model: The plain net; not wrapped, as the parameters go by name.
            optimizer: Of its parameters: SGD or SGDW (with momentum and decay, Nesterov's or not), where the maps act
                on the gradient; AdamW or NAdamW, where they act on the update.

        Returns:
            Detaches them.

        Raises:
            GradientError: The optimizer is of another kind or does not train a mapped parameter, or the maps are of
                another net.
        """
        found = self._parameters(model)
        if self._check_optimizer(optimizer, found):  # by the rule for updates
            hooks = _MapUpdates(found)
            handles = [optimizer.register_step_pre_hook(hooks.before), optimizer.register_step_post_hook(hooks.after)]
        else:
            handles = [optimizer.register_step_pre_hook(lambda *_: _map_gradients(found))]

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    def state_dict(self) -> dict[str, Any]:
        """Tensors by parameter name."""
        return {name: {"factor": m.factor, "mixes": m.mixes, "update": m.update} for name, m in self.maps.items()}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> GradientMaps:
        """The inverse of `state_dict`."""
        return GradientMaps(
            {
                name: KernelMap(values["factor"], tuple(map(tuple, values["mixes"])), values["update"])
                for name, values in state.items()
            }
        )

    def _parameters(self, model: nn.Module) -> dict[nn.Parameter, KernelMap]:
        named, found = dict(model.named_parameters()), {}
        for name, kernel in self.maps.items():
            if name not in named:
                raise GradientError(f"{name}: the net has no such parameter to map{did_you_mean(name, named)}")
            if named[name].shape != kernel.factor.shape:
                shape, wanted = tuple(named[name].shape), tuple(kernel.factor.shape)
                raise GradientError(f"{name}: it is {shape}, and its gradient's map is of {wanted}.")
            found[named[name]] = kernel.beside(named[name])
        return found

    def _check_optimizer(self, optimizer: torch.optim.Optimizer, found: Mapping[nn.Parameter, KernelMap]) -> bool:
        """Whether the maps are for its updates."""
        kind, on_update = type(optimizer), type(optimizer) in ON_UPDATE
        if kind not in (*ON_GRADIENT, *ON_UPDATE):
            known = ", ".join(cls.__name__ for cls in (*ON_GRADIENT, *ON_UPDATE))
            raise GradientError(f"{kind.__name__}: branches trained by it are no map on the gradient; take {known}.")
        for option in REFUSED_OPTIONS:
            if any(group.get(option) for group in optimizer.param_groups):
                raise GradientError(f"{kind.__name__}: with {option} its updates are not linear in the gradient.")
        trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        names = dict(zip(self.maps, found.items(), strict=True))
        if missing := [name for name, (parameter, _) in names.items() if parameter not in trained]:
            raise GradientError(f"{missing[0]}: the optimizer does not train it. Make it after compile_gradients.")
        mixed = [name for name, (_, kernel) in names.items() if kernel.update is None]
        if on_update and mixed:
            raise GradientError(f"{mixed[0]}: its map is not elementwise, so {kind.__name__} has none; take SGD.")
        return on_update


def compile_gradients(
    grown: nn.Module, *, normalize: bool = True, inplace: bool = False, input_size: InputSize | None = None
) -> tuple[nn.Module, GradientMaps]:
    """Turn linear branches into maps on the gradient: the plain net, which trains as the grown net would.

    For branches that are linear in what they train: `BranchSpec(kind=..., norm=None)`, or kinds of your own. Then any
    loop goes on as it is, without clipping:

    >>> import timm
    >>> import growshrink as gs
    >>> net = timm.create_model("reducenet20", width=0.25)
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
    return fuse(grown, inplace=inplace, input_size=input_size), GradientMaps(maps)


@torch.no_grad()
def _map_gradients(maps: Mapping[nn.Parameter, KernelMap]) -> None:
    """Replace gradients by their maps, the elementwise ones in one call."""
    grads, factors = [], []
    for parameter, kernel in maps.items():
        if (grad := parameter.grad) is None:
            continue
        if kernel.mixes:
            grad.copy_(kernel(grad))
        else:
            grads.append(grad)
            factors.append(kernel.factor)
    if grads:
        torch._foreach_mul_(grads, factors)


class _MapUpdates:
    """Before and after a step: what moved a parameter, beside its decay, is multiplied."""

    def __init__(self, maps: Mapping[nn.Parameter, KernelMap]) -> None:
        self._maps = maps

    @torch.no_grad()
    def before(self, *_: object) -> None:
        self._before = {parameter: parameter.detach().clone() for parameter in self._maps}

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._before and parameter.grad is not None:
                    factor = self._maps[parameter].update
                    assert factor is not None
                    decayed = self._before[parameter] * (1 - group["lr"] * group["weight_decay"])
                    parameter.copy_(decayed + (parameter - decayed) * factor)
        self._before.clear()
