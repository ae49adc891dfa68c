"""Data sets that are held in memory as uint8 images, and the names under which they are found."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from growshrink.base.limits import Count, NotAll, checked
from growshrink.base.seeding import generator
from growshrink.data import formats
from growshrink.data.folders import Folder, load_folder
from growshrink.errors import DataError, did_you_mean

FASHION_CLASSES = (
    *("t-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
CACHE = Path("~/.cache/growshrink")


@dataclass(frozen=True, eq=False)
class Split:
    """Images, uint8 (N, H, W, C), and their labels, int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise DataError(f"Split.images must be uint8 (N, H, W, C), got {images.dtype} {tuple(images.shape)}.")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(f"Split.labels must be int64 ({len(images)},), got {labels.dtype} {tuple(labels.shape)}.")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class DataSet:
    """The three splits of a data set.

    Attributes:
        name: As asked for; a folder's own name for a folder.
        val: To choose with: a part of the training set, never of the test set.
        classes: The class names, in the order of the labels.
        mean: Mean of `train`, per channel, where 1.0 is the brightest value; `std` is at least 1/255.
        notes: What was done to images, or left out, sentence by sentence.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        height, width, channels = self.train.images.shape[1:]
        return channels, height, width


#: A data set as its files have it, before a val split is taken: train, test, class names, and perhaps notes.
_Raw = tuple[formats.Arrays, formats.Arrays, tuple[str, ...]] | Folder


@checked(DataError, val_fraction=NotAll, image_size=Count | None)
def load_data(
    name: str,
    data_dir: str | Path | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
    progress: bool = True,
    skip_damaged: bool = False,
    use_cache: bool = True,
) -> DataSet:
    """A data set, decoded into memory.

    | name | where it comes from |
    | --- | --- |
    | `digits` | scikit-learn's 1797 8x8 digits; a fixed, stratified fifth is the test split |
    | `fashion-mnist` | idx files (`.gz` or not) in `data_dir`, else Debian's package, else a download by torchvision |
    | `cifar10`, `cifar100` | `data_dir`: the binary version, torchvision's pickled one, or class folders as below |
    | `folder`, or any path | `train/CLASS/*`, `test/CLASS/*` (or `val`, `validation`: the first), or `CLASS/*` |

    Args:
        name: One of the names above, or the path of a folder.
        data_dir: Where the files are; `digits` needs none.
        val_fraction: The part of each class of the training set that becomes `val`; 0 leaves `val` empty. A class
            keeps at least one image in `train`, and gives at least one to `val` if it has two.
        seed: Which images become `val`. The test split never depends on it.
        image_size: Side in pixels to which the images of class folders are brought: the shorter side is resized
            (bicubic), then the centre is cut out. None takes them as they are.
        progress: Show a progress bar where decoding takes longer than two seconds.
        skip_damaged: Leave out images of a folder that cannot be decoded, and name them in `notes`.
        use_cache: Keep the decoded images of a folder, see `growshrink.data.folders`.

    Raises:
        DataError: Unknown name, missing or damaged files, or more images than fit into memory.
    """
    root = None if data_dir is None else Path(data_dir).expanduser()
    folder = partial(
        load_folder, image_size=image_size, progress=progress, skip_damaged=skip_damaged, use_cache=use_cache
    )
    label, path = name, Path(name).expanduser()
    if name in SOURCES:
        (images, labels), test, classes, *notes = SOURCES[name](root, folder)
    elif path.is_dir():
        (images, labels), test, classes, *notes = folder(path)
        label = path.resolve().name
    else:
        raise DataError(f"load_data: {name!r} is no data set, nor a folder{did_you_mean(name.lower(), SOURCES)}")

    height, width = images.shape[1:3]
    if image_size is not None and (height, width) != (image_size, image_size):
        raise DataError(f"load_data: {name} has {height}x{width} images; {image_size=} works for class folders only.")
    rest, picked = stratified(labels, val_fraction, generator("val split", seed))
    train, val = (Split(images[part], labels[part]) for part in (rest, picked))
    return DataSet(label, train, val, Split(*test), classes, *channel_statistics(train.images), *notes)


def stratified(labels: Tensor, fraction: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split indices class by class: (the rest, the picked `fraction`), both int64 and rising.

    From a class with n images `round(n * fraction)` are picked, but at least 1 and at most n - 1; none if it is 0.

    >>> rest, picked = stratified(torch.tensor([0, 1, 0, 0, 1, 0]), 0.5, generator("example"))
    >>> len(rest), len(picked)
    (3, 3)
    """
    is_picked = torch.zeros(len(labels), dtype=torch.bool)
    if fraction > 0:
        for label in labels.unique():
            members = (labels == label).nonzero().flatten()
            count = min(max(round(len(members) * fraction), 1), len(members) - 1)
            is_picked[members[torch.randperm(len(members), generator=random)[:count]]] = True
    return (~is_picked).nonzero().flatten(), is_picked.nonzero().flatten()


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, population standard deviation) of uint8 (N, H, W, C) images per channel, in units of 255.

    From exact integer counts. The deviation is at least 1/255.

    >>> channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    ((0.5,), (0.5,))
    """
    values, means, deviations = torch.arange(256, dtype=torch.float64) / 255, [], []
    for channel in images.unbind(-1):
        weights = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (weights * values).sum()
        means.append(mean.item())
        deviations.append(max((weights * (values - mean) ** 2).sum().sqrt().item(), 1 / 255))
    return tuple(means), tuple(deviations)


def pooled(data: DataSet, pool: int) -> DataSet:
    """The data set with smaller images: each pixel the mean of `pool` by `pool`; mean and std are kept as they are."""
    if not 1 <= pool <= min(data.input_size[1:]):
        raise DataError(f"pool={pool!r}: must lie between 1 and the side of the images, {min(data.input_size[1:])}.")

    def smaller(split: Split) -> Split:
        images = F.avg_pool2d(split.images.permute(0, 3, 1, 2).float(), pool).round().to(torch.uint8)
        return Split(images.permute(0, 2, 3, 1).contiguous(), split.labels)

    if pool == 1:
        return data
    return replace(data, train=smaller(data.train), val=smaller(data.val), test=smaller(data.test))


def _needed(root: Path | None, name: str, layout: str) -> Path:
    if root is None:
        raise DataError(f"load_data({name!r}) needs data_dir, a folder with {layout}.")
    if not root.is_dir():
        raise DataError(f"load_data({name!r}): data_dir {root} is not a folder.")
    return root


def _digits() -> _Raw:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("The digits data set needs scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    images = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8).unsqueeze(-1)
    labels = torch.from_numpy(bunch.target).long()
    rest, picked = stratified(labels, 0.2, generator("digits test split"))
    return (images[rest], labels[rest]), (images[picked], labels[picked]), tuple("0123456789")


def _fashion_mnist(root: Path | None) -> _Raw:
    if root is not None:
        root = _needed(root, "fashion-mnist", "train-images-idx3-ubyte.gz and its three companions")
    elif DEBIAN_FASHION.is_dir():
        root = DEBIAN_FASHION
    else:
        root = _download_fashion_mnist()
    train, test = (formats.read_idx_pair(root, prefix, len(FASHION_CLASSES)) for prefix in ("train", "t10k"))
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(f"fashion-mnist in {root}: train and test images differ in size.")
    return train, test, FASHION_CLASSES


def _download_fashion_mnist() -> Path:
    from torchvision.datasets import FashionMNIST

    cache = CACHE.expanduser()
    try:
        FashionMNIST(str(cache), download=True)  # checks md5 sums, and downloads nothing that is there already
    except (RuntimeError, OSError) as error:
        raise DataError(
            "fashion-mnist could not be downloaded; install Debian's package dataset-fashion-mnist, or pass data_dir "
            f"with its four idx files: {error}"
        ) from error
    return cache / "FashionMNIST" / "raw"


def _cifar(num_classes: int, root: Path | None, folder: Callable[[Path], _Raw]) -> _Raw:
    name, (binary, pickled) = f"cifar{num_classes}", formats.CIFAR_FOLDERS[num_classes]
    layouts = f"{binary}/*.bin, {pickled}/ (torchvision's), or train/CLASS/*.png and test/CLASS/*.png"
    root = _needed(root, name, layouts)
    for base in (root, root / binary):
        if formats.has_cifar_binary(base, num_classes):
            return formats.read_cifar_binary(base, num_classes)
    if (root / "train").is_dir():
        found = folder(root)
        if len(found[2]) != num_classes:
            raise DataError(f"{name} in {root}: {len(found[2])} class folders, not {num_classes}; is it a 'folder'?")
        return found
    for base in (root, root.parent):
        if (base / pickled).is_dir() and (base == root or root.name == pickled):
            return formats.read_cifar_pickled(base, num_classes)
    raise DataError(f"{name}: {root} has none of {layouts}.")


#: The data sets by name: functions of their folder and of the reader of class folders.
SOURCES: dict[str, Callable[[Path | None, Callable[[Path], _Raw]], _Raw]] = {
    "digits": lambda root, folder: _digits(),
    "fashion-mnist": lambda root, folder: _fashion_mnist(root),
    "cifar10": lambda root, folder: _cifar(10, root, folder),
    "cifar100": lambda root, folder: _cifar(100, root, folder),
    "folder": lambda root, folder: folder(_needed(root, "folder", "train/CLASS/* and test/CLASS/*")),
}
