"""allocate: how wide each layer of a slim net should be under a budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from growshrink.algebra.inputs import InputLike
from growshrink.analysis.prune import SlimSpace, cost_of, profile_macs
from growshrink.base.copying import copy_net
from growshrink.base.limits import SomeOrAll, checked
from growshrink.errors import WidthError
from growshrink.layers.widths import Slots, Width, WidthSpace
from growshrink.training import calibrate_bn


@dataclass(frozen=True)
class WidthStep:
    """A net on the path: its width, its cost over the full net's, and what it scored."""

    width: dict[str, int]
    cost: float
    score: float


@dataclass(frozen=True)
class WidthPath:
    """Outcome of `allocate`: nets from the full one down, each one choice narrower than the one before."""

    steps: tuple[WidthStep, ...]

    @checked(WidthError)
    def within(self, cost: float) -> WidthStep:
        """The first net that costs at most this share of the full one; WidthError if the path ends before."""
        for step in self.steps:
            if step.cost <= cost:
                return step
        raise WidthError(f"no net of the path costs {cost:g} of the full one, the last {self.steps[-1].cost:.3f}.")


class WidthScore:
    """The score of a slim net at any width, batch norm statistics taken from `batches` each time; scores are kept."""

    @checked(WidthError)
    def __init__(self, model: nn.Module, batches: Sequence[Tensor], score: Callable[[nn.Module], float]) -> None:
        self._net, self._batches, self._score = copy_net(model), list(batches), score
        self._slots = Slots(self._net)
        self.known: dict[tuple[int, ...], float] = {}

    def __call__(self, width: Width) -> float:
        """Score at a width."""
        key = tuple(width[name] for name, _ in self._slots)
        if key not in self.known:
            self._slots.check(width)
            self._slots.set(width)
            calibrate_bn(self._net, self._batches)
            self.known[key] = self._score(self._net)
        return self.known[key]


@checked(WidthError, macs=SomeOrAll)
def allocate(
    model: nn.Module,
    space: WidthSpace,
    *,
    macs: float,
    score: Callable[[Width], float],
    per_mac: bool = True,
    cost: Callable[[Width], float] | None = None,
    input_size: InputLike = None,
) -> WidthPath:
    """Narrow a slim net choice by choice where that costs the least: the path has a net for every budget.

    Args:
        model: A slim net, trained at all widths. Not modified.
        space: Its width space.
        macs: What the last net may cost, over the full net.
        score: Score of a width, higher is better, on images neither trained on nor the test set: minus the loss by a
            `growshrink.analysis.WidthScore` of the model.
        per_mac: Lose the least score for each MAC saved; False: the highest score, whatever it saves.
        cost: Cost of a width, such as the measured latency; None is its MACs.
        input_size: `(C, H, W)`, for the MACs; None takes the model's own.

    Raises:
        WidthError: The space is another model's, has values that are no levels of it, or no net within the budget.

    Source: Yu and Huang, AutoSlim (arXiv:1903.11728), section 3.2: `per_mac=False`, the loss on one training batch.

    >>> slim = gs.slim(net)
    >>> score = gs.analysis.WidthScore(slim, [torch.randn(8, 3, 32, 32)], lambda net: 0.0)  # yours: minus the loss
    >>> gs.allocate(slim, gs.width_space(slim), macs=0.5, score=score).within(0.5).cost <= 0.5
    True
    """
    space.check(model)
    if cost is None:
        table = SlimSpace(model, input_size)
        full_macs = profile_macs(table)
        if other := [name for name in space.choices if not set(space.choices[name]) <= set(table.choices[name])]:
            own = ", ".join(map(str, table.choices[other[0]]))
            raise WidthError(f"{other[0]}: the space has values beside the slim net's levels, {own}.")

        def cost(width: Width) -> float:
            return cost_of(table, width)[1] / full_macs

    whole = cost(space.full)
    steps = [WidthStep(space.full, 1.0, score(space.full))]
    while steps[-1].cost > macs:
        now, tried = steps[-1], []
        for name, choices in space.choices.items():
            narrower = [value for value in choices if value < now.width[name]]
            width = {**now.width, name: narrower[-1]} if narrower else now.width
            if narrower and (share := cost(width) / whole) < now.cost:
                tried.append(WidthStep(width, share, score(width)))
        if not tried:
            raise WidthError(f"macs={macs:g}: the space has no net so small; the smallest on the path: {now.cost:.3f}.")
        rates = [(step.score - now.score) / (now.cost - step.cost) if per_mac else step.score for step in tried]
        steps.append(tried[int(np.argmax(np.where(np.isnan(rates), -np.inf, rates)))])  # a net may diverge
    return WidthPath(tuple(steps))
