"""Making and training the nets that programs analyse or compare (not a program)."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.progress import progress_bar
from growshrink.base.seeding import own_randomness
from growshrink.data.feed import Feed, UpdateBatches
from growshrink.errors import RunError
from growshrink.layers.grown import grown_modules
from growshrink.layers.widths import WidthSpace, width_space
from growshrink.schedules import Schedule, constant, cosine, rewarm
from growshrink.schedules.closed_loop import ClosedLoop
from growshrink.supernet import NetAugTask
from growshrink.training import TrainConfig, Trainer
from growshrink.transforms import grow

#: Ratio of the branches of a model that is not built grown.
RATIO = 4.0


def as_supernet(
    model: nn.Module, about: Mapping[str, Any], *, input_size: InputSize, seed: int = 0
) -> tuple[WidthSpace, dict[str, Any]]:
    """Grow a fresh net, with `name` and `kwargs` in `about`, by bottlenecks of ratio 4 in place unless it is grown.

    Returns the width space, and what `growshrink.supernet.save_supernet` has to know about the net.
    """
    grown_by: dict[str, Any] | None = None
    if not grown_modules(model):
        grown_by = {"branch": "bottleneck", "ratio": RATIO, "seed": seed}
        grow(model, **grown_by, inplace=True, input_size=input_size)
    about = {"name": about["name"], "kwargs": about["kwargs"], "grow": grown_by, "input_size": list(input_size)}
    return width_space(model), about


def train_supernet(
    model: nn.Module,
    feed: Feed,
    *,
    epochs: float,
    config: TrainConfig,
    space: WidthSpace | None = None,
    mode: str = "single",
    seed: int = 0,
    start: int = 0,
    **more: Any,
) -> int:
    """Train the widths of a grown net together, in place, activations alive; see `train_net`.

    Widths are drawn from `space` (None: all of the model's) by `seed` and the update, in a `mode` of `NetAugTask`'s.
    """
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    task = NetAugTask(model, criterion, verbose=False, space=space, mode=mode, seed=seed, input_size=feed.input_size)
    stop = train_net(model, feed, epochs=epochs, config=config, start=start, task=task, **more)
    task.detach()
    return stop


def train_net(
    model: nn.Module,
    feed: Feed,
    *,
    epochs: float,
    config: TrainConfig,
    start: int = 0,
    after_update: Callable[[], None] | None = None,
    task: NetAugTask | None = None,
    train: Callable[..., Tensor] = Trainer.train,
) -> int:
    """Train a net in place, learning rate falling by a cosine; a `task` computes the loss in place of the trainer.

    Updates are counted from `start`, which decides about their batches; returns the number of the next one. `train`
    does them; `Results.kept` gives one that is resumed.
    """
    total = num_updates(feed, epochs)
    options: dict[str, Any] = {"train": train, "task": task, "after_update": after_update}
    trainer, train_to = cosine_trainer(model, feed, config, total, start, **options)
    if task is not None:
        task.attach(trainer.optimizer)
    train_to(start + total)
    return start + total


def cosine_trainer(
    model: nn.Module,
    feed: Feed,
    config: TrainConfig,
    total: int,
    start: int = 0,
    *,
    train: Callable[..., Tensor] = Trainer.train,
    **options: Any,
) -> tuple[Trainer, Callable[[int], object]]:
    """A trainer without averages, and its `train`, learning rate falling by a cosine over `total` updates."""
    trainer = Trainer(model, replace(config, ema_decay=0.0), feed.train)
    trainer.update = start
    rate = cosine(1.0, 0.0, total, start)
    return trainer, partial(train, trainer, learning_rate=rate, lam=constant(1.0), **options)


def num_updates(feed: Feed, epochs: float) -> int:
    """Updates that `epochs` are, at least one."""
    return max(1, round(epochs * feed.train.updates_per_epoch))


def fit(
    model: nn.Module,
    batches: UpdateBatches,
    config: TrainConfig,
    *,
    updates: int,
    lam: Schedule | ClosedLoop = constant(1.0),  # noqa: B008 - has no state
    label: str = "",
    progress: bool = False,
    train: Callable[..., Tensor] = Trainer.train,
) -> nn.Module:
    """Train `model` in place for some updates: a warm-up of 5 %, then half a cosine down to a learning rate of 0.

    With `ema_decay` the averaged net is returned, recalibrated. A closed loop as `lam` observes the training loss, and
    `label` names the progress bar. Returns the net to judge, in eval mode; RunError where the loss is not finite.
    `train` does the updates; `Results.kept` gives one that is resumed.
    """
    trainer = Trainer(model, config, batches)
    on_loss = lam.observe if isinstance(lam, ClosedLoop) else None
    learning_rate = rewarm(cosine(1.0, 0.0, updates), [0], warmup=updates // 20)
    how: dict[str, Any] = {"learning_rate": learning_rate, "lam": lam, "on_loss": on_loss}
    with progress_bar(total=updates, what=label, show=progress) as bar:
        mean = train(trainer, updates, after_update=bar.update, **how)
    loss = float(mean)
    if not loss < float("inf"):
        raise RunError(f"{label or 'training'}: the mean loss is {loss}; try a lower lr.")
    trainer.calibrate_average()
    for ours, theirs in zip(trainer.best.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)  # an average needs no gradients, but may be trained further
    return trainer.best.eval()


def reinitialise(net: nn.Module, seed: int | None = None) -> None:
    """Fresh weights, in place: each layer's `reset_parameters`, then the net's own `init_weights` if it has one.

    They are drawn from `seed`; None draws them from the process's random stream.
    """
    with own_randomness(seed + 1_000_003) if seed is not None else nullcontext():
        for module in net.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        if callable(init := getattr(net, "init_weights", None)):
            init()
