"""Batches of class folders that do not fit into memory, decoded by timm's loader as they are needed."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageDataset, create_dataset, create_loader
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from growshrink.base.limits import Count, NotAll, checked
from growshrink.base.seeding import generator, own_randomness
from growshrink.base.stopping import shield_worker
from growshrink.data.batches import Batch, Order
from growshrink.data.datasets import stratified
from growshrink.data.folders import find_parts, split_off_test
from growshrink.errors import DataError

_OURS = frozenset(
    ("dataset", "input_size", "batch_size", "is_training", "distributed", "device", "use_prefetcher", "worker_seeding")
)
_RETRIES = 50


@dataclass(frozen=True, eq=False)
class StreamedData:
    """The three splits of a folder, as batches; attributes as in `DataSet`, images normalised by `mean` and `std`.

    `fingerprint` is a digest of the names and labels of all images and of which of them are val.
    """

    name: str
    train: StreamTrainBatches
    val: StreamEvalBatches
    test: StreamEvalBatches
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]
    fingerprint: str = ""

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)


@checked(DataError, val_fraction=NotAll, image_size=Count | None)
def stream_data(
    data_dir: str | Path,
    *,
    batch_size: int,
    image_size: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    num_workers: int = 2,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    **loader_options: Any,
) -> StreamedData:
    """Class folders (`train/CLASS/*`, `test/CLASS/*`) read again and again through timm's readers and transforms.

    The batches of an update are as pure a function of (seed, update) as `TrainBatches`' are, whatever the number of
    workers. Asking for updates out of order is allowed but restarts the workers. Damaged images are skipped
    with a warning, which is timm's way. Images are RGB.

    `val_fraction` and `seed` are those of `load_data`, the other arguments those of `TrainBatches`; `image_size` is a
    side in pixels, None that of the images where all are equal squares, `num_workers` 0 decodes in this process, and
    `loader_options` go to `timm.data.create_loader`: `train_crop_mode="rkrc"` or `color_jitter=0.0`, say.

    Raises:
        DataError: Wrong layout, no images, differing classes, or an argument out of range.
    """
    root = Path(data_dir).expanduser()
    if clash := sorted(_OURS & loader_options.keys()):
        raise DataError(f"stream_data sets {', '.join(clash)} of timm's create_loader itself.")
    train, test = _open_parts(root)
    image_size = image_size or _side((train, test), root)
    size, target = (3, image_size, image_size), torch.device(device)
    options: dict[str, Any] = {"mean": mean, "std": std, "num_workers": num_workers, "persistent_workers": False}
    options |= {"crop_pct": 1.0, "interpolation": "bicubic", **loader_options}  # at test as load_data's image_size
    # timm's prefetcher erases in this process and from the global generator, its workers do not
    options |= {"use_prefetcher": not loader_options.get("re_prob"), "device": target, "worker_seeding": _start_worker}

    def scoring(images: ImageDataset, indices: Tensor) -> StreamEvalBatches:
        part: Any = _Part(images, indices)
        return StreamEvalBatches(len(part), lambda: create_loader(part, size, batch_size, **options), target)

    def training(start: int) -> Any:
        images: Any = _Endless(train, rest, order, start)
        return create_loader(images, size, batch_size, is_training=True, **options)

    labels = torch.tensor([label for _, label in train.reader.samples])
    rest, picked = stratified(labels, val_fraction, generator("val split", seed))
    order = Order(len(rest), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
    return StreamedData(
        name=root.resolve().name,
        train=StreamTrainBatches(order, training, target),
        val=scoring(train, picked),
        test=scoring(test, torch.arange(len(test))),
        classes=tuple(sorted(train.reader.class_to_idx, key=train.reader.class_to_idx.__getitem__)),
        mean=tuple(mean),
        std=tuple(std),
        input_size=size,
        fingerprint=_fingerprint((train, test), picked),
    )


def _open_parts(root: Path) -> tuple[Any, Any]:
    """Make timm's data sets of the training and the test images of a folder."""
    train_folder, test_folder = find_parts(root)
    try:
        folders = (str(train_folder), str(test_folder or train_folder))
        train, test = (create_dataset("", root=folder, search_split=False) for folder in folders)
    except RuntimeError as error:
        raise DataError(f"{root}: {error}") from error
    if test_folder is None:
        files, numbers = zip(*train.reader.samples, strict=True)
        for part, kept in zip((train, test), split_off_test(files, torch.tensor(numbers)), strict=True):
            part.reader.samples = [part.reader.samples[index] for index in kept.tolist()]
    if odd := sorted(train.reader.class_to_idx.keys() ^ test.reader.class_to_idx.keys()):
        raise DataError(f"{root}: the classes of the training and the test folder differ in {', '.join(odd[:3])}.")
    return train, test


