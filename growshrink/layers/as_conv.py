"""Layers as the convolutions of images that they are: what branches are built for, and merged into."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from growshrink.algebra.convmap import ConvMap
from growshrink.algebra.taps import adjoint

#: Layers with one kernel and one bias, which a convolution of images is or can be.
WeightLayer = nn.modules.conv._ConvNd | nn.Linear


class TokenConv2d(nn.Conv2d):
    """A linear layer as the 1x1 convolution it is on the image of its tokens."""


def as_conv(layer: nn.Module) -> nn.Conv2d:
    """The layer as a convolution of images; it shares its parameters where no tap has to move.

    A linear layer is a 1x1 on the image of its tokens, an `nn.Conv1d` a 1xk on an image of one row, and an
    `nn.ConvTranspose2d` has stride 1 on the input with zeros between its pixels and around them (see
    `GrownConvTranspose2d`). A batch norm in eval mode is a depthwise 1x1. Mode and trainability are the layer's.
    """
    if isinstance(layer, nn.Conv2d):
        return layer
    if isinstance(layer, nn.BatchNorm2d):
        affine = ConvMap.from_bn(layer).to_conv2d(dtype=layer.weight.dtype)
        return affine.train(layer.training).requires_grad_(layer.weight.requires_grad)
    assert isinstance(layer, (nn.Linear, nn.Conv1d, nn.ConvTranspose2d))
    kernel = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        kernel = kernel[:, :, None, None]
        conv: nn.Conv2d = TokenConv2d(layer.in_features, layer.out_features, 1, device="meta")
    else:
        options: dict[str, Any] = {"kernel_size": layer.kernel_size, "dilation": layer.dilation}
        if isinstance(layer, nn.Conv1d):
            options = {key: (1, *getattr(layer, key)) for key in ("kernel_size", "stride", "dilation")}
            options["padding"] = layer.padding if isinstance(layer.padding, str) else (0, *layer.padding)
            options["padding_mode"] = layer.padding_mode
        kernel = kernel[:, :, None] if isinstance(layer, nn.Conv1d) else adjoint(kernel, layer.groups)
        conv = nn.Conv2d(layer.in_channels, layer.out_channels, groups=layer.groups, device="meta", **options)
    conv.weight = nn.Parameter(kernel, requires_grad=layer.weight.requires_grad)
    conv.bias = layer.bias
    return conv.train(layer.training)


@torch.no_grad()
def write_kernel_(layer: nn.Module, kernel_OIHW: Tensor) -> None:
    """Give a layer the kernel of a convolution shaped like `as_conv(layer)`, in its own layout and dtype."""
    assert isinstance(layer, WeightLayer)
    layer.weight.copy_(own_layout(layer, kernel_OIHW))


def own_layout(layer: nn.Module, kernel_OIHW: Tensor) -> Tensor:
    """The kernel of a convolution shaped like `as_conv(layer)` as the layer's weight has it."""
    if isinstance(layer, nn.ConvTranspose2d):
        kernel_OIHW = adjoint(kernel_OIHW, layer.groups)
    return kernel_OIHW.reshape(cast(Tensor, layer.weight).shape)
