"""Equilibria z = f(z, inputs): gradients, the activation whose channels are at equilibrium, tied convolutions."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from growshrink.algebra.contraction import contract
from growshrink.algebra.convmap import ConvMap
from growshrink.algebra.solvers import SOLVER, Solver
from growshrink.errors import AlgebraError, EquilibriumError
from growshrink.layers.activations import VanishingReLU
from growshrink.layers.bottleneck import prefix
from growshrink.layers.online import no_autocast

#: Operator norm of a recurrence at most, so that its equilibrium exists, is unique and is found.
BOUND = 0.9
#: Operator norm that the recurrence of a branch starts with.
START = 0.5


def equilibrium(
    func: Callable[..., Tensor], start: Tensor, *inputs: Tensor, solver: Solver = SOLVER, name: str = "equilibrium"
) -> Tensor:
    r"""The z with z = func(z, \*inputs), differentiable in what `func` reads; memory does not grow with the steps.

    With J the derivative of `func` in z, :math:`g = (I - J^T)^{-1} \, \partial L / \partial z` is solved for as z was,
    and goes through one more evaluation of `func` (Bai et al., arXiv:1909.01377, theorem 1). Several backward passes
    through one graph are right, also under checkpoints, autocast (which is left) and DDP. Not differentiable twice.

    Args:
        func: `(z, *inputs) -> z`, sample by sample: no batch norm. It may read parameters.
        start: `(N, ...)`, not differentiated.
        inputs: Other tensors that `func` depends on: kept where a checkpoint sees them.
        solver: Method, tolerance, and kind of gradient.
        name: For warnings and errors.

    >>> a = torch.tensor([[0.25]], requires_grad=True)
    >>> equilibrium(lambda z, a: a * z + 3, torch.zeros(1, 1), a).backward()
    >>> a.grad.round(decimals=2)  # z = 3 / (1 - a), its derivative 3 / (1 - a)**2
    tensor([[5.3300]])
    """
    with no_autocast(start.device.type):
        value = solver.solve(lambda z: func(z, *inputs), start.detach(), name).value
        out = func(value, *inputs)
    if solver.gradient == "one_step" or not out.requires_grad:
        return out
    return _Adjoint.apply(out, value, func, solver, name, *inputs)


class _Adjoint(torch.autograd.Function):
    """The identity of `out`, whose gradient is solved for."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, value: Tensor, func: Callable[..., Tensor], solver: Solver, name: str, *inputs: Tensor
    ) -> Tensor:
        ctx.func, ctx.solver, ctx.name = func, solver, name
        ctx.save_for_backward(value, *inputs)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        value, *inputs = (tensor.detach() for tensor in ctx.saved_tensors)
        with torch.enable_grad(), no_autocast(value.device.type):
            out = ctx.func(value.requires_grad_(), *inputs)

        def step(g: Tensor) -> Tensor:
            return torch.autograd.grad(out, value, g, retain_graph=True)[0] + grads[0]

        found = ctx.solver.solve(step, grads[0], f"{ctx.name} (gradient)")
        return (found.value, *[None] * (4 + len(inputs)))


