"""Closed-loop lam: the activations vanish as fast as the training signal allows, and by a deadline in any case."""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from growshrink.base.config import check_fields
from growshrink.base.limits import Count, NotAll, NotNegative, SomeOrAll, Whole
from growshrink.base.ranks import average_, num_ranks
from growshrink.errors import PlanError
from growshrink.schedules.functions import Schedule


@dataclass(eq=False)
class ClosedLoop:
    r"""Schedule of lam that follows the training loss. Called like any other schedule: `lam(update)`.

    A smoothed signal s is compared with a reference r, its lowest value so far:

    * while :math:`s \le (1 + tolerance) \, r`, lam falls by `1 / fall` at every update;
    * otherwise it waits for training to catch up;
    * it is never above the straight line that ends at exactly 0 at `deadline` and falls by
      `1 / ((deadline - hold) * final)`.

    So lam never rises, and is exactly 0.0 from `deadline` on, whatever the signal does (a signal that is not finite
    makes it wait). Whether that is worth anything is measured by `recipes/closed_loop.py`.

    Args:
        deadline: Updates done when lam is 0 at the latest. Train beyond it: batch norm statistics have to settle.
        hold: Updates with lam 1 before anything falls; the signal is observed already.
        fall: Updates it takes from 1 to 0 if the signal never objects; None: half of those from `hold` to `deadline`.
        tolerance: How far the signal may be above its lowest, relatively.
        smoothing: Weight of the past in the smoothed signal, in [0, 1).
        final: Share of what is between `hold` and `deadline` that the steepest way down takes.
        every: Updates between two looks at the signal: what is observed stays on its device until then.

    Raises:
        PlanError: An argument makes no sense.

    >>> lam = ClosedLoop(deadline=8, hold=2, fall=4, every=1)
    >>> values = []
    >>> for update in range(10):
    ...     values.append(lam(update))
    ...     lam.observe(1.0)
    >>> values
    [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]
    """

    deadline: Count
    _: KW_ONLY
    hold: Whole = 0
    fall: Count | None = None
    tolerance: NotNegative = 0.05
    smoothing: NotAll = 0.9
    final: SomeOrAll = 0.1
    every: Count = 10

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hold >= self.deadline:
            raise PlanError(f"hold={self.hold}: must be below deadline={self.deadline}.")
        self._steps = max(1, (self.deadline - self.hold) // 2) if self.fall is None else self.fall
        self._lam, self._update, self._smoothed, self._lowest, self._falling = 1.0, 0, math.nan, math.inf, True
        self._pending: Tensor | float = 0.0
        self._count = 0

    def __call__(self, update: int) -> float:
        """Lam for update number `update`; asked for an update that has been, the present lam."""
        if update > self._update:
            first = max(self._update, self.hold)
            if self._falling and update > first:
                self._lam = max(0.0, self._lam - (update - first) / self._steps)
            steepest = (self.deadline - update) / ((self.deadline - self.hold) * self.final)
            self._lam = min(self._lam, max(0.0, steepest))
            self._update = update
        return self._lam

    def observe(self, signal: Tensor | float) -> None:
        """Take in the signal of one update, the training loss say: a number, or a 0-dim tensor on any device.

        With `torch.distributed` every rank has to call this equally often: the mean over the ranks is what counts.
        """
        self._pending = self._pending + (signal.detach().double() if isinstance(signal, Tensor) else signal)
        self._count += 1
        if self._count == self.every:
            self._look(_mean_over_ranks(self._pending) / self._count)
            self._pending, self._count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as numbers."""
        return {name: kind(getattr(self, f"_{name}")) for name, kind in _STATE.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name, kind in _STATE.items():
            setattr(self, f"_{name}", kind(state[name]))

    def _look(self, signal: float) -> None:
        if not math.isfinite(signal):
            self._falling = False
            return
        old = self._smoothed
        self._smoothed = signal if math.isnan(old) else self.smoothing * old + (1 - self.smoothing) * signal
        self._lowest = min(self._lowest, self._smoothed)
        self._falling = self._smoothed <= self._lowest + self.tolerance * abs(self._lowest)


_STATE: dict[str, Any] = {"update": int, "count": int, "falling": bool}
_STATE |= dict.fromkeys(("lam", "smoothed", "lowest", "pending"), float)


def _mean_over_ranks(value: Tensor | float) -> float:
    if num_ranks() == 1:
        return float(value)
    mean = torch.as_tensor(value, dtype=torch.float64, device="cuda" if distributed.get_backend() == "nccl" else None)
    mean = mean.clone()
    average_([mean])
    return float(mean)


class LoopSpan(NamedTuple):
    """Updates of a round in which `loop` controls lam; losses count from update `observes_from` on."""

    updates: range
    observes_from: int
    loop: ClosedLoop


class LamControl:
    """Lam over a run, by update: a schedule, but in the rounds of `spans` (by number) closed loops; see `ClosedLoop`.

    Where a teacher comes in at the end of the hold, the losses from before, which are others, do not count.
    """

    def __init__(self, schedule: Schedule, spans: Mapping[int, LoopSpan]) -> None:
        self._schedule, self._spans = schedule, spans
        self._observer: ClosedLoop | None = None

    def __call__(self, update: int) -> float:
        """Lam for update number `update`; of an update that has been, in a closed loop the present lam."""
        span = next((span for span in self._spans.values() if update in span.updates), None)
        self._observer = span.loop if span is not None and update >= span.observes_from else None
        return self._schedule(update) if span is None else span.loop(update - span.updates.start)

    def observe(self, loss: Tensor) -> None:
        """Take in the loss of the update that lam was last asked for."""
        if self._observer is not None:
            self._observer.observe(loss)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The closed loops' states by number of the round."""
        return {str(number): span.loop.state_dict() for number, span in self._spans.items()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """The inverse of `state_dict`."""
        for number, span in self._spans.items():
            span.loop.load_state_dict(state[str(number)])
