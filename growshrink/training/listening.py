"""What `growshrink.cycle` used before `Trainer.train` had `on_loss`; goes with its last use there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from growshrink.training.trainer import Trainer


class ListeningTrainer(Trainer):
    """`Trainer` whose `train` passes `listener` as `on_loss`."""

    listener: Callable[[Tensor], None] | None = None

    def train(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `Trainer.train`."""
        return super().train(*args, on_loss=self.listener, **kwargs)
