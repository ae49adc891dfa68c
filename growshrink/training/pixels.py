"""Maps on the gradient by how far neighbouring pixels of a layer's input depend on each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from growshrink.base.copying import copy_net
from growshrink.errors import GradientError
from growshrink.training.gradient_maps import GradientMaps
from growshrink.training.kernel_maps import KernelMap

#: Levels, equally full, that pixels are told apart by.
PIXEL_LEVELS = 16
#: Pixels at most that the limits of the levels are taken from.
SAMPLED_PIXELS = 100_000


@torch.no_grad()
def pixel_maps(model: nn.Module, images_NCHW: Tensor) -> GradientMaps:
    """Scale the gradient of each tap of a kernel by the dependence of the pixel it sees on the pixel its middle sees.

    The dependence is the normalised mutual information I(x; y) / sqrt(H(x) H(y)) of the two pixels of a channel in the
    layer's input, 1 for the middle tap itself; the scales of each layer have mean 1. AdamW takes their square roots, as
    a branch with that scale would have it.

    Args:
        model: Any net; runs in eval mode, on a copy.
        images_NCHW: Some of the training images.

    Source: spatial gradient scaling (arXiv:2303.02733); the estimator is ours.
    """
    net, maps = copy_net(model).eval(), dict[str, KernelMap]()

    def measure(name: str, conv: nn.Conv2d, x_NCHW: Tensor) -> None:
        taps_HW = dependence(x_NCHW, conv)
        factor = (taps_HW / taps_HW.mean()).cpu().expand(conv.weight.shape).contiguous()
        maps[f"{name}.weight".lstrip(".")] = KernelMap(factor, update=factor.sqrt())

    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d) and max(conv.kernel_size) > 1:
            conv.register_forward_pre_hook(lambda conv, args, name=name: measure(name, conv, args[0]))
    net(images_NCHW)
    if not maps:
        raise GradientError("the net has no convolution that sees more than one pixel.")
    return GradientMaps(maps)


def dependence(x_NCHW: Tensor, conv: nn.Conv2d) -> Tensor:
    """Dependence of the pixels that the taps `(kh, kw)` of a convolution see, on that of the middle one; float64."""
    x_NCHW = x_NCHW.float().contiguous()
    pixels = x_NCHW.flatten()
    sample = pixels[:: -(-len(pixels) // SAMPLED_PIXELS)]
    inner = torch.linspace(0, 1, PIXEL_LEVELS + 1, device=sample.device)[1:-1]
    levels_NCHW = torch.bucketize(x_NCHW, sample.quantile(inner).unique())
    height, width = conv.kernel_size
    known: dict[tuple[int, int], Tensor] = {}
    for row in range(height):
        for column in range(width):
            shift = ((row - height // 2) * conv.dilation[0], (column - width // 2) * conv.dilation[1])
            opposite = (-shift[0], -shift[1])
            known[shift] = known[opposite] if opposite in known else _information(levels_NCHW, *shift)
    return torch.stack([*known.values()]).view(height, width)


def _information(levels_NCHW: Tensor, down: int, right: int) -> Tensor:
    """Normalised mutual information of pixels that far apart; 0 where there are none."""
    height, width = levels_NCHW.shape[2:]
    if abs(down) >= height or abs(right) >= width:
        return torch.zeros((), dtype=torch.float64, device=levels_NCHW.device)
    first = levels_NCHW[:, :, max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
    second = levels_NCHW[:, :, max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)]
    counts = (
        (first * PIXEL_LEVELS + second).flatten().bincount(minlength=PIXEL_LEVELS**2).view(PIXEL_LEVELS, PIXEL_LEVELS)
    )
    joint = counts.double() / counts.sum()
    both, one, other = (-torch.special.xlogy(p, p).sum() for p in (joint, joint.sum(1), joint.sum(0)))
    # a constant input tells nothing apart, and depends on itself all the same
    return torch.where(one * other > 0, (one + other - both) / (one * other).sqrt(), float(down == right == 0))
