"""Folders of images, one subfolder a class, decoded once into memory, and kept on disk decoded.

The next start maps the images into memory instead of decoding again: one safetensors file for each folder and image
size, in `~/.cache/growshrink/images` (or below `XDG_CACHE_HOME`), which may be removed at any time. It is replaced by a
rename, so several processes may read and write it at once, and it is used only while names, sizes and modification
times of all image files are those it was made from.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from growshrink.base.progress import progress_bar
from growshrink.base.reading import parse_json, read_tensors
from growshrink.data.formats import check_fits
from growshrink.errors import DataError, RunError

#: Seconds of decoding above which the result is kept.
WORTH = 1.0
#: Changes whenever images are decoded in another way.
VERSION = 1


class DecodeCache:
    """The cache entry of one folder at one image size: its file `path`, and the digest `key` of its sources."""

    def __init__(self, root: Path, paths: Sequence[str], image_size: int | None) -> None:
        place = hashlib.blake2b(f"{root.resolve()}\n{image_size}".encode(errors="surrogateescape"), digest_size=10)
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        self.path = caches / "growshrink" / "images" / f"{place.hexdigest()}.safetensors"
        digest = hashlib.blake2b(f"{VERSION}".encode(), digest_size=16)
        for path in paths:
            stat = os.stat(path)
            name = path.removeprefix(str(root)).lstrip(os.sep)
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        self.key = digest.hexdigest()

    def read(self) -> tuple[Tensor, dict[str, Any]] | None:
        """Images, mapped from the file, and what was noted of them; None where there is no entry that holds."""
        found: dict[str, str] = {}
        try:
            images = read_tensors(self.path, found.update)["images"]
            about = parse_json(found["about"])
            return (images, about["notes"]) if about["key"] == self.key else None
        except (RunError, KeyError, TypeError, ValueError):
            return None

    def write(self, images: Tensor, notes: dict[str, Any]) -> None:
        """Keep images (N, H, W, C); on a full or read-only disk nothing happens."""
        about = json.dumps({"key": self.key, "notes": notes})
        with contextlib.suppress(OSError, SafetensorError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                partial = Path(folder) / self.path.name
                save_file({"images": images}, partial, {"about": about})
                os.replace(partial, self.path)


LAYOUT = "train/CLASS/*.png and test/CLASS/*.png (or val/, validation/ for test/), or only CLASS/*.png; jpg, ... too"
#: Formats of Pillow's that are read by other programs or are no images.
_NO_IMAGES = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"))

#: Pixels of an image at most: a file of a few bytes may claim any number.
MOST_PIXELS = 1 << 26
_NAMED = 3  # how many offending files a message names
_FILES_A_TASK = 64
#: Image files, and their labels.
_Listed = tuple[list[str], Tensor]


def find_parts(root: Path) -> tuple[Path, Path | None]:
    """(training folder, test folder) of `root`; the latter is the first of test/, val/, validation/ that exists.

    Without one it is None, and the training folder is train/ or `root` itself: see `split_off_test`.
    """
    train = root / "train"
    test = next((root / name for name in ("test", "val", "validation") if (root / name).is_dir()), None)
    if test is None and not train.is_dir() and root.is_dir() and len(_class_folders(root)) > 1:
        return root, None
    if not train.is_dir():
        raise DataError(f"{root} has no folder train/; needed are {LAYOUT}.")
    return train, test


def split_off_test(paths: Sequence[str], labels: Tensor) -> tuple[Tensor, Tensor]:
    """(training, test) indices of images without a test folder, both int64 and rising.

    From each class the fifth is taken whose names have the smallest hashes: no seed and no order matters.
    """
    names = ("/".join(path.split(os.sep)[-2:]) for path in paths)
    marks = [hashlib.blake2b(name.encode(errors="surrogateescape")).digest() for name in names]
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten().tolist()
        is_test[sorted(members, key=marks.__getitem__)[: min(max(round(len(members) / 5), 1), len(members) - 1)]] = True
    return (~is_test).nonzero().flatten(), is_test.nonzero().flatten()


def _class_folders(part: Path) -> dict[str, Path]:
    return {d.name: d for d in part.iterdir() if d.is_dir() and d.name[0] != "."}


def _list_parts(root: Path) -> tuple[_Listed, _Listed, tuple[str, ...], tuple[str, ...]]:
    """Both parts of a folder, its classes sorted by name, and notes for the user; hidden files are skipped."""
    parts = find_parts(root)
    train = _class_folders(parts[0])
    if not train:
        raise DataError(f"{parts[0]} has no class folders; needed are {LAYOUT}.")
    classes = tuple(sorted(train))
    if parts[1] is None:
        paths, labels = _list(train, classes)
        if lone := [name for name, count in zip(classes, labels.bincount(), strict=True) if count < 2]:
            raise DataError(f"{root}: {_some(lone)}: a single image each, and no folder test/ to judge by.")
        train_part, test_part = (([paths[i] for i in part], labels[part]) for part in split_off_test(paths, labels))
        note = "there is no folder test/: a fifth of each class, the same images in every run, is kept for the test"
        return train_part, test_part, classes, (note,)
    test = _class_folders(parts[1])
    if odd := sorted(train.keys() ^ test.keys()):
        raise DataError(f"{root}: the classes of {parts[0].name}/ and {parts[1].name}/ differ in {_some(odd)}.")
    return _list(train, classes), _list(test, classes), classes, ()


def _list(folders: dict[str, Path], classes: Sequence[str]) -> _Listed:
    """The image files of one part of a folder, class after class, sorted by name, and their labels, int64 (N,)."""
    paths = list[str]()  # of 60,000 files, pathlib's take a second
    labels: list[int] = []
    for label, name in enumerate(classes):
        with os.scandir(folders[name]) as entries:
            found = sorted(entry.name for entry in entries)
        names = [file for file in found if file[0] != "." and os.path.splitext(file)[1].lower() in suffixes()]
        if not names:
            raise DataError(f"{folders[name]} has no images (.jpg, .png, or another format that Pillow opens).")
        paths += [os.path.join(folders[name], file) for file in names]
        labels += [label] * len(names)
    return paths, torch.tensor(labels)


@cache
def suffixes() -> frozenset[str]:
    """The file name endings of all that Pillow opens, plug-ins included."""
    known = Image.registered_extensions()
    return frozenset(end for end, kind in known.items() if kind in Image.OPEN and kind not in _NO_IMAGES)


class Folder(NamedTuple):
    """A folder of images: (images, labels) of both parts, class names, and what the user should hear about them."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def class_counts(root: Path) -> Tensor:
    """Number of training images of each class, by the names of the files alone: int64 (K,)."""
    (_, labels), _, classes, _ = _list_parts(root)
    return labels.bincount(minlength=len(classes))


