"""Kernels as grids of taps: zeros between them, and the channels they join."""

import torch
from torch import Tensor

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

NO_PADDING: Padding = ((0, 0), (0, 0))


def pair(value: object) -> Pair:
    """`(vertical, horizontal)` of one number for both, or of two."""
    if isinstance(value, int):
        return (value, value)
    assert isinstance(value, (tuple, list))
    return (value[0], value[1])


def grid_steps(dilation: Pair, grid: Pair) -> Pair:
    """Steps of `grid` between two taps `dilation` apart (1 where there is but one tap, whatever its dilation)."""
    return pair([max(1, d // g) for d, g in zip(dilation, grid, strict=True)])


def spread(kernel_OIHW: Tensor, factors: Pair) -> Tensor:
    """Zeros between the taps (or the pixels of an image): `k` taps become `factor * (k - 1) + 1`."""
    if factors == (1, 1):
        return kernel_OIHW
    out_ch, in_ch, kh, kw = kernel_OIHW.shape
    wide = kernel_OIHW.new_zeros(out_ch, in_ch, factors[0] * (kh - 1) + 1, factors[1] * (kw - 1) + 1)
    wide[:, :, :: factors[0], :: factors[1]] = kernel_OIHW
    return wide


def merge_groups(kernel_OIHW: Tensor, groups: int, merged: int) -> Tensor:
    """A kernel of `groups * merged` groups written with `groups`: zeros fill the blocks off the diagonal."""
    out_ch, in_ch, kh, kw = kernel_OIHW.shape
    blocks = kernel_OIHW.reshape(groups, merged, out_ch // (groups * merged), in_ch, kh, kw)
    eye = torch.eye(merged, dtype=kernel_OIHW.dtype, device=kernel_OIHW.device)
    return torch.einsum("gaoihw,ab->gaobihw", blocks, eye).reshape(out_ch, merged * in_ch, kh, kw)


def transpose_in_groups(kernel_OMHW: Tensor, groups: int) -> Tensor:
    """`(O, M / groups, h, w) -> (M, O / groups, h, w)`: what conv_transpose2d calls a weight."""
    out_ch, mid, kh, kw = kernel_OMHW.shape
    blocks = kernel_OMHW.reshape(groups, out_ch // groups, mid, kh, kw)
    return blocks.transpose(1, 2).reshape(groups * mid, out_ch // groups, kh, kw)


def adjoint(kernel_OMHW: Tensor, groups: int) -> Tensor:
    """The kernel of a transposed convolution as that of a convolution, and back: channels exchanged, taps reversed."""
    return transpose_in_groups(kernel_OMHW, groups).flip(2, 3)
