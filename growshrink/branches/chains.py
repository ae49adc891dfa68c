"""Linear chains beside a kernel, each with its own start.

A copy of the kernel, or a smaller one with the same centre, and its batch norm: parts of RepVGG, ACNet, MobileOne and a
Diverse Branch Block. A smaller kernel sees the input where the middle taps of the convolution see it, so it is the
convolution's kernel with zeros around it, for any stride, padding, dilation and groups. There must be a middle tap: no
even kernels. Two more of a Diverse Branch Block, ExpandNet's two, and a kernel of low rank: they pad in their first
convolution. All are exact, borders included.
"""

from typing import Any

from torch import nn

from growshrink.algebra.taps import Pair
from growshrink.branches.base import ONE_TAP, Chain, even_sides, like, lopsided, padding_of, scaled_identity
from growshrink.layers.activations import VanishingReLU
from growshrink.layers.as_conv import TokenConv2d
from growshrink.layers.bottleneck import he_fan_out_
from growshrink.layers.branch import middle_width


class Copy(Chain, kind="copy"):
    """In parallel: kxk -> BN, the convolution again.

    Source: the over-parameterisation factor k of MobileOne (Vasu et al., arXiv:2206.04040, section 3.2).
    """

    outermost = "path.norm.weight"

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio, conv=like(conv), norm=nn.BatchNorm2d(conv.out_channels))


class _Small(Chain, kind=""):
    """A kernel of `kernel_size` at the centre of the convolution's -> BN."""

    outermost = "path.norm.weight"

    def __init__(self, conv: nn.Conv2d, ratio: float, kernel_size: Pair) -> None:
        margin = _margin(conv, kernel_size)
        # where "same" is lopsided (2x5, and 2x1 beside it) no number of pixels on both sides is the same
        padding = "same" if conv.padding == "same" else (max(0, margin[0]), max(0, margin[1]))
        super().__init__(
            conv,
            ratio,
            crop=(max(0, -margin[0]), max(0, -margin[1])),
            conv=like(conv, kernel_size=kernel_size, padding=padding),
            norm=nn.BatchNorm2d(conv.out_channels),
        )


class Pointwise(_Small, kind="pointwise"):
    """In parallel: 1x1 -> BN.

    Source: RepVGG (Ding et al., arXiv:2101.03697, section 3.3); the scale branch of MobileOne.
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio, (1, 1))

    @classmethod
    def reason_against(cls, conv: nn.Conv2d) -> str:
        return even_sides(conv)


class Identity(Chain, kind="identity"):
    """In parallel: BN(x).

    Source: RepVGG (arXiv:2101.03697, section 3.3), where the shape is the same before and after.
    """

    outermost = "path.norm.weight"

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        vertical, horizontal = _margin(conv, (1, 1))
        super().__init__(conv, ratio, crop=(-vertical, -horizontal), norm=nn.BatchNorm2d(conv.out_channels))

    @classmethod
    def reason_against(cls, conv: nn.Conv2d) -> str:
        if conv.in_channels != conv.out_channels:
            return f"its {conv.in_channels} input channels become {conv.out_channels}"
        if conv.stride != (1, 1):
            return f"its stride is {conv.stride}"
        if reason := even_sides(conv):
            return reason
        if max(_margin(conv, (1, 1))) > 0:
            return "it pads by more than half its kernel, so its output is larger than its input"
        return ""


class Dirac(Chain, kind="dirac"):
    """In parallel: a_o x, the identity with a factor for each channel and without a norm, where `identity` fits.

    Source: DiracNet (Zagoruyko and Komodakis, arXiv:1706.00388, eq. 3).
    """

    biased = False
    outermost = "path.weight.weight"
    reason_against = Identity.reason_against

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        vertical, horizontal = _margin(conv, (1, 1))
        super().__init__(conv, ratio, crop=(-vertical, -horizontal), weight=scaled_identity(conv.out_channels, 1.0))


class Vertical(_Small, kind="vertical"):
    """In parallel: kx1 -> BN, the middle column of the kernel.

    Source: ACNet (Ding et al., arXiv:1908.03930, section 3.2).
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio, (conv.kernel_size[0], 1))

    @classmethod
    def reason_against(cls, conv: nn.Conv2d) -> str:
        return _not_a_cross(conv) or even_sides(conv, axes=(1,))


