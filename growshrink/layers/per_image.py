"""A convolution with a kernel for each image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def convolve(conv: nn.Conv2d, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """`(N, I, H, W) -> (N, O, H', W')` in the geometry of `conv`, with kernels and biases of one's own.

    Images are groups of one convolution (timm's CondConv2d does so). ONNX fixes the number of groups, so there the same
    is a matrix product on the unfolded images, for any batch size.

    Args:
        conv: Its parameters are not used.
        x: Images.
        kernel: `(O, I // groups, kh, kw)` for all images, or `(N, O, I // groups, kh, kw)`.
        bias: None, `(O,)` or `(N, O)`.
    """
    if kernel.dim() == 4 and (bias is None or bias.dim() == 1):
        return conv._conv_forward(x, kernel, bias)
    images, rows = len(x), kernel.shape[-4]
    kernel = kernel.expand(images, *kernel.shape[-4:])
    padding = conv.padding
    if conv.padding_mode != "zeros" or (isinstance(padding, str) and torch.compiler.is_exporting()):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode), (0, 0)
    if torch.compiler.is_exporting():
        height, width = (
            (size + 2 * int(p) - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(x.shape[2:], padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
        )
        columns = F.unfold(x, conv.kernel_size, conv.dilation, padding, conv.stride)  # type: ignore[arg-type]
        columns = columns.unflatten(1, (conv.groups, -1))
        out = kernel.flatten(2).unflatten(1, (conv.groups, -1)) @ columns
        y = out.flatten(1, 2).unflatten(2, (height, width))
        return y if bias is None else y + bias.expand(images, rows)[:, :, None, None]
    bias = None if bias is None else bias.expand(images, rows).flatten()
    y = F.conv2d(
        x.reshape(1, -1, *x.shape[2:]),
        kernel.flatten(0, 1),
        bias,
        conv.stride,
        padding,  # type: ignore[arg-type]
        conv.dilation,
        images * conv.groups,
    )
    return y.reshape(images, rows, *y.shape[2:])