def load_folder(
    root: Path,
    *,
    image_size: int | None = None,
    progress: bool = True,
    skip_damaged: bool = False,
    use_cache: bool = True,
) -> Folder:
    """Decode a folder, see `find_parts` for its layout; what took over a second is kept (`growshrink.data.folders`).

    Images are uint8 (N, H, W, C): C is 1 if every image, of both parts, is greyscale, else 3. 16-bit images are
    rounded to 8 bits, transparent ones are put over white, and rotations noted by cameras are applied. `skip_damaged`
    leaves out what cannot be decoded instead of raising DataError.
    """
    (train, train_labels), (test, test_labels), classes, told_of = _list_parts(root)
    paths = [*train, *test]
    entry = DecodeCache(root, paths, image_size)
    found = entry.read() if use_cache else None
    if found is None:
        began = time.perf_counter()
        found = _decode_all(paths, root, image_size, progress)
        if use_cache and time.perf_counter() - began > WORTH:
            entry.write(*found)
    images, about = found
    notes = [*told_of, *(f"{about[key]} images {words}" for key, words in _NOTES.items() if about.get(key))]
    labels, first = torch.cat([train_labels, test_labels]), len(train)
    if damaged := {int(index): words for index, words in about["damaged"].items()}:
        told = f"{len(damaged)} of {len(paths)} images are damaged"
        if not skip_damaged or len(damaged) == len(paths):
            advice = "" if skip_damaged else "; skip_damaged (--skip-damaged) leaves them out"
            raise DataError(f"{root}: {told}: {_some([*damaged.values()])}{advice}.")
        notes.append(f"{told} and left out: {', '.join(damaged.values())}")
        good = torch.tensor([index for index in range(len(paths)) if index not in damaged])
        images, labels, first = images[good], labels[good], int((good < first).sum())
        for part, name in ((labels[:first], "training"), (labels[first:], "test")):
            if empty := sorted(set(range(len(classes))) - set(part.tolist())):
                raise DataError(f"{root}: no {name} image of {classes[empty[0]]} can be read.")
    return Folder((images[:first], labels[:first]), (images[first:], labels[first:]), classes, tuple(notes))


#: What is done to images, and the words for it.
_NOTES = {
    "white": "with transparency were put over a white background",
    "turned": "were turned as their EXIF orientation says",
    "deep": "with 16 bits a channel were rounded to 8",
}


