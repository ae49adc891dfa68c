"""AngleNAS's loop: shrink a space of widths while its supernet trains, dropping the choices that score lowest.

What the loop is worth is what it has over the same loop that drops at random.

Source: Hu et al., Angle-based Search Space Shrinking (arXiv:2004.13431), algorithm 2.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from growshrink.analysis._angle import Floats, supernet_table
from growshrink.analysis.scores import RANDOM, SCORES, Bench
from growshrink.base.config import Checked
from growshrink.base.copying import copy_net
from growshrink.base.limits import Count, Positive, Whole
from growshrink.data.feed import Feed
from growshrink.errors import AnalysisError, did_you_mean
from growshrink.layers.widths import WidthSpace
from growshrink.training import TrainConfig
from trained import num_updates, train_supernet

Choices = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ShrinkPlan(Checked):
    """How the loop goes.

    The article's figures, for 21 layers of 7 operators: 100 epochs, then 5; 1000 samples; 7 dropped at a time, until
    1e6 subnets are left, or after 20 iterations; rebased when more than 50 of 147 operators are gone.

    Attributes:
        first_epochs: Before the first drop.
        later_epochs: After each drop.
        samples: Subnets sampled for each choice.
        drop: Choices dropped at a time, the lowest of all layers; a layer keeps at least one.
        stop_size: Stop once the space has this many subnets or less.
        max_iterations: Stop after this many.
        rebase_after: Measure angles from the current weights on, once, when more choices than this are gone; 0 or None
            is never.
    """

    first_epochs: Positive = 10.0
    later_epochs: Positive = 2.0
    samples: Count = 50
    drop: Count = 3
    stop_size: Count = 1000
    max_iterations: Whole = 20
    rebase_after: Whole | None = 12


@dataclass(frozen=True, eq=False)
class Shrunk:
    """Outcome of `shrink`: the space that is left, and for each step the choices dropped, the size left and all scores.

    `updates` were spent after the first stage; `rebased_at` is the iteration that replaced the initial weights.
    """

    space: WidthSpace
    steps: list[dict[str, Any]]
    updates: int
    rebased_at: int | None


def balanced_sample(choices: Choices, samples: int, seed: int) -> list[dict[str, int]]:
    """Subnets of a space, each choice of each layer in the same number of them, `samples` at least, otherwise random.

    (The article samples for each operator; here a subnet counts for all of its choices: fewer have to be scored.)
    """
    random = np.random.default_rng(seed)
    num = samples * max(len(values) for values in choices.values())
    columns = {name: random.permutation(np.resize(np.asarray(values), num)) for name, values in choices.items()}
    return [{name: int(column[i]) for name, column in columns.items()} for i in range(num)]


def choice_scores(subnets: list[dict[str, int]], scores: Floats) -> dict[tuple[str, int], float]:
    """Mean score of the subnets that contain a choice, by (layer, width); subnets without a score are left out."""
    sums: dict[tuple[str, int], list[float]] = {}
    for subnet, value in zip(subnets, scores, strict=True):
        if math.isfinite(value):
            for item in subnet.items():
                sums.setdefault(item, []).append(float(value))
    return {item: float(np.mean(values)) for item, values in sums.items()}


def drop_lowest(choices: Choices, scores: Mapping[tuple[str, int], float], num: int) -> list[tuple[str, int]]:
    """The `num` choices of all layers with the lowest scores, fewer if a layer would be left without one."""
    left = {name: len(values) for name, values in choices.items()}
    dropped: list[tuple[str, int]] = []
    every = [(name, width) for name, values in choices.items() for width in values]
    for name, width in sorted(every, key=lambda item: scores.get(item, -math.inf)):
        if len(dropped) < num and left[name] > 1:
            dropped.append((name, width))
            left[name] -= 1
    return dropped


def shrink(
    init: nn.Module,
    model: nn.Module,
    space: WidthSpace,
    feed: Feed,
    *,
    driver: str,
    plan: ShrinkPlan,
    config: TrainConfig,
    seed: int = 0,
    num_calibration: int = 4,
    after_update: Callable[[], None] | None = None,
) -> Shrunk:
    """Shrink the space of a supernet, initialised as `init` and trained for `plan.first_epochs`; train it on, in place.

    `driver` is "angle", another key of `SCORES`, or "random"; `num_calibration` batches are for drivers that need batch
    norm statistics; `after_update` is called after each update.
    """
    if driver not in SCORES and driver != RANDOM:
        raise AnalysisError(f"{driver}: no such score to shrink by{did_you_mean(driver, (*SCORES, RANDOM))}")
    base, left = init, space
    update = first = num_updates(feed, plan.first_epochs)
    steps: list[dict[str, Any]] = []
    rebased_at: int | None = None
    num_choices = sum(map(len, space.choices.values()))
    # Drivers reach the stop at different iterations: what is left of the longest possible run is trained too, so that
    # all of them spend the same.
    longest = -(-(num_choices - len(space.choices)) // plan.drop)
    for iteration in range(min(longest, plan.max_iterations)):
        if left.size > plan.stop_size:
            table = supernet_table(base, model, space, input_size=feed.input_size)
            bench = Bench(base, model, table, feed, num_calibration=num_calibration)
            drawn = seed * 1_000_003 + iteration
            subnets = balanced_sample(left.choices, plan.samples, drawn)
            if driver == RANDOM:
                values = np.random.default_rng((drawn, 7)).random(len(subnets))
            else:
                values = SCORES[driver](bench, table.index(subnets))
            scores = choice_scores(subnets, values)
            dropped = drop_lowest(left.choices, scores, plan.drop)
            kept = {n: tuple(w for w in widths if (n, w) not in dropped) for n, widths in left.choices.items()}
            left = replace(left, choices=kept)
            named = {f"{name}: {width}": value for (name, width), value in scores.items()}
            gone = [f"{name}: {width}" for name, width in dropped]
            steps.append({"iteration": iteration, "dropped": gone, "size": left.size, "scores": named})
            total_gone = num_choices - sum(map(len, left.choices.values()))
            if plan.rebase_after and rebased_at is None and total_gone > plan.rebase_after:
                base, rebased_at = copy_net(model), iteration
        options: dict[str, Any] = {"config": config, "seed": seed, "after_update": after_update}
        update = train_supernet(model, feed, epochs=plan.later_epochs, space=left, start=update, **options)
    return Shrunk(left, steps, update - first, rebased_at)
