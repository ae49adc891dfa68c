"""Schedules: pure functions from the count of optimizer updates to a value.

A schedule has no state, so a resumed run, every rank and every plot see the same curve. All of them take
`step >= 0`, the number of updates already done, and stay at their last value for ever.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """The same value at every step.

    >>> constant(0.3)(10_000)
    0.3
    """
    return lambda step: value


def linear(start: float, end: float, steps: int, begin: int = 0) -> Schedule:
    """From `start` to `end` in a straight line over `steps` updates after `begin`; exactly `end` from then on.

    >>> [linear(1.0, 0.0, steps=4)(s) for s in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return _ramp(start, end, steps, begin, lambda t: t, "linear")


def cosine(start: float, end: float, steps: int, begin: int = 0) -> Schedule:
    r"""Half a cosine from `start` to `end` over `steps` updates after `begin`; exactly `end` from then on.

    .. math:: end + (start - end) \cdot (1 + \cos \pi t) / 2, \quad t = (step - begin) / steps

    >>> [round(cosine(1.0, 0.0, steps=4)(s), 3) for s in range(6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]

    Source: SGDR (Loshchilov and Hutter, arXiv:1608.03983, eq. 5).
    """
    return _ramp(start, end, steps, begin, lambda t: 0.5 - 0.5 * math.cos(math.pi * t), "cosine")


def hold_then_vanish(hold: int, vanish: int) -> Schedule:
    """The lam of a round: 1 for `hold` updates, a cosine to exactly 0.0 over `vanish` updates, then 0.0 for ever.

    At 0.0 the BN statistics settle and fusing becomes legal, so a run must last beyond `hold + vanish`.

    >>> lam = hold_then_vanish(hold=2, vanish=2)
    >>> [round(lam(s), 3) for s in range(6)]
    [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    if hold < 0:
        raise ValueError(f"hold_then_vanish needs hold >= 0 updates, got {hold=}.")
    return cosine(1.0, 0.0, steps=vanish, begin=hold)


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after another: `schedules[i]` from `boundaries[i - 1]` on, counting its steps from there.

    >>> s = join([constant(5.0), linear(1.0, 0.0, steps=2)], boundaries=[3])
    >>> [s(step) for step in range(6)]
    [5.0, 5.0, 5.0, 1.0, 0.5, 0.0]
    """
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(f"join needs one boundary fewer than schedules, got {len(schedules)=}, {len(boundaries)=}.")
    if list(boundaries) != sorted(boundaries):
        raise ValueError(f"join needs boundaries in rising order, got {list(boundaries)}.")
    starts = [0, *boundaries]

    def schedule(step: int) -> float:
        index = bisect_right(boundaries, step)
        return schedules[index](step - starts[index])

    return schedule


def rewarm(envelope: Schedule, restarts: Sequence[int], warmup: int) -> Schedule:
    r"""`envelope`, pulled down to near 0 at every restart and led back up linearly over `warmup` updates.

    .. math:: envelope(step) \cdot \min(1, (step - r + 1) / (warmup + 1)), \quad r = \max\{restart \le step\}

    The jagged schedule of ReLoRA (arXiv:2307.05695, section 3): after a change of structure some parameters have
    no optimizer state yet, and a full learning rate on their first updates would undo what was kept.

    >>> [round(rewarm(constant(1.0), restarts=[0, 4], warmup=1)(s), 2) for s in range(6)]
    [0.5, 1.0, 1.0, 1.0, 0.5, 1.0]
    """
    if warmup < 0:
        raise ValueError(f"rewarm needs warmup >= 0 updates, got {warmup=}.")
    points = sorted(restarts)

    def schedule(step: int) -> float:
        index = bisect_right(points, step)
        since = step - points[index - 1] if index else warmup
        return envelope(step) * min(1.0, (since + 1) / (warmup + 1))

    return schedule


def _ramp(start: float, end: float, steps: int, begin: int, shape: Callable[[float], float], name: str) -> Schedule:
    if steps < 0 or begin < 0:
        raise ValueError(f"{name} needs steps >= 0 and begin >= 0, got {steps=}, {begin=}.")

    def schedule(step: int) -> float:
        if step >= begin + steps:
            return end  # exactly: 1 - cos(pi) arithmetic must not leave 1e-17 behind
        if step <= begin:
            return start
        return start + (end - start) * shape((step - begin) / steps)

    return schedule
