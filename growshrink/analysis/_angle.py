r"""The angle between a subnet's weights before and after training, for millions of subnets a second.

:math:`\theta(a) = \angle(V(a, W_0), V(a, W_t))`, V the concatenation of the subnet's kernels. Every sum in it is a sum
over layers of one entry of a table of prefix sums over channels: so a subnet is a gather, its costs two more columns.

Source: Hu et al., Angle-based Search Space Shrinking (arXiv:2004.13431), and RLNAS (arXiv:2101.11834).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from growshrink.algebra.inputs import ExampleInputs, InputLike, given_inputs
from growshrink.analysis.layers import Layer, Side, State, check_states, output_positions, supernet_layers
from growshrink.analysis.stats import Floats
from growshrink.base.limits import checked
from growshrink.errors import AnalysisError, did_you_mean
from growshrink.layers.widths import Width, WidthSpace

Index = NDArray[np.integer[Any]]
"""Subnets: `(N, number of variables)`, the position of each width in the list of its choices."""

#: Rows of the joint tables that widths are looked up in: several variables at once, as many as stay in the cache.
_ROWS = 1024
#: Subnets that are scored at a time: intermediate results stay in the cache.
_CHUNK = 8192


@dataclass(frozen=True, eq=False)
class AngleScores:
    """One row for each of N subnets.

    Attributes:
        angle: In radians, float64 `(N,)`; NaN where the initial or the trained vector is zero.
        null: The structural null: the angle if every layer had turned by its mean, whatever the width, `(N,)`.
        params: All parameters of the subnet, int64 `(N,)`.
        macs: MACs of an image through the subnet as it is trained (not fused), int64 `(N,)`.
    """

    angle: Floats
    null: Floats
    params: NDArray[np.int64]
    macs: NDArray[np.int64]

    @property
    def excess(self) -> Floats:
        """What is left of the angle without the structure: angle - null, in radians."""
        return self.angle - self.null

    @property
    def num_undefined(self) -> int:
        """Subnets without an angle."""
        return int(np.isnan(self.angle).sum())


class AngleTable:
    r"""The sums that angles of subnets are made of, by layer and width.

    Columns are :math:`|w_0|^2`, and of each trained state :math:`|w_1|^2 - |w_0|^2` and :math:`|w_1 - w_0|^2`, see
    `angle_of`. The structural null takes for a layer's cosine at each width the mean of its cosines over all widths.

    Args:
        layers: What a subnet keeps of each tensor, e.g. `supernet_layers(model, input_size)`.
        variables: The choices of each width, in the order of the columns of an index.
        init: The initial weights.
        trained: The trained weights, or several: a trajectory.
        order: For some variables an order of its channels, of which a width keeps the first.

    Raises:
        AnalysisError: The states do not fit each other or the layers, or a layer names an unknown variable.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        variables: Mapping[str, Sequence[int]],
        init: State,
        trained: State | Sequence[State],
        *,
        order: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        checkpoints = [trained] if isinstance(trained, Mapping) else list(trained)
        if not checkpoints or not layers:
            raise AnalysisError("an angle needs layers, and trained weights, at least one checkpoint of them.")
        check_states(layers, [init, *checkpoints])
        self.choices = {name: tuple(choices) for name, choices in variables.items()}
        self.names = tuple(self.choices)
        self.layers = tuple(layers)
        self.num_checkpoints = len(checkpoints)
        #: Angle of every single layer of the vector, at the last checkpoint, by its own one or two widths.
        self.layer_angles: dict[str, Floats] = {}
        self._sums: dict[tuple[str, ...], Floats] = {}  # (choices ..., columns) by variables
        for layer in layers:
            for name in layer.variables:
                if name not in self.choices:
                    known = did_you_mean(name, self.choices)
                    raise AnalysisError(f"{layer.name}: its width {name} is not a variable{known}")
            names, sums = self._of_layer(layer, init, checkpoints, order or {})
            self._sums[names] = self._sums.get(names, 0.0) + sums
        self._factors = list(self._join())

    @property
    def size(self) -> int:
        """How many subnets there are."""
        return math.prod(len(choices) for choices in self.choices.values())

    def score(self, index: Index, checkpoint: int = -1) -> AngleScores:
        """Angle, null, parameters and MACs of subnets."""
        index, limits = np.asarray(index), np.array([len(choices) for choices in self.choices.values()], dtype=np.uintp)
        if index.ndim != 2 or index.shape[1] != len(limits) or not np.issubdtype(index.dtype, np.integer):
            raise AnalysisError(f"an index of shape {index.shape}: needs whole numbers, {len(limits)} for each subnet.")
        beyond = np.tile(limits, min(_CHUNK, len(index)))  # of the memory's order: nine times as fast as by column
        t = checkpoint % self.num_checkpoints
        columns = [0, 1, 2, 3 + 3 * t, 4 + 3 * t, 5 + 3 * t]
        tables = [np.ascontiguousarray(table[:, columns].T) for _, _, table in self._factors]
        place = np.zeros((len(self.names), len(tables)))  # float64: a product of BLAS; exact below 2**53
        for factor, (axes, strides, _) in enumerate(self._factors):
            np.add.at(place[:, factor], list(axes), strides)  # a variable may stand in several of its tables
        scores = AngleScores(*(np.empty(len(index), dtype) for dtype in (float, float, np.int64, np.int64)))
        for start in range(0, len(index), _CHUNK):
            rows = slice(start, start + _CHUNK)
            part = np.ascontiguousarray(index[rows], dtype=np.intp)
            if (part.reshape(-1).view(np.uintp) >= beyond[: part.size]).any():  # those below 0 are huge
                raise AnalysisError("an index beyond the choices of a width.")
            codes = (part.astype(np.float64) @ place).astype(np.intp)
            total = tables[0].take(codes[:, 0], axis=1)
            for factor, table in enumerate(tables[1:], 1):
                total += table.take(codes[:, factor], axis=1)
            scores.params[rows], scores.macs[rows] = total[:2]
            scores.angle[rows], scores.null[rows] = angle_of(total[2], total[3], total[4:])
        return scores

    def trajectory(self, index: Index) -> Floats:
        """Angles at every checkpoint, `(number of checkpoints, N)`."""
        return np.stack([self.score(index, t).angle for t in range(self.num_checkpoints)])

    def all(self) -> NDArray[np.intp]:
        """Every subnet, the last variable changing fastest."""
        shape = [len(choices) for choices in self.choices.values()]
        return np.stack(np.unravel_index(np.arange(self.size), shape), axis=1)

    def sample(self, num: int, seed: int = 0) -> NDArray[np.intp]:
        """Subnets drawn uniformly and independently (so one may come twice)."""
        random = np.random.default_rng(seed)
        return np.stack([random.integers(len(choices), size=num) for choices in self.choices.values()], axis=1)

    def sample_distinct(self, num: int, seed: int = 0) -> NDArray[np.intp]:
        """Subnets drawn uniformly, none twice; AnalysisError if there are not as many."""
        if num > self.size:
            raise AnalysisError(f"{num} different subnets of a space of {self.size}.")
        if self.size < 2**62:
            found = np.random.default_rng(seed).choice(self.size, num, replace=False)
            return np.stack(np.unravel_index(found, [len(choices) for choices in self.choices.values()]), axis=1)
        return np.unique(self.sample(num, seed), axis=0)  # so many that none comes twice in practice

    def index(self, widths: Sequence[Width]) -> NDArray[np.intp]:
        """Widths as an index; AnalysisError if one is not of this space."""
        position = {name: {width: i for i, width in enumerate(choices)} for name, choices in self.choices.items()}
        try:
            rows = [[position[name][width[name]] for name in self.names] for width in widths]
        except KeyError as error:
            raise AnalysisError(f"a subnet has no width, or one that is not a choice, for {error}.") from error
        return np.array(rows, dtype=np.intp).reshape(len(rows), len(self.names))

    def width(self, row: Sequence[int] | Index) -> dict[str, int]:
        """One row of an index as a width."""
        return {name: choices[i] for (name, choices), i in zip(self.choices.items(), row, strict=True)}

    def _of_layer(
        self, layer: Layer, init: State, checkpoints: Sequence[State], order: Mapping[str, Sequence[int]]
    ) -> tuple[tuple[str, ...], Floats]:
        """Its variables, and its columns by their choices."""
        sums = channel_sums(layer, init, checkpoints)
        for axis, side in enumerate((layer.rows, layer.columns)):
            if side is None or side.whole:
                sums = sums.sum(axis, keepdims=True)
            else:
                if side.variable in order:
                    sums = np.take(sums, _order(layer, side, order[side.variable], sums.shape[axis]), axis)
                if side.blocks > 1:  # the same prefix of each: their sum is one block
                    sums = np.stack(np.split(sums, side.blocks, axis)).sum(0)
                sums = np.cumsum(sums, axis, dtype=np.longdouble)
        for axis, side in enumerate((layer.rows, layer.columns)):
            sums = np.take(np.insert(sums, 0, 0.0, axis), self._kept(layer, side, sums.shape[axis]), axis)
        sums = sums.astype(np.float64)
        if layer.rows is not None and layer.columns is not None and layer.rows.variable == layer.columns.variable:
            sums = sums[np.arange(len(sums)), np.arange(len(sums))][:, None]
        for start in range(3, sums.shape[-1], 3):
            norm0, difference, distance = sums[..., 2], sums[..., start], sums[..., start + 1]
            angles = angle_of(norm0, difference, distance)
            if layer.in_vector:
                self.layer_angles[layer.name] = angles.squeeze()
            sums[..., start + 2] = _null_distance(norm0, difference, angles)
        names = layer.variables
        return names, sums.reshape([len(self.choices[name]) for name in names] + [sums.shape[-1]])

    def _kept(self, layer: Layer, side: Side | None, length: int) -> list[int]:
        """How many entries each choice keeps of an axis of `length`."""
        if side is None:
            return [length]
        kept = [side.kept(width, length) for width in self.choices[side.variable]]
        if max(kept) > length:
            raise AnalysisError(f"{layer.name}: {side.variable} goes to {max(kept)}, the tensor has {length}.")
        return kept

    def _join(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Floats]]:
        """Joint tables: variables (as columns of an index), strides of their choices, `(choices, columns)`."""
        pairs = {names: sums for names, sums in self._sums.items() if len(names) == 2}
        singles = {names[0]: sums for names, sums in self._sums.items() if len(names) == 1}
        constant = self._sums.get((), 0.0)
        tables: list[tuple[tuple[str, ...], Floats]] = []
        for (a, b), sums in pairs.items():
            sums = sums + singles.pop(a)[:, None] if a in singles else sums
            tables.append(((a, b), sums + singles.pop(b)[None] if b in singles else sums))
        tables += [((name,), singles[name]) for name in self.names if name in singles]
        names: tuple[str, ...] = ()
        joint = np.zeros((1, next(iter(self._sums.values())).shape[-1])) + constant
        for own, sums in tables:
            flat = sums.reshape(-1, sums.shape[-1])
            if len(joint) * len(flat) > _ROWS and names:
                yield self._factor(names, joint)
                names, joint = (), np.zeros((1, sums.shape[-1]))
            joint = (joint[:, None] + flat[None]).reshape(-1, sums.shape[-1])
            names += own
        yield self._factor(names, joint)

    def _factor(self, names: tuple[str, ...], table: Floats) -> tuple[tuple[int, ...], tuple[int, ...], Floats]:
        lengths = [len(self.choices[name]) for name in names]
        strides = tuple(math.prod(lengths[i + 1 :]) for i in range(len(names)))
        return tuple(map(self.names.index, names)), strides, table