class Horizontal(_Small, kind="horizontal"):
    """In parallel: 1xk -> BN, the middle row of the kernel.

    Source: ACNet (arXiv:1908.03930, section 3.2).
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio, (1, conv.kernel_size[1]))

    @classmethod
    def reason_against(cls, conv: nn.Conv2d) -> str:
        return _not_a_cross(conv) or even_sides(conv, axes=(0,))


class SmallKernel(_Small, kind="small_kernel"):
    """In parallel: 3x3 -> BN, in the middle of a kernel of 5x5 or larger.

    Source: RepLKNet (Ding et al., arXiv:2203.06717, section 3, guideline 3), whose small kernel is 3x3 or 5x5.
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio, (3, 3))

    @classmethod
    def reason_against(cls, conv: nn.Conv2d) -> str:
        height, width = conv.kernel_size
        too_small = "" if min(height, width) >= 5 else f"its {height}x{width} kernel is smaller than 5x5"
        return even_sides(conv) or too_small


class Stack(Chain, kind="stack"):
    """In parallel: 3x3 -> BN -> vanishing ReLU -> 3x3 -> BN, middle width `ratio` times the output channels.

    The bottleneck of ReduceNet with a 3x3 in place of its 1x1: two layers of the 5x5 in the middle of a kernel of 5x5
    or larger. All padding is in the first, the stride in the second, so that at lam = 0 the two are one kernel, borders
    included.
    """

    outermost = "path.norm.weight"
    reason_against = SmallKernel.reason_against

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        middle = middle_width(conv.out_channels, conv.groups, ratio)
        vertical, horizontal = _margin(conv, (5, 5))
        padding = (max(0, vertical), max(0, horizontal))
        super().__init__(
            conv,
            ratio,
            crop=(max(0, -vertical), max(0, -horizontal)),
            first=like(conv, out_channels=middle, kernel_size=(3, 3), stride=(1, 1), padding=padding),
            inner=nn.BatchNorm2d(middle),
            act=VanishingReLU(),
            last=like(conv, middle, kernel_size=(3, 3), padding=(0, 0)),
            norm=nn.BatchNorm2d(conv.out_channels),
        )


def _margin(conv: nn.Conv2d, kernel_size: Pair) -> Pair:
    """Padding that a kernel of `kernel_size` at the centre of the convolution's needs; below 0 it is a crop."""
    padding = padding_of(conv)
    vertical, horizontal = (
        p - d * (k - small) // 2
        for p, d, k, small in zip(padding, conv.dilation, conv.kernel_size, kernel_size, strict=True)
    )
    return vertical, horizontal


def _not_a_cross(conv: nn.Conv2d) -> str:
    height, width = conv.kernel_size
    return "" if min(height, width) > 1 else f"its {height}x{width} kernel has no row and column that cross"


class PointwiseConv(Chain, kind="pointwise_conv"):
    """In parallel: 1x1 -> BN -> kxk -> BN, as wide in the middle as the input; the 1x1 starts as the identity.

    The kxk must see, around the map, what the first BN makes of zeros. The paper pads with that value, taken from the
    running statistics; here the 1x1 pads, and so the BN sees the border: in eval mode the same, and in train mode too
    both agree at the border. (While training its statistics count the border's zeros.)

    Source: Diverse Branch Block (Ding et al., arXiv:2103.13425, section 3.2).
    """

    outermost = "path.norm.weight"

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        pointwise = _pointwise_in_front(conv, conv.in_channels)
        nn.init.dirac_(pointwise.weight, conv.groups)
        super().__init__(
            conv,
            ratio,
            pointwise=pointwise,
            inner=nn.BatchNorm2d(conv.in_channels),
            conv=like(conv, padding=(0, 0)),
            norm=nn.BatchNorm2d(conv.out_channels),
        )

    @classmethod
    def reason_against(cls, conv: nn.Conv2d) -> str:
        return lopsided(conv)


