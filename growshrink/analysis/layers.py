"""What a subnet keeps of every tensor, for nets whose subnets are prefixes of channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.copying import copy_net
from growshrink.branches import Branch
from growshrink.errors import AnalysisError
from growshrink.layers.widths import Slots, active_width
from growshrink.supernet.middle import axes

State = Mapping[str, Tensor]
"""Tensors by name, e.g. a state_dict."""


@dataclass(frozen=True)
class Side:
    """What a subnet keeps along one axis of a tensor: of each of equal `blocks` the first width / `divisor` entries.

    `variable` names the width; with `switch` all is kept, or nothing at width 0.
    """

    variable: str
    blocks: int = 1
    divisor: int = 1
    switch: bool = False


@dataclass(frozen=True)
class Layer:
    """A tensor of the net, and what a subnet keeps along axes 0 (`rows`) and 1 (`columns`); None is everything.

    `positions` are MACs of an image for each weight, `in_vector` whether it is part of the vector whose angle is taken.
    """

    name: str
    rows: Side | None = None
    columns: Side | None = None
    positions: int = 0
    in_vector: bool = True

    @property
    def variables(self) -> tuple[str, ...]:
        """The widths that decide over this layer, each once."""
        return tuple(dict.fromkeys(side.variable for side in (self.rows, self.columns) if side is not None))


def supernet_layers(model: nn.Module, input_size: InputSize) -> list[Layer]:
    """Every parameter of a grown net as a layer; the variables are the names of its width space.

    The vector is made of the kernels of convolutions and of linear layers. MACs are those of the grown net as it is
    trained (fused, all widths cost the same). WidthError if the model carries no branches.

    Source: Hu et al., Angle-based Search Space Shrinking (arXiv:2004.13431), section 3.2.
    """
    slots = dict(Slots(model))
    sides: dict[tuple[int, str], dict[int, Side]] = {}
    branches: dict[str, str] = {}  # prefix of the dotted names below a branch -> its slot
    for name, slot in slots.items():
        if slot.body is not None:
            for axis in axes(slot.body):
                side = Side(name, blocks=axis.groups if axis.dim == 0 else 1, divisor=axis.groups)
                sides.setdefault((id(axis.module), axis.name), {})[axis.dim] = side
        if isinstance(slot.branch, Branch):
            branches[f"{name}."] = name
    with active_width(model, {name: slot.full for name, slot in slots.items()}):
        positions = output_positions(model, input_size)
    layers = []
    for prefix, module in model.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{short}" if prefix else short
            found = dict(sides.get((id(module), short), {}))
            for below, variable in branches.items():
                if name.startswith(below) and variable not in {side.variable for side in found.values()}:
                    free = next(dim for dim in (1, 0) if dim not in found)
                    found[free] = Side(variable, switch=True)
            kernel = parameter.ndim >= 2
            layers.append(Layer(name, found.get(0), found.get(1), positions.get(prefix, 0) if kernel else 0, kernel))
    return layers


def check_states(layers: Iterable[Layer], states: Iterable[State]) -> None:
    """AnalysisError unless every state has every layer, with the same shapes and finite values."""
    states = list(states)
    for layer in layers:
        name = layer.name
        for number, state in enumerate(states):
            which = "the initial weights" if number == 0 else "the trained weights"
            if name not in state:
                raise AnalysisError(f"{name}: missing in {which}; both must be of the net that is ranked.")
            shape, first = tuple(state[name].shape), tuple(states[0][name].shape)
            if shape != first:
                raise AnalysisError(
                    f"{name}: {first} in the initial weights, {shape} in the trained ones; both must be of one net."
                )
            if not bool(torch.isfinite(state[name]).all()):
                raise AnalysisError(f"{name}: has values that are not finite in {which}.")


def output_positions(model: nn.Module, input_size: InputSize) -> dict[str, int]:
    """Output positions of an image, by name of the convolution or linear layer: MACs for each of its weights."""
    found: dict[str, int] = {}

    def record(module: nn.Module, args: object, output: Tensor, name: str) -> None:
        channels = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
        found[name] = found.get(name, 0) + output.numel() // channels

    replica = copy_net(model).to("meta").eval()
    for name, module in replica.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(partial(record, name=name))
    dtype = next(replica.parameters()).dtype
    with torch.no_grad():
        replica(torch.empty(1, *input_size, device="meta", dtype=dtype))
    return found
