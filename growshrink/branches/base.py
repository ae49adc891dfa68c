"""What kinds of branches are made of: the geometry of their convolution, and modules in a row."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from growshrink.algebra.convmap import ConvMap, compose
from growshrink.algebra.taps import Pair
from growshrink.layers.activations import VanishingReLU
from growshrink.layers.bottleneck import geometry_of, he_fan_out_
from growshrink.layers.branch import Branch
from growshrink.layers.mapping import convmap_of

#: Options of `like` for a 1x1 that changes nothing but the channels.
ONE_TAP: dict[str, Any] = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}


def padding_of(conv: nn.Conv2d) -> Pair:
    """Pixels on each side, `(vertical, horizontal)`; where `padding="same"` is lopsided, on the side with fewer."""
    if isinstance(conv.padding, str):
        if conv.padding == "valid":
            return (0, 0)
        vertical, horizontal = (d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        return vertical, horizontal
    return conv.padding[0], conv.padding[1]


def even_sides(conv: nn.Conv2d, axes: Iterable[int] = (0, 1)) -> str:
    """The reason against a kernel without a middle tap along one of `axes`; empty if there is one."""
    height, width = conv.kernel_size
    return f"its {height}x{width} kernel has no middle" if any(conv.kernel_size[axis] % 2 == 0 for axis in axes) else ""


def lopsided(conv: nn.Conv2d) -> str:
    """The reason against `padding="same"` with one pixel more on one side than on the other; empty if it has not."""
    totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return "its padding='same' is lopsided" if conv.padding == "same" and any(t % 2 for t in totals) else ""


def like(conv: nn.Conv2d, in_channels: int | None = None, out_channels: int | None = None, **options: Any) -> nn.Conv2d:
    """A fresh convolution in the geometry and groups of `conv`, but for `options`; no bias, He et al. fan-out start.

    Where it pads nothing it has no padding mode.
    """
    options = geometry_of(conv) | options
    if options["padding"] == (0, 0):
        options["padding_mode"] = "zeros"
    new = nn.Conv2d(in_channels or conv.in_channels, out_channels or conv.out_channels, bias=False, **options)
    he_fan_out_(new, "linear")
    return new


def several(ratio: float) -> int:
    """How many kernels a ratio asks for."""
    return max(1, round(ratio))


def freeze_(module: nn.Module) -> None:
    """Turn the module's own parameters into buffers: constants that keep their keys, and that nothing can train."""
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            delattr(module, name)
            module.register_buffer(name, parameter.detach())


def scaled_identity(channels: int, scale: float) -> nn.Conv2d:
    """A factor per channel as a depthwise 1x1: in the shape of a kernel, so that it decays as kernels do."""
    conv = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
    nn.init.constant_(conv.weight, scale)
    return conv


def leave_one_trained_(convs: Sequence[nn.Module], trained: str) -> None:
    """Freeze all of `convs` but the "first" or the "last"."""
    kept = convs[0 if trained == "first" else -1]
    for conv in convs:
        if conv is not kept:
            freeze_(conv)


class Chain(Branch, kind=""):
    """Base of the linear branches that are modules in a row, the `parts`, by name.

    `crop` are the pixels of the input left out on each side, `(vertical, horizontal)`, before the first of them.
    """

    if TYPE_CHECKING:  # TorchScript cannot read the annotations of a class in this file
        path: nn.Sequential

    def __init__(self, conv: nn.Conv2d, ratio: float, /, *, crop: Pair = (0, 0), **parts: nn.Module) -> None:
        super().__init__(conv, ratio)
        self.crop = crop
        self.out_channels = conv.out_channels
        self.path = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        vertical, horizontal = self.crop
        if vertical or horizontal:
            x = x[:, :, vertical : x.shape[2] - vertical, horizontal : x.shape[3] - horizontal]
        return self.path(x)

    def make_linear_(self, scale: float, trained: str) -> None:
        gone = (nn.BatchNorm2d, VanishingReLU)
        parts = {name: part for name, part in self.path.named_children() if not isinstance(part, gone)}
        if not parts:  # the identity, whose norm was all it trained
            parts["weight"] = scaled_identity(self.out_channels, 1.0)
        leave_one_trained_([part for part in parts.values() if isinstance(part, nn.Conv2d)], trained)
        parts["scale"] = scaled_identity(self.out_channels, scale)
        freeze_(parts["scale"])
        self.path = nn.Sequential(OrderedDict(parts))

    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        return compose(*self.as_chains(kernel))

    def as_chains(self, kernel: ConvMap) -> list[list[ConvMap]]:
        maps: list[ConvMap] = []
        for name, part in self.path.named_children():
            channels = maps[-1].out_channels if maps else kernel.in_channels
            maps.append(convmap_of(part, f"path.{name}", channels, kernel.kernel.dtype, kernel.kernel.device))
        (top, bottom), (left, right) = maps[0].padding
        vertical, horizontal = self.crop
        padding = ((top - vertical, bottom - vertical), (left - horizontal, right - horizontal))
        return [[replace(maps[0], padding=padding), *maps[1:]]]
