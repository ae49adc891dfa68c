"""The branch whose middle is at equilibrium: infinitely deep over its channels, one kernel once it has vanished."""

from torch import nn

from growshrink.branches.bottleneck import Bottleneck
from growshrink.layers.branch import Branch
from growshrink.layers.equilibrium import ImplicitReLU


class Implicit(Bottleneck, kind="implicit"):
    r"""A bottleneck whose middle solves :math:`h = f_\lambda(A h + BN(B x))`, with a 1x1 recurrence A of norm below 1.

    At lam = 0 that is :math:`(I - A)^{-1} BN(B x)`, one kxk kernel, borders included. A starts with norm 0.5.
    """

    make_linear_ = Branch.make_linear_

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio)
        self.body.act = ImplicitReLU(self.body.conv.out_channels, conv.groups)
