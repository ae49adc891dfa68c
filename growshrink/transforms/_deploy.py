"""timm's own merging hooks on modules that hold grown layers: branches are merged before they run.

The `fuse`, `reparameterize` or `switch_to_deploy` of a dozen families' blocks (RepVGG, MobileOne, ...), which
`timm.models.reparameterize_model` calls, know nothing of branches, which would be lost silently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from growshrink.algebra.dataflow import Flow
from growshrink.errors import FuseError
from growshrink.layers.grown import Grown, grown_modules
from growshrink.layers.mapping import Mergeable
from growshrink.layers.swaps import to_plain

#: In the order in which timm looks for them.
HOOKS = ("fuse", "reparameterize", "switch_to_deploy")


class MergeFirst:
    """Wrapper that merges branches before a module's own hook; removes itself, then calls the hook.

    It is an attribute of the module (`owner`), refers to it and to the grown layers inside it, each with the batch norm
    that takes its bias if it has none, and is copied with them.
    """

    def __init__(self, owner: nn.Module, hook: str, convs: list[tuple[Grown, nn.Module | None]]) -> None:
        self.owner, self.hook, self.convs = owner, hook, convs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the hook; AlgebraError while a lam is not 0, FuseError where a bias has nowhere to go."""
        for conv, norm in self.convs:
            if isinstance(conv, Grown):  # not merged yet by the hook of a module around this one
                _merge(conv, norm)
        del self.owner.__dict__[self.hook]
        return getattr(self.owner, self.hook)(*args, **kwargs)


def guard_hooks(model: nn.Module, flow: Flow) -> None:
    """Put a `MergeFirst` before each hook of a module that holds grown layers; replaces guards that are there."""
    unguard_hooks(model)
    convs: dict[str, tuple[Grown, nn.Module | None]] = {}
    for name, module in grown_modules(model).items():
        if isinstance(module, Grown):
            norm, _ = flow.norm_after(name)
            convs[name] = module, None if norm is None else model.get_submodule(norm)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        inside = [pair for conv, pair in convs.items() if conv.startswith(prefix) and conv != name]
        if inside and not isinstance(module, Mergeable):
            for hook in HOOKS:
                if callable(getattr(module, hook, None)):
                    setattr(module, hook, MergeFirst(module, hook, inside))


def unguard_hooks(model: nn.Module) -> None:
    """Take all of them away."""
    for module in model.modules():
        for hook in HOOKS:
            if isinstance(module.__dict__.get(hook), MergeFirst):
                del module.__dict__[hook]


@torch.no_grad()
def _merge(conv: Grown, norm: nn.Module | None) -> None:
    total = conv.as_convmap().fit(conv.as_conv())
    if conv.bias is None and norm is None and bool((total.bias != 0).any()):
        raise FuseError("a layer has no bias, and that of its branches has nowhere to go: use growshrink.fuse.")
    weight, bias = conv.values_of(total)
    conv.weight.copy_(weight)
    if conv.bias is not None:
        conv.bias.copy_(bias)
    elif norm is not None:
        running_mean = norm.running_mean
        assert isinstance(running_mean, Tensor)
        running_mean.copy_(running_mean.double() - total.bias)
    to_plain(conv)
