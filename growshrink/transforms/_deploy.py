"""timm's own merging hooks on modules that hold grown layers: branches are merged before they run.

The `fuse`, `reparameterize` or `switch_to_deploy` of a dozen families' blocks (RepVGG, MobileOne, ...), which
`timm.models.reparameterize_model` calls, know nothing of branches, which would be lost silently.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from growshrink.algebra.convmap import ConvMap
from growshrink.algebra.dataflow import Flow, shared_parameters
from growshrink.errors import FuseError
from growshrink.layers.grown import Grown, grown_modules
from growshrink.layers.mapping import Mergeable
from growshrink.layers.swaps import to_plain

#: In the order in which timm looks for them.
HOOKS = ("fuse", "reparameterize", "switch_to_deploy")
#: The share of the branches' effect that rounding may take without a word.
MOST_LOST = 0.1


class MergeFirst:
    """Wrapper that merges branches before a module's own hook; removes itself, then calls the hook.

    It is an attribute of the module (`owner`) and copied with it. What it merges it finds by name when it is called:
    until then layers and norms may be replaced, cast or copied. `norms` are the names, inside of the owner where they
    are, of the batch norms that take the biases of the grown layers.
    """

    def __init__(self, owner: nn.Module, hook: str, norms: dict[str, str]) -> None:
        self.owner, self.hook, self.norms = owner, hook, norms

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the hook; AlgebraError while a lam is not 0, FuseError where a bias has nowhere to go."""
        found = ((name, m) for name, m in grown_modules(self.owner).items() if isinstance(m, Grown))
        merges = [self._plan(name, layer, shared_parameters(self.owner)) for name, layer in found]
        for layer, total, norm in merges:
            write_map(layer, total)
            if norm is not None:
                mean = norm.get_buffer("running_mean")
                mean.copy_(mean.double() - total.bias)
        del self.owner.__dict__[self.hook]
        return getattr(self.owner, self.hook)(*args, **kwargs)

    def _plan(self, name: str, layer: Grown, shared: set[str]) -> tuple[Grown, ConvMap, nn.Module | None]:
        if name in shared:
            raise FuseError(f"{name} shares memory with another module: merging would change that one too.")
        total, norm = layer.as_convmap().fit(layer.as_conv()), None
        if layer.bias is None and bool((total.bias != 0).any()):
            norm = dict(self.owner.named_modules()).get(self.norms.get(name, "no norm"))
            if not isinstance(mean := getattr(norm, "running_mean", None), Tensor) or len(mean) != len(total.bias):
                raise FuseError(
                    f"{name} has no bias, and in this block no batch norm to take that of its branches "
                    f"({self.norms.get(name, 'none')} when it was grown): growshrink.fuse comes first."
                )
        check_cast(name, layer, total, norm)
        return layer, total, norm


def guard_hooks(model: nn.Module, flow: Flow) -> None:
    """Put a `MergeFirst` before each hook of a module that holds grown layers; replaces guards that are there."""
    unguard_hooks(model)
    norms = {name: flow.norm_after(name)[0] or "" for name, m in grown_modules(model).items() if isinstance(m, Grown)}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        inside = {n.removeprefix(prefix): norm for n, norm in norms.items() if n.startswith(prefix) and n != name}
        if inside and not isinstance(module, Mergeable):
            local = {
                n: f"..{norm}" if not norm.startswith(prefix) else norm[len(prefix) :] for n, norm in inside.items()
            }
            for hook in HOOKS:
                if callable(getattr(module, hook, None)):
                    setattr(module, hook, MergeFirst(module, hook, local))


def unguard_hooks(model: nn.Module) -> None:
    """Take all of them away."""
    for module in model.modules():
        for hook in HOOKS:
            if isinstance(module.__dict__.get(hook), MergeFirst):
                del module.__dict__[hook]


def write_map(layer: Grown, total: ConvMap) -> None:
    """Make a grown layer the plain one that computes `total`, but for a bias where it has none of its own."""
    layer.weight.copy_(total.kernel.reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(total.bias)
    to_plain(layer)


@torch.no_grad()
def check_cast(name: str, module: nn.Module, total: ConvMap, norm: nn.Module | None) -> None:
    """FuseError where values overflow in the net's own dtype; a warning where rounding takes what the branches add."""
    weight = module.weight if isinstance(module, Grown) else next(module.parameters())
    targets = [(weight, total.kernel.cpu())]
    if isinstance(module, Grown) and module.bias is not None:
        targets.append((module.bias, total.bias.cpu()))
    elif norm is not None:
        mean = norm.get_buffer("running_mean")
        targets.append((mean, mean.double().cpu() - total.bias.cpu()))
    changes = []
    for old, new in targets:
        dtype, written = str(old.dtype).removeprefix("torch."), new.to(old.dtype).double()
        if not written.isfinite().all():
            raise FuseError(
                f"{name}: what its branches merge into is too large for {dtype}: fuse in float32, then cast."
            )
        if old.numel() == new.numel():  # not of a PureBottleneck, which has no kernel of its own
            added = (new - old.double().cpu().reshape(new.shape)).norm()
            changes.append((dtype, float(added), float((written - new).norm()), float(new.norm())))
    least = max((1e-4 * added for _, added, _, _ in changes), default=0.0)
    for dtype, added, lost, size in changes:
        if added > max(least, 1e-12 * size) and lost > MOST_LOST * added:
            share = min(1.0, lost / added)
            warnings.warn(
                f"{name}: rounding to {dtype} takes {share:.0%} of what its branches add: fuse in float32, then cast.",
                stacklevel=2,
            )
            return
