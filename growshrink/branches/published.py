"""The published forms of branches, where the default ones differ: `BranchSpec(published=True)`.

The blocks of the papers replace a convolution that has a bias and no norm behind it once it is deployed: every path
ends in a norm of its own, the kernel's too. (OREPA has scales for norms, and one norm behind the sum.)
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.algebra.convmap import ConvMap, Pair, compose
from growshrink.branches.base import ONE_TAP, Chain, even_sides, like, padding_of
from growshrink.branches.kernels import Kernels
from growshrink.layers.branch import Branch
from growshrink.layers.mapping import Mergeable, convmap_of


class OwnNorm(Branch, kind="own_norm", published=True):
    """In series: the batch norm of the convolution's own kernel; what it adds is BN(y) - y.

    Source: RepVGG (Ding et al., arXiv:2101.03697, eq. 1), and likewise ACNet, DBB and MobileOne.
    """

    parallel = False

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio)
        self.norm = nn.BatchNorm2d(conv.out_channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(y) - y

    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        norm = convmap_of(self.norm, "norm", dtype=kernel.kernel.dtype)
        return kernel.then(norm) + kernel.scale(-kernel.kernel.new_ones(()))


class NormAndPad(Mergeable):
    """A batch norm that pads by what it makes of zeros in eval mode; its statistics do not count the border.

    Source: Diverse Branch Block (Ding et al., arXiv:2103.13425), the authors' code; no gradient flows into the border.
    """

    def __init__(self, channels: int, padding: Pair) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W) -> (N, C, H + 2 p, W + 2 q)`."""
        y, (vertical, horizontal) = self.norm(x), self.padding
        height, width = y.shape[2:]
        border = ConvMap.from_bn(self.norm, torch.promote_types(y.dtype, torch.float32)).bias.detach().to(y.dtype)
        out = border[:, None, None].repeat(len(y), 1, height + 2 * vertical, width + 2 * horizontal)
        out[:, :, vertical : vertical + height, horizontal : horizontal + width] = y
        return out

    def as_convmap(self, dtype: torch.dtype = torch.float64) -> ConvMap:
        (vertical, horizontal) = self.padding
        own = convmap_of(self.norm, "norm", dtype=dtype)
        return replace(own, padding=((vertical, vertical), (horizontal, horizontal)))


class _Published(Chain, kind=""):
    """1x1 -> BN, padded by it -> kxk or average pool -> BN, as DBB has them; depthwise they are others."""

    outermost = "path.norm.weight"

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        depthwise, averages = conv.groups == conv.out_channels, self.kind == "pointwise_average"
        inner = conv.out_channels if averages else conv.in_channels * (2 if depthwise else 1)
        pointwise, last = like(conv, out_channels=inner, **ONE_TAP), like(conv, inner, padding=(0, 0))
        pointwise.reset_parameters()
        last.reset_parameters()
        if not averages and not depthwise:
            nn.init.dirac_(pointwise.weight, conv.groups)
        parts: dict[str, Any] = {"pointwise": pointwise, "inner": NormAndPad(inner, padding_of(conv)), "conv": last}
        if averages:
            parts.pop("conv")
            parts = {} if depthwise else parts
            padding = padding_of(conv) if depthwise else 0
            parts["average"] = nn.AvgPool2d(conv.kernel_size, conv.stride, padding)  # type: ignore[arg-type]
        super().__init__(conv, ratio, **parts, norm=nn.BatchNorm2d(conv.out_channels))

    @classmethod
    def reason_against(cls, conv: nn.Conv2d) -> str:
        known = Branch.kinds[cls.kind].reason_against(conv)
        return known or (f"its padding mode is {conv.padding_mode}" if conv.padding_mode != "zeros" else "")


class PublishedPointwiseConv(_Published, kind="pointwise_conv", published=True):
    """In parallel: 1x1 -> BN, padded by it -> kxk -> BN; a depthwise 1x1 makes two channels of one.

    Source: Diverse Branch Block (arXiv:2103.13425, section 3.2; depthwise: the authors' code).
    """


