"""What choosing a net for every image could bring, before anything is trained to choose."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from growshrink.analysis.stats import Bootstrap, Estimate, Floats
from growshrink.errors import AnalysisError

#: Thresholds of the cascade's curve.
POINTS = 19


@dataclass(frozen=True)
class Policy:
    """A way to choose a net for every image: mean MACs, top-1 in percent, and points over the random mix there."""

    name: str
    macs: float
    top1: float
    over_mix: Estimate


def headroom(
    right: ArrayLike,
    macs: ArrayLike,
    *,
    confidence: ArrayLike | None = None,
    gates: Mapping[str, ArrayLike] | None = None,
    shared: float = 0.0,
    num: int = 1000,
    seed: int = 0,
) -> list[Policy]:
    """Bound every gate by a table of which of M nets is right on which of N images.

    A random mix of the nets needs no gate: its top-1 is the upper hull of theirs over MACs, a straight line between
    two. The oracle takes the cheapest net that is right, the cheapest of all where none is. The cascade runs one net
    after the other until one is confident enough, and pays for all it ran. What the oracle brings is a bound: nets that
    err independently have an oracle too, which no gate can learn; two seeds of one net show how much that is.

    Args:
        right: Whether each net is right, `(N, M)`.
        macs: MACs of the nets, `(M,)`, rising.
        confidence: Confidence of each net, e.g. the softmax's maximum, `(N, M)`; without it there is no cascade.
        gates: By name what a trained gate takes: a net for each image, `(N,)`, its own MACs left out; or whether it is
            right there and the MACs, `(2, N)`. A net that was right with another seed shows what is luck.
        shared: MACs of what all nets begin with, which a cascade runs once.
        num: Resamples of the images, for the intervals of 95 %.
        seed: Seed of those.

    Returns:
        Each net, the oracle, the cascade at quantiles of its confidence, and the gates.

    Raises:
        AnalysisError: The shapes do not fit, MACs do not rise, or a value is out of range.

    >>> right = [[True, True], [False, True], [True, False], [True, True]]  # 4 images, 2 nets
    >>> [(policy.name, policy.macs, policy.top1) for policy in gs.analysis.headroom(right, macs=[1, 3])]
    [('net 0', 1.0, 75.0), ('net 1', 3.0, 75.0), ('oracle', 1.5, 100.0)]
    """
    right, macs = np.asarray(right, dtype=np.float64), np.asarray(macs, dtype=np.float64)
    if right.ndim != 2 or macs.shape != right.shape[1:] or not (np.diff(macs) > 0).all() or len(macs) < 2:
        raise AnalysisError(f"right of shape {right.shape} and macs of {macs.shape}: must be (N, M), and (M,), rising.")
    if not np.isin(right, (0, 1)).all():
        raise AnalysisError("right: must hold 0 or 1, False or True.")
    if confidence is not None and (np.shape(confidence) != right.shape or np.isnan(confidence).any()):
        raise AnalysisError(f"confidence of shape {np.shape(confidence)}: must be {right.shape}, without NaN.")
    boot, found = Bootstrap(len(right), num=num, seed=seed), []
    for name, (hit, paid) in _policies(right, macs, confidence, gates or {}, shared).items():

        def over_mix(index: NDArray[np.int64], hit: Floats = hit, paid: Floats = paid) -> float:
            return float(100 * (hit[index].mean() - _mix(macs, right[index].mean(0), float(paid[index].mean()))))

        estimate = boot.interval(over_mix(np.arange(len(right))), boot.of(over_mix))
        found.append(Policy(name, float(paid.mean()), float(100 * hit.mean()), estimate))
    return found


def _policies(
    right: Floats, macs: Floats, confidence: ArrayLike | None, gates: Mapping[str, ArrayLike], shared: float
) -> dict[str, tuple[Floats, Floats]]:
    """Whether each is right on each image, and what it pays, `(N,)` each."""
    rows, count = np.arange(len(right)), len(macs)
    policies = {f"net {net}": (right[:, net], np.full(len(right), macs[net])) for net in range(count)}

    def choose(name: str, choice: NDArray[np.intp], paid: Floats = macs) -> None:
        policies[name] = right[rows, choice], paid[choice]

    choose("oracle", np.where(right.any(1), right.argmax(1), 0))
    if confidence is not None:
        sure = np.asarray(confidence, dtype=np.float64)
        for share in np.linspace(0, 1, POINTS + 2)[1:-1]:
            enough = sure[:, :-1] >= np.quantile(sure[:, :-1], share)
            stop = np.where(enough.any(1), enough.argmax(1), count - 1)
            choose(f"cascade {share:.2f}", stop, shared + np.cumsum(macs - shared))
    for name, given in gates.items():
        taken = np.asarray(given, dtype=np.float64)
        if taken.shape == (2, len(right)):
            policies[name] = taken[0], taken[1]
        elif taken.shape == right.shape[:1] and np.isin(taken, range(count)).all():
            choose(name, taken.astype(np.intp))
        else:
            raise AnalysisError(f"gates, {name}: must be one of 0 to {count - 1} for each of {len(right)} images.")
    return policies


def _mix(macs: Floats, top1: Floats, at: float) -> float:
    """The best top-1 of a random mix of nets with mean MACs of `at`: the upper hull, flat beyond its ends."""
    pairs = ([one, two] for one in range(len(macs)) for two in range(one, len(macs)) if one == 0 or macs[one] <= at)
    return max(float(np.interp(at, macs[pair], top1[pair])) for pair in pairs)
