"""Augmentation for photographs, image by image: torchvision's v2 transforms, and timm's mixtures of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import torch
from timm.data import Mixup
from torch import Tensor

from growshrink.base.config import check_fields
from growshrink.base.limits import Interval, NotNegative, Share
from growshrink.base.seeding import own_randomness
from growshrink.errors import DataError

Magnitude = Annotated[int, Interval(0, 30)]


@dataclass(frozen=True)
class PhotoAugment:
    """Random changes to photographs; each image has parameters of its own. All are off by default.

    Attributes:
        resized_crop: Least share of the area that a random crop keeps, which is then resized (arXiv:1409.4842).
        jitter: Largest relative change of brightness, contrast and saturation, and four times that of the hue.
        randaugment: Magnitude of two random operations of RandAugment's (arXiv:1909.13719).
        mixup: Alpha of the Beta distribution of the share of another image that is blended in (arXiv:1710.09412).
        cutmix: Likewise, of the area pasted from another image (arXiv:1905.04899); with mixup too, either at random.
    """

    resized_crop: Share = 0.0
    jitter: Share = 0.0
    randaugment: Magnitude = 0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0

    def __post_init__(self) -> None:
        check_fields(self, DataError)

    @property
    def mixes(self) -> bool:
        """Whether labels become shares of classes."""
        return self.mixup > 0 or self.cutmix > 0

    def change(self, images_NHWC: Tensor, seeds: Sequence[int]) -> Tensor:
        """Change uint8 images, each as its seed says, on the CPU."""
        if not (self.resized_crop or self.jitter or self.randaugment):
            return images_NHWC
        transform, changed = _transform(self, *images_NHWC.shape[1:3]), []
        for image, seed in zip(images_NHWC.cpu().permute(0, 3, 1, 2), seeds, strict=True):
            with own_randomness(seed):
                changed.append(transform(image))
        return torch.stack(changed).permute(0, 2, 3, 1).contiguous().to(images_NHWC.device)

    def mix(self, images_NCHW: Tensor, labels_N: Tensor, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """Mix each image with another of the batch, in place; labels become shares, float (N, num_classes)."""
        mixture = Mixup(self.mixup, self.cutmix, mode="elem", label_smoothing=0.0, num_classes=num_classes)
        with own_randomness(seed):
            images, labels = mixture(images_NCHW, labels_N)
        return images, labels.float()


@lru_cache(maxsize=8)
def _transform(photo: PhotoAugment, height: int, width: int) -> Any:
    from torchvision.transforms import v2

    steps: list[Any] = []
    if photo.resized_crop:
        steps.append(v2.RandomResizedCrop((height, width), scale=(photo.resized_crop, 1.0), antialias=True))
    if photo.randaugment:
        steps.append(v2.RandAugment(magnitude=photo.randaugment))
    if photo.jitter:
        steps.append(v2.ColorJitter(photo.jitter, photo.jitter, photo.jitter, photo.jitter / 4))
    return v2.Compose(steps)
