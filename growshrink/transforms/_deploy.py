"""timm's own merging hooks on modules that hold grown layers: branches are merged before they run.

The `fuse`, `reparameterize` or `switch_to_deploy` of a dozen families' blocks (RepVGG, MobileOne, ...), which
`timm.models.reparameterize_model` calls, know nothing of branches, which would be lost silently.
"""

import warnings
from collections.abc import Mapping
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
#: In front of the architecture of a grown timm net: what timm's `save_for_hf` writes of it is then not taken for the
#: weights of the plain one, its branches left out.
GROWN = "a net that growshrink grew (its save_grown keeps it): "
#: The share of the branches' effect that rounding may take without a word.
MOST_LOST = 0.1


class MergeFirst:
    """Wrapper that merges branches before a module's own hook; removes itself, then calls the hook.

    It is an attribute of the module (`owner`), copied with it, and finds what it merges by name when it is called.
    `norms` are the names, inside of the owner, of the batch norms that take the biases of the grown layers.
    """

    def __init__(self, owner: nn.Module, hook: str, norms: dict[str, str]) -> None:
        self.owner, self.hook, self.norms = owner, hook, norms

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the hook; AlgebraError while a lam is not 0, FuseError where a bias has nowhere to go."""
        found = ((name, m) for name, m in grown_modules(self.owner).items() if isinstance(m, Grown))
        shared = shared_parameters(self.owner)
        lost: dict[str, float] = {}
        merges = [self._plan(name, layer, shared, lost) for name, layer in found]
        warn_of_rounding(lost, self.owner)
        for layer, total, _ in merges:
            write_map(layer, total)
        for _, total, norm in merges:  # when norms are merged, which took their statistics as they were
            if norm is not None:
                mean = norm.get_buffer("running_mean")
                mean.copy_(mean.double() - total.bias)
        del self.owner.__dict__[self.hook]
        return getattr(self.owner, self.hook)(*args, **kwargs)

    def _plan(
        self, name: str, layer: Grown, shared: set[str], lost: dict[str, float]
    ) -> tuple[Grown, ConvMap, nn.Module | None]:
        if {name, self.norms.get(name)} & shared:
            raise FuseError(f"{name}, or the norm behind it, shares memory with another module: nothing was merged.")
        total, norm = layer.as_convmap().fit(layer.as_conv()), None
        if layer.bias is None and bool((total.bias != 0).any()):
            norm = dict(self.owner.named_modules()).get(self.norms.get(name, "outside"))
            if not isinstance(mean := getattr(norm, "running_mean", None), Tensor) or len(mean) != len(total.bias):
                raise FuseError(
                    f"{name} has no bias, and no batch norm in this block takes that of its branches: "
                    "growshrink.fuse comes first."
                )
        lost[name] = lost_in_cast(name, layer, total, norm)
        return layer, total, norm


def guard_hooks(model: nn.Module, flow: Flow) -> None:
    """Put a `MergeFirst` before each hook of a module that holds grown layers, and mark timm's; replaces old guards."""
    unguard_hooks(model)
    for module in model.modules():
        if "architecture" in (cfg := vars(module).get("pretrained_cfg") or {}):
            vars(module)["pretrained_cfg"] = {**cfg, "architecture": GROWN + cfg["architecture"]}
    norms = {name: flow.norm_after(name)[0] for name, m in grown_modules(model).items() if isinstance(m, Grown)}
    taken = {name: norm for name, norm in norms.items() if norm}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        inside = {
            n.removeprefix(prefix): norm.removeprefix(prefix)
            for n, norm in taken.items()
            if n.startswith(prefix) and norm.startswith(prefix)
        }
        grown = any(n.startswith(prefix) and n != name for n in norms)
        if grown and not isinstance(module, Mergeable):
            for hook in HOOKS:
                if callable(getattr(module, hook, None)):
                    setattr(module, hook, MergeFirst(module, hook, inside))


def unguard_hooks(model: nn.Module) -> None:
    """Take all of them away."""
    for module in model.modules():
        if "architecture" in (cfg := vars(module).get("pretrained_cfg") or {}):
            vars(module)["pretrained_cfg"] = {**cfg, "architecture": cfg["architecture"].removeprefix(GROWN)}
        for hook in HOOKS:
            if isinstance(module.__dict__.get(hook), MergeFirst):
                del module.__dict__[hook]


def write_map(layer: Grown, total: ConvMap) -> None:
    """Make a grown layer the plain one that computes `total`, but for a bias where it has none of its own."""
    weight, bias = layer.values_of(total)
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)
    to_plain(layer)


@torch.no_grad()
def lost_in_cast(name: str, module: nn.Module, total: ConvMap, norm: nn.Module | None) -> float:
    """The share of what branches add that rounding to the net's own dtype takes; FuseError where values overflow."""
    targets: list[tuple[Tensor, Tensor]] = [(next(module.parameters()), total.kernel.cpu())]
    if isinstance(module, Grown):
        weight, bias = module.values_of(total)
        targets = [(module.weight, weight.cpu())] + [(module.bias, bias.cpu())] * (module.bias is not None)
    if norm is not None:
        mean = norm.get_buffer("running_mean")
        targets.append((mean, mean.double().cpu() - total.bias.cpu()))
    changes = []  # what is to be added, and what of it is lost
    for old, new in targets:
        dtype, written = str(old.dtype).removeprefix("torch."), new.to(old.dtype).double()
        if not written.isfinite().all():
            raise FuseError(f"{name}: what its branches merge into is too large for {dtype}: fuse in float32 and cast.")
        if old.shape == new.shape:  # not of a PureBottleneck, which has no kernel of its own
            added = float((new - old.double().cpu()).norm())
            changes.append((added * (added > 1e-12 * float(new.norm())), float((written - new).norm())))
    most = max((added for added, _ in changes), default=0.0)
    shares = [lost / added for added, lost in changes if added > 1e-4 * most]
    return min(1.0, max(shares, default=0.0))


def warn_of_rounding(lost: Mapping[str, float], model: nn.Module) -> None:
    """One warning for all layers of which rounding takes more than `MOST_LOST`."""
    if not (layers := {name: share for name, share in lost.items() if share > MOST_LOST}):
        return
    worst = max(layers, key=layers.__getitem__)
    dtype = next(model.parameters()).dtype
    wider = "double" if dtype == torch.float32 else "float"
    warnings.warn(
        f"{worst}: rounding to {str(dtype).removeprefix('torch.')} takes {layers[worst]:.0%} of what its branches add"
        f"{f', and over {MOST_LOST:.0%} in {len(layers) - 1} more' * (len(layers) > 1)}: they add little more than "
        f"rounding; fuse model.{wider}() to keep it.",
        stacklevel=3,
    )
