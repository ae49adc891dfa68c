"""The growth log: every change of structure a run made, enough to make them again."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.branches import BranchSpec
from growshrink.cycle.plan import CyclePlan
from growshrink.errors import RunError
from growshrink.layers.activations import set_lambda
from growshrink.layers.grown import grown_modules
from growshrink.transforms import collapse_online, fuse, grow

Entry = Mapping[str, Any]


def apply_grow(model: nn.Module, entry: Entry, input_size: InputSize) -> nn.Module:
    """Grow `model` in place as a log entry says (by exact names, so that nothing is decided twice)."""
    specs = [BranchSpec(kind=b["kind"], ratio=b["ratio"]) for b in entry["branches"]]
    return grow(
        model, specs, where=entry["names"], init=entry["init"], seed=entry["seed"], inplace=True, input_size=input_size
    )


def replay(model: nn.Module, log: Sequence[Entry], input_size: InputSize) -> nn.Module:
    """A copy of the initial `model` with the structure that `log` describes (its values are to be loaded after).

    Raises:
        RunError: An entry does not fit the model: it is the log of another one.
    """
    plain, model = model, copy.deepcopy(model)
    for entry in log:
        if entry["op"] == "grow":
            if entry["names"]:  # empty: the net was grown at birth
                apply_grow(model, entry, input_size)
            found = shapes_of(model)
            if found != {name: list(shape) for name, shape in entry["shapes"].items()}:
                raise RunError("the growth log is of another model: its shapes differ.")
        elif entry["op"] == "teach":
            model = copy.deepcopy(plain)
        elif entry["op"] == "collapse":
            set_lambda(model, entry["lam"])
            collapse_online(model, choose=entry["names"], inplace=True)
        elif entry["op"] == "fuse":
            set_lambda(model, 0.0)
            fuse(model, inplace=True, input_size=input_size)
        elif entry["op"] == "undo":
            pass  # what was fused has the structure of what was grown
        else:
            raise RunError(f"the growth log has an unknown operation {entry['op']!r}.")
    return model


def check_log(log: Sequence[Entry], plan: CyclePlan) -> None:
    """RunError unless what was grown in `log` is what `plan` grows: a file may not ask for branches of any size."""
    for entry in log:
        if entry["op"] == "grow" and entry["names"]:
            wanted = plan.rounds[entry["round"] - 1]
            if entry["branches"] != [{"kind": kind, "ratio": wanted.ratio} for kind in wanted.branch]:
                raise RunError(f"its round {entry['round']} has grown {entry['branches']!r}, which is not in the plan.")
            if not isinstance(entry["names"], list):
                raise RunError(
                    f"its round {entry['round']} was grown at {entry['names']!r}, which is no list of names."
                )


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """Shape of every parameter of every grown module, by dotted name."""
    return {
        f"{name}.{key}": list(parameter.shape)
        for name, module in grown_modules(model).items()
        for key, parameter in module.named_parameters()
    }
