"""VanillaNet for small images: pointwise convolutions, max pools and series activations, no skip anywhere.

A block is 1x1 conv -> BN -> max pool where it strides -> series activation. `vanillanet_5` is the plain net; in
`vanillanet_5_x1` the 1x1 of every block is built grown into a `PureBottleneck`, 1x1 -> BN -> vanishing ReLU -> 1x1:
the paper's *deep training*, with the paper's middle width; `gs.fuse` makes it `vanillanet_5`. The number counts layers
as the paper does: stem, one per block, classifier.

Source: Chen et al., VanillaNet: the Power of Minimalism in Deep Learning (arXiv:2305.12972), section 3: deep training
(eq. 1 to 4) and the series activation (eq. 5, 6). Other than there: a 3x3 stem of stride 1 instead of a 4x4 of
stride 4, 32 to 256 channels instead of 512 to 4096, and the stem and the classifier are single layers in both forms.
"""

from typing import Any

import torch
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from growshrink.models.staged import StagedNet, block_conv, check_options, cifar_cfg, conv_norm_act, register_variants

__all__ = ["SeriesActivation", "VanillaBlock", "VanillaNet"]

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.


class SeriesActivation(nn.Module):
    r"""ReLU, then a depthwise convolution over (2n + 1) x (2n + 1) neighbours, then BN; this activation stays.

    .. math:: A_s(x)_{h, w, c} = \sum_{i, j \in \{-n .. n\}} a_{i, j, c} \, A(x_{h + i, w + j, c})

    With C `channels` and n `num_rings`; `factory` are `device` and `dtype` of the tensors.
    """

    def __init__(self, channels: int, num_rings: int, **factory: Any) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        size = 2 * num_rings + 1
        self.conv = nn.Conv2d(channels, channels, size, padding=num_rings, groups=channels, bias=False, **factory)
        self.bn = nn.BatchNorm2d(channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return self.bn(self.conv(self.act(x)))


class VanillaBlock(nn.Module):
    """`conv` (1x1) -> `bn` -> `pool` (max, where `stride` is above 1) -> `act` (series activation of `num_rings`).

    With an `expansion` of E > 0, `conv` is a `PureBottleneck` with E * `in_channels` middle channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, expansion: int = 0, num_rings: int = 3, **factory: Any
    ) -> None:
        super().__init__()
        self.conv = block_conv((in_channels, expansion * in_channels, out_channels), 1, **factory)
        self.bn = nn.BatchNorm2d(out_channels, **factory)
        self.pool = nn.MaxPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.act = SeriesActivation(out_channels, num_rings, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        return self.act(self.pool(self.bn(self.conv(x))))


class VanillaNet(StagedNet):
    """Stem, stages of `VanillaBlock`, pooled linear classifier. See the module's docstring for what the family is.

    Arguments as of a `ReduceNet`, but `channels` begin with those of the stem, `expansion` is in multiples of a block's
    input channels (the paper has 1), and `num_rings` is the n of the series activations.

    >>> timm.create_model("vanillanet_5", width=0.25)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        depths: tuple[int, ...] = (1, 1, 1),
        channels: tuple[int, ...] = (32, 64, 128, 256),
        strides: tuple[int, ...] = (2, 2, 2),
        *,
        width: float = 1.0,
        expansion: int = 0,
        num_rings: int = 3,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **head: Any,
    ) -> None:
        check_options(width, expansion)
        if num_rings < 0:
            raise ValueError(f"{num_rings=}: must not be negative (0 = one weight per channel).")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        first, *outs = (max(1, round(c * width)) for c in channels)
        stem = conv_norm_act(in_chans, first, stride=1, linear=True, **factory)
        stem.act = SeriesActivation(first, num_rings, **factory)
        stages = []
        in_channels = first
        for depth, out_channels, stride in zip(depths, outs, strides, strict=True):
            blocks = []
            for block_stride in (stride, *[1] * (depth - 1)):
                blocks.append(VanillaBlock(in_channels, out_channels, block_stride, expansion, num_rings, **factory))
                in_channels = out_channels
            stages.append(blocks)
        super().__init__(stem, stages, outs, (1, *strides), in_chans=in_chans, **factory, **head)


_VARIANTS = {
    f"vanillanet_{layers}" + (f"_x{expansion}" if expansion else ""): {"depths": depths, "expansion": expansion}
    for layers, depths in ((5, (1, 1, 1)), (6, (1, 1, 2)))
    for expansion in (0, 1, 2)
}
_CFG = cifar_cfg(pool_size=(4, 4), origin_url="https://arxiv.org/abs/2305.12972")
default_cfgs = generate_default_cfgs({f"{name}.untrained": _CFG for name in _VARIANTS})


def _describe(name: str) -> str:
    expansion = _VARIANTS[name]["expansion"]
    plain = name.partition("_x")[0]
    form = f"built grown, expansion {expansion}; fuses into `{plain}`" if expansion else "the plain net"
    return f"VanillaNet of {plain.rpartition('_')[2]} layers for small images: {form}."


register_variants(__name__, VanillaNet, _VARIANTS, _describe)
