"""Growth inside the Trainer of Hugging Face's transformers (extra `transformers`).

A loop of Accelerate's is one's own: `grow` before `prepare`, or `sync_optimizer` behind it, and `LambdaScheduler`.
"""

from typing import Any

from transformers import TrainerCallback

from growshrink.integrations.growth import Growth


class TrainerGrowth(Growth, TrainerCallback):
    """`transformers.Trainer(callbacks=[TrainerGrowth("bottleneck", schedule=..., net="net")])`; see `Growth`.

    Checkpoints hold the branches, and resuming from one grows the net again. Grown before epoch 0, the optimizer is
    made with the branches; one that they join later is refused on resuming, where `Trainer` groups them otherwise.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """See transformers' `TrainerCallback`, as for the others."""
        self.watch(model)
        self.begin_epoch(0, 0, model, [])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        """Grow if it is time."""
        if self.start is None:
            self.start = round(self.epoch * state.max_steps / state.num_train_epochs)
        self.begin_epoch(int(state.epoch or 0), state.global_step, model, [optimizer])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set lam."""
        self.end_update(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        """Fuse."""
        self.end([optimizer])