def angle_of(norm0: Floats, difference: Floats, distance: Floats) -> Floats:
    r"""Angles from :math:`A = |w_0|^2`, :math:`D = |w_1|^2 - |w_0|^2` and :math:`E = |w_1 - w_0|^2`; NaN at zero norm.

    With :math:`\delta = |w_1| - |w_0|`: :math:`4 |w_0||w_1| \sin^2(\theta/2) = E - \delta^2` and
    :math:`4 |w_0||w_1| \cos^2(\theta/2) = |w_0 + w_1|^2 - \delta^2`. (arccos loses half of the digits near 0.)

    Source: Kahan, How Futile are Mindless Assessments of Roundoff (2006), section 12: the angle of two unit vectors.
    """
    norm1 = np.maximum(norm0 + difference, 0.0)
    square = (difference / np.maximum(np.sqrt(norm0) + np.sqrt(norm1), 1e-300)) ** 2
    across = np.maximum(distance - square, 0.0)
    along = np.maximum(2.0 * (norm0 + norm1) - distance - square, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):  # opposite vectors; a zero norm
        angle = 2.0 * np.arctan(np.sqrt(across / along))
    return np.where((norm0 > 0) & (norm1 > 0), angle, np.nan)


def channel_sums(layer: Layer, init: State, checkpoints: Sequence[State]) -> Floats:
    """Columns params, MACs, A, then D, E and room for the null of each checkpoint: `(rows, columns, 3 + 3 T)`."""

    def as_3d(state: State) -> Floats:
        tensor = state[layer.name].detach().to("cpu", torch.float64)
        shape = (*tensor.shape[:2], -1) if tensor.ndim > 1 else (*tensor.shape, 1, 1) if tensor.ndim else (1, 1, 1)
        return tensor.reshape(shape).numpy()

    before, inside = as_3d(init), float(layer.in_vector)
    counts = np.full(before.shape[:2], before.shape[2], dtype=np.float64)
    columns = [counts, counts * layer.positions, (before**2).sum(2) * inside]
    for state in checkpoints:
        after = as_3d(state)
        change = after - before
        columns += [(change * (after + before)).sum(2) * inside, (change**2).sum(2) * inside, np.zeros_like(counts)]
    return np.stack(columns, axis=2)


