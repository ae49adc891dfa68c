"""The operator algebra: an affine convolution as a value.

A `ConvMap` is what a stack of convolutions, batch norms in eval mode, identities and average pools computes. Every
operation gives the exact operator, the values at the borders included, or raises `AlgebraError` with the reason.

Shape letters: N batch, O output channels, I input channels, M middle channels, H and W height and width.
Background: Ding et al., Diverse Branch Block (arXiv:2103.13425), section 3; the border conditions are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.algebra.taps import (
    NO_PADDING,
    Padding,
    Pair,
    grid_steps,
    merge_groups,
    pair,
    spread,
    transpose_in_groups,
)
from growshrink.errors import AlgebraError

#: MACs of a convolution in the time that an operation on single elements, and its gradient, takes for one on a CPU.
MACS_PER_ELEMENT = 24


@dataclass(frozen=True, eq=False)
class ConvMap:
    """`x (N, I, H, W) -> (N, O, H', W')`: pad, cross-correlate, add a bias.

    Attributes:
        kernel: `(O, I // groups, kh, kw)`.
        bias: `(O,)`.
        stride: `(vertical, horizontal)`.
        padding: `((top, bottom), (left, right))`, in pixels; below 0 they are left out.
        dilation: `(vertical, horizontal)`.
        groups: Number of groups; channels are grouped in contiguous blocks as in `nn.Conv2d`.
        padding_mode: What the padded pixels hold: `zeros`, `reflect`, `replicate` or `circular`.
        biased: False promises that the bias is zero, and saves the work and the looking.

    >>> conv, norm = gs.algebra.ConvMap.from_conv2d(nn.Conv2d(3, 4, 3)), gs.algebra.ConvMap.from_bn(nn.BatchNorm2d(4))
    >>> conv.then(norm).to_conv2d()
    Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """

    kernel: Tensor
    bias: Tensor
    stride: Pair = (1, 1)
    padding: Padding = NO_PADDING
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    biased: bool = True

    # ---- where maps come from

    @staticmethod
    def from_conv2d(conv: nn.Conv2d, dtype: torch.dtype = torch.float64) -> ConvMap:
        """The map of a plain convolution; `padding='same'` becomes the (perhaps lopsided) padding it stands for."""
        # One tap has no dilation, whatever the module says.
        dilation = pair([d if k > 1 else 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)])
        if isinstance(conv.padding, str):
            totals = [d * (k - 1) * (conv.padding == "same") for d, k in zip(dilation, conv.kernel_size, strict=True)]
            padding = tuple((t // 2, t - t // 2) for t in totals)
        else:
            padding = tuple((p, p) for p in conv.padding)
        kernel_OIHW = conv.weight.to(dtype)
        biased = conv.bias is not None
        bias_O = kernel_OIHW.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.to(dtype)
        mode = conv.padding_mode if padding != NO_PADDING else "zeros"
        return ConvMap(kernel_OIHW, bias_O, pair(conv.stride), padding, dilation, conv.groups, mode, biased)  # type: ignore[arg-type]

    @staticmethod
    def from_bn(bn: Any, dtype: torch.dtype = torch.float64) -> ConvMap:
        """The per-channel affine map of a norm of batch statistics in eval mode (running statistics, its own eps)."""
        if bn.running_mean is None or bn.running_var is None:
            raise AlgebraError("a batch norm without running statistics normalises by the batch: no fixed affine map.")
        scale_O = (bn.running_var.to(dtype) + bn.eps).rsqrt()
        if bn.weight is not None:
            scale_O = scale_O * bn.weight.to(dtype)
        shift_O = torch.zeros_like(scale_O) if bn.bias is None else bn.bias.to(dtype)
        bias_O = torch.addcmul(shift_O, bn.running_mean.to(dtype), scale_O, value=-1)
        return ConvMap(scale_O.reshape(-1, 1, 1, 1), bias_O, groups=bias_O.numel())

    @staticmethod
    def identity(channels: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> ConvMap:
        """`x -> x` on `channels` channels, a depthwise 1x1."""
        ones = torch.ones(channels, 1, 1, 1, dtype=dtype, device=device)
        return ConvMap(ones, ones.new_zeros(channels), groups=channels, biased=False)

    @staticmethod
    def from_avg_pool(
        pool: nn.AvgPool2d, channels: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None
    ) -> ConvMap:
        """An average pool as a depthwise kernel of equal weights.

        Refused with `ceil_mode` (windows may hang over the edge) and, where it pads and no `divisor_override` is
        given, with `count_include_pad=False` (the divisor then depends on the position).
        """
        kernel_size, padding = pair(pool.kernel_size), pair(pool.padding)
        if pool.ceil_mode:
            raise AlgebraError("an average pool with ceil_mode=True lets windows hang over the edge: no convolution.")
        if padding != (0, 0) and not pool.count_include_pad and pool.divisor_override is None:
            raise AlgebraError("a padded average pool with count_include_pad=False: its divisor depends on position.")
        divisor = pool.divisor_override or kernel_size[0] * kernel_size[1]
        kernel = torch.full((channels, 1, *kernel_size), 1.0 / divisor, dtype=dtype, device=device)
        sides = ((padding[0], padding[0]), (padding[1], padding[1]))
        return ConvMap(kernel, kernel.new_zeros(channels), pair(pool.stride), sides, groups=channels, biased=False)

    # ---- what a map is

    @property
    def out_channels(self) -> int:
        """O."""
        return self.kernel.shape[0]

    @property
    def in_channels(self) -> int:
        """I."""
        return self.kernel.shape[1] * self.groups

    @property
    def extent(self) -> Pair:
        """Pixels the dilated kernel spans, `(vertical, horizontal)`."""
        kh, kw = self.kernel.shape[2:]
        return self.dilation[0] * (kh - 1) + 1, self.dilation[1] * (kw - 1) + 1

    def __call__(self, x: Tensor) -> Tensor:
        """`(N, I, H, W) -> (N, O, H', W')`."""
        (top, bottom), (left, right) = self.padding
        pads, kernel = (left, right, top, bottom), self.kernel.to(x.dtype)
        late = self._is_pointwise and self.stride == (1, 1) and not self.biased and self.padding_mode == "zeros"
        if any(pads) and not late:
            x = F.pad(x, pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        if self._is_pointwise and self._is_depthwise:
            y = x[:, :, :: self.stride[0], :: self.stride[1]] * kernel.view(-1, 1, 1)
        elif self.groups > 1 or x[:, 0].numel() > 2 * self.in_channels:
            y = F.conv2d(x, kernel, None, self.stride, 0, self.dilation, self.groups)
        else:  # on few pixels a product of unfolded images is faster
            windows = x.permute(0, 2, 3, 1).unfold(1, self.extent[0], self.stride[0])
            windows = windows.unfold(2, self.extent[1], self.stride[1])[..., :: self.dilation[0], :: self.dilation[1]]
            columns = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
            y = (columns @ kernel.permute(2, 3, 1, 0).flatten(0, 2)).permute(0, 3, 1, 2)
        y = y + self.bias.to(x.dtype)[:, None, None] if self.biased else y
        return F.pad(y, pads) if late and any(pads) else y

    # ---- algebra

    def then(self, second: ConvMap) -> ConvMap:
        """The map `x -> second(self(x))`.

        With `second` unpadded this is always one convolution. With `second` padded it is one only if `self`,
        evaluated past the edge of its own output, gives what `second` pads with there. For zero padding, `self` must
        have no bias and see nothing but zeros there, on every side that is padded (say, it is one pixel wide, or padded
        by all but one pixel of its extent). The other modes are taken behind a pointwise map only.

        Kernel: the full convolution of the two kernels, the second one spread by the first one's stride.
        """
        if second.in_channels != self.out_channels:
            raise AlgebraError(f"cannot compose: {self.out_channels} channels come out, {second.in_channels} go in.")
        padding_mode = self._mode_before(second)
        groups = math.gcd(self.groups, second.groups)
        first = self
        # Along an axis tap u of the first and tap v of the second meet at offset d1 * u + s1 * d2 * v.
        apart = (first.stride[0] * second.dilation[0], first.stride[1] * second.dilation[1])
        sizes = zip(first.kernel.shape[2:], second.kernel.shape[2:], first.dilation, apart, strict=True)
        dilation = pair([d2 if k1 == 1 else d1 if k2 == 1 else math.gcd(d1, d2) for k1, k2, d1, d2 in sizes])
        if first._is_pointwise or second._is_pointwise:
            kernel_OIHW = _product(first, second, groups)
        else:
            first, second = first.regroup(groups), second.regroup(groups)
            kernel_OIHW = F.conv_transpose2d(
                spread(first.kernel, grid_steps(first.dilation, dilation)).transpose(0, 1),
                transpose_in_groups(second.kernel, groups),
                groups=groups,
                dilation=grid_steps(apart, dilation),
            ).transpose(0, 1)
        bias_O = second._of_constant(first.bias) if first.biased else second.bias
        padding = tuple(
            (a1 + s1 * a2, b1 + s1 * b2)
            for (a1, b1), (a2, b2), s1 in zip(first.padding, second.padding, first.stride, strict=True)
        )
        stride = (first.stride[0] * second.stride[0], first.stride[1] * second.stride[1])
        biased = first.biased or second.biased
        return ConvMap(kernel_OIHW, bias_O, stride, padding, dilation, groups, padding_mode, biased)  # type: ignore[arg-type]

    def __add__(self, other: ConvMap) -> ConvMap:
        """The map `x -> self(x) + other(x)`; both must give outputs of one shape for every input size."""
        if (self.in_channels, self.out_channels) != (other.in_channels, other.out_channels):
            raise AlgebraError(
                f"cannot add: {self.in_channels} -> {self.out_channels} channels and "
                f"{other.in_channels} -> {other.out_channels}."
            )
        if self.stride != other.stride:
            raise AlgebraError(f"cannot add: strides {self.stride} and {other.stride} differ.")
        modes = {m.padding_mode for m in (self, other) if max(map(max, m.padding)) > 0} or {"zeros"}
        if len(modes) > 1:
            raise AlgebraError(f"cannot add: padding modes {sorted(modes)} differ.")
        if self._shrinkage != other._shrinkage:
            raise AlgebraError(
                "cannot add: the outputs differ in size "
                f"(kernel extent less padding is {self._shrinkage} and {other._shrinkage})."
            )
        groups = math.gcd(self.groups, other.groups)
        a, b = self.regroup(groups), other.regroup(groups)
        vertical, horizontal = (pair([*map(max, p, q)]) for p, q in zip(a.padding, b.padding, strict=True))
        padding, dilation = (vertical, horizontal), pair([a._common_dilation(b, axis) for axis in (0, 1)])
        a, b = a._widen(padding, dilation), b._widen(padding, dilation)
        # where one has no bias there is none to add, in training not even zeros
        bias_O = a.bias + b.bias if a.biased and b.biased else b.bias if b.biased else a.bias
        biased, mode = a.biased or b.biased, modes.pop()
        return replace(a, kernel=a.kernel + b.kernel, bias=bias_O, padding_mode=mode, biased=biased)

    def scale(self, factor_O: Tensor) -> ConvMap:
        """The map `x -> factor * self(x)`, `factor` a scalar or `(O,)`."""
        factor_O = factor_O.to(self.kernel).expand(self.out_channels)
        return replace(self, kernel=self.kernel * factor_O.reshape(-1, 1, 1, 1), bias=self.bias * factor_O)

    def regroup(self, groups: int) -> ConvMap:
        """The same map written with fewer groups (zeros fill the blocks off the diagonal); `1` is dense."""
        if self.groups % groups:
            raise AlgebraError(f"{self.groups} groups cannot be written as {groups}: it does not divide them.")
        merged = self.groups // groups
        if merged == 1:
            return self
        return replace(self, kernel=merge_groups(self.kernel, groups, merged), groups=groups)

    # ---- where maps go

    def fit(self, conv: nn.Conv2d) -> ConvMap:
        """The same map with the kernel size, padding, dilation and groups of `conv`; AlgebraError if there is none."""
        target = ConvMap.from_conv2d(conv, self.kernel.dtype)
        if target.groups != math.gcd(self.groups, target.groups):
            raise AlgebraError(f"a map of {self.groups} group(s) does not fit a convolution of {target.groups}.")
        zero = replace(target, kernel=self.kernel.new_zeros(target.kernel.shape), biased=False)
        fitted = self + zero
        for field in ("padding", "dilation"):
            own, wanted = getattr(fitted, field), getattr(target, field)
            if own != wanted:
                raise AlgebraError(f"{field} {own} does not fit a convolution of {wanted}.")
        if fitted.kernel.shape != target.kernel.shape:
            raise AlgebraError(f"a kernel of {tuple(fitted.kernel.shape)} does not fit {tuple(target.kernel.shape)}.")
        return fitted

    def to_conv2d(self, *, bias: bool = True, dtype: torch.dtype | None = None) -> nn.Conv2d:
        """An `nn.Conv2d` that computes this map; refuses lopsided padding and, with `bias=False`, a non-zero bias."""
        (top, bottom), (left, right) = self.padding
        if top != bottom or left != right:
            raise AlgebraError(f"nn.Conv2d pads both sides alike, this map needs {self.padding}.")
        if not bias and bool((self.bias != 0).any()):
            raise AlgebraError("this map has a bias; a convolution with bias=False cannot hold it.")
        options = {key: getattr(self, key) for key in ("stride", "dilation", "groups", "padding_mode")}
        options |= {"padding": (top, left), "device": self.kernel.device, "dtype": dtype or self.kernel.dtype}
        size = self.in_channels, self.out_channels, tuple(self.kernel.shape[2:])
        # The usual initialisation would draw from the process's random stream.
        conv = nn.utils.skip_init(nn.Conv2d, *size, bias=bias, **options)
        assert isinstance(conv, nn.Conv2d)
        with torch.no_grad():
            conv.weight.copy_(self.kernel)
            if conv.bias is not None:
                conv.bias.copy_(self.bias)
        return conv

    # ---- details

    @property
    def _is_pointwise(self) -> bool:
        return self.kernel.shape[2:] == (1, 1)

    @property
    def _is_depthwise(self) -> bool:
        return self.groups == self.in_channels == self.out_channels

    def _of_constant(self, value_I: Tensor) -> Tensor:
        """The output `(O,)` for an image that holds `value_I` everywhere."""
        sums_OI = self.kernel.flatten(1) if self._is_pointwise else self.kernel.sum((2, 3))
        if self._is_depthwise:
            return torch.addcmul(self.bias, sums_OI.flatten(), value_I)
        if self.groups == 1:
            return torch.addmv(self.bias, sums_OI, value_I)
        return self.bias + (sums_OI.unflatten(0, (self.groups, -1)) @ value_I.view(self.groups, -1, 1)).flatten()

    @property
    def _shrinkage(self) -> Pair:
        return pair([e - a - b for e, (a, b) in zip(self.extent, self.padding, strict=True)])

    def _mode_before(self, second: ConvMap) -> str:
        """The padding mode of `self.then(second)`, or AlgebraError where the borders would be wrong."""
        if second.padding == NO_PADDING:
            return self.padding_mode
        if second.padding_mode != "zeros":
            if self.extent != (1, 1) or self.stride != (1, 1) or self.padding != NO_PADDING:
                raise AlgebraError(f"only a pointwise map composes with {second.padding_mode} padding after it.")
            return second.padding_mode
        if self.padding != NO_PADDING and self.padding_mode != "zeros":
            raise AlgebraError(f"{self.padding_mode} padding followed by zero padding is not one padding.")
        for axis, name in enumerate(("vertical", "horizontal")):
            (before, after), (own_before, own_after) = second.padding[axis], self.padding[axis]
            if not before and not after:
                continue
            extent = self.extent[axis]
            # The last window before the first output ends on pixel extent - 1 - own_before - stride of the input; how
            # far the first window behind the last output starts past the input depends on the input's size.
            sees_before = before and extent - 1 >= own_before + self.stride[axis]
            sees_after = after and extent - 1 > own_after
            if sees_before or sees_after:
                raise AlgebraError(
                    f"the second map pads ({name}) what the first, {extent} pixels wide, would fill with other values "
                    "at the border: put all padding into the first."
                )
            if self.biased and bool((self.bias != 0).any()):
                raise AlgebraError(
                    "the second map pads with zeros where the first would give its bias: wrong at the border. Pad in "
                    "the first map, or leave its bias out."
                )
        return "zeros"

    def _common_dilation(self, other: ConvMap, axis: int) -> int:
        """The coarsest grid along `axis` that holds the taps of both kernels once they are aligned."""
        steps = (m.dilation[axis] for m in (self, other) if m.kernel.shape[2 + axis] > 1)
        return math.gcd(abs(self.padding[axis][0] - other.padding[axis][0]), *steps) or 1

    def _widen(self, padding: Padding, dilation: Pair) -> ConvMap:
        """The same map with more padding, zero taps making up for it, on a finer grid of taps."""
        axes = zip(padding, self.padding, dilation, strict=True)
        margins = [((p[0] - q[0]) // d, (p[1] - q[1]) // d) for p, q, d in axes]
        (top, bottom), (left, right) = margins
        kernel = spread(self.kernel, grid_steps(self.dilation, dilation))
        if margins != [(0, 0), (0, 0)]:  # channels last, as products are
            kernel = F.pad(kernel.permute(0, 2, 3, 1), (0, 0, left, right, top, bottom)).permute(0, 3, 1, 2)
        return replace(self, kernel=kernel, padding=padding, dilation=dilation)


def compose(maps: Sequence[ConvMap]) -> ConvMap:
    """The map that applies `maps` one after another, multiplied out in an order that takes little work.

    >>> gs.algebra.compose([gs.algebra.ConvMap.from_conv2d(nn.Conv2d(4, 4, 3)) for _ in range(2)]).kernel.shape
    torch.Size([4, 4, 5, 5])
    """
    left = list(maps)
    while len(left) > 1:
        # O * M * I * taps of a product without groups; a norm goes into the smaller of its neighbours
        work = [a.kernel.numel() * b.kernel.numel() // a.out_channels for a, b in zip(left, left[1:], strict=False)]
        at = work.index(min(work))
        left[at : at + 2] = [left[at].then(left[at + 1])]
    return left[0]


def cheaper_apart(maps: Sequence[ConvMap], pixels: float, elements: int) -> bool:
    """Whether `maps` take less time one after another, on `pixels` pixels, than as part of a kernel of `elements`."""
    apart = fan_in = 0.0
    product = float(MACS_PER_ELEMENT * elements)
    for each in maps:
        if each._is_pointwise and each._is_depthwise:
            apart += MACS_PER_ELEMENT * pixels * each.out_channels
        else:
            pixels /= math.prod(each.stride)
            apart += pixels * each.kernel.numel()
            product += fan_in * each.kernel.numel()
            fan_in = (fan_in or each.kernel.shape[1]) * math.prod(each.kernel.shape[2:])
    return apart < product


def _product(first: ConvMap, second: ConvMap, groups: int) -> Tensor:
    """The kernel of `second` after `first` where one of the two is pointwise: products of matrices, tap by tap."""
    if second._is_depthwise and second._is_pointwise:
        return second.kernel * first.kernel
    if second._is_depthwise:
        return (second.kernel.permute(0, 2, 3, 1) * first.kernel.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if first._is_depthwise:
        scales_GMHW = first.kernel.reshape(second.groups, 1, -1, *first.kernel.shape[2:])
        return (second.kernel.unflatten(0, (second.groups, -1)) * scales_GMHW).flatten(0, 1)
    first, second = first.regroup(groups), second.regroup(groups)
    # channels last: where the weights are so too, this is one product without copies
    if groups == 1 and first._is_pointwise:
        return (second.kernel.permute(0, 2, 3, 1) @ first.kernel.flatten(1)).permute(0, 3, 1, 2)
    first_GMHWI = first.kernel.permute(0, 2, 3, 1).unflatten(0, (groups, -1))
    second_GOHWM = second.kernel.permute(0, 2, 3, 1).unflatten(0, (groups, -1))
    if first._is_pointwise:
        kernel_GOHWI = (second_GOHWM.flatten(1, 3) @ first_GMHWI.flatten(1, 3)).unflatten(1, second_GOHWM.shape[1:4])
    else:
        kernel_GOHWI = (second_GOHWM.flatten(1, 3) @ first_GMHWI.flatten(2)).unflatten(2, first_GMHWI.shape[2:])
    return kernel_GOHWI.flatten(0, 1).permute(0, 3, 1, 2)
