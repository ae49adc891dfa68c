"""What a subnet keeps of every tensor, for nets whose subnets are prefixes of channels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from growshrink.algebra.dataflow import inputs_for
from growshrink.algebra.inputs import InputLike
from growshrink.base.copying import copy_net
from growshrink.base.reading import read_json, reason
from growshrink.errors import AnalysisError, RunError
from growshrink.layers.as_conv import WeightLayer
from growshrink.layers.slim import Entries, SkippableBlock
from growshrink.layers.widths import Slots, active_width
from growshrink.proofs._profile import profile
from growshrink.supernet.middle import slot_axes

State = Mapping[str, Tensor]
"""Tensors by name, e.g. a state_dict."""


@dataclass(frozen=True)
class Side:
    """What a subnet keeps along one axis: of each of equal `blocks` the first width / `divisor` * `times` entries.

    `variable` names the width; with `switch` all is kept, or nothing at width 0. With `chosen` the variable is a choice
    of one operator of several by number: all is kept where it is this one, else nothing.
    """

    variable: str
    blocks: int = 1
    divisor: int = 1
    switch: bool = False
    chosen: int | None = None
    times: int = 1

    @property
    def whole(self) -> bool:
        """It keeps all or nothing."""
        return self.switch or self.chosen is not None

    def kept(self, width: int, length: int) -> int:
        """How many entries of an axis of `length` a width keeps."""
        if self.whole:
            return length if (width != 0 if self.chosen is None else width == self.chosen) else 0
        return width // self.divisor * self.times


@dataclass(frozen=True)
class Layer:
    """A tensor of the net, and what a subnet keeps along axes 0 (`rows`) and 1 (`columns`); None is everything.

    `positions` are MACs of an image for each weight, `in_vector` whether it is part of the vector whose angle is taken.

    >>> layer = gs.analysis.Layer("conv.weight", rows=gs.analysis.Side("width", divisor=2))
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


def supernet_layers(model: nn.Module, input_size: InputLike) -> list[Layer]:
    """Every parameter of a grown or slim net as a layer; the variables are the names of its width space.

    The vector is made of the kernels of convolutions and of linear layers. MACs are those of the net as it is trained
    (fused, all widths of a grown net cost the same). WidthError if the model has no widths.

    Source: Hu et al., Angle-based Search Space Shrinking (arXiv:2004.13431), section 3.2.
    """
    slots = Slots(model)
    sides: dict[tuple[int, str], dict[int, Side]] = {}
    branches: dict[str, str] = {}  # prefix of the dotted names below a branch -> its slot
    for name, found_axes in slot_axes(slots).items():
        for axis in found_axes:
            whole = axis.channels * axis.each
            if whole and axis.tensor is not None and (axis.start or axis.tensor.shape[axis.dim] != whole):
                raise AnalysisError(f"{name}: in one of its layers other channels lie beside its own: no prefix.")
            side = Side(name, blocks=axis.groups if axis.dim == 0 else 1, divisor=axis.groups, times=axis.each)
            sides.setdefault((id(axis.module), axis.name), {})[axis.dim] = side
    for name, slot in slots:
        if isinstance(slot.branch, SkippableBlock):
            raise AnalysisError(f"{name}: angles are of nets with all their blocks; make the net slim without blocks=.")
        if slot.branch is not None:
            branches[f"{name}."] = name
    with active_width(model, {name: slot.full for name, slot in slots}):
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


