"""Beside a kernel: a copy of it, or a smaller kernel with the same centre, each with its batch norm.

Of these RepVGG, ACNet and MobileOne are made, and the 1x1 of a Diverse Branch Block. A smaller kernel sees the input
where the middle taps of the convolution see it, so it is the convolution's kernel with zeros around it: exact,
borders included, for any stride, padding, dilation and groups. There must be a middle tap: no even kernels.
"""

from torch import nn

from growshrink.algebra.taps import Pair
from growshrink.branches.base import Chain
from growshrink.branches.geometry import even_sides, like, padding_of, scaled_identity


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
