"""Controls lam during a run: by the plan's schedule, or in a round that asks for it by a closed loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from growshrink.schedules import ClosedLoop, Schedule

#: Looks that a closed loop takes at the loss while lam falls, at least; every 10 updates at the most.
LEAST_LOOKS = 20


@dataclass(frozen=True)
class LoopSpan:
    """The updates of a round whose lam is controlled in a closed loop.

    Attributes:
        round: Number of the round.
        start: Its first update.
        hold_stop: The update in which lam begins to fall, at the earliest.
        vanish_stop: The update from which on lam is 0.
        stop: The first update after the round.
        observes_from: The update from which losses count.
    """

    round: int
    start: int
    hold_stop: int
    vanish_stop: int
    stop: int
    observes_from: int

    def loop(self) -> ClosedLoop:
        """Made for these updates, with lam still at 1."""
        every = min(10, max(1, (self.vanish_stop - self.hold_stop) // LEAST_LOOKS))
        return ClosedLoop(self.vanish_stop - self.start, hold=self.hold_stop - self.start, every=every)


class LamControl:
    """Lam over a run, by update: called like any schedule, and told the training loss of every update.

    In a round with a closed loop lam is 1 in the hold, falls as the training loss allows, and is 0 when the plan's
    vanishing is over, at the latest; see `ClosedLoop`. Where a teacher comes in at the end of the hold, the losses
    from before, which are others, do not count.

    Args:
        schedule: Lam everywhere else.
        spans: Of the closed loops.
    """

    def __init__(self, schedule: Schedule, spans: Sequence[LoopSpan]) -> None:
        self._schedule = schedule
        self._spans = spans
        self._loops = {span.round: span.loop() for span in spans}
        self._observer: ClosedLoop | None = None

    def __call__(self, update: int) -> float:
        """Lam for update number `update`; of an update that has been, in a closed loop the present lam."""
        span = next((span for span in self._spans if span.start <= update < span.stop), None)
        if span is None:
            self._observer = None
            return self._schedule(update)
        loop = self._loops[span.round]
        self._observer = loop if update >= span.observes_from else None
        return loop(update - span.start)

    def observe(self, loss: Tensor) -> None:
        """Take in the loss of the update that lam was last asked for."""
        if self._observer is not None:
            self._observer.observe(loss)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The closed loops' states by number of the round."""
        return {str(number): loop.state_dict() for number, loop in self._loops.items()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """The inverse of `state_dict`."""
        for number, loop in self._loops.items():
            loop.load_state_dict(state[str(number)])