@checked(AnalysisError)
def supernet_table(
    init: nn.Module | State,
    trained: nn.Module | State | Sequence[nn.Module | State],
    space: WidthSpace | Mapping[str, Sequence[int]],
    *,
    layers: Sequence[Layer] | None = None,
    input_size: InputLike = None,
    example_inputs: ExampleInputs | None = None,
    order: Mapping[str, Sequence[int]] | None = None,
) -> AngleTable:
    """Make the table of a space from a net as initialised and trained (once or at several times); see `angle`.

    >>> init, trained = gs.grow(net), gs.grow(net, seed=1)  # stands for the same net, trained
    >>> gs.analysis.supernet_table(init, trained, gs.width_space(init)).size
    24
    """
    nets = [init, *([trained] if isinstance(trained, (nn.Module, Mapping)) else trained)]
    states = [dict(net.named_parameters()) if isinstance(net, nn.Module) else net for net in nets]
    inputs = given_inputs(input_size, example_inputs)
    if layers is None:
        if not isinstance(space, WidthSpace) or not isinstance(init, nn.Module):
            raise AnalysisError(f"{space=}: must be a WidthSpace (growshrink.width_space) of two nets, or use layers=.")
        space.check(init)
        layers = supernet_layers(init, inputs)
    elif isinstance(init, nn.Module):
        seen = output_positions(init, inputs)
        layers = [replace(row, positions=row.positions or seen.get(row.name.rpartition(".")[0], 0)) for row in layers]
    choices = space.choices if isinstance(space, WidthSpace) else space
    return AngleTable(layers, choices, states[0], states[1:], order=order)


