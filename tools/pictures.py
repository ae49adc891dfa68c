"""Pictures of an analysis, by matplotlib without a display."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from growshrink.analysis._angle import Floats
from growshrink.base.writing import save_picture

#: Points of a scatter plot; of more, as many are drawn at random.
MOST_POINTS = 20_000


def draw_angles(path: Path, columns: Mapping[str, Floats], colour: Floats | None, title: str) -> bool:
    """Angle and excess of N subnets against parameters and null, coloured by the truth; False without matplotlib."""
    figure = _figure(13, 4.2)
    if figure is None:
        return False
    num = len(columns["angle"])
    shown = np.arange(num) if num <= MOST_POINTS else np.random.default_rng(0).choice(num, MOST_POINTS, replace=False)
    axes = figure.subplots(1, 3)
    for axis, (x, y) in zip(axes, (("params", "angle"), ("null", "angle"), ("params", "excess")), strict=True):
        c = "C0" if colour is None else colour[shown]
        dots = axis.scatter(columns[x][shown], columns[y][shown], s=4, c=c, linewidths=0, rasterized=True)
        axis.set(xlabel=_LABELS[x], ylabel=_LABELS[y])
    low, high = np.nanmin(columns["null"]), np.nanmax(columns["null"])
    axes[1].plot([low, high], [low, high], color="0.6", linewidth=1, label="angle = null")
    axes[1].legend(frameon=False)
    if colour is not None:
        figure.colorbar(dots, ax=axes[-1], label="truth")
    figure.suptitle(title)
    save_picture(figure, path)
    return True


def draw_yield(path: Path, random: Floats, criteria: Mapping[str, Floats], title: str) -> bool:
    """Histogram and distribution of the top-1 (%) of random subnets, criteria marked; False without matplotlib."""
    figure = _figure(11, 4.5)
    if figure is None:
        return False
    histogram, edf = figure.subplots(1, 2)
    histogram.hist(random, bins=min(40, max(5, len(random) // 10)), color="0.75")
    histogram.set_ylabel("random subnets")
    best = np.sort(random)
    edf.step(best, np.arange(1, len(best) + 1) / len(best), where="post", color="0.4")
    edf.set_ylabel("share of random subnets at or below")
    for axis in (histogram, edf):
        axis.set_xlabel("val top-1 (%)")
        for number, (name, values) in enumerate(criteria.items()):
            axis.axvline(
                float(np.mean(values)),
                color=f"C{number % 10}",
                label=name,
                linewidth=1.8,
                linestyle=_DASHES[number % 3],
            )
    if criteria:
        edf.legend(frameon=False)
    figure.suptitle(title)
    save_picture(figure, path)
    return True


#: Lines at the same place show in each other's gaps.
_DASHES = ((0, (4, 8)), (4, (4, 8)), (8, (4, 8)))
_LABELS = {"params": "parameters", "angle": "angle (rad)", "null": "structural null (rad)", "excess": "excess (rad)"}


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")
