"""Compiling a supernet in pieces that have one width each."""

import inspect
from typing import Any

import torch
from torch import nn

from growshrink.layers.widths import Slots


def regions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The largest modules of `model` with at most one width, by name: each combination inside one has its own graph."""
    # Where a width is read: in a bottleneck of `nest` that is the body, which holds another one.
    readers = [
        f"{name}.body" if slot.branch is not None and slot.body is not None else name for name, slot in Slots(model)
    ]

    def visit(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        inside = sum(f"{reader}.".startswith(f"{name}." if name else "") for reader in readers)
        if inside <= 1 and name and type(module) not in (nn.ModuleList, nn.ModuleDict):
            return [(name, module)] if any(True for _ in module.parameters()) else []
        found = []
        for child_name, child in module.named_children():
            found += visit(f"{name}.{child_name}" if name else child_name, child)
        return found

    return visit("", model)


def compile_regions(model: nn.Module, **options: Any) -> None:
    """`torch.compile` for each region, in place; `options` are those of `torch.compile`."""
    defaults: dict[str, Any] = {"dynamic": False}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        # Regions of one class share their code: without this they would share one small limit on graphs, too.
        defaults["isolate_recompiles"] = True
    for _, module in regions(model):
        module.compile(**{**defaults, **options})
