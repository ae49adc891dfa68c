"""The bottleneck that is a convolution: kxk -> BN -> vanishing ReLU -> 1x1, of any middle width."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from growshrink.algebra.convmap import ConvMap, compose
from growshrink.errors import GrowError
from growshrink.layers.activations import VanishingReLU
from growshrink.layers.mapping import Mergeable, convmap_of


class PureBottleneck(Mergeable):
    """A convolution without a kernel of its own: kxk -> BN -> vanishing ReLU -> 1x1.

    The unit of ReduceNet. Once lam is 0 it is one kxk convolution whatever its middle width, borders included: all
    padding is in the kxk. Its bias, which comes from the BN, has to go into the norm that follows.

    All widths up to M share these parameters: at `width` m only the first m of the M middle channels exist (with G
    groups, the first m / G of each group), as views of the same tensors.

    Args:
        in_channels: I.
        mid_channels: M, the middle width; must be divisible by `groups`.
        out_channels: O.
        kernel_size: Kernel size of the kxk; the 1x1 has stride 1, and the same groups.
        padding: Padding of the kxk.
        groups: Groups of both convolutions.
        device: Where the parameters are made.
        dtype: Type of the parameters (lam stays float32).
        geometry: `stride`, `dilation` and `padding_mode` of the kxk.

    >>> gs.layers.PureBottleneck(3, mid_channels=8, out_channels=4, padding=1)(torch.randn(1, 3, 9, 9)).shape
    torch.Size([1, 4, 9, 9])
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        padding: int | tuple[int, int] | str = 1,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **geometry: Any,
    ) -> None:
        super().__init__()
        if type(mid_channels) is not int or mid_channels < 1 or mid_channels % groups:
            raise GrowError(f"{mid_channels=}: must be a whole number above 0, divisible by {groups=}.")
        self.out_channels = out_channels
        self.width = mid_channels  # how many middle channels are active; see growshrink.set_width
        options: dict[str, Any] = {"groups": groups, "bias": False, "device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_channels, mid_channels, kernel_size, padding=padding, **geometry, **options)
        self.bn = nn.BatchNorm2d(mid_channels, device=device, dtype=dtype)
        self.act = VanishingReLU(device=device)
        self.pointwise = nn.Conv2d(mid_channels, out_channels, 1, **options)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Redraw the kernels (He et al., arXiv:1502.01852, fan-out), reset the BN, make the activation a ReLU."""
        he_fan_out_(self.conv)
        he_fan_out_(self.pointwise)
        self.bn.reset_parameters()
        self.act.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """`(N, I, H, W) -> (N, O, H', W')`."""
        if torch.jit.is_scripting():
            assert self.width == self.conv.out_channels, "TorchScript knows the full width only: growshrink.fuse first."
        elif self.width != self.conv.out_channels:
            return self._forward_prefix(x)
        return self.pointwise(self.act(self.bn(self.conv(x))))

    @torch.jit.unused
    def _forward_prefix(self, x: Tensor) -> Tensor:
        groups, conv = self.conv.groups, self.conv
        if isinstance(conv, Mergeable):  # its branches have outputs of their own: computed whole, then cut
            mid = prefix(conv(x), self.width, groups, dim=1)
        else:
            mid = conv._conv_forward(x, prefix(conv.weight, self.width, groups), None)
        mid = self.act(_norm_prefix(self.bn, mid, groups))
        kernel = self.pointwise.weight[:, : self.width // groups]
        return self.pointwise._conv_forward(mid, kernel, None)

    @torch.jit.ignore
    def as_convmap(self, dtype: torch.dtype = torch.float64) -> ConvMap:
        """The whole module as one affine map, at its active width; AlgebraError while lam is not 0."""
        channels = self.conv.out_channels
        names = ("conv", "bn", "pointwise")
        first, norm, last = (convmap_of(getattr(self, name), name, channels, dtype) for name in names)
        act = convmap_of(self.act, "act", self.width, dtype)
        if self.width != channels:
            groups = self.conv.groups
            first, norm = (
                replace(m, kernel=prefix(m.kernel, self.width, groups), bias=prefix(m.bias, self.width, groups))
                for m in (first, norm)
            )
            norm = replace(norm, groups=self.width)
            last = replace(last, kernel=last.kernel[:, : self.width // groups])
        return compose([first, norm, act, last])

    @torch.jit.ignore
    def fuse(self) -> nn.Conv2d:
        """A plain convolution computing the same, with a bias (timm's `reparameterize_model` calls this)."""
        return self.as_convmap().to_conv2d(dtype=self.pointwise.weight.dtype)


def geometry_of(conv: nn.Conv2d) -> dict[str, Any]:
    """How a convolution slides, as arguments for another one."""
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names}


def he_fan_out_(conv: nn.Conv2d, nonlinearity: str = "relu") -> None:
    """Redraw a kernel: normal, scaled by the fan out of one group (He et al., arXiv:1502.01852)."""
    gain = nn.init.calculate_gain(nonlinearity)  # type: ignore[arg-type]
    fan_out = conv.out_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
    nn.init.normal_(conv.weight, std=gain / math.sqrt(fan_out))


def prefix(tensor: Tensor, width: int, groups: int, dim: int = 0) -> Tensor:
    """The first `width` channels along `dim`, taken evenly from each of `groups` blocks; a view where groups is 1."""
    if groups == 1:
        return tensor.narrow(dim, 0, width)
    return tensor.unflatten(dim, (groups, -1)).narrow(dim + 1, 0, width // groups).flatten(dim, dim + 1)


def _norm_prefix(norm: nn.BatchNorm2d, mid: Tensor, groups: int) -> Tensor:
    """`norm` of `mid`, a prefix of what it was made for: its own forward on its own tensors cut short."""
    if isinstance(norm, nn.Identity):
        return mid
    whole = {name: getattr(norm, name) for name in ("weight", "bias", "running_mean", "running_var")}
    cut = {name: prefix(t, mid.shape[1], groups) for name, t in whole.items() if t is not None}
    out = functional_call(norm, cut, (mid,))
    if groups > 1 and norm.training and norm.track_running_stats:  # the cut was a copy
        for name in ("running_mean", "running_var"):
            if (statistics := whole[name]) is not None:
                # .data: the graph of an earlier pass may have saved the statistics, though it does not read them
                blocks = statistics.data.unflatten(0, (groups, -1)).narrow(1, 0, mid.shape[1] // groups)
                blocks.copy_(cut[name].unflatten(0, (groups, -1)))
    return out
