"""A convolutional equilibrium on one or several resolutions: one layer with tied weights, applied infinitely often."""

import math
from functools import partial
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.algebra.contraction import contract
from growshrink.algebra.solvers import SOLVER, Solver
from growshrink.errors import EquilibriumError
from growshrink.layers.equilibrium import BOUND, equilibrium

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.


@register_notrace_module
class ConvEquilibrium(nn.Module):
    r"""Maps z of several resolutions, finest first, with :math:`z_l = relu(A_l * mix_l(z) + u_l)` for given u.

    mix adds to a map its finer neighbour (averaged) and its coarser one (repeated, at norm 1), and is scaled to norm 1.
    Each A is a padded 3x3 convolution of C `channels`, scaled to a norm of at most 0.9: a contraction by construction,
    unlike the cell of Multiscale Deep Equilibrium Models (Bai et al., arXiv:2006.08656).

    With `levels` L the weight is `(T, L, C, C, 3, 3)`, T the steps after `gs.unroll`, else 1. `steps` are explicit
    evaluations, which export; None solves. `factory` are `device` and `dtype`.
    """

    __constants__ = ["bounded"]  # False after gs.unroll: TorchScript then sees nothing of `kernels`

    def __init__(
        self, channels: int, levels: int = 1, *, steps: int | None = None, solver: Solver = SOLVER, **factory: Any
    ) -> None:
        super().__init__()
        if steps is not None and steps < 1:
            raise EquilibriumError(f"{steps=}: must be a whole number above 0, or None to solve.")
        self.channels, self.steps, self.bounded, self.solver = channels, steps or 0, True, solver
        self.name = f"a ConvEquilibrium of {channels} channels"  # its dotted name once `name_equilibria` has run
        self.mixing = 1.0 + 2.0 * math.cos(math.pi / (levels + 1))  # norm of the matrix of ones on three diagonals
        self.weight = nn.Parameter(torch.empty(1, levels, channels, channels, 3, 3, **factory))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Redraw the weight as He et al. do; the bound scales it down."""
        nn.init.normal_(self.weight, std=math.sqrt(2 / (9 * self.channels)))

    def forward(self, u: list[Tensor]) -> list[Tensor]:
        """L maps `(N, C, H_l, W_l)`, finest first -> as many of the same shapes."""
        sizes = [[t.shape[2], t.shape[3]] for t in u]
        packed = torch.cat([t.flatten(1) for t in u], 1)
        if self.steps == 0 and not torch.jit.is_scripting():
            return self._solve(packed, sizes)
        kernels = self.kernels(packed) if self.bounded else self.weight
        z = F.relu(packed)
        for step in range(self.steps if self.steps > 0 else 30):  # TorchScript solves nothing
            z = self.step(z, packed, kernels[min(step, kernels.shape[0] - 1)], sizes)
        return self.unpack(z, sizes)

    def step(self, z: Tensor, u: Tensor, kernel: Tensor, sizes: list[list[int]]) -> Tensor:
        """One evaluation on packed maps `(N, D)`, with weights `(L, C, C, k, k)`."""
        maps = self.unpack(z, sizes)
        out: list[Tensor] = []
        for level in range(len(sizes)):
            mixed = maps[level]
            if level > 0:
                mixed = mixed + F.interpolate(maps[level - 1], sizes[level], mode="area")
            if level + 1 < len(sizes):
                below = maps[level + 1]
                repeats = math.ceil(mixed.shape[2] / below.shape[2]) * math.ceil(mixed.shape[3] / below.shape[3])
                mixed = mixed + F.interpolate(below, sizes[level]) / math.sqrt(repeats)
            out.append(F.conv2d(mixed / self.mixing, kernel[level], padding=1).flatten(1))
        return F.relu(torch.cat(out, 1) + u)

    def unpack(self, z: Tensor, sizes: list[list[int]]) -> list[Tensor]:
        """`(N, D)` -> maps `(N, C, H, W)` of these sizes."""
        parts = z.split([self.channels * size[0] * size[1] for size in sizes], 1)
        return [part.view(z.shape[0], self.channels, size[0], size[1]) for part, size in zip(parts, sizes)]  # noqa: B905

    @torch.jit.ignore
    def kernels(self, like: Tensor) -> Tensor:
        """The weight in the dtype of `like`, each A scaled to its bound."""
        flat = contract(self.weight.flatten(0, 2), BOUND, self.weight.shape[:2].numel())
        return flat.view_as(self.weight).to(like)

    @torch.jit.unused
    def _solve(self, packed: Tensor, sizes: list[list[int]]) -> list[Tensor]:
        u = packed.to(torch.promote_types(packed.dtype, torch.float32))
        step = partial(self.step, sizes=sizes)
        z = equilibrium(step, F.relu(u), u, self.kernels(u)[0], solver=self.solver, name=self.name)
        return self.unpack(z.to(packed.dtype), sizes)
