"""The map on a kernel's gradient that training its linear branches amounts to, read off the branches themselves.

Shape letters: G groups, O and I output and input channels of a group, T taps of the kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.algebra.convmap import ConvMap
from growshrink.errors import AlgebraError, GradientError
from growshrink.layers.activations import vanishing
from growshrink.layers.branch import Branch
from growshrink.layers.grown import Grown

TOLERANCE = 1e-10  # of what is claimed to be linear, or of some form, in float64
#: What the rows and columns of a gradient are, as a matrix for each group.
LAYOUTS = ("oi,t", "ot,i", "o,it")

Operator = Callable[[Tensor], Tensor]
Mix = tuple[str, int, Tensor, Tensor]


@dataclass(frozen=True)
class KernelMap:
    """A symmetric linear map on the gradient of a kernel `(G * O, I, kh, kw)`, or of a linear layer's `(O, I)`.

    Attributes:
        factor: Its elementwise part, in the kernel's shape.
        mixes: Products `left @ gradient @ right` for each group, added to that: the layout (a key of `LAYOUTS`), G,
            and both matrices `(G, n, n)`, or `(G, n, 1)` where one is diagonal.
        update: The factor on an update instead, for an optimizer that is invariant to scale; None where there is none.
    """

    factor: Tensor
    mixes: tuple[Mix, ...] = ()
    update: Tensor | None = None

    def __call__(self, grad: Tensor) -> Tensor:
        """The map of `grad`."""
        total = grad * self.factor
        for layout, groups, left, right in self.mixes:
            rows_GXY = _as_rows(grad, layout, groups)
            total = total + _from_rows(_times(_times(rows_GXY, left).mT, right).mT, layout, groups, grad)
        return total

    def normalized(self) -> KernelMap:
        """The map over the mean of its diagonal (the mean of its eigenvalues), likewise on an update."""
        mean = self.factor.mean()
        for _, _, left, right in self.mixes:
            mean = mean + (_diagonal(left).mean(1) * _diagonal(right).mean(1)).mean()
        mixes = tuple((layout, groups, left / mean, right) for layout, groups, left, right in self.mixes)
        return KernelMap(self.factor / mean, mixes, None if self.update is None else self.update / self.update.mean())

    def beside(self, weight: Tensor) -> KernelMap:
        """The map in the dtype and memory format of `weight`, on its device."""
        mixes = tuple((layout, groups, left.to(weight), right.to(weight)) for layout, groups, left, right in self.mixes)
        like = torch.empty_like(weight, requires_grad=False)
        update = None if self.update is None else torch.empty_like(like).copy_(self.update)
        return KernelMap(like.copy_(self.factor), mixes, update)


def kernel_map(name: str, module: Grown) -> KernelMap | None:
    """The sum of A A^T over the layer's kernel and its branches, in float64; None where nothing of it is trained.

    Args:
        name: Of the layer, in messages.
        module: Not changed.

    Raises:
        GradientError: A branch is not linear in what it trains.
    """
    conv = copy.deepcopy(module).cpu().double().as_conv()
    if not module.weight.requires_grad:
        if any(parameter.requires_grad for parameter in module.branches.parameters()):
            raise GradientError(f"{name}: its own kernel is frozen, a constant that would decay in the merged one.")
        return None
    own = torch.ones(module.weight.shape, dtype=torch.float64)
    total = KernelMap(own, update=own)
    for index, branch in enumerate(module.branches):
        if not branch.skipped:
            replica = cast(Branch, copy.deepcopy(branch).cpu().double().eval())
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

    generator = torch.Generator().manual_seed(0)
    a, b = (
        {key: torch.randn(p.shape, dtype=torch.float64, generator=generator) for key, p in trained.items()}
        for _ in range(2)
    )
    if bool((of({}) != 0).any()):
        raise GradientError(f"{name}: it adds a constant, which no decay of the kernel leaves where it is.")
    if not trained:
        return
    both = of({key: a[key] - 2 * b[key] for key in trained})
    if not _close(both, of(a) - 2 * of(b)):
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


def _form(name: str, forth: Operator, back: Operator, shape: torch.Size, groups: int) -> KernelMap:
    """A A^T in the form that takes least work, from A (`forth`) and its transpose (`back`).

    Elementwise, or else a product of one matrix on the rows and one on the columns of the gradient in some layout.
    """

    def square(grad: Tensor) -> Tensor:
        return forth(back(grad))

    generator = torch.Generator().manual_seed(1)
    ones, x, y = (
        torch.ones(shape, dtype=torch.float64),
        *torch.randn(2, *shape, dtype=torch.float64, generator=generator),
    )
    factor, expected = square(ones), square(x)
    if _close(factor * x, expected):
        column = back(ones)  # each weight is one tap, so it is all there is in its column of A
        sparse = _close(back(x) * back(y), column * back(x * y))
        return KernelMap(factor, update=forth(column.sign()) if sparse else None)
    products = (_Product.find(square, layout, groups, ones, generator) for layout in LAYOUTS)
    for product in sorted((p for p in products if p is not None), key=lambda p: p.length):
        form = KernelMap(torch.zeros_like(ones), (product.mix(),))
        if _close(form(x), expected):
            return form
    raise GradientError(f"{name}: its map on the gradient is of no form known, a product over channels and taps.")


@dataclass(frozen=True)
class _Product:
    """An operator that is a diagonal matrix on one side of the gradient, in some layout, and a dense one on the other.

    Attributes:
        layout: Key of `LAYOUTS`.
        on_rows: The dense matrix is on the rows.
        act: The operator on `(G, n, length)`, whose last axis is the dense side's.
        diagonal_GN: Up to a factor.
        length: Of the dense side.
    """

    layout: str
    on_rows: bool
    act: Operator
    diagonal_GN: Tensor
    length: int

    @staticmethod
    def find(square: Operator, layout: str, groups: int, like: Tensor, generator: torch.Generator) -> _Product | None:
        """What `square` is in that layout, or None where it is nothing of the kind."""

        def rows_first(grad_GXY: Tensor) -> Tensor:
            return _as_rows(square(_from_rows(grad_GXY, layout, groups, like)), layout, groups)

        def columns_first(grad_GYX: Tensor) -> Tensor:
            return rows_first(grad_GYX.mT).mT

        _, height, width = _as_rows(like, layout, groups).shape
        for act, count, length in ((rows_first, height, width), (columns_first, width, height)):
            if layout == "oi,t" and length != width:
                continue  # dense over both kinds of channels: never worth its memory
            draw = torch.randn(3, groups, count + length, dtype=like.dtype, generator=generator)
            (a, b), v_G1Y = draw[:2, :, :count, None], draw[2, :, None, count:]
            first, second = act(a * v_G1Y), act(b * v_G1Y)
            if _close(first / a * b, second):  # then row n of both is diagonal[n] times the same vector
                at = first.abs().sum(1).argmax(-1)
                diagonal_GN = (first / a)[torch.arange(groups), :, at]
                return _Product(layout, act is columns_first, act, diagonal_GN, length)
        return None

    def mix(self) -> Mix:
        """The matrices."""
        groups, count = self.diagonal_GN.shape
        dense = self.diagonal_GN.new_zeros(groups, self.length, self.length)
        for start in range(0, self.length, count):  # a column to each row
            columns = torch.arange(start, min(start + count, self.length))
            rows = torch.arange(len(columns))
            probe = dense.new_zeros(groups, count, self.length)
            probe[:, rows, columns] = 1.0
            dense[:, :, columns] = (self.act(probe)[:, rows] / self.diagonal_GN[:, rows, None]).mT
        sides = (dense, self.diagonal_GN[..., None])
        return (self.layout, groups, *(sides if self.on_rows else sides[::-1]))


def _as_rows(grad: Tensor, layout: str, groups: int) -> Tensor:
    """A gradient as a matrix for each group."""
    grad_GOIT = grad.reshape(groups, grad.shape[0] // groups, grad.shape[1], -1)
    if layout == "ot,i":
        return grad_GOIT.mT.flatten(1, 2)
    return grad_GOIT.flatten(1, 2) if layout == "oi,t" else grad_GOIT.flatten(2)


def _from_rows(rows_GXY: Tensor, layout: str, groups: int, like: Tensor) -> Tensor:
    """The inverse of `_as_rows`, in the shape of `like`."""
    if layout == "ot,i":
        rows_GXY = rows_GXY.unflatten(1, (like.shape[0] // groups, -1)).mT
    return rows_GXY.reshape(like.shape)


def _times(rows_GXY: Tensor, side: Tensor) -> Tensor:
    """A side's matrix, or diagonal, on the rows."""
    return side * rows_GXY if side.shape[-1] == 1 else side @ rows_GXY


def _diagonal(side: Tensor) -> Tensor:
    return side[..., 0] if side.shape[-1] == 1 else side.diagonal(dim1=1, dim2=2)


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())
