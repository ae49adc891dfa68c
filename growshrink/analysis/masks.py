r"""Angles of subnets that keep any channels, not only the first ones.

With the channel sums G of a tensor, a subnet with output mask m and input mask n has the sum :math:`m^T G n`: two
matrix products for all subnets at once. Far slower than a table of prefixes; a mask that keeps the first channels
of *one* order needs none of this, but an `AngleTable` with that order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from growshrink.analysis._angle import AngleScores, Floats, angle_of, channel_sums
from growshrink.analysis.layers import Layer, Side, State, check_states
from growshrink.errors import AnalysisError, did_you_mean

#: Subnets that are scored at a time.
_CHUNK = 1024


def mask_scores(layers: Sequence[Layer], init: State, trained: State, masks: Mapping[str, ArrayLike]) -> AngleScores:
    """Angle, null, parameters and MACs of N subnets.

    The structural null takes each layer's cosine from the layer as a whole.

    Args:
        layers: What a subnet keeps of each tensor; a `switch` keeps it where any channel of its variable is kept.
        init: The initial weights.
        trained: The trained weights.
        masks: For each variable which channels are kept, bool `(N, channels)`.

    Raises:
        AnalysisError: The states or the masks do not fit the layers, or each other.
    """
    check_states(layers, [init, trained])
    kept = {name: np.asarray(mask, dtype=np.float64) for name, mask in masks.items()}
    lengths = {len(mask) for mask in kept.values()}
    if len(lengths) != 1:
        raise AnalysisError(f"masks of {sorted(lengths)} subnets: every variable needs one for each subnet.")
    total = np.zeros((6, lengths.pop()))
    for layer in layers:
        for name in layer.variables:
            if name not in kept:
                raise AnalysisError(f"{layer.name}: there is no mask of {name}{did_you_mean(name, kept)}")
        sums = channel_sums(layer, init, [trained])
        if layer.columns is not None and layer.columns.divisor > 1:
            sums = _spread(sums, layer.columns.divisor)
        _add(total, layer, sums, kept)
    params, macs, norm0, difference, distance, null = total
    counts = (np.rint(column).astype(np.int64) for column in (params, macs))
    return AngleScores(angle_of(norm0, difference, distance), angle_of(norm0, difference, null), *counts)


def _add(total: Floats, layer: Layer, sums: Floats, kept: Mapping[str, Floats]) -> None:
    """Add the columns of a layer for every subnet to `total`."""
    whole = sums.sum((0, 1))
    turned = 2.0 * np.sin(angle_of(*whole[2:5]) / 2.0) ** 2
    for start in range(0, total.shape[1], _CHUNK):
        part = slice(start, start + _CHUNK)
        rows, columns = (
            _of_side(layer, side, kept, part, sums.shape[axis], min(_CHUNK, total.shape[1] - start))
            for axis, side in enumerate((layer.rows, layer.columns))
        )
        found = [((rows @ sums[..., k]) * columns).sum(1) for k in range(5)]
        root0, root1 = np.sqrt(found[2]), np.sqrt(np.maximum(found[2] + found[3], 0.0))
        product = root0 * root1
        null = (root1 - root0) ** 2 + 2.0 * np.where(product > 0, turned, 0.0) * product
        total[:, part] += [*found, null]


def _of_side(
    layer: Layer, side: Side | None, kept: Mapping[str, Floats], part: slice, length: int, num: int
) -> NDArray[np.float64]:
    """What each subnet keeps of an axis, `(num, length)`."""
    if side is None:
        return np.ones((num, length))
    mask = kept[side.variable][part]
    if side.switch:
        return np.repeat(mask.any(1, keepdims=True).astype(np.float64), length, axis=1)
    if mask.shape[1] != length:
        raise AnalysisError(f"{layer.name}: the mask of {side.variable} has {mask.shape[1]} channels, not {length}.")
    return mask


def _spread(sums: Floats, groups: int) -> Floats:
    """Columns of a grouped layer as columns of all channels: each block of rows has those of its own group."""
    blocks = np.split(sums, groups, axis=0)
    wide = np.zeros((groups, len(blocks[0]), groups, *sums.shape[1:]))
    for group, block in enumerate(blocks):
        wide[group, :, group] = block
    return wide.reshape(len(sums), groups * sums.shape[1], sums.shape[2])
