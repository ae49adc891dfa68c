"""Gradients of equilibria z = f(z, inputs), and the activation whose channels are at equilibrium."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from growshrink.algebra.contraction import contract
from growshrink.algebra.convmap import ConvMap
from growshrink.algebra.solvers import SOLVER, Solver
from growshrink.errors import AlgebraError
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
    adjoint: Tensor = _Adjoint.apply(out, value, func, solver, name, *inputs)
    return adjoint


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
        kernels = [
            m.kernel(m.recurrence.out_channels, torch.float64).unflatten(0, (m.recurrence.groups, -1)) for m in layers
        ]
        norms = [torch.linalg.matrix_norm(kernel[..., 0, 0], 2) for kernel in kernels]
        return float(torch.cat(norms).mean()) if norms else None

    def _resolvent(self, kernel: Tensor) -> Tensor:
        blocks = kernel.flatten(1).unflatten(0, (self.recurrence.groups, -1))
        return torch.linalg.inv(torch.eye(blocks.shape[1]).to(kernel) - blocks).flatten(0, 1)[:, :, None, None]


def name_equilibria(model: nn.Module) -> None:
    """Tell every layer that solves an equilibrium its dotted name, for its warnings."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "solver", None), Solver):
            module.name = name
