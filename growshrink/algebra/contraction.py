"""Convolutions that are contractions: an upper bound of their operator norm, and kernels scaled to obey one."""

import math

import torch
from torch import Tensor

_FINENESS = 8  # frequencies along an axis for each tap beside the middle one
_SQUARINGS = 4  # of the Gram matrices: the Schatten norm with p = 64 stands for the largest singular value


def operator_bound(kernel: Tensor, groups: int = 1) -> Tensor:
    r"""An upper bound of the operator norm of a convolution, for each group `(groups,)`, differentiable.

    Holds for any size of image, stride and dilation, and for padding with zeros, of any amount, or circular: the norm
    of the symbol :math:`\sum_t K_t e^{i \omega t}`, as the maximum over a grid of frequencies times 1.082 an axis (no
    trigonometric polynomial of degree d rises higher than by :math:`1 / \cos(\pi d / n)` between n points: Ehlich and
    Zeller, Math. Z. 86, 1964). The norm of a matrix of C channels is bounded by a Schatten norm, at most
    :math:`C^{1/64}` too large (Gram iteration: Delattre et al., arXiv:2305.16173).

    Args:
        kernel: `(O, I // groups, kh, kw)`.
        groups: Groups of the convolution, which is block-diagonal.

    >>> bool(operator_bound(torch.full((1, 1, 3, 3), 1 / 9)) < 1.18)  # a mean over 3x3, of norm 1
    True
    """
    exact = kernel.to(torch.promote_types(kernel.dtype, torch.float32)).unflatten(0, (groups, -1))
    counts = [max(1, _FINENESS * (size // 2)) for size in kernel.shape[2:]]
    symbol_FGOI = torch.fft.rfft2(exact, s=counts).flatten(3).permute(3, 0, 1, 2)
    with torch.no_grad():
        worst_G = _largest_singular_value(symbol_FGOI).argmax(0)
    at_worst_GOI = symbol_FGOI[worst_G, torch.arange(groups, device=worst_G.device)]
    slack = math.prod(math.cos(math.pi * (size // 2) / n) for size, n in zip(kernel.shape[2:], counts, strict=True))
    return _largest_singular_value(at_worst_GOI) / slack


def contract(kernel: Tensor, bound: float, groups: int = 1) -> Tensor:
    """The kernel `(O, I // groups, kh, kw)`, each group scaled down to an operator norm of at most `bound`.

    >>> gs.algebra.contract(torch.tensor([[3.0, 0.0], [0.0, 1.5]]).view(2, 2, 1, 1), bound=1.0).view(2, 2)
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]])
    """
    factor_G = bound / operator_bound(kernel, groups).clamp_min(bound)
    return (kernel.unflatten(0, (groups, -1)) * factor_G[:, None, None, None, None]).flatten(0, 1)


def _largest_singular_value(matrix: Tensor) -> Tensor:
    """An upper bound of it for matrices `(..., O, I)`."""
    power, log = matrix @ matrix.mH, torch.zeros_like(matrix[..., 0, 0].real)
    for _ in range(_SQUARINGS):
        norm = _norm(power)
        power = power / norm[..., None, None]
        power, log = power @ power, 2 * (log + norm.log())
    return ((log + _norm(power).log()) / 2 ** (_SQUARINGS + 1)).exp()


def _norm(matrix: Tensor) -> Tensor:
    return (matrix * matrix.conj()).real.sum((-2, -1)).clamp_min(torch.finfo(matrix.dtype).tiny).sqrt()
