"""What branches have to know about the geometry of their convolution."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from growshrink.algebra.taps import Pair
from growshrink.layers.bottleneck import he_fan_out_

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
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    options = {name: getattr(conv, name) for name in names} | options
    if options["padding"] == (0, 0):
        options["padding_mode"] = "zeros"
    new = nn.Conv2d(in_channels or conv.in_channels, out_channels or conv.out_channels, bias=False, **options)
    he_fan_out_(new, "linear")
    return new


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