class Decoded(NamedTuple):
    """An image, uint8 (H, W, C), and which of `_NOTES` hold for it."""

    pixels: np.ndarray
    notes: tuple[str, ...] = ()


def _decode_all(paths: list[str], root: Path, image_size: int | None, progress: bool) -> tuple[Tensor, dict[str, Any]]:
    """All images, black where damaged, and what was noted: numbers by `_NOTES`, and words by index under "damaged"."""
    attempts = (decode_image(path, image_size, grey=True) for path in paths)
    first = next((image.pixels for image in attempts if not isinstance(image, str)), np.empty((1, 1, 1)))
    height, width = first.shape[:2]
    for channels in sorted({first.shape[2], 3}):
        check_fits(len(paths) * height * width * channels, str(root))
        images = np.zeros((len(paths), height, width, channels), dtype=np.uint8)
        about, sizes, coloured = _decode_into(images, paths, image_size, progress)
        if not coloured:
            break  # else: the first image was grey, a later one is not; decode all again into three channels
    if sizes:
        told = f"images differ in size; the first is {width}x{height}, but {_some(sizes)}"
        raise DataError(f"{root}: {told}; pass image_size (--image-size).")
    return torch.from_numpy(images), about


def _decode_into(
    images: np.ndarray, paths: list[str], image_size: int | None, progress: bool
) -> tuple[dict[str, Any], list[str], bool]:
    """Fill uint8 `images` (N, H, W, C): what was noted, those of another size, and whether some has another colour."""
    _, height, width, channels = images.shape
    counts, damaged, sizes, coloured = Counter[str](), dict[int, str](), list[str](), False

    def task(start: int) -> list[tuple[int, Decoded | str]]:
        indices = range(start, min(start + _FILES_A_TASK, len(paths)))
        found = [(index, decode_image(paths[index], image_size, grey=channels == 1)) for index in indices]
        for index, image in found:
            if not isinstance(image, str) and image.pixels.shape == images.shape[1:]:
                images[index] = image.pixels
        return found

    bar = progress_bar(total=len(paths), what="decoding", unit="image", delay=2, show=progress)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, bar:
        for found in pool.map(task, range(0, len(paths), _FILES_A_TASK)):
            for index, image in found:
                if isinstance(image, str):
                    damaged[index] = f"{paths[index]} ({image})"
                    continue
                counts.update(image.notes)
                if image.pixels.shape[:2] != (height, width):
                    sizes.append(f"{paths[index]} is {image.pixels.shape[1]}x{image.pixels.shape[0]}")
                coloured = coloured or image.pixels.shape[2] != channels
            bar.update(len(found))
    return {**counts, "damaged": {str(index): words for index, words in sorted(damaged.items())}}, sizes, coloured


def decode_image(path: str, image_size: int | None, grey: bool) -> Decoded | str:
    """The image with one channel if `grey` and it is grey, else with three; for a damaged one what is wrong with it."""
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            notes = list[str]()
            if too_large := _too_large(image.size, image_size):
                return too_large
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                image = ImageOps.exif_transpose(image)
                notes.append("turned")
            if image.mode.startswith(("I", "F")):
                notes.append("deep")
                image = _eight_bits(image)
            if image.has_transparency_data:
                notes.append("white")
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if grey and image.mode in ("L", "1") else "RGB")
            if image_size is not None:
                image = _resize(image, image_size)
            array = np.asarray(image)
    except Exception as error:  # on damaged files PIL's decoders raise whatever they happen to stumble over
        return f"{type(error).__name__}: {error}"
    return Decoded(array.reshape(*array.shape[:2], -1), tuple(notes))


def _eight_bits(image: Image.Image) -> Image.Image:
    """A greyscale image of 16 bits a pixel, rounded; ValueError for other ranges, of which nothing is known."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"mode {image.mode} is no range of 8 or 16 bits")
    return Image.fromarray(((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8))


def _too_large(size: tuple[int, int], side: int | None) -> str:
    """Why an image is not decoded: it says that it has, or resized it would have, more pixels than any photograph."""
    width, height = size
    if width * height > MOST_PIXELS:
        return f"{width}x{height} are more than {MOST_PIXELS:,} pixels"
    if side is not None and side * side * max(size) > MOST_PIXELS * min(size):
        return f"{width}x{height} are too long and thin to be resized to {side}"
    return ""


def _resize(image: Image.Image, side: int) -> Image.Image:
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _some(items: Sequence[str]) -> str:
    more = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {more} more" if more > 0 else "")
