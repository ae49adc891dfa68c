"""Who says what lam is: the plan's schedule, or in a round that asks for it a closed loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from growshrink.cycle.timeline import Timeline
from growshrink.schedules.closed_loop import ClosedLoop

#: Looks that a closed loop takes at the loss while lam falls, at least; every 10 updates at the most.
LEAST_LOOKS = 20


class LamControl:
    """Lam over a run, by update: called like any schedule, and told the training loss of every update.

    In a round with `control="closed_loop"` lam is 1 in the hold, falls as the training loss allows, and is 0 when the
    plan's vanishing is over, at the latest; see `ClosedLoop`. Where a teacher comes in at the end of the hold, the
    losses from before, which are others, do not count.

    Args:
        timeline: Of the run.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._loops: dict[int, ClosedLoop] = {}
        self._starts: dict[int, int] = {}
        self._listens_from: dict[int, int] = {}
        self._listener: ClosedLoop | None = None
        alive = {(s.round, s.phase): s for s in timeline.segments if s.phase in ("hold", "vanish")}
        for number, plan in enumerate(timeline.plan.rounds, start=1):
            if plan.control == "closed_loop":
                hold, vanish = alive[number, "hold"], alive[number, "vanish"]
                every = min(10, max(1, (vanish.stop - vanish.start) // LEAST_LOOKS))
                self._loops[number] = ClosedLoop(vanish.stop - hold.start, hold=hold.stop - hold.start, every=every)
                self._starts[number] = hold.start
                self._listens_from[number] = hold.start if plan.distil == "none" else vanish.start

    def __call__(self, update: int) -> float:
        """Lam for update number `update`; of an update that has been, in a closed loop the present lam."""
        number = self._timeline.segment_at(update).round
        loop = self._loops.get(number)
        if loop is None:
            self._listener = None
            return self._timeline.lam(update)
        self._listener = loop if update >= self._listens_from[number] else None
        return loop(update - self._starts[number])

    def observe(self, loss: Tensor) -> None:
        """Take in the loss of the update that lam was last asked for."""
        if self._listener is not None:
            self._listener.observe(loss)

    def state_dict(self) -> dict[str, Any]:
        """The closed loops' states by number of the round."""
        return {str(number): loop.state_dict() for number, loop in self._loops.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for number, loop in self._loops.items():
            loop.load_state_dict(state[str(number)])
