"""fit: train a net once, plainly; what the recipes compare with each other."""

from __future__ import annotations

from torch import nn
from tqdm import tqdm

from growshrink.data.feed import UpdateBatches
from growshrink.errors import RunError
from growshrink.schedules.closed_loop import ClosedLoop
from growshrink.schedules.functions import Schedule, constant, cosine, rewarm
from growshrink.training.trainer import TrainConfig, Trainer


def fit(
    model: nn.Module,
    batches: UpdateBatches,
    config: TrainConfig,
    *,
    updates: int,
    lam: Schedule | ClosedLoop = constant(1.0),  # noqa: B008 - has no state
    label: str = "",
    progress: bool = False,
) -> nn.Module:
    """Train `model` in place for some updates: a warm-up of 5 %, then half a cosine down to a learning rate of 0.

    Args:
        model: Any net.
        batches: What it is fed with.
        config: How; with `ema_decay` the averaged net is returned, recalibrated.
        updates: How long.
        lam: A schedule, or a closed loop, which then observes the training loss.
        label: Label of the progress bar.
        progress: Show one.

    Returns:
        The net to judge, in eval mode.

    Raises:
        RunError: The loss is no longer finite.
    """
    trainer = Trainer(model, config, batches)
    on_loss = lam.observe if isinstance(lam, ClosedLoop) else None
    learning_rate = rewarm(cosine(1.0, 0.0, updates), [0], warmup=updates // 20)
    with tqdm(total=updates, desc=label, unit="update", leave=False, disable=not progress, ncols=110) as bar:
        mean = trainer.train(updates, learning_rate=learning_rate, lam=lam, on_loss=on_loss, after_update=bar.update)
    loss = float(mean)
    if not loss < float("inf"):
        raise RunError(f"{label or 'training'}: the mean loss is {loss}; try a lower lr.")
    trainer.calibrate_average()
    for ours, theirs in zip(trainer.best.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)  # an average needs no gradients, but may be trained further
    return trainer.best.eval()