@register_notrace_module
class ImplicitReLU(VanishingReLU):
    r"""A vanishing ReLU with a recurrence over channels: h solves :math:`h = f_\lambda(A h + x)`.

    A is block-diagonal over `groups`, and scaled to a norm of at most 0.9. At `lam = 0`, with a `kernel_size` of 1, the
    layer is the 1x1 convolution :math:`(I - A)^{-1}`, which runs instead of the solver. More taps do not merge. Given
    fewer channels than it has, it solves the system of the leading block of A: narrow nets are prefixes of wide ones.

    >>> gs.layers.ImplicitReLU(4)(torch.randn(1, 4, 8, 8)).shape
    torch.Size([1, 4, 8, 8])
    """

    def __init__(self, channels: int, groups: int = 1, kernel_size: int = 1, solver: Solver = SOLVER) -> None:
        super().__init__()
        self.solver = solver
        self.name = f"an ImplicitReLU of {channels} channels"  # its dotted name once `name_equilibria` has run
        self.recurrence = nn.Conv2d(channels, channels, kernel_size, padding="same", groups=groups, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Redraw the recurrence, with an operator norm of 0.5, and make the activation a ReLU."""
        super().reset_parameters()
        weight = nn.init.normal_(self.recurrence.weight)
        weight.copy_(contract(weight * START, START, self.recurrence.groups))

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W) -> (N, C, H, W)`, with as many channels as there are or fewer; in float32 at least."""
        with no_autocast(x.device.type):
            u = x.to(torch.promote_types(x.dtype, torch.float32))
            kernel = self.kernel(x.shape[1], u.dtype)
            if self.recurrence.kernel_size == (1, 1) and not self.lam.is_meta and float(self.lam) == 0.0:
                return self._convolve(u, self._resolvent(kernel)).to(x.dtype)
            return equilibrium(self.step, u, u, kernel, solver=self.solver, name=self.name).to(x.dtype)

    def step(self, h: Tensor, u: Tensor, kernel: Tensor) -> Tensor:
        """One evaluation, f(A h + u)."""
        return super().forward(self._convolve(h, kernel) + u)

    def kernel(self, channels: int, dtype: torch.dtype) -> Tensor:
        """A on the first `channels`, scaled: `(channels, channels // groups, kh, kw)`."""
        groups = self.recurrence.groups
        block = prefix(self.recurrence.weight, channels, groups)[:, : channels // groups]
        return contract(block.to(dtype), BOUND, groups)

    def linear_map(self, channels: int, dtype: torch.dtype) -> ConvMap:
        """See `VanishingReLU.linear_map`; AlgebraError for a recurrence of more than one tap."""
        height, width = self.recurrence.kernel_size
        if (height, width) != (1, 1):
            raise AlgebraError(
                f"its recurrence is {height}x{width} and padded, so its equilibrium depends on where the image ends: "
                "no convolution, but one matrix for each size of image (growshrink.collapse finds it)."
            )
        kernel = self._resolvent(self.kernel(channels, dtype))
        return ConvMap(kernel, kernel.new_zeros(channels), groups=self.recurrence.groups, biased=False)

    def _convolve(self, h: Tensor, kernel: Tensor) -> Tensor:
        return nn.functional.conv2d(h, kernel, padding="same", groups=self.recurrence.groups)

    @staticmethod
    @torch.no_grad()
    def mean_norm(model: nn.Module) -> float | None:
        """Norm of A, the mean over the layers of a net and their groups; None where it has none of one tap."""
        layers = [m for m in model.modules() if isinstance(m, ImplicitReLU) and m.recurrence.kernel_size == (1, 1)]
        kernels = [(m.recurrence.groups, m.kernel(m.recurrence.out_channels, torch.float64)) for m in layers]
        norms = [torch.linalg.matrix_norm(k.unflatten(0, (groups, -1))[..., 0, 0], 2) for groups, k in kernels]
        return float(torch.cat(norms).mean()) if norms else None

    def _resolvent(self, kernel: Tensor) -> Tensor:
        blocks = kernel.flatten(1).unflatten(0, (self.recurrence.groups, -1))
        return torch.linalg.inv(torch.eye(blocks.shape[1]).to(kernel) - blocks).flatten(0, 1)[:, :, None, None]


def name_equilibria(model: nn.Module) -> None:
    """Tell every layer that solves an equilibrium its dotted name, for its warnings."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "solver", None), Solver):
            module.name = name


@register_notrace_module
class ConvEquilibrium(nn.Module):
    r"""Maps z of several resolutions, finest first, with :math:`z_l = relu(A_l * mix_l(z) + u_l)` for given u.

    mix adds to a map its finer neighbour (averaged) and its coarser one (repeated, at norm 1), and is scaled to norm 1.
    Each A is a padded 3x3 convolution of C `channels`, scaled to a norm of at most 0.9: a contraction by construction,
    unlike the cell of Multiscale Deep Equilibrium Models (Bai et al., arXiv:2006.08656).

    With `levels` L the weight is `(T, L, C, C, 3, 3)`, T the steps after `gs.unroll`, else 1. `steps` are explicit
    evaluations, which export; None solves. `factory` are `device` and `dtype`.

    >>> layer = gs.layers.ConvEquilibrium(4, levels=2)
    >>> [z.shape[2:] for z in layer([torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4)])]
    [torch.Size([8, 8]), torch.Size([4, 4])]
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
