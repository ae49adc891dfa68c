"""The block of a ReduceNet."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.layers.bottleneck import PureBottleneck

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.


def front_padding(stride: int, length: int) -> int:
    """Padding of the first of `length` 3x3 convs in a row, of which it alone strides and it alone pads.

    One conv of `2 * front_padding(...) + 1` pixels can then take the place of all of them.

    >>> front_padding(stride=1, length=3), front_padding(stride=2, length=3)
    (3, 5)
    """
    return 1 + stride * (length - 1)


def block_conv(
    channels: tuple[int, int, int], kernel_size: int, stride: int = 1, padding: int = 0, **factory: Any
) -> nn.Module:
    """Make the conv of a block: a `PureBottleneck` of (in, middle, out) channels, an `nn.Conv2d` where middle is 0."""
    if channels[1]:
        return PureBottleneck(*channels, kernel_size, stride=stride, padding=padding, **factory)
    return nn.Conv2d(channels[0], channels[2], kernel_size, stride, padding, bias=False, **factory)


class Block(nn.Module):
    """`conv` (3x3) -> `bn` (+ identity where the shape allows, unless `skip` is false) -> ReLU unless `linear`.

    An `expansion` of 0 makes `conv` an `nn.Conv2d`, E > 0 a `PureBottleneck` with E * `out_channels` middle channels.
    Where `padding` is not 1, the map grows or shrinks by `2 * (padding - 1)` pixels (before the stride), and the
    identity is padded or cropped to fit. `factory` are `device` and `dtype` of the tensors.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expansion: int = 0,
        linear: bool = False,
        padding: int = 1,
        skip: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        channels = in_channels, expansion * out_channels, out_channels
        self.conv = block_conv(channels, 3, stride, padding, **factory)
        self.bn = nn.BatchNorm2d(out_channels, **factory)
        self.skip = skip and stride == 1 and in_channels == out_channels
        self.margin = padding - 1
        self.act = nn.Identity() if linear else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, ceil(h / stride), ...) with h = H + 2 * (padding - 1)."""
        y = self.bn(self.conv(x))
        if self.skip:
            m = self.margin
            y = y + (x if m == 0 else F.pad(x, [m, m, m, m]))  # a negative margin crops
        return self.act(y)

    def fold_skip(self) -> bool:
        r"""Add the identity skip to the kernel, in place: :math:`K * x + b + x = (K + \delta) * x + b`.

        Whether it was: only where the conv is all that the skip spans, an `nn.Conv2d` with a bias, followed by the
        `nn.Identity` that folding leaves of a BN.
        """
        conv = self.conv
        # A subclass of Conv2d may compute more than its weight says (a grown conv has branches).
        if not self.skip or type(conv) is not nn.Conv2d or conv.bias is None or not isinstance(self.bn, nn.Identity):
            return False
        weight = conv.weight.detach()
        dirac = nn.init.dirac_(torch.empty_like(weight, dtype=torch.float64), groups=conv.groups)
        with torch.no_grad():
            conv.weight.copy_(weight.double() + dirac)
        self.skip = False
        return True

    @torch.jit.ignore
    def is_identity(self) -> bool:
        """Whether merging has left nothing here but the identity."""
        return not self.skip and all(type(part) is nn.Identity for part in (self.conv, self.bn, self.act))

    def extra_repr(self) -> str:
        """`skip=...` in the printed model: the skip is no module of its own."""
        return f"skip={self.skip}"
