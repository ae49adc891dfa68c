"""Making and training the supernets that are analysed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from growshrink import schedules
from growshrink.errors import RunError, near
from growshrink.grown import grown_modules
from growshrink.supernet import NetAugTask
from growshrink.training import DataSet, Feed, Split, TrainConfig
from growshrink.training.seeding import generator
from growshrink.transforms import grow
from growshrink.widths import WidthSpace, width_space

#: Ratio of the branches of a model that is not grown at birth.
RATIO = 4.0


def make_supernet(
    name: str, feed: Feed, kwargs: Mapping[str, Any] | None = None, *, seed: int = 0
) -> tuple[nn.Module, WidthSpace, dict[str, Any]]:
    """A supernet for a data set, freshly initialised.

    Args:
        name: A timm model; one that is not grown at birth is grown with bottlenecks of ratio 4.
        feed: Whose classes and image size it gets.
        kwargs: More for `timm.create_model`.
        seed: Of the weights; no random stream of the process moves.

    Returns:
        The net, its width space, and what `growshrink.supernet.save_supernet` wants to know about it.

    Raises:
        RunError: timm has no such model, or it does not take these arguments.
    """
    if not timm.is_model(name):
        raise RunError(f"{name}: timm knows no such model{near(name, timm.list_models())}")
    given = {"num_classes": len(feed.classes), "in_chans": feed.input_size[0], **(kwargs or {})}
    grown_by: dict[str, Any] | None = None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model = timm.create_model(name, **given)
        except Exception as error:  # models check their arguments in their own ways
            raise RunError(f"{name} with {given}: {type(error).__name__}: {error}") from error
    if not grown_modules(model):
        grown_by = {"branch": "bottleneck", "ratio": RATIO, "seed": seed}
        grow(model, **grown_by, inplace=True, input_size=feed.input_size)
    about = {"name": name, "kwargs": given, "grow": grown_by, "input_size": list(feed.input_size), "seed": seed}
    return model, width_space(model), about


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
    after_update: Callable[[], None] | None = None,
) -> int:
    """Train the widths of a grown net together, in place, activations alive, learning rate falling by a cosine.

    Args:
        model: A grown net, at lam 1.
        feed: What with.
        epochs: How long.
        config: Optimizer, learning rate, weight decay, momentum and label smoothing of it are used.
        space: Widths to draw from; None is all of the model's.
        mode: Of `NetAugTask`: "single" draws one subnet an update, uniformly, as the articles on ranking do.
        seed: Of the widths.
        start: The number of the first update: a later stage draws other widths and other batches.
        after_update: Called after each update (a progress bar).

    Returns:
        The number of the update that would come next.
    """
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    task = NetAugTask(model, criterion, verbose=False, space=space, mode=mode, seed=seed, input_size=feed.input_size)
    optimizer = create_optimizer_v2(
        model, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
    )
    task.attach(optimizer)
    task.train()
    total = max(1, round(epochs * feed.train.updates_per_epoch))
    rate = schedules.cosine(1.0, 0.0, total)
    for update in range(total):
        images_NCHW, labels_N = feed.train.batch(start + update)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate(update) * group.get("lr_scale", 1.0)
        task.set_step(start + update)
        optimizer.zero_grad(set_to_none=True)
        task.backward(images_NCHW, labels_N)
        optimizer.step()
        if after_update is not None:
            after_update()
    return start + total


def random_labels(data: DataSet, seed: int = 0) -> DataSet:
    """The same images, but every training image with a label drawn once, uniformly; val and test keep theirs.

    Source: Zhang et al., Neural Architecture Search with Random Labels (RLNAS, arXiv:2101.11834).
    """
    drawn = torch.randint(data.num_classes, (len(data.train),), generator=generator("random labels", seed))
    return replace(data, train=Split(data.train.images, drawn))