@checked(AnalysisError)
def angle(
    init: nn.Module | State,
    trained: nn.Module | State,
    space: WidthSpace | Mapping[str, Sequence[int]],
    widths: Sequence[Width] | None = None,
    *,
    layers: Sequence[Layer] | None = None,
    input_size: InputLike = None,
    example_inputs: ExampleInputs | None = None,
) -> AngleScores:
    """Angle, structural null, parameters and MACs of subnets of a grown net, or of any supernet.

    The angle alone misleads: it grows with the size of a subnet. `growshrink.rank` says what it adds to that.

    Args:
        init: The net as it was initialised (or its tensors by name, if `layers` are given).
        trained: The same net, trained.
        space: Its width space; of another supernet the choices of each width by name.
        widths: Subnets, each a width of the space; None is every one.
        layers: What a subnet keeps of each tensor (`growshrink.analysis.Layer`, `read_width_table`), for supernets that
            were not grown. `positions` that are 0 are taken from a pass.
        input_size: `(C, H, W)`, for the MACs; None takes the model's own.
        example_inputs: In place of a size, a batch; see `growshrink.grow`.

    Raises:
        AnalysisError: The two nets are not one, or a width is not of the space.

    >>> init, trained = gs.grow(net), gs.grow(net, seed=1)  # stands for the same net, trained
    >>> space = gs.width_space(init)
    >>> gs.angle(init, trained, space, [space.base, space.full]).params
    array([1926, 5934])
    """
    options: dict[str, Any] = {"layers": layers, "input_size": input_size, "example_inputs": example_inputs}
    table = supernet_table(init, trained, space, **options)
    return table.score(table.all() if widths is None else table.index(widths))


def _null_distance(norm0: Floats, difference: Floats, angles: Floats) -> Floats:
    """|w1 - w0|^2 if the layer had its mean cosine at every width: (|w1| - |w0|)^2 + 2 |w0||w1| (1 - mean)."""
    root0, root1 = np.sqrt(norm0), np.sqrt(np.maximum(norm0 + difference, 0.0))
    turned = 2.0 * np.sin(angles[~np.isnan(angles)] / 2.0) ** 2
    mean = float(turned.mean()) if len(turned) else 0.0
    with np.errstate(invalid="ignore"):
        length = np.where(root0 + root1 > 0, difference / (root0 + root1), 0.0)
    return length**2 + 2.0 * mean * root0 * root1


def _order(layer: Layer, side: Side, order: Sequence[int], length: int) -> NDArray[np.intp]:
    found = np.asarray(order, dtype=np.intp)
    if side.divisor != 1 or side.blocks != 1:
        raise AnalysisError(f"{layer.name}: channels of {side.variable} lie in groups and cannot be put in an order.")
    if len(found) != length or not np.array_equal(np.sort(found), np.arange(length)):
        raise AnalysisError(f"{layer.name}: the order of {side.variable} is not one of its {length} channels.")
    return found
