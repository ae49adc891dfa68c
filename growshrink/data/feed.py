"""What a training run is fed with: batches to train on, two splits to score, and what the model must know of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from growshrink.base.copying import copy_net
from growshrink.data.batches import Augment, Batch, TrainBatches, eval_batches
from growshrink.data.datasets import DataSet, Split
from growshrink.errors import RunError


class UpdateBatches(Protocol):
    """Training batches as a function of the update."""

    updates_per_epoch: int
    batch_size: int

    def batch(self, update: int) -> Batch:
        """Images (N, C, H, W), normalised, and labels (N,) of update number `update`."""
        ...


class ScoringBatches(Protocol):
    """All images of a split in batches, in order, the last one perhaps smaller; `len` is the number of images."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class Feed(Protocol):
    """What `run_cycle` needs to know about a data set, as in `DataSet`; `MemoryFeed` and `StreamedData` are two."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def train(self) -> UpdateBatches: ...  # noqa: D102
    @property
    def val(self) -> ScoringBatches: ...  # noqa: D102
    @property
    def test(self) -> ScoringBatches: ...  # noqa: D102
    @property
    def classes(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def mean(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def std(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def input_size(self) -> tuple[int, int, int]: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class MemoryFeed:
    """A data set held in memory, on the device, as uint8; `train` is shuffled and augmented."""

    data: DataSet
    train: TrainBatches
    val: SplitBatches
    test: SplitBatches
    name: str = field(init=False)
    classes: tuple[str, ...] = field(init=False)
    mean: tuple[float, ...] = field(init=False)
    std: tuple[float, ...] = field(init=False)
    input_size: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        for key in ("name", "classes", "mean", "std", "input_size"):
            object.__setattr__(self, key, getattr(self.data, key))

    @staticmethod
    def of(
        data: DataSet,
        *,
        batch_size: int,
        augment: Augment = Augment(),  # noqa: B008 - frozen
        seed: int = 0,
        device: torch.device | str = "cpu",
        eval_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> MemoryFeed:
        """Batches of `data` for one process, rank `rank` of `world_size`; DataError for fewer images than a batch.

        Scored are 512 images at a time, on a CPU fewer of more than 16x16 pixels: activations beyond what the allocator
        keeps are given back and fetched again page by page.
        """
        if eval_batch_size is None:
            fits = max(32, 2**17 // math.prod(data.input_size[1:]))
            eval_batch_size = min(512, fits) if torch.device(device).type == "cpu" else 512
        colours: dict[str, Any] = {"mean": data.mean, "std": data.std, "device": device}
        ranks: dict[str, Any] = {"rank": rank, "world_size": world_size}
        train = TrainBatches(data.train, batch_size=batch_size, augment=augment, seed=seed, **colours, **ranks)
        val, test = (SplitBatches(split, eval_batch_size, **colours) for split in (data.val, data.test))
        return MemoryFeed(data, train, val, test)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all pixels and labels."""
        digest = hashlib.blake2b(digest_size=8)
        parts = (self.data.train, self.data.val, self.data.test)
        for tensor in (tensor for split in parts for tensor in (split.images, split.labels)):
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class SplitBatches:
    """One split of a data set in batches, in order, without augmentation; see `eval_batches`."""

    split: Split
    batch_size: int
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device | str

    def __len__(self) -> int:
        return len(self.split)

    def __iter__(self) -> Iterator[Batch]:
        return eval_batches(**vars(self))


def check_model_fits(model: nn.Module, feed: Feed, *, classifies: bool = True) -> None:
    """RunError unless the model takes the images, tells the classes apart, and there is something to score it by."""
    for split, images in (("val", feed.val), ("test", feed.test)):
        if not len(images):
            raise RunError(f"the {split} split of {feed.name} is empty: there is nothing to judge the net by.")
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels != feed.input_size[0]:
        raise RunError(
            f"the model takes {first.in_channels} channels, the images of {feed.name} have {feed.input_size[0]}: "
            f"make it with in_chans={feed.input_size[0]}."
        )
    replica = copy_net(model).to("meta").eval()
    try:
        output = replica(torch.empty(2, *feed.input_size, device="meta"))
    except Exception as error:  # any forward may fail in its own way
        raise RunError(f"the model does not run on images of size {feed.input_size}: {error}") from error
    rows = 2 * getattr(feed, "nets", 1)  # several nets side by side: one row each
    if classifies and tuple(output.shape) != (rows, len(feed.classes)):
        raise RunError(
            f"the model gives outputs of shape {tuple(output.shape)[1:]}, {feed.name} has {len(feed.classes)} classes: "
            f"make it with num_classes={len(feed.classes)}."
        )
