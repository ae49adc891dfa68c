"""RandAugment on whole batches: each operation is applied once, to all images that drew it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SIGNED = ("shear x", "shear y", "move x", "move y", "rotate", "brightness", "colour", "contrast", "sharpness")
#: In the order of torchvision's `v2.RandAugment`, whose draws they are numbered by.
OPERATIONS = ("identity", *_SIGNED, "posterize", "solarize", "autocontrast", "equalize")


def randaugment(images_NCHW: Tensor, seeds: Sequence[int], magnitude: int) -> Tensor:
    """Two random operations on each uint8 image: those of torchvision for its seed, magnitudes 0 to 30.

    Source: Cubuk et al., RandAugment (arXiv:1909.13719).
    """
    images, drawn = images_NCHW.clone(memory_format=torch.contiguous_format), [_draw(seed) for seed in seeds]
    for turn in range(2):
        groups: dict[tuple[str, int], list[int]] = {}
        for index, operations in enumerate(drawn):
            groups.setdefault(operations[turn], []).append(index)
        for (operation, sign), members in groups.items():
            rows = torch.tensor(members, device=images.device)
            images[rows] = _apply(images[rows], operation, sign, magnitude)
    return images


def _draw(seed: int) -> list[tuple[str, int]]:
    """Two operations, and the signs of their magnitudes."""
    random, drawn = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        operation = OPERATIONS[int(torch.randint(len(OPERATIONS), (), generator=random))]
        negative = operation in _SIGNED and float(torch.rand((), generator=random)) <= 0.5
        drawn.append((operation, -1 if negative else 1))
    return drawn


def _apply(images_NCHW: Tensor, operation: str, sign: int, magnitude: int) -> Tensor:
    from torchvision.transforms.v2 import functional as F

    def level(most: float, least: float = 0.0) -> float:
        return sign * float(torch.linspace(least, most, 31)[magnitude])

    match operation.split():
        case ["identity"]:
            return images_NCHW
        case ["shear", axis]:
            degrees = math.degrees(math.atan(level(0.3)))
            shear = [degrees, 0.0] if axis == "x" else [0.0, degrees]
            return F.affine(images_NCHW, 0.0, [0, 0], 1.0, shear, center=[0, 0])
        case ["move", axis]:
            pixels = int(level(150 / 331 * images_NCHW.shape[3 if axis == "x" else 2]))
            return F.affine(images_NCHW, 0.0, [pixels, 0] if axis == "x" else [0, pixels], 1.0, [0.0, 0.0])
        case ["rotate"]:
            return F.rotate(images_NCHW, level(30.0))
        case ["posterize"]:
            return F.posterize(images_NCHW, 8 - round(magnitude / 7.5))
        case ["solarize"]:
            return F.solarize(images_NCHW, 255 * level(0.0, 1.0))
        case ["autocontrast" | "equalize" as name]:
            same: Tensor = getattr(F, name)(images_NCHW)
            return same
    adjusts = "saturation" if operation == "colour" else operation
    changed: Tensor = getattr(F, f"adjust_{adjusts}")(images_NCHW, 1.0 + level(0.9))
    return changed
