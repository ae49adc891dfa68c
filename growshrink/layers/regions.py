"""Compiling a supernet in pieces that have one width each."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from growshrink.layers.grown import grown_modules
from growshrink.layers.widths import Slots


def regions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The largest modules of `model` with at most one width, by name: each combination inside one has its own graph."""
    # Where a width is read: in a bottleneck of `nest` that is the body, which holds another one.
    readers = [
        f"{name}.body" if slot.branch is not None and slot.body is not None else name
        for name, slot in (Slots(model) if grown_modules(model) else ())
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


def compiled_regions(model: nn.Module) -> dict[nn.Module, Any]:
    """What `compile_regions` would have each region call; the model stays as it is."""
    compile_regions(model)
    calls = {module: call for module in model.modules() if (call := module._compiled_call_impl) is not None}
    for module in calls:
        module._compiled_call_impl = None
    return calls


@contextmanager
def called(calls: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Have modules call what `compiled_regions` found, as long as this lasts."""
    for module, call in calls.items():
        module._compiled_call_impl = call
    try:
        yield
    finally:
        for module in calls:
            module._compiled_call_impl = None