def _side(parts: Sequence[ImageDataset], root: Path) -> int:
    """The side in pixels of all images, by their headers; DataError where they are no equal squares."""
    found = set[tuple[int, int]]()
    for file in (file for part in parts for file, _ in part.reader.samples):
        with suppress(Exception), Image.open(file) as image:
            found.add(image.size)
        if len(found) > 1 or any(width != height for width, height in found):
            sizes = ", ".join(f"{width}x{height}" for width, height in sorted(found))
            raise DataError(f"{root}: images are no equal squares ({sizes}); pass image_size (--image-size).")
    if not found:
        raise DataError(f"{root}: no image can be read.")
    return found.pop()[0]


def _fingerprint(parts: Sequence[ImageDataset], picked: Tensor) -> str:
    digest = hashlib.blake2b(picked.numpy().data, digest_size=8)
    for part in parts:
        for index, (_, label) in enumerate(part.reader.samples):
            digest.update(f"{part.reader.filename(index)} {label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


class StreamTrainBatches:
    """`TrainBatches` over timm's loader."""

    def __init__(self, order: Order, open_at: Callable[[int], Any], device: torch.device) -> None:
        self.batch_size, self.updates_per_epoch = order.batch_size, order.updates_per_epoch
        self._open_at, self._device = open_at, device
        self._next = -1
        self._batches: Iterator[Batch] = iter(())

    def batch(self, update: int) -> Batch:
        """See `TrainBatches.batch`; cheap only for the update after the last one asked for."""
        if update < 0:
            raise DataError(f"Updates are counted from 0, got {update=}.")
        with own_randomness(0):  # a DataLoader takes its base seed from the global generator, and needs none here
            if update != self._next:
                self._batches = iter(self._open_at(update))
            images, labels = next(self._batches)
        self._next = update + 1
        return _placed(images, labels, self._device)


class StreamEvalBatches:
    """All images of a split, in batches as `eval_batches` yields them; `len` is their number."""

    def __init__(self, num_images: int, open_loader: Callable[[], Any], device: torch.device) -> None:
        self._num_images, self._open_loader, self._device = num_images, open_loader, device

    def __len__(self) -> int:
        return self._num_images

    def __iter__(self) -> Iterator[Batch]:
        with own_randomness(0):
            batches = iter(self._open_loader())
        for images, labels in batches:
            yield _placed(images, labels, self._device)


def _start_worker(worker: Any) -> int:
    """Called by timm in each worker, for a seed, which `own_randomness` makes irrelevant."""
    shield_worker()
    return 0


def _placed(images: Tensor, labels: Tensor, device: torch.device) -> Batch:
    images, labels = (tensor.to(device, non_blocking=True) for tensor in (images, labels))
    return images.contiguous(memory_format=torch.channels_last), labels


class _Part(Dataset[tuple[Any, int]]):
    """Some images of a timm data set, with a transform of their own: timm puts it there."""

    def __init__(self, dataset: ImageDataset, indices: Tensor) -> None:
        self.dataset, self.indices = dataset, indices
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        """The image at a position, or the next one that can be read: timm skips only those that raise an OSError."""
        for offset in range(_RETRIES):
            index = int(self.indices[(position + offset) % len(self)])
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    image, label = self.dataset[index]
            except Exception as error:  # on damaged files PIL's decoders raise whatever they happen to stumble over
                last = error
            else:
                return (image if self.transform is None else self.transform(image)), label
        raise DataError(f"{_RETRIES} images in a row cannot be read, the last because of {type(last).__name__}: {last}")


class _Endless(IterableDataset[tuple[Any, int]]):
    """The images of update `start` and of all later ones; worker w of n yields every n-th update from the w-th on."""

    def __init__(self, dataset: ImageDataset, indices: Tensor, order: Order, start: int) -> None:
        self.part = _Part(dataset, indices)
        self.order, self.start = order, start
        self.transform: Callable[[Any], Any] | None = None  # timm puts it here

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        self.part.transform = self.transform
        worker = get_worker_info()
        update, step = (self.start, 1) if worker is None else (self.start + worker.id, worker.num_workers)
        while True:
            positions = self.order.indices(update).tolist()
            (seeds,) = self.order.draw(update, (2**32,))
            for position, seed in zip(positions, seeds.tolist(), strict=True):
                with own_randomness(seed):
                    item = self.part[position]
                yield item
            update += step
