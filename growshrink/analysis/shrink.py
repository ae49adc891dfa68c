"""AngleNAS's loop: shrink a space of widths while its supernet trains, dropping the choices that score lowest.

Train the supernet; score each choice of each layer by the mean score of sampled subnets that contain it; drop the
lowest; train on. Driven by the angle as published, or by anything else: what the loop is worth is what it has over
the same loop that drops at random.

Source: Hu et al., Angle-based Search Space Shrinking (arXiv:2004.13431), algorithm 2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from growshrink.analysis._angle import AngleTable, Floats, supernet_table
from growshrink.analysis.scores import RANDOM, SCORES, Bench
from growshrink.analysis.trained import num_updates, train_supernet
from growshrink.base.config import check_fields
from growshrink.base.limits import Count, Positive, Whole
from growshrink.data.feed import Feed
from growshrink.errors import AnalysisError, did_you_mean
from growshrink.layers.widths import WidthSpace
from growshrink.training import TrainConfig

Choices = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ShrinkPlan:
    """How the loop goes.

    The article's figures are for 21 layers of 7 operators: 100 epochs, then 5 for each stage; 1000 subnets for each
    operator; 7 operators dropped at a time; until 1e6 subnets are left, or after 20 iterations; and the initial weights
    that angles are measured from are replaced, once, when more than 50 of 147 operators are gone.

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

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, eq=False)
class Shrunk:
    """Outcome of `shrink`.

    Attributes:
        space: What is left.
        steps: For each iteration the choices that were dropped, the size that was left, and every choice's score.
        updates: Spent after the first stage: the same for all drivers.
        rebased_at: The iteration at which the initial weights were replaced, or None.
    """

    space: WidthSpace
    steps: list[dict[str, Any]]
    updates: int
    rebased_at: int | None


def balanced_sample(choices: Choices, samples: int, seed: int) -> list[dict[str, int]]:
    """Subnets of a space, each choice of each layer in the same number of them, `samples` at least, otherwise random.

    Every layer's list of choices is repeated and shuffled. (The article samples for each operator; here a subnet counts
    for all of its choices, so that as few as possible have to be scored.)
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


def score_with(driver: str, subnets: list[dict[str, int]], table: AngleTable, bench: Bench, seed: int) -> Floats:
    """Scores of subnets: by a key of `SCORES`, or drawn."""
    if driver == RANDOM:
        return np.random.default_rng((seed, 7)).random(len(subnets))
    index: NDArray[np.intp] = table.index(subnets)
    return SCORES[driver](bench, index)


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
    """Shrink the space of a supernet that has been through its first stage, and train it on, in place.

    Args:
        init: The net as it was initialised.
        model: The net after `plan.first_epochs`.
        space: All of its widths.
        feed: What it is trained with.
        driver: "angle", another key of `SCORES` ("null", "supernet_accuracy", "params", ...), or "random".
        plan: How the loop goes.
        config: How to train.
        seed: Seed of subnets and widths.
        num_calibration: Batches for statistics, where the driver needs them.
        after_update: Called after each update (a progress bar).
    """
    if driver not in SCORES and driver != RANDOM:
        raise AnalysisError(f"{driver}: no such score to shrink by{did_you_mean(driver, (*SCORES, RANDOM))}")
    base = init
    choices: dict[str, tuple[int, ...]] = {name: tuple(values) for name, values in space.choices.items()}
    update = first = num_updates(feed, plan.first_epochs)
    steps: list[dict[str, Any]] = []
    rebased_at: int | None = None
    gone = 0

    def stage(start: int) -> int:
        return train_supernet(
            model,
            feed,
            epochs=plan.later_epochs,
            config=config,
            space=WidthSpace(choices, space.factor, space.diversity, space.divisor),
            seed=seed,
            start=start,
            after_update=after_update,
        )

    while _size(choices) > plan.stop_size and len(steps) < plan.max_iterations:
        iteration = len(steps)
        table = supernet_table(base, model, space, input_size=feed.input_size)
        bench = Bench(base, model, table, feed, num_calibration=num_calibration)
        subnets = balanced_sample(choices, plan.samples, seed * 1_000_003 + iteration)
        scores = choice_scores(subnets, score_with(driver, subnets, table, bench, seed * 1_000_003 + iteration))
        dropped = drop_lowest(choices, scores, plan.drop)
        if not dropped:
            break
        for name, width in dropped:
            choices[name] = tuple(value for value in choices[name] if value != width)
        gone += len(dropped)
        steps.append(
            {
                "iteration": iteration,
                "dropped": [f"{name}: {width}" for name, width in dropped],
                "size": _size(choices),
                "scores": {f"{name}: {width}": value for (name, width), value in scores.items()},
            }
        )
        if plan.rebase_after and rebased_at is None and gone > plan.rebase_after:
            base, rebased_at = copy.deepcopy(model), iteration
        update = stage(update)
    # Drivers reach the stop at different iterations: what is left of the longest possible run is trained too, so that
    # all of them spend the same.
    longest = -(-(sum(map(len, space.choices.values())) - len(space.choices)) // plan.drop)
    for _ in range(len(steps), min(longest, plan.max_iterations)):
        update = stage(update)
    left = WidthSpace(choices, space.factor, space.diversity, space.divisor)
    return Shrunk(left, steps, update - first, rebased_at)


def _size(choices: Choices) -> int:
    return math.prod(len(values) for values in choices.values())
