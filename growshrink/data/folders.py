"""Folders of images, one subfolder a class, decoded once into memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from growshrink.data.memory import check_fits
from growshrink.errors import DataError

LAYOUT = "train/CLASS/*.png and test/CLASS/*.png (or val/ or validation/ in place of test/; jpg and others too)"
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))

#: Pixels of an image at most: a file of a few bytes may claim any number.
MOST_PIXELS = 1 << 26
_NAMED = 3  # how many offending files a message names
_FILES_A_TASK = 64


def find_parts(root: Path) -> tuple[Path, Path]:
    """(training folder, test folder) of `root`; the latter is the first of test/, val/, validation/ that exists."""
    train = root / "train"
    test = next((root / name for name in ("test", "val", "validation") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        raise DataError(f"{root} has no folder {'test' if train.is_dir() else 'train'}/; needed are {LAYOUT}.")
    return train, test


def _list_parts(root: Path) -> tuple[tuple[list[Path], Tensor], tuple[list[Path], Tensor], tuple[str, ...]]:
    """(train, test, class names) of a folder; classes are sorted by name, hidden files and folders are skipped."""
    parts = find_parts(root)
    train, test = ({d.name: d for d in part.iterdir() if d.is_dir() and d.name[0] != "."} for part in parts)
    if not train:
        raise DataError(f"{parts[0]} has no class folders; needed are {LAYOUT}.")
    if odd := sorted(train.keys() ^ test.keys()):
        raise DataError(f"{root}: the classes of {parts[0].name}/ and {parts[1].name}/ differ in {_some(odd)}.")
    classes = tuple(sorted(train))
    return _list(train, classes), _list(test, classes), classes


def _list(folders: dict[str, Path], classes: Sequence[str]) -> tuple[list[Path], Tensor]:
    """The image files of one part of a folder, class after class, sorted by name, and their labels, int64 (N,)."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        with os.scandir(folders[name]) as entries:
            names = sorted(e.name for e in entries if e.name[0] != "." and Path(e.name).suffix.lower() in SUFFIXES)
        if not names:
            raise DataError(f"{folders[name]} has no images ({', '.join(sorted(SUFFIXES))}).")
        paths += [folders[name] / file for file in names]
        labels += [label] * len(names)
    return paths, torch.tensor(labels)


def load_folder(
    root: Path, *, image_size: int | None = None, progress: bool = True
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[str, ...]]:
    """((train images, labels), (test images, labels), class names) of a folder, see `find_parts` for its layout.

    Images are uint8 (N, H, W, C): C is 1 if every image, of both parts, is 8-bit greyscale (PIL's mode L), else 3.
    """
    (train, train_labels), (test, test_labels), classes = _list_parts(root)
    images = _decode_all([*train, *test], root, image_size, progress)
    return (images[: len(train)], train_labels), (images[len(train) :], test_labels), classes


#: Why an image could not be stored, and the words for it.
_Problem = tuple[Literal["damaged", "size", "colour"], str]


def _decode_all(paths: list[Path], root: Path, image_size: int | None, progress: bool) -> Tensor:
    attempts = (_decode(path, image_size, grey=True) for path in paths)
    first = next((image for image in attempts if not isinstance(image, str)), np.empty((1, 1, 1)))
    height, width = first.shape[:2]
    for channels in sorted({first.shape[2], 3}):
        check_fits(len(paths) * height * width * channels, str(root))
        images = np.empty((len(paths), height, width, channels), dtype=np.uint8)
        problems = _decode_into(images, paths, image_size, progress)
        if not any(kind == "colour" for kind, _ in problems):
            break  # else: the first image was grey, a later one is not; decode all again into three channels
    damaged, sizes = ([words for kind, words in problems if kind == wanted] for wanted in ("damaged", "size"))
    if damaged:
        raise DataError(f"{root}: {len(damaged)} of {len(paths)} images are damaged: {_some(damaged)}.")
    if sizes:
        first_size = f"{paths[0]} is {width}x{height}"
        raise DataError(f"{root}: images differ in size; {first_size}, but {_some(sizes)}; pass image_size.")
    return torch.from_numpy(images)


def _decode_into(images: np.ndarray, paths: list[Path], image_size: int | None, progress: bool) -> list[_Problem]:
    """Fills uint8 `images` (N, H, W, C) where it can; returns a problem for each one that it could not fill."""
    _, height, width, channels = images.shape

    def task(start: int) -> list[_Problem]:
        problems: list[_Problem] = []
        for index in range(start, min(start + _FILES_A_TASK, len(paths))):
            image = _decode(paths[index], image_size, grey=channels == 1)
            if isinstance(image, str):
                problems.append(("damaged", f"{paths[index]} ({image})"))
            elif image.shape[:2] != (height, width):
                problems.append(("size", f"{paths[index]} is {image.shape[1]}x{image.shape[0]}"))
            elif image.shape[2] != channels:
                problems.append(("colour", str(paths[index])))
            else:
                images[index] = image
        return problems

    problems, bar = [], tqdm(total=len(paths), desc="decoding", unit="image", delay=2, disable=not progress)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, bar:
        for found in pool.map(task, range(0, len(paths), _FILES_A_TASK)):
            problems += found
            bar.update(min(_FILES_A_TASK, len(paths) - bar.n))
    return problems


def _decode(path: Path, image_size: int | None, grey: bool) -> np.ndarray | str:
    """Uint8 (H, W, 1) if `grey` and the image is, else (H, W, 3); for a damaged image what is wrong with it."""
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            if too_large := _too_large(image.size, image_size):
                return too_large
            if image.mode.startswith(("I", "F")):
                return f"mode {image.mode} has more than 8 bits a channel"
            if "transparency" in image.info:
                image = image.convert("RGBA")  # PIL warns about the direct way
            if not (grey and image.mode == "L"):
                image = image.convert("RGB")
            if image_size is not None:
                image = _resize(image, image_size)
            array = np.asarray(image)
    except Exception as error:  # on damaged files PIL's decoders raise whatever they happen to stumble over
        return f"{type(error).__name__}: {error}"
    return array.reshape(*array.shape[:2], -1)


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
