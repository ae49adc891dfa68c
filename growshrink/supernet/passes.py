"""What one update of a supernet runs: the modes, as functions of the update."""

from collections.abc import Callable
from dataclasses import dataclass

from growshrink.layers.widths import WidthSpace, draw
from growshrink.supernet.chain import UnitChain

#: Default number of updates for each that runs the augmented net.
EVERY = {"lazy": 8}
#: Default share of the base's loss that comes from the augmented net.
INPLACE_DISTIL = {"lazy": 0.5, "sandwich": 1.0, "levels": 1.0}


@dataclass(frozen=True)
class Passes:
    """The passes of one update, by width: the one that is always there, and the augmented ones before it.

    `start` is the unit of the chain from which on the augmented passes run, None runs them whole; `asked` is a net that
    is run for its logits only: the one that `single` learns from in in-place distillation.
    """

    width: dict[str, int]
    augmented: tuple[dict[str, int], ...] = ()
    start: int | None = None
    asked: dict[str, int] | None = None


Mode = Callable[[WidthSpace, int, int, UnitChain | None], Passes]


def _netaug(space: WidthSpace, seed: int, update: int, chain: UnitChain | None) -> Passes:
    return Passes(space.base, (space.sample(seed, update),))


def _suffix(space: WidthSpace, seed: int, update: int, chain: UnitChain | None) -> Passes:
    assert chain is not None
    start = draw(chain.starts, seed, update, "suffix")
    return Passes(space.base, (chain.widened_from(start, space.sample(seed, update), space.base),), start=start)


def _levels(space: WidthSpace, seed: int, update: int, chain: UnitChain | None) -> Passes:
    number = draw(range(space.diversity + 1), seed, update, "levels")
    return Passes(space.base, (space.full, space.all_levels[number]))


#: A new mode is one function of (space, seed, update, chain) here.
MODES: dict[str, Mode] = {
    "netaug": _netaug,
    "lazy": _netaug,
    "suffix": _suffix,
    "single": lambda space, seed, update, chain: Passes(space.sample(seed, update), asked=space.full),
    "sandwich": lambda space, seed, update, chain: Passes(space.base, (space.full, space.sample(seed, update))),
    "levels": _levels,
}
#: Augmented passes of an update that has any.
NUM_AUGMENTED = {"netaug": 1, "lazy": 1, "suffix": 1, "single": 0, "sandwich": 2, "levels": 2}


def default_alpha(mode: str, every: int | None = None) -> float:
    """The alpha at which a pass of an augmented net weighs what the base's does, in the updates that have one."""
    return 1.0 / (EVERY.get(mode, 1) if every is None else every)
