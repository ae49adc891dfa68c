"""Nets that are not timm's, for tools/coverage.py (not a program): torchvision's, a YOLO-like one, MLPerf Tiny."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from mlperf_tiny import NETS as MLPERF_TINY


@dataclass(frozen=True)
class Entry:
    """How a net is made, and one batch for it."""

    kind: str
    make: Callable[[], nn.Module]
    example_inputs: Any


class Heads(nn.Module):
    """A detector of torchvision's up to its heads, whose numbers are compared: untrained, it chooses few boxes or none.

    Images are not made larger; the heads of a second stage see the image in nine boxes.
    """

    def __init__(self, name: str, side: int, **kwargs: Any) -> None:
        super().__init__()
        self.net: Any = models.get_model(name, min_size=side, max_size=side, **kwargs)

    def forward(self, images: list[Tensor]) -> list[Any]:
        """`(3, H, W)` each, to what the heads say."""
        batch, _ = self.net.transform(images)
        maps = self.net.backbone(batch.tensors)
        if not hasattr(self.net, "rpn"):
            return [self.net.head(list(maps.values()))]
        corners = torch.cartesian_prod(*[torch.arange(3.0) * batch.tensors.shape[-1] / 4] * 2)
        boxes = torch.cat([corners, corners + batch.tensors.shape[-1] / 2], 1).to(batch.tensors)
        second = self.net.roi_heads
        found = second.box_roi_pool(maps, [boxes] * len(images), batch.image_sizes)
        return [self.net.rpn.head(list(maps.values())), second.box_predictor(second.box_head(found))]


def _torchvision(kind: str, name: str, side: int) -> Entry:
    kwargs: dict[str, Any] = {"weights": None}
    if kind != "classification":
        kwargs["weights_backbone"] = None
    batch: Any = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    if kind == "detection":
        batch = ([image.sigmoid() for image in batch],)
        if not name.startswith("ssd"):
            return Entry(f"torchvision, {kind}, heads", partial(Heads, name, side, **kwargs), batch)
    return Entry(f"torchvision, {kind}", partial(models.get_model, name, **kwargs), batch)


class Stage(nn.Module):
    """Cross-stage partial: half of the channels through two residual bottlenecks, all of them joined again."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.split, self.join = _conv(channels, channels, 1), _conv(2 * channels, channels, 1)
        self.blocks = nn.ModuleList(_conv(channels // 2, channels // 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Shape-preserving."""
        parts = list(self.split(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.join(torch.cat(parts, 1))


class Yolo(nn.Module):
    """A one-stage detector of three scales with a top-down path; a dict of boxes and classes for each."""

    def __init__(self, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(5)]
        self.stem = _conv(3, widths[0], 3, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(_conv(a, b, 3, 2), Stage(b)) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(w, widths[2], 1) for w in widths[2:])
        self.up = nn.ConvTranspose2d(widths[2], widths[2], 2, 2)
        self.boxes, self.classes = (
            nn.ModuleList(nn.Sequential(_conv(widths[2], widths[2]), nn.Conv2d(widths[2], n, 1)) for _ in range(3))
            for n in (4, classes)
        )

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        """`(N, 3, H, W)` to boxes `(N, 4, h, w)` and classes at three scales."""
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        levels = [lateral(level) for lateral, level in zip(self.lateral, maps[2:], strict=True)]
        for index in (1, 0):
            levels[index] = levels[index] + self.up(levels[index + 1])
        heads = {"boxes": self.boxes, "classes": self.classes}
        return {name: [part(y) for part, y in zip(parts, levels, strict=True)] for name, parts in heads.items()}


def _conv(inside: int, out: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inside, out, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.SiLU())


_CLASSIFICATION = (
    "squeezenet1_1",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "mobilenet_v2",
    "regnet_y_400mf",
    "efficientnet_b0",
    "googlenet",
    "densenet121",
    "resnet18",
    "inception_v3",
    "convnext_tiny",
    "swin_t",
    "alexnet",
)
_SIDES = {"inception_v3": 96, "alexnet": 96}
ZOO = {
    **{
        name: Entry("MLPerf Tiny", make, torch.randn(2, *size, generator=torch.Generator().manual_seed(0)))
        for name, (make, size, _) in MLPERF_TINY.items()
    },
    "yolo": Entry("YOLO-like", Yolo, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))),
    **{name: _torchvision("classification", name, _SIDES.get(name, 64)) for name in _CLASSIFICATION},
    **{
        name: _torchvision("segmentation", name, 64)
        for name in ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50")
    },
    **{
        name: _torchvision("detection", name, 96)
        for name in ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn")
    },
}