class PointwiseAverage(Chain, kind="pointwise_average"):
    """In parallel: 1x1 -> BN -> average pool of the kernel's size and stride -> BN; padded as `PointwiseConv` is.

    Source: Diverse Branch Block (arXiv:2103.13425, section 3.2).
    """

    outermost = "path.norm.weight"

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(
            conv,
            ratio,
            pointwise=_pointwise_in_front(conv, conv.out_channels),
            inner=nn.BatchNorm2d(conv.out_channels),
            average=nn.AvgPool2d(conv.kernel_size, conv.stride),  # type: ignore[arg-type]
            norm=nn.BatchNorm2d(conv.out_channels),
        )

    @classmethod
    def reason_against(cls, conv: nn.Conv2d) -> str:
        if isinstance(conv, TokenConv2d):
            return "it is a linear layer, there are no neighbours to average over"
        if any(d > 1 and k > 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
            return f"its dilation is {conv.dilation}, an average pool has none"
        return lopsided(conv)


class ExpandNet(Chain, kind="expandnet"):
    """In parallel: 1x1 -> kxk -> 1x1, linear and without norms, `ratio` times as wide inside.

    Source: ExpandNets (Guo et al., arXiv:1811.10495), expanding a convolutional layer ("CL"). There the chain
    replaces the kernel.
    """

    biased = False
    outermost = "path.last.weight"

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        wide_in = middle_width(conv.in_channels, conv.groups, ratio)
        wide_out = middle_width(conv.out_channels, conv.groups, ratio)
        super().__init__(
            conv,
            ratio,
            first=like(conv, out_channels=wide_in, **ONE_TAP),
            conv=like(conv, wide_in, wide_out),  # zeros stay zeros behind a 1x1 without a bias: it may pad itself
            last=like(conv, wide_out, **ONE_TAP),
        )


class ExpandNetStack(Chain, kind="expandnet_stack"):
    """In parallel: 3x3 -> ... -> 3x3, as many as make up the kernel (two for 5x5), linear, without norms.

    Source: ExpandNets (arXiv:1811.10495), expanding a kernel ("CK"). All padding is in the first, the stride in the
    last; `ratio` times the output channels between.
    """

    biased = False
    outermost = "path.last.weight"

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        depth = (conv.kernel_size[0] - 1) // 2
        widths = [conv.in_channels, *[middle_width(conv.out_channels, conv.groups, ratio)] * (depth - 1)]
        parts: dict[str, Any] = {
            f"conv{index}": like(
                conv,
                widths[index],
                widths[index + 1],
                kernel_size=(3, 3),
                stride=(1, 1),
                padding=(0, 0) if index else padding_of(conv),
            )
            for index in range(depth - 1)
        }
        last = like(conv, widths[-1], kernel_size=(3, 3), padding=(0, 0))
        super().__init__(conv, ratio, **parts, last=last)

    @classmethod
    def reason_against(cls, conv: nn.Conv2d) -> str:
        height, width = conv.kernel_size
        if height != width or height % 2 == 0 or height < 5:
            return f"a stack of 3x3 makes 5x5, 7x7, ..., not its {height}x{width}"
        return ""


class LowRank(Chain, kind="lora"):
    """In parallel: kxk to `ratio` times the output channels -> 1x1; of low rank for a `ratio` well below 1, say 1/8.

    The 1x1 starts at zero in either init, as in the paper.

    Source: LoRA (Hu et al., arXiv:2106.09685, eq. 3), W + BA with a convolution for A and a 1x1 for B.
    """

    biased = False
    outermost = "path.up.weight"

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        rank = middle_width(conv.out_channels, conv.groups, ratio)
        super().__init__(conv, ratio, down=like(conv, out_channels=rank), up=like(conv, rank, **ONE_TAP))
        self.silence_()

    def make_linear_(self, scale: float, trained: str) -> None:
        """See `Branch.make_linear_`; the trained factor starts at zero, as in the paper."""
        down, up = self.path
        assert isinstance(down, nn.Conv2d) and isinstance(up, nn.Conv2d)
        if trained == "first":
            he_fan_out_(up, "linear")
            nn.init.zeros_(down.weight)
        super().make_linear_(scale, trained)


def _pointwise_in_front(conv: nn.Conv2d, out_channels: int) -> nn.Conv2d:
    """A 1x1 that does the padding of `conv`."""
    return like(conv, out_channels=out_channels, **{**ONE_TAP, "padding": padding_of(conv)})
