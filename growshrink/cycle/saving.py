"""When a run is to save itself: every so many updates, and when it is asked to stop."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from types import TracebackType

import torch

from growshrink.base.ranks import any_rank, num_ranks
from growshrink.base.stopping import Stopped, finishing
from growshrink.errors import PlanError

#: Updates between two questions whether some rank was asked to stop, where asking means to wait for the device.
_PATIENCE = 10


class Saving:
    """A context manager: inside it the first SIGTERM or Ctrl-C of a program is only noted, for `due` to tell.

    Attributes:
        keep: How many checkpoints are kept.
        device: Where the ranks meet, and the run trains.

    Args:
        every: Updates from one checkpoint to the next; None for no more than there are anyway.
        keep: How many checkpoints are kept.
        device: Where the ranks meet.
    """

    def __init__(self, every: int | None, keep: int, device: torch.device) -> None:
        for name, number in (("save_every", every), ("keep", keep)):
            if number is not None and number < 1:
                raise PlanError(f"{name}={number!r}: must be at least 1.")
        self.keep = keep
        self.device = device
        self._every = every
        self._asked = False
        self._stack = ExitStack()

    def __enter__(self) -> Saving:
        """Itself."""
        self._came = self._stack.enter_context(finishing())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Signals are as they were before."""
        self._stack.__exit__(kind, error, trace)

    def due(self, update: int) -> bool:
        """Whether to save after `update` updates; must be called on every rank; all get the same answer."""
        if num_ranks() == 1 or self.device.type == "cpu" or update % _PATIENCE == 0:
            self._asked = self._asked or any_rank(self._came() is not None, self.device)
        return self._asked or bool(self._every and update % self._every == 0)

    def leave_if_asked(self, where: str) -> None:
        """Raise `Stopped`, if `due` said so for that reason."""
        if self._asked:
            number = self._came() or signal.SIGTERM  # it was another rank that was asked
            raise Stopped(number, f"stopped by {signal.Signals(number).name} {where}")
