"""Ranges of a net's weights, which foretell what int8 costs in accuracy (not a program)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

#: Steps on either side of zero in symmetric int8.
LEVELS = 127
#: Ratios of the largest to the median channel from which per-tensor int8 leaves the median channel fewer than 32 and
#: fewer than 8 steps on either side of zero (6 and 4 bits). A rule of thumb; `--int8` measures.
MAY_HURT, WILL_HURT = 4.0, 16.0


@dataclass(frozen=True)
class LayerRange:
    """Ranges of a layer's weights, output channel by output channel.

    `channels` is max|w| of each over that of the layer (`largest`), `ratio` is `largest` over the median of those that
    are not all zero; the errors are norms of what rounding to int8 changes over those of the weights.
    """

    name: str
    channels: tuple[float, ...]
    largest: float
    ratio: float
    error_per_tensor: float
    error_per_channel: float


def weight_ranges(model: nn.Module) -> list[LayerRange]:
    """Every convolution and linear layer of `model`, which is to be quantised (folded), the most unequal first."""
    layers = [
        _range(name, module.weight.detach().flatten(1).double())
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight is not None
    ]
    return sorted(layers, key=lambda layer: -layer.ratio)


def _range(name: str, weight_ON: Tensor) -> LayerRange:
    range_O = weight_ON.abs().amax(1)
    largest, alive = range_O.max(), range_O[range_O > 0]
    if not len(alive):
        return LayerRange(name, (0.0,) * len(range_O), 0.0, 1.0, 0.0, 0.0)
    return LayerRange(
        name,
        tuple((range_O / largest).tolist()),
        float(largest),
        float(largest / alive.median()),
        _rounding(weight_ON, largest),
        _rounding(weight_ON, range_O.clamp_min(float(alive.min())).unsqueeze(1)),
    )


def _rounding(weight_ON: Tensor, largest: Tensor) -> float:
    step = largest / LEVELS
    return float((torch.round(weight_ON / step) * step - weight_ON).norm() / weight_ON.norm())


def range_verdict(ranges: Sequence[LayerRange]) -> str:
    """One plain sentence: will int8 with one scale per layer hurt?"""
    if not ranges:
        return "There is no layer to quantise."
    worst = ranges[0]
    where = (
        f"in {worst.name}, the worst layer, the largest channel is {worst.ratio:.1f} times the median one, which is "
        f"left {LEVELS / worst.ratio:.0f} of {LEVELS} steps"
    )
    if worst.ratio > WILL_HURT:
        count = sum(layer.ratio > WILL_HURT for layer in ranges)
        return f"Per-tensor int8 will likely hurt ({count} of {len(ranges)} layers): {where}; quantise per channel."
    if worst.ratio > MAY_HURT:
        return f"Per-tensor int8 may hurt: {where}; quantise per channel, or measure it with --int8."
    return f"Per-tensor int8 will likely not hurt: {where}."


def draw_ranges(ranges: Sequence[LayerRange], path: Path, *, most: int = 40) -> None:
    """A picture: a column per layer, worst first, a dot per channel at its share of the layer's range."""
    from matplotlib.figure import Figure

    shown = ranges[:most]
    figure = Figure(figsize=(max(6.0, 0.3 * len(shown) + 2), 5), layout="constrained")
    axis = figure.subplots()
    for column, layer in enumerate(shown):
        alive = [share for share in layer.channels if share > 0]
        axis.scatter([column] * len(alive), alive, s=9, color="C0", alpha=0.5, linewidths=0)
        axis.scatter([column], [1 / layer.ratio], s=60, marker="_", color="C3", label="median" if not column else None)
    lowest = min([1 / LEVELS, *(share for layer in shown for share in layer.channels if share > 0)]) / 1.5
    label = "below 8 steps with one scale per layer"
    axis.axhspan(lowest, 8 / LEVELS, facecolor="0.9", edgecolor="0.5", linewidth=0.6, zorder=0, label=label)
    axis.set(yscale="log", ylim=(lowest, 1.2), ylabel="max|w| of a channel over its layer's")
    axis.set_xticks(range(len(shown)), [layer.name for layer in shown], rotation=90, fontsize=7)
    axis.legend(frameon=False, loc="lower left")
    of = f"{len(shown)} worst of {len(ranges)} layers" if len(shown) < len(ranges) else f"all {len(ranges)} layers"
    axis.set_title(f"ranges of output channels, {of}")
    figure.savefig(path, dpi=110)
