"""Linear chains beside a kernel: two of a Diverse Branch Block, ExpandNet's two, and a kernel of low rank.

Each has all its padding in its first convolution, so each is one kernel of the convolution's size, borders included.
"""

from typing import Any

from torch import nn

from growshrink.branches.base import Chain
from growshrink.branches.geometry import ONE_TAP, like, lopsided, padding_of
from growshrink.layers.as_conv import TokenConv2d
from growshrink.layers.bottleneck import he_fan_out_
from growshrink.layers.branch import middle_width


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
