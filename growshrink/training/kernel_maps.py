"""The map on a kernel's gradient that training its linear branches amounts to, read off the branches themselves.

Shape letters: G groups, O and I output and input channels of a group, T taps of the kernel, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.algebra.convmap import ConvMap
from growshrink.base.copying import copy_net
from growshrink.errors import AlgebraError, GradientError
from growshrink.layers.activations import vanishing
from growshrink.layers.branch import Branch
from growshrink.layers.grown import Grown

#: Relative error of what is claimed to be linear, or of some form, in float64.
LINEAR_TOLERANCE = 1e-10
#: The axes that are the rows and the columns of a gradient seen as a matrix for each group.
LAYOUTS = ("oi,t", "ot,i", "o,it", "it,o", "i,ot")


@dataclass(frozen=True)
class KernelMap:
    """A symmetric linear map on the gradient of a kernel `(G * O, I, kh, kw)`, or of a linear layer's `(O, I)`.

    Attributes:
        factor: Its elementwise part, in the kernel's shape.
        mixes: What is added to that, for each `(layout, G, scale_GR, matrix_GCC)`: the gradient as a matrix with its
            rows scaled, times a symmetric matrix.
        update: The factor on an update instead, for an optimizer that is invariant to scale; None where there is none.
    """

    factor: Tensor
    mixes: tuple[tuple[str, int, Tensor, Tensor], ...] = ()
    update: Tensor | None = None

    def __call__(self, grad: Tensor) -> Tensor:
        """The map of `grad`."""
        total = grad * self.factor
        for layout, groups, scale_GR, matrix_GCC in self.mixes:
            mixed_GRC = scale_GR[..., None] * _as_matrix(grad, layout, groups) @ matrix_GCC
            total = total + _from_matrix(mixed_GRC, layout, groups, grad)
        return total

    def normalized(self) -> KernelMap:
        """The map over the mean of its diagonal, which is that of its eigenvalues; likewise on an update."""
        mean = self.factor.mean()
        for _, _, scale_GR, matrix_GCC in self.mixes:
            mean = mean + (scale_GR.mean(1) * matrix_GCC.diagonal(dim1=1, dim2=2).mean(1)).mean()
        mixes = tuple((layout, groups, scale / mean, matrix) for layout, groups, scale, matrix in self.mixes)
        return KernelMap(self.factor / mean, mixes, None if self.update is None else self.update / self.update.mean())

    def beside(self, weight: Tensor) -> KernelMap:
        """The map in the dtype and memory format of `weight`, on its device."""
        mixes = tuple((layout, groups, *(t.to(weight) for t in tensors)) for layout, groups, *tensors in self.mixes)
        factor, update = (
            None if values is None else torch.empty_like(weight, requires_grad=False).copy_(values)
            for values in (self.factor, self.update)
        )
        assert factor is not None
        return KernelMap(factor, mixes, update)  # type: ignore[arg-type]


def kernel_map(name: str, module: Grown) -> KernelMap | None:
    """The sum of A A^T over a layer's kernel and its branches, in float64; None where nothing of it is trained.

    `name` is the layer's, in messages; GradientError where a branch is not linear in what it trains.
    """
    if isinstance(module, nn.ConvTranspose2d):
        raise GradientError(f"{name}: the kernel of a transposed convolution has other axes than its branches'.")
    conv = copy_net(module).cpu().double().as_conv()
    if not module.weight.requires_grad:
        if any(parameter.requires_grad for parameter in module.branches.parameters()):
            raise GradientError(f"{name}: its own kernel is frozen, a constant that would decay in the merged one.")
        return None
    own = torch.ones(module.weight.shape, dtype=torch.float64)
    total = KernelMap(own, update=own)
    for index, branch in enumerate(module.branches):
        if not branch.skipped:
            replica = cast(Branch, copy_net(branch).cpu().double().eval())
            for form in _forms(f"{name}.branches.{index}".lstrip("."), replica, conv, module.weight.shape):
                update = None if total.update is None or form.update is None else total.update + form.update
                total = KernelMap(total.factor + form.factor, total.mixes + form.mixes, update)
    return total


def _forms(name: str, branch: Branch, conv: nn.Conv2d, shape: torch.Size) -> Iterator[KernelMap]:
    """A map for each parameter that the branch trains."""
    _check_parts(name, branch)
    trained = {key: p for key, p in branch.named_parameters() if p.requires_grad}
    base = ConvMap.from_conv2d(conv)

    def kernel() -> Tensor:
        try:
            added = branch.as_convmap(base).fit(conv)
        except AlgebraError as error:
            raise GradientError(f"{name}.{error}" if error.module else f"{name}: {error}") from error
        if bool((added.bias != 0).any()) or (added.bias.requires_grad and added.biased):
            raise GradientError(f"{name}: it adds a bias, which is no part of the kernel's gradient.")
        return added.kernel.reshape(shape)

    @torch.no_grad()
    def of(values: dict[str, Tensor]) -> Tensor:
        for key, parameter in trained.items():
            parameter.data = values.get(key, torch.zeros_like(parameter))
        return kernel()

    random = torch.Generator().manual_seed(0)
    a, b = ({key: _noise(p.shape, random) for key, p in trained.items()} for _ in range(2))
    if bool((of({}) != 0).any()):
        raise GradientError(f"{name}: it adds a constant, which no decay of the kernel leaves where it is.")
    if not trained:
        return
    if not _close(of({key: a[key] - 2 * b[key] for key in trained}), of(a) - 2 * of(b)):
        raise GradientError(
            f"{name}: not linear in what it trains ({', '.join(trained)}): a trained scale, or a product of trained "
            "factors. BranchSpec(..., norm=None) has them frozen."
        )
    graph = kernel()
    for key, parameter in trained.items():

        def back(grad: Tensor, parameter: Tensor = parameter) -> Tensor:
            (value,) = torch.autograd.grad(graph, parameter, grad, retain_graph=True, materialize_grads=True)
            return value

        def forth(value: Tensor, key: str = key) -> Tensor:
            return of({key: value})

        yield _form(f"{name}.{key}", forth, back, shape, conv.groups)


def _check_parts(name: str, branch: Branch) -> None:
    for key, part in branch.named_modules():
        if isinstance(part, _BatchNorm):
            raise GradientError(f"{name}.{key}: a norm depends on the data. BranchSpec(..., norm=None) has none.")
    for key, act in vanishing(branch):
        if act.lam != 0:
            raise GradientError(f"{name}.{key}: the activation is alive (lam = {float(act.lam)!r}), so not linear.")
    if not branch.parallel:
        raise GradientError(f"{name}: a branch behind its kernel multiplies it, which is a product of trained factors.")


def _form(
    name: str, forth: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], shape: torch.Size, groups: int
) -> KernelMap:
    """A A^T in the form that takes least work, from A (`forth`) and its transpose (`back`)."""
    random = torch.Generator().manual_seed(1)
    ones, x, y = torch.ones(shape, dtype=torch.float64), _noise(shape, random), _noise(shape, random)
    factor, expected = forth(back(ones)), forth(back(x))
    if _close(factor * x, expected):
        column = back(ones)  # where each weight is one tap, that is all there is in its column of A
        sparse = _close(back(x) * back(y), column * back(x * y))
        return KernelMap(factor, update=forth(column.sign()) if sparse else None)
    for layout in sorted(LAYOUTS, key=lambda layout: _as_matrix(ones, layout, groups).shape[2]):
        mix = _mix(lambda grad: forth(back(grad)), layout, groups, ones, random)
        form = KernelMap(torch.zeros_like(ones), () if mix is None else (mix,))
        if _close(form(x), expected):
            return form
    raise GradientError(f"{name}: its map on the gradient is of no form known, a scale on some axes times a matrix.")


def _mix(
    square: Callable[[Tensor], Tensor], layout: str, groups: int, like: Tensor, random: torch.Generator
) -> tuple[str, int, Tensor, Tensor] | None:
    """The entry of `KernelMap.mixes` that `square` is in that layout, or None where it is nothing of the kind."""

    def act(grad_GRC: Tensor) -> Tensor:
        return _as_matrix(square(_from_matrix(grad_GRC, layout, groups, like)), layout, groups)

    _, rows, columns = _as_matrix(like, layout, groups).shape
    (a_GR1, b_GR1), row_G1C = _noise((2, groups, rows, 1), random), _noise((groups, 1, columns), random)
    first, second = act(a_GR1 * row_G1C), act(b_GR1 * row_G1C)
    if not _close(first / a_GR1 * b_GR1, second):
        return None
    # row r is scale[r] times a vector that all rows have in common; any entry of that will do for a unit
    at = first.abs().sum(1).argmax(-1)
    scale_GR = (first / a_GR1)[torch.arange(groups), :, at]
    matrix_GCC = like.new_zeros(groups, columns, columns)
    for start in range(0, columns, rows):  # a column in each row
        chosen = torch.arange(start, min(start + rows, columns))
        used = torch.arange(len(chosen))
        probe_GRC = like.new_zeros(groups, rows, columns)
        probe_GRC[:, used, chosen] = 1.0
        matrix_GCC[:, :, chosen] = (act(probe_GRC)[:, used] / scale_GR[:, used, None]).mT
    return layout, groups, scale_GR, matrix_GCC


def _order(layout: str) -> list[int]:
    return ["goit".index(axis) for axis in "g" + layout.replace(",", "")]


def _as_matrix(grad: Tensor, layout: str, groups: int) -> Tensor:
    """A gradient as a matrix `(G, R, C)`."""
    grad_GOIT = grad.reshape(groups, grad.shape[0] // groups, grad.shape[1], -1)
    return grad_GOIT.permute(_order(layout)).flatten(1, layout.index(",")).flatten(2)


def _from_matrix(matrix_GRC: Tensor, layout: str, groups: int, like: Tensor) -> Tensor:
    """The inverse of `_as_matrix`, in the shape of `like`."""
    order = _order(layout)
    sizes = (groups, like.shape[0] // groups, like.shape[1], like[0, 0].numel())
    return matrix_GRC.reshape([sizes[n] for n in order]).permute([order.index(n) for n in range(4)]).reshape(like.shape)


def _noise(shape: Sequence[int], random: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=random)


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= LINEAR_TOLERANCE * expected.abs().max())
