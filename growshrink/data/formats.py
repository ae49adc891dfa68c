"""Readers of idx files and of CIFAR's binary and pickled versions; sizes they declare are checked against length."""

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from growshrink.base.reading import read_bytes
from growshrink.errors import DataError


def available_bytes() -> int | None:
    """Memory in bytes that could be allocated without swapping; None where the system does not tell.

    Linux's own estimate, lowered to what a container (cgroup v2) is allowed; elsewhere all physical memory.
    """
    amounts = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        amounts += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        try:
            amounts.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (AttributeError, OSError, ValueError):
            pass  # Windows: no limit is known
    try:
        cgroup = Path("/sys/fs/cgroup")
        limit, used = ((cgroup / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        amounts.append(max(int(limit) - int(used), 0))
    except (OSError, ValueError):
        pass  # no cgroup, or its limit is "max"
    return min(amounts, default=None)


def check_fits(size: int, what: str) -> None:
    """DataError for `size` bytes (decoded) above half of the available memory; the rest is for copies and training."""
    available = available_bytes()
    if available is not None and size > available / 2:
        raise DataError(
            f"{what}: {size / 2**30:.2f} GiB of decoded images exceed half of the {available / 2**30:.2f} GiB memory "
            "available; give a smaller image_size (--image-size), or read class folders with "
            "growshrink.data.stream_data (--stream)."
        )


#: uint8 images (N, H, W, C) and int64 labels (N,).
Arrays = tuple[Tensor, Tensor]
#: By number of classes: the subfolder of the binary version, and of the pickled one.
CIFAR_FOLDERS = {10: ("cifar-10-batches-bin", "cifar-10-batches-py"), 100: ("cifar-100-binary", "cifar-100-python")}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_FILES = {
    10: ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]),
    100: (["train.bin"], ["test.bin"]),
}
_CIFAR_PIXELS = 3 * 32 * 32
_DEFLATE_RATIO = 1032  # deflate's limit: a 258 byte copy in 2 bits
_CHUNK = 1 << 20


def read_idx(path: Path, ndim: int) -> Tensor:
    """The uint8 array of an idx file of `ndim` dimensions, gzipped if its name ends in .gz."""
    compressed = path.suffix == ".gz"
    try:
        length = path.stat().st_size
        with gzip.open(path, "rb") if compressed else path.open("rb") as file:
            header = file.read(4 + 4 * ndim)
            if len(header) < 4 + 4 * ndim or header[:4] != bytes((0, 0, 8, ndim)):
                raise DataError(f"{path} is not an idx file of uint8 with {ndim} dimensions.")
            shape = np.frombuffer(header, ">u4", offset=4).tolist()
            size = math.prod(shape)
            if size > (length * _DEFLATE_RATIO if compressed else length):
                raise DataError(f"{path}: its header promises {size:,} bytes, more than its {length:,} can hold.")
            check_fits(size, str(path))
            content = bytearray()  # in pieces: memory grows with what is really there, never with what a header claims
            while len(content) <= size and (piece := file.read(min(_CHUNK, size + 1 - len(content)))):
                content += piece
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(content) != size:
        found = "more" if len(content) > size else f"{len(content):,}"
        raise DataError(f"{path}: its header promises {size:,} bytes of data, it has {found}.")
    if size == 0:
        raise DataError(f"{path} is empty: its header says {shape}.")
    return torch.frombuffer(content, dtype=torch.uint8).view(shape)


def read_idx_pair(root: Path, prefix: str, num_classes: int) -> Arrays:
    """`{prefix}-images-idx3-ubyte` and `{prefix}-labels-idx1-ubyte` of a folder, each with or without `.gz`."""
    images = read_idx(_idx_path(root, f"{prefix}-images-idx3-ubyte"), ndim=3).unsqueeze(-1)
    labels = read_idx(_idx_path(root, f"{prefix}-labels-idx1-ubyte"), ndim=1).long()
    if len(images) != len(labels):
        raise DataError(f"{root}: {len(images):,} {prefix} images but {len(labels):,} labels.")
    _check_labels(labels, num_classes, f"{root}, {prefix} labels")
    return images, labels


def _idx_path(root: Path, name: str) -> Path:
    found = [path for path in (root / f"{name}.gz", root / name) if path.is_file()]
    if not found:
        raise DataError(f"{root} has no {name}.gz.")
    return found[0]


def _check_labels(labels: Tensor, num_classes: int, where: str) -> None:
    if (highest := int(labels.max())) >= num_classes:
        raise DataError(f"{where}: label {highest} of only {num_classes} classes.")


def has_cifar_binary(base: Path, num_classes: int) -> bool:
    """Whether any file of CIFAR's binary version is in `base`."""
    return any((base / name).is_file() for part in _CIFAR_FILES[num_classes] for name in part)


def read_cifar_binary(base: Path, num_classes: int) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """(train, test, class names) of CIFAR's binary version, 10 or 100 classes.

    The names of CIFAR-100 are read from `fine_label_names.txt` if it is there, and are numbers otherwise.
    """
    train, test = (_read_records(base, files, num_classes) for files in _CIFAR_FILES[num_classes])
    classes = CIFAR10_CLASSES if num_classes == 10 else tuple(map(str, range(num_classes)))
    names = base / "fine_label_names.txt"
    if num_classes == 100 and names.is_file():
        classes = tuple(read_bytes(names).decode("utf-8", "replace").split())
        if len(classes) != num_classes:
            raise DataError(f"{names} has {len(classes)} names, not {num_classes}.")
    return train, test, classes


def _read_records(base: Path, files: list[str], num_classes: int) -> Arrays:
    label_bytes = 1 if num_classes == 10 else 2  # CIFAR-100 has the coarse label first, then the fine one
    record = label_bytes + _CIFAR_PIXELS
    images, labels = [], []
    for path in (base / name for name in files):
        if not path.is_file():
            raise DataError(f"{base} has no {path.name}.")
        length = path.stat().st_size
        if length == 0 or length % record:
            raise DataError(f"{path}: {length:,} bytes are not a whole number of {record}-byte records; truncated?")
        check_fits(length, str(path))
        records = torch.from_numpy(np.fromfile(path, dtype=np.uint8)).view(-1, record)
        labels.append(records[:, label_bytes - 1].long())
        images.append(records[:, label_bytes:].reshape(-1, 3, 32, 32).permute(0, 2, 3, 1))
        _check_labels(labels[-1], num_classes, str(path))
    return torch.cat(images).contiguous(), torch.cat(labels)


def read_cifar_pickled(root: Path, num_classes: int) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """(train, test, class names) of the pickled version below `root`, read by torchvision.

    Unpickling runs whatever a file tells it to. torchvision compares md5 sums with the published files' first, so
    that no other file is ever unpickled; nothing here opens a pickle itself.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if num_classes == 10 else CIFAR100
    try:
        parts = [kind(str(root), train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{root / CIFAR_FOLDERS[num_classes][1]}: files are missing or are not the published ones "
            "(by md5 sum, checked before anything is unpickled)."
        ) from error
    train, test = ((torch.from_numpy(part.data).contiguous(), torch.tensor(part.targets)) for part in parts)
    return train, test, tuple(parts[0].classes)
