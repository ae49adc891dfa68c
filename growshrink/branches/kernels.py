"""Branches that add up kernels before they convolve: whatever their number, one convolution in training."""

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from growshrink.algebra.convmap import ConvMap
from growshrink.branches.base import ONE_TAP, even_sides, freeze_, leave_one_trained_, like, several
from growshrink.layers.branch import Branch


class Kernels(Branch, kind=""):
    """A convolution with a kernel that every pass computes from its parts."""

    biased = False

    if TYPE_CHECKING:  # TorchScript cannot read the annotations of a class in this file
        conv: nn.Conv2d

    def make_linear_(self, scale: float, trained: str) -> None:
        """See `Branch.make_linear_`; the scales are frozen where they start, times `scale`."""
        with torch.no_grad():
            getattr(self, self.outermost).mul_(scale)
        freeze_(self)

    @abstractmethod
    def kernel(self, dtype: torch.dtype) -> Tensor:
        """`(O, I // groups, kh, kw)`, computed in `dtype`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.conv._conv_forward(x, self.kernel(self.conv.weight.dtype), None)

    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        own = self.kernel(kernel.kernel.dtype)
        return replace(ConvMap.from_conv2d(self.conv, own.dtype), kernel=own, bias=own.new_zeros(len(own)))


class Mixture(Kernels, kind="mixture"):
    """In parallel: sum over i of mix_i W_i, `ratio` kernels (to the nearest whole number) with a learnt scalar each.

    Source: CondConv (Yang et al., arXiv:1904.04971, eq. 1) with scalars that do not depend on the input. They start
    where the paper's do on average, at sigmoid(0).
    """

    outermost = "mix"

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio)
        self.conv = like(conv, out_channels=several(ratio) * conv.out_channels)  # kernel after kernel
        self.mix = nn.Parameter(torch.full((several(ratio),), 0.5))

    def kernel(self, dtype: torch.dtype) -> Tensor:
        kernels_EOIHW = self.conv.weight.to(dtype).unflatten(0, (len(self.mix), -1))
        return (kernels_EOIHW * self.mix.to(dtype).view(-1, 1, 1, 1, 1)).sum(0)


class DiracKernel(Kernels, kind="dirac_kernel"):
    """In parallel: diag(a) delta + diag(b) W / |W|, delta the kernel of the identity, |W| the norm of each filter.

    Source: DiracNet (Zagoruyko and Komodakis, arXiv:1706.00388, eq. 3), a = 1 and b = 0.1 at the start.
    """

    outermost = "scale"
    make_linear_ = Branch.make_linear_
    reason_against = classmethod(lambda cls, conv: even_sides(conv))

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio)
        self.conv = like(conv)
        self.scale = nn.Parameter(torch.tensor([1.0, 0.1])[:, None].repeat(1, conv.out_channels))

    def kernel(self, dtype: torch.dtype) -> Tensor:
        kernel_OIHW = self.conv.weight.to(dtype)
        delta = nn.init.dirac_(torch.empty_like(kernel_OIHW, requires_grad=False), self.conv.groups)
        norm_O111 = kernel_OIHW.flatten(1).norm(dim=1)[:, None, None, None]
        own, learnt = self.scale.to(dtype)[:, :, None, None, None].unbind()
        return own * delta + learnt * kernel_OIHW / norm_O111


class Orepa(Kernels, kind="orepa"):
    """In parallel: kxk, 1x1, 1x1-kxk and 1x1-average pool with a scale per path and channel, no norms, one kernel.

    Source: OREPA (Hu et al., arXiv:2204.00826, section 3.2: a block's norms become linear scales, and a norm behind the
    sum is left; that is the one behind the convolution). Its frequency prior (which starts at scale 0) and its
    depthwise-separable path are left out.
    """

    outermost = "scale"

    #: Where the scales of kxk, 1x1, 1x1-kxk and 1x1-average start.
    STARTS = (0.25, 0.5, 0.5, 0.25)

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio)
        self.conv = like(conv)
        self.pointwise = like(conv, **ONE_TAP)
        self.before = like(conv, out_channels=conv.in_channels, **ONE_TAP)
        nn.init.dirac_(self.before.weight, conv.groups)
        self.behind = like(conv)
        self.average = like(conv, **ONE_TAP)
        self.scale = nn.Parameter(torch.tensor(self.STARTS)[:, None].repeat(1, conv.out_channels))

    def make_linear_(self, scale: float, trained: str) -> None:
        """See `Branch.make_linear_`; one of the two factors of 1x1-kxk is frozen too."""
        super().make_linear_(scale, trained)
        leave_one_trained_([self.before, self.behind], trained)

    @classmethod
    def reason_against(cls, conv: nn.Conv2d) -> str:
        return even_sides(conv)

    def kernel(self, dtype: torch.dtype) -> Tensor:
        before_GMI = self.before.weight.to(dtype).flatten(1).unflatten(0, (self.conv.groups, -1))
        behind_GOMHW = self.behind.weight.to(dtype).unflatten(0, (self.conv.groups, -1))
        chain_OIHW = torch.einsum("gomhw,gmi->goihw", behind_GOMHW, before_GMI).flatten(0, 1)
        return torch.addcmul(self.unchained(dtype), self.scale[2].to(dtype)[:, None, None, None], chain_OIHW)

    def unchained(self, dtype: torch.dtype) -> Tensor:
        """Kernel of all paths but 1x1-kxk, which are no chains."""
        height, width = self.conv.weight.shape[2:]
        scale, pointwise, _, average = self.scale.to(dtype)[:, :, None, None, None].unbind()
        around = [0, 0, width // 2, width // 2, height // 2, height // 2]
        small = (pointwise * self.pointwise.weight.to(dtype)).permute(0, 2, 3, 1)
        spread = average / (height * width) * self.average.weight.to(dtype)
        others = nn.functional.pad(small, around).permute(0, 3, 1, 2) + spread
        return torch.addcmul(others, scale, self.conv.weight.to(dtype))

    def as_chains(self, kernel: ConvMap) -> list[list[ConvMap]]:
        dtype = kernel.kernel.dtype
        own, before, behind = (ConvMap.from_conv2d(m, dtype) for m in (self.conv, self.before, self.behind))
        chain = self.scale[2].to(dtype)[:, None, None, None]
        factor = ConvMap(chain, behind.bias, groups=len(chain), biased=False)
        return [[replace(own, kernel=self.unchained(dtype))], [before, behind, factor]]
