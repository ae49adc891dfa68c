"""The branches whose activation vanishes: beside a kernel, in each other, behind a kernel, at equilibrium."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from growshrink.algebra.convmap import ConvMap, compose
from growshrink.branches.base import freeze_, leave_one_trained_, scaled_identity
from growshrink.layers.activations import VanishingReLU
from growshrink.layers.bottleneck import PureBottleneck, geometry_of, he_fan_out_
from growshrink.layers.branch import Branch, middle_width
from growshrink.layers.equilibrium import ImplicitReLU
from growshrink.layers.mapping import convmap_of
from growshrink.layers.swaps import attach


class Bottleneck(Branch, kind="bottleneck"):
    """In parallel: kxk -> BN -> vanishing ReLU -> 1x1 -> BN, middle width `ratio` times the output channels.

    The block of ReduceNet beside a kernel. The kxk repeats the convolution's geometry, the 1x1 its groups, so the two
    merge into a kernel of the same shape, exactly, borders included.
    """

    if TYPE_CHECKING:  # TorchScript cannot read the annotations of a class in this file
        body: PureBottleneck

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio)
        middle = middle_width(conv.out_channels, conv.groups, ratio)
        self.body = PureBottleneck(conv.in_channels, middle, conv.out_channels, **geometry_of(conv))
        self.norm = nn.BatchNorm2d(conv.out_channels)

    def make_linear_(self, scale: float, trained: str) -> None:
        body = self.body
        body.bn, body.act = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        leave_one_trained_([body.conv, body.pointwise], trained)
        self.norm = scaled_identity(body.out_channels, scale)  # type: ignore[assignment]
        freeze_(self.norm)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(self.body(x))

    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        dtype = kernel.kernel.dtype
        return convmap_of(self.body, "body", dtype=dtype).then(convmap_of(self.norm, "norm", dtype=dtype))


class Nest(Bottleneck, kind="nest"):
    """A bottleneck whose kxk is itself a grown convolution with a bottleneck branch.

    The inner branch starts loud (gamma 1): the outermost gamma is the one factor that makes the whole silent.
    """

    make_linear_ = Branch.make_linear_

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio)
        inner = self.body.conv
        attach(inner, [Bottleneck(inner, ratio)])


class Insert(Branch, kind="insert"):
    """In series, behind the output y: y + BN(1x1(vanishing ReLU(y))).

    A new layer for a kernel that is already trained: growing *into* a fused net. When linear it multiplies into the
    kernel, whose meaning thereby changes (its optimizer state starts afresh). It has no middle width.
    """

    parallel = False

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio)
        self.act = VanishingReLU()
        self.pointwise = nn.Conv2d(conv.out_channels, conv.out_channels, 1, groups=conv.groups, bias=False)
        he_fan_out_(self.pointwise)
        self.norm = nn.BatchNorm2d(conv.out_channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(self.pointwise(self.act(y)))

    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        names, channels, dtype = ("act", "pointwise", "norm"), kernel.out_channels, kernel.kernel.dtype
        return compose([kernel, *(convmap_of(getattr(self, name), name, channels, dtype) for name in names)])


class Implicit(Bottleneck, kind="implicit"):
    r"""A bottleneck whose middle solves :math:`h = f_\lambda(A h + BN(B x))`, with a 1x1 recurrence A of norm below 1.

    At lam = 0 that is :math:`(I - A)^{-1} BN(B x)`, one kxk kernel, borders included. A starts with norm 0.5.
    """

    make_linear_ = Branch.make_linear_

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio)
        self.body.act = ImplicitReLU(self.body.conv.out_channels, conv.groups)
