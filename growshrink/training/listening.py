"""A trainer somebody listens to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from growshrink.training.trainer import Trainer


class ListeningTrainer(Trainer):
    """A `Trainer` that tells its training loss, update by update, to whoever wants to know: `ClosedLoop.observe`, say.

    Attributes:
        listener: Called with the loss of each update, 0-dim, detached, on its device.
    """

    listener: Callable[[Tensor], None] | None = None

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super()._loss(*args, **kwargs)
        if self.listener is not None:
            self.listener(loss.detach())
        return loss