class PublishedPointwiseAverage(_Published, kind="pointwise_average", published=True):
    """In parallel: 1x1 -> BN, padded by it -> average pool -> BN; depthwise the average pool -> BN alone.

    Source: Diverse Branch Block (arXiv:2103.13425, section 3.2; depthwise: the authors' code).
    """


class PublishedOrepa(Kernels, kind="orepa", published=True):
    """With the convolution's own kernel scaled: 1x1, 1x1-kxk, 1x1-average, 1x1-waves and depthwise-1x1, one kernel.

    Source: OREPA (Hu et al., arXiv:2204.00826, section 3.2 and the authors' code: six paths, their starts). The
    convolution's kernel is the path called origin; the norm behind the sum is the net's.
    """

    parallel = False
    outermost = "scale"

    #: Where the scales of the kernel itself and of the five paths start.
    STARTS = (0.25, 1.0, 0.5, 0.25, 0.0, 0.5)

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio)
        inner = conv.in_channels * (1 if conv.groups <= 4 else 2)
        wide = 8 * conv.in_channels
        self.pointwise, self.average, self.wave = (like(conv, **ONE_TAP) for _ in range(3))
        self.before, self.conv = like(conv, out_channels=inner, **ONE_TAP), like(conv, inner)
        self.depthwise = like(conv, out_channels=wide, groups=conv.in_channels)
        self.mix = like(conv, wide, **ONE_TAP)
        for module in self.children():
            nn.init.kaiming_uniform_(module.weight)  # type: ignore[arg-type]
        one = torch.eye(conv.in_channels // conv.groups)[:, :, None, None]
        self.before.weight = nn.Parameter(one.repeat(inner // len(one), 1, 1, 1))
        starts = torch.tensor(self.STARTS)[:, None].repeat(1, conv.out_channels)
        self.own, self.scale = nn.Parameter(starts[0].clone()), nn.Parameter(starts[1:])
        self.register_buffer("waves", _waves(conv.out_channels, *conv.kernel_size), persistent=False)

    @classmethod
    def reason_against(cls, conv: nn.Conv2d) -> str:
        return even_sides(conv) or ("OREPA's block for 1x1 kernels is another" if conv.kernel_size == (1, 1) else "")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y) + (self.own - 1)[:, None, None] * y

    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        return super().as_convmap(kernel) + kernel.scale(self.own.to(kernel.kernel.dtype) - 1)

    def silence_(self) -> None:
        nn.init.ones_(self.own)
        super().silence_()

    def kernel(self, dtype: torch.dtype) -> Tensor:
        groups, (height, width) = self.conv.groups, self.conv.kernel_size
        around = [width // 2, width // 2, height // 2, height // 2]
        weights = {name.partition(".")[0]: value.to(dtype) for name, value in self.named_parameters()}
        depthwise = weights["depthwise"].unflatten(0, (groups, -1, 8)).squeeze(3)
        mix = weights["mix"].flatten(1).unflatten(0, (groups, -1)).unflatten(2, (-1, 8))
        paths = [
            F.pad(weights["pointwise"], around),
            compose([ConvMap.from_conv2d(conv, dtype) for conv in (self.before, self.conv)]).kernel,
            weights["average"].expand(-1, -1, height, width) / (height * width),
            weights["wave"] * self.waves.to(dtype),  # type: ignore[operator]
            torch.einsum("goit,githw->goihw", mix, depthwise).flatten(0, 1),
        ]
        scales = weights["scale"][:, :, None, None, None].unbind()
        return torch.stack([scale * path for scale, path in zip(scales, paths, strict=True)]).sum(0)


def _waves(channels: int, *sides: int) -> Tensor:
    """The frequency prior `(O, 1, kh, kw)`: cosines down the first half of the channels, across the second."""
    waves = torch.empty(channels, 1, *sides, dtype=torch.float64)
    for o in range(channels):
        axis = int(o >= channels / 2)
        taps = torch.arange(sides[axis], dtype=torch.float64) + 0.5
        wave = torch.cos(math.pi * taps * (o + 1 - axis * channels / 2) / sides[axis])
        waves[o, 0] = (wave if axis else wave[:, None]).expand(*sides)
    return waves
