"""lam by the update, in anybody's loop."""

from __future__ import annotations

from typing import Any

from torch import nn

from growshrink.errors import GrowShrinkError
from growshrink.layers.activations import set_lambda
from growshrink.schedules.functions import Schedule


class LambdaScheduler:
    """Sets lam as torch's schedulers set the learning rate: once now, and then with every `step()`.

    Args:
        model: A grown net; what `fuse` or `drop` made of it is passed over.
        schedule: lam by the update (`growshrink.schedules`, or a `ClosedLoop`, whose state is kept too).
        ema: The average of its weights, which has averaged lam too: step after it is updated.

    Raises:
        GrowShrinkError: The net was never grown, or the schedule gives a value outside [0, 1].

    >>> import growshrink as gs
    >>> net = gs.grow(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    >>> scheduler = gs.LambdaScheduler(net, gs.schedules.hold_then_vanish(hold=1, vanish=2))
    >>> for update in range(4):
    ...     print(scheduler.lam)  # optimizer.step() goes here
    ...     scheduler.step()
    1.0
    1.0
    0.5
    0.0
    """

    def __init__(self, model: nn.Module, schedule: Schedule, *, ema: nn.Module | None = None) -> None:
        if not callable(schedule):
            raise GrowShrinkError(f"{schedule=}: must be a function from the update to lam.")
        self.nets = [model] if ema is None else [model, ema]
        self.schedule, self.updates, self.lam = schedule, 0, 1.0
        self._set()

    def step(self, updates: int | None = None) -> None:
        """An update was made (or `updates` in all): set lam for the next."""
        self.updates = self.updates + 1 if updates is None else updates
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """Updates made, and the state of a schedule that has one; lam itself is in the state of the net."""
        keeps = getattr(self.schedule, "state_dict", None)
        return {"updates": self.updates, "schedule": None if keeps is None else keeps()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; sets lam."""
        self.updates = state["updates"]
        if state["schedule"] is not None:
            self.schedule.load_state_dict(state["schedule"])  # type: ignore[attr-defined]
        self._set()

    def _set(self) -> None:
        self.lam = self.schedule(self.updates)
        for net in self.nets:
            set_lambda(net, self.lam)
