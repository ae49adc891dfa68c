"""Fixed points z = f(z), solved for every sample of a batch independently."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from growshrink.errors import EquilibriumError

#: Evaluations on the meta device, where no residual can be read: what a contraction of 0.5 takes to 1e-4.
COUNTED_STEPS = 8
ITERATES = 5  # iterates that are mixed


@dataclass(frozen=True)
class Solution:
    """f at the best iterate of each sample, and the largest relative change by f after each evaluation (residual)."""

    value: Tensor
    residuals: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How fixed points are solved; a contraction converges either way, a sample's answer does not depend on its batch.

    Attributes:
        method: "plain" for z <- f(z), or "anderson", which mixes the last 5 iterates (Walker and Ni, SIAM J.
            Numer. Anal. 49, 2011, eq. 1.2); a sample that this leads astray continues from its best iterate.
        tol: Relative residual at which a sample stops, and is frozen; 1e-13 in float64, which is for proofs.
        max_steps: Evaluations at most; in float64 10 times as many.
        gradient: "implicit" solves for the gradient of an equilibrium, "one_step" takes that of one evaluation there,
            cheaper and biased (Fung et al., arXiv:2103.12803).

    >>> Solver(tol=1e-6).solve(torch.cos, torch.zeros(1, 1)).value
    tensor([[0.7391]])
    """

    method: Literal["anderson", "plain"] = "anderson"
    tol: float = 1e-4
    max_steps: int = 50
    gradient: Literal["implicit", "one_step"] = "implicit"

    @torch.no_grad()
    def solve(self, func: Callable[[Tensor], Tensor], start: Tensor, name: str = "equilibrium") -> Solution:
        """Solve z = func(z) from `(N, ...)`; warns with `name` if the tolerance is missed, EquilibriumError for NaN."""
        if start.is_meta:
            for _ in range(COUNTED_STEPS):
                start = func(start)
            return Solution(start, ())
        exact = start.dtype == torch.float64
        tol, max_steps = (1e-13, 10 * self.max_steps) if exact else (self.tol, self.max_steps)
        z = best = start
        shape = -1, *[1] * (start.dim() - 1)
        least_N = relative_N = start.new_full(start.shape[:1], torch.inf)
        recent: list[tuple[Tensor, Tensor]] = []  # f(z) and f(z) - z, (N, D)
        residuals: list[float] = []
        for step in range(1, max_steps + 1):
            out = func(z)
            out_ND, gap_ND = out.flatten(1), (out - z).flatten(1)
            gap_N, size_N = gap_ND.norm(dim=1), out_ND.norm(dim=1).clamp_min(torch.finfo(out.dtype).tiny)
            if not bool(gap_N.isfinite().all()):
                raise EquilibriumError(f"{name}: evaluation {step} is not finite; a contraction of finite inputs is.")
            better_N = (gap_N < least_N) & (relative_N > tol)  # a plain step of a contraction is always better
            best = torch.where(better_N.view(shape), out, best)
            least_N = torch.where(better_N, gap_N, least_N)
            relative_N = torch.where(better_N, gap_N / size_N, relative_N)
            residuals.append(float(relative_N.max()))
            if residuals[-1] <= tol:
                break
            z = out
            if self.method == "anderson":
                recent = [*recent[1 - ITERATES :], (out_ND, gap_ND)]
                z = torch.where(better_N.view(shape), _mixed(recent).view_as(out), best)
            z = torch.where((relative_N <= tol).view(shape), best, z)
        else:
            missed = f"residual {residuals[-1]:.1e} after {max_steps} evaluations, tol={tol:.0e}"
            warnings.warn(f"{name}: the equilibrium was not found ({missed}).", stacklevel=2)
        return Solution(best, tuple(residuals))


SOLVER = Solver()  # by default


def _mixed(recent: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The affine combination of `f(z)` with the smallest gap; gaps are scaled to 1 before the ridge is added."""
    outs_NmD, gaps_NmD = (torch.stack(parts, 1) for parts in zip(*recent, strict=True))
    info = torch.finfo(outs_NmD.dtype)
    size_Nm = gaps_NmD.norm(dim=2).clamp_min(info.tiny)
    unit_NmD = gaps_NmD / size_Nm[:, :, None]
    gram_Nmm = unit_NmD @ unit_NmD.mT + info.eps**0.75 * torch.eye(len(recent)).to(outs_NmD)
    scale_Nm = size_Nm.amin(1, keepdim=True) / size_Nm  # only the ratios count
    weight_Nm = torch.linalg.solve(gram_Nmm, scale_Nm) * scale_Nm
    return torch.einsum("nm,nmd->nd", weight_Nm / weight_Nm.sum(1, keepdim=True), outs_NmD)