def read_width_table(path: Path) -> tuple[dict[str, tuple[int, ...]], list[Layer]]:
    """Width variables and layers of a net of your own, from a small JSON file.

    `{"variables": {"a": [8, 16], "op": [0, 1]}, "layers": [{"name": "conv.weight", "rows": "a", "columns": {"variable":
    "op", "chosen": 1}, "positions": 1024}]}`: the choices of every variable by name, and the fields of `Layer` and
    `Side`; the name of a variable alone is a `Side` without options.

    Raises:
        AnalysisError: It is none, says where.

    >>> _ = (folder / "widths.json").write_text('{"variables": {"a": [8, 16]}, "layers": [{"name": "w", "rows": "a"}]}')
    >>> gs.analysis.read_width_table(folder / "widths.json")[0]
    {'a': (8, 16)}
    """

    def side(value: Any) -> Side | None:
        return None if value is None else Side(value) if isinstance(value, str) else Side(**value)

    try:
        table = read_json(path)
        variables = {str(name): tuple(sorted(set(choices))) for name, choices in table["variables"].items()}
        sides = ("rows", "columns")
        layers = [Layer(**{**row, **{key: side(row.get(key)) for key in sides}}) for row in table["layers"]]
        numbers = [number for choices in variables.values() for number in choices]
        numbers += [n for layer in layers for s in (layer.rows, layer.columns) if s for n in (s.blocks, s.divisor)]
        if any(type(n) is not int or n < 0 for n in numbers) or any(not choices for choices in variables.values()):
            raise ValueError("widths, blocks and divisors must be whole numbers, at least one of each")
    except (RunError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise AnalysisError(f"{path}: not a table of widths ({reason(error)}).") from error
    return variables, layers


def check_states(layers: Iterable[Layer], states: Iterable[State]) -> None:
    """AnalysisError unless every state has every layer, with the same shapes and finite values."""
    states = list(states)
    for name, (number, state) in product((layer.name for layer in layers), list(enumerate(states))):
        which = "the trained weights" if number else "the initial weights"
        if name not in state:
            raise AnalysisError(f"{name}: missing in {which}; both must be of the net that is ranked.")
        shape, first = tuple(state[name].shape), tuple(states[0][name].shape)
        if shape != first:
            raise AnalysisError(
                f"{name}: {first} in the initial weights, {shape} in the trained ones; both must be of one net."
            )
        if not bool(torch.isfinite(state[name]).all()):
            raise AnalysisError(f"{name}: has values that are not finite in {which}.")


class LayerCosts:
    """Parameters and MACs of an image by widths: of groups of channels, and of blocks (1 or 0).

    Args:
        model: The net at full width.
        input_size: `(C, H, W)`.
        axes: As of `ChannelSpace.axes`.
        names: Groups and blocks in the order of the columns of widths.
        blocks: Which of them are modules that may be off.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: InputLike,
        axes: Mapping[tuple[str, bool], Mapping[str, Entries]],
        names: Sequence[str],
        blocks: Sequence[str] = (),
    ) -> None:
        positions, full = output_positions(model, input_size), [0] * len(names)
        #: By parameter: constant and factors of its first two sizes, blocks it is in, entries, positions.
        self._terms: list[tuple[list[tuple[int, NDArray[np.int64]]], list[int], int, int]] = []
        for name, module in model.named_modules():
            inside = [i for i, block in enumerate(names) if block in blocks and f"{name}.".startswith(f"{block}.")]
            for key, parameter in module.named_parameters(recurse=False):
                sizes, kernel = [], key != "gain"  # of a standardised convolution: `(O, 1, 1, 1)`
                for dim, length in enumerate(parameter.shape[: 1 + kernel]):
                    each = np.zeros(len(names), dtype=np.int64)
                    for group, entries in axes.get((name, dim == 0), {}).items():
                        each[names.index(group)] += entries.shape[1]
                        full[names.index(group)] = len(entries)
                        length -= entries.size
                    sizes.append((length, each))
                macs = positions.get(name, 0) if parameter.ndim > 1 and kernel else 0
                self._terms.append((sizes, inside, parameter.shape[2:].numel(), macs))
        self._other = 0
        whole = [1 if name in blocks else width for name, width in zip(names, full, strict=True)]
        self._other = profile(model, input_size).macs - int(self.of(np.array([whole]))[1][0])

    def of(self, widths: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Parameters and MACs `(N,)` at widths `(N, names)`."""
        params, macs = np.zeros(len(widths), dtype=np.int64), np.full(len(widths), self._other, dtype=np.int64)
        for sizes, inside, rest, positions in self._terms:
            count = rest * widths[:, inside].prod(1)
            for constant, each in sizes:
                count = count * (constant + widths @ each)
            params += count
            macs += count * positions
        return params, macs


def output_positions(model: nn.Module, input_size: InputLike) -> dict[str, int]:
    """Output positions of an image, by name of the convolution or linear layer: MACs for each of its weights."""
    found: dict[str, int] = {}

    def record(module: nn.Module, args: object, output: Tensor, name: str) -> None:
        channels = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
        seen = output.numel() // channels
        if getattr(module, "transposed", False):  # there each weight meets every pixel that comes in
            assert isinstance(module, nn.modules.conv._ConvNd) and isinstance(args, tuple)
            seen = args[0].numel() // module.in_channels
        found[name] = found.get(name, 0) + seen // num_images

    inputs = inputs_for(model, input_size)
    num_images = inputs.num_images(1)
    replica = copy_net(model).to("meta").eval()
    for name, module in replica.named_modules():
        if isinstance(module, WeightLayer):
            module.register_forward_hook(partial(record, name=name))
    dtype = next(replica.parameters()).dtype
    with torch.no_grad():
        inputs.batch(1, seed=None).to("meta", dtype).run(replica)
    return found
