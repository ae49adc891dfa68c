"""Growth inside Lightning's Trainer (extra `lightning`)."""

from typing import Any

from lightning.pytorch import Callback

from growshrink.integrations.growth import Growth


class LightningGrowth(Growth, Callback):
    """`lightning.Trainer(callbacks=[LightningGrowth("bottleneck", schedule=..., net="net")])`; see `Growth`.

    Checkpoints hold the branches, and resuming from one grows the net again.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See Lightning's `Callback`, as for the others."""
        self.watch(pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Grow if it is time."""
        self.begin_epoch(trainer.current_epoch, trainer.global_step, pl_module, trainer.optimizers)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Set lam."""
        self.end_update(trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Fuse."""
        self.end(trainer.optimizers)

    def state_dict(self) -> dict[str, Any]:
        """Updates before the growth."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.start = state_dict["start"]
