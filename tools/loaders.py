"""Images of noise, as a PNG folder and behind timm's loader (for the tools; not a program)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from timm.data.transforms import ToNumpy
from torchvision import transforms

from growshrink.data.batches import fill_colour
from growshrink.data.datasets import Split
from paired import Bench

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def random_split(count: int, side: int = 32) -> Split:
    """Noise in 10 classes."""
    return Split(torch.randint(256, (count, side, side, 3), dtype=torch.uint8), torch.arange(count) % 10)


def png_folder(split: Split, folder: str, bench: Bench) -> None:
    """Write the images as `<class>/<number>.png`."""
    for index in bench.bar(len(split), "loader: writing PNG files"):
        path = Path(folder, str(int(split.labels[index])), f"{index:05d}.png")
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(split.images[index].numpy()).save(path)


def timm_loader(folder: str, batch_size: int, side: int = 32) -> Any:
    """As timm's train.py makes it (prefetcher: workers hand over bytes, batches are normalised here), bar the crop."""
    size, device = (3, side, side), torch.device("cpu")
    loader = create_loader(
        ImageDataset(folder), size, batch_size, is_training=True, mean=MEAN, std=STD, num_workers=2, device=device
    )
    crop = transforms.RandomCrop(side, padding=side // 8, fill=tuple(fill_colour(MEAN).tolist()))
    loader.dataset.transform = transforms.Compose([crop, transforms.RandomHorizontalFlip(), ToNumpy()])
    return loader
