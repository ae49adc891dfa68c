"""Random small nets, from a random stream alone: whatever nn.Conv2d can be, wired in the ways that people wire it.

The stream may be `random.Random(seed)`, or what hypothesis gives in its place (and then shrinks).
"""

from __future__ import annotations

import math
from random import Random
from typing import Literal

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.algebra.dataflow import InputSize

MODES: tuple[Literal["zeros", "reflect", "replicate", "circular"], ...] = (
    "zeros",
    "zeros",
    "zeros",
    "reflect",
    "replicate",
    "circular",
)
ACTS = ("none", "module", "module_inplace", "functional", "method_inplace")
UNITS = (
    "plain",
    "plain",
    "plain",
    "residual",
    "concat",
    "squeeze",
    "pool",
    "shared",
    "twice_read",
    "nested",
    "lopsided_pad",
    "mixed_up",
)


class Unit(nn.Module):
    """conv -> norm -> activation; the last two may be missing, the activation a function or in place."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None, act: str) -> None:
        super().__init__()
        self.conv = conv
        if norm is not None:
            self.norm = norm
        self.kind = act
        if act in ("module", "module_inplace"):
            self.act = nn.ReLU(inplace=act == "module_inplace")

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W) -> (N, C', H', W')`."""
        x = self.conv(x)
        if "norm" in self._modules:
            x = self.norm(x)
        if "act" in self._modules:
            return self.act(x)
        if self.kind == "functional":
            return torch.tanh(x)
        return x.relu_() if self.kind == "method_inplace" else x


class Residual(nn.Module):
    """body(x) + x, written in one of three ways."""

    def __init__(self, body: nn.Module, way: str) -> None:
        super().__init__()
        self.body, self.way = body, way

    def forward(self, x: Tensor) -> Tensor:
        """Shape-preserving."""
        y = self.body(x)
        if self.way == "inplace":
            y += x
            return y
        return torch.add(x, y) if self.way == "function" else y + x


class Concat(nn.Module):
    """Both of two paths, side by side in the channels."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        """Channels add up."""
        return torch.cat([self.left(x), self.right(x)], dim=1)


class Squeeze(nn.Module):
    """x times a gate for each channel, computed on 1x1 maps (squeeze and excitation)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, 4, 1)
        self.up = nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shape-preserving."""
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Shared(nn.Module):
    """One module, run twice; or two modules that share a kernel."""

    def __init__(self, unit: nn.Module, twin: nn.Module | None) -> None:
        super().__init__()
        self.first = unit
        if twin is not None:
            self.second = twin

    def forward(self, x: Tensor) -> Tensor:
        """Shape-preserving."""
        return getattr(self, "second", self.first)(self.first(x))


class TwiceRead(nn.Module):
    """norm(z) + z, or a norm that overwrites what another reads: z has a second reader that no module hook shows."""

    def __init__(self, conv: nn.Module, norm: nn.Module, way: str) -> None:
        super().__init__()
        self.conv, self.norm, self.way = conv, norm, way

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution."""
        z = self.conv(x)
        if self.way == "relu_first":
            z = F.relu_(z)
            return self.norm(z)
        return self.norm(z) + z


class RandomNet(nn.Module):
    """A stem, units, a head: `(N, C, H, W) -> (N, 5)`, or the last map where there is no head.

    Attributes:
        input_size: `(C, H, W)` it is made for.
    """

    def __init__(self, random: Random) -> None:
        super().__init__()
        size = (random.choice((1, 2, 3)), random.randint(6, 12), random.randint(6, 12))
        self.input_size: InputSize = size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.getrandbits(32))
            self._build(random)

    def _build(self, random: Random) -> None:
        width = random.choice((4, 6, 8, 12))
        self.stem = nn.Conv2d(self.input_size[0], width, 3, padding=1, bias=random.random() < 0.5)
        self.units = nn.Sequential()
        shape = (width, *self.input_size[1:])
        for index in range(random.randint(1, 6)):
            unit, shape = _unit(random, shape, depth=0)
            self.units.add_module(random.choice(("", "block", "x_")) + str(index), unit)
        self.head = nn.Linear(shape[0], 5) if random.random() < 0.7 else None

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.units(self.stem(x))
        return x if self.head is None else self.head(x.mean((2, 3)))


def trainable_net(random: Random) -> RandomNet:
    """The first random net that can be trained: not all that is done in place can be differentiated."""
    while True:
        net = RandomNet(random)
        try:
            net(torch.zeros(2, *net.input_size)).sum().backward()
        except RuntimeError:
            continue
        net.zero_grad()
        return net


Shape = tuple[int, int, int]


def _unit(random: Random, shape: Shape, depth: int) -> tuple[nn.Module, Shape]:
    """A unit that takes maps of `shape`, and the shape it gives."""
    kind = random.choice(UNITS) if depth < 2 else "plain"
    same = (random, shape)
    if kind == "pool":
        pools = (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1), nn.Dropout(0.0), nn.Identity())
        return _checked(random.choice(pools if min(shape[1:]) > 2 else pools[2:]), shape)
    if kind == "squeeze":
        return Squeeze(shape[0]), shape
    if kind == "residual":
        way = random.choice(("operator", "inplace", "function"))
        # what an activation has given may not be added to in place: no net is trained that way
        acts = ("none",) if way == "inplace" else ACTS
        units = [_conv_unit(*same, keep=True) for _ in range(random.randint(0, 1))]
        return Residual(nn.Sequential(*units, _conv_unit(*same, keep=True, acts=acts)), way), shape
    if kind == "concat":
        left, right = (_conv_unit(*same, keep=True) for _ in range(2))
        return Concat(left, right), (2 * shape[0], *shape[1:])
    if kind == "shared":
        unit = _conv_unit(*same, keep=True)
        twin = None
        if random.random() < 0.5:
            assert isinstance(unit.conv, nn.Conv2d)
            other = nn.Conv2d(shape[0], shape[0], unit.conv.kernel_size, padding="same", groups=unit.conv.groups)  # type: ignore[arg-type]
            other.weight = unit.conv.weight
            twin = Unit(other, _norm(random, shape[0]), "none")
        return Shared(unit, twin), shape
    if kind == "twice_read":
        conv = _conv(random, shape, shape[0], keep=True)
        return TwiceRead(conv, _norm(random, shape[0]), random.choice(("sum", "relu_first"))), shape
    if kind == "nested":
        inner, between = _unit(random, shape, depth + 1)
        outer, after = _unit(random, between, depth + 1)
        return nn.Sequential(nn.Sequential(inner), outer), after
    if kind == "lopsided_pad":
        zeros = nn.ZeroPad2d((random.randint(0, 2), random.randint(0, 2), random.randint(0, 1), random.randint(0, 2)))
        padded, after = _plain(random, _checked(zeros, shape)[1])
        return nn.Sequential(zeros, padded), after
    if kind == "mixed_up":  # a norm before the convolution, and one far behind it
        order = [_norm(random, shape[0]), _conv(random, shape, shape[0], keep=True), nn.ReLU(), _norm(random, shape[0])]
        random.shuffle(order)
        return nn.Sequential(*order), shape
    return _plain(random, shape)


def _plain(random: Random, shape: Shape) -> tuple[nn.Module, Shape]:
    for _ in range(8):  # strides and large kernels may leave nothing of a small map
        unit = _conv_unit(random, shape)
        try:
            return _checked(unit, shape)
        except RuntimeError:
            continue
    return _conv_unit(random, shape, keep=True), shape


def _checked(module: nn.Module, shape: Shape) -> tuple[nn.Module, Shape]:
    """The module, and the shape it gives; RuntimeError if it does not run on `shape`, or leaves nothing of it."""
    with torch.no_grad():
        out = module.eval()(torch.zeros(2, *shape))
    if min(out.shape[2:]) < 1 or max(out.shape[2:]) > 24:
        raise RuntimeError("no map of a size to go on with")
    return module.train(), (out.shape[1], out.shape[2], out.shape[3])


def _conv_unit(random: Random, shape: Shape, *, keep: bool = False, acts: tuple[str, ...] = ACTS) -> Unit:
    out_channels = shape[0] if keep else random.choice((4, 6, 8, 12))
    conv = _conv(random, shape, out_channels, keep=keep)
    norm = _norm(random, out_channels, acts) if random.random() < 0.75 else None
    return Unit(conv, norm, random.choice(acts))


def _conv(random: Random, shape: Shape, out_channels: int, *, keep: bool) -> nn.Conv2d:
    """A convolution of any geometry; with `keep` one that keeps the size of the map, whatever its kernel."""
    in_channels, bias = shape[0], random.random() < 0.4
    divisors = [g for g in range(1, in_channels + 1) if math.gcd(in_channels, out_channels) % g == 0]
    groups = random.choice((1, 1, random.choice(divisors), divisors[-1]))
    height = random.choice((1, 2, 3, 3, 3, 4, 5, 5, 6, 7))
    kernel = (height, height) if random.random() < 0.8 else (height, random.choice((1, 2, 3, 4, 5)))
    dilation = (random.choice((1, 1, 1, 2)), random.choice((1, 1, 1, 2)))
    mode = random.choice(MODES)
    if keep:
        if mode in ("reflect", "circular") and any(
            d * k > n for d, k, n in zip(dilation, kernel, shape[1:], strict=True)
        ):
            mode = "zeros"  # more padding than there are pixels to take it from
        return nn.Conv2d(in_channels, out_channels, kernel, 1, "same", dilation, groups, bias, mode)
    stride = (random.choice((1, 1, 2, 3)),) * 2 if random.random() < 0.8 else (1, 2)
    if random.random() < 0.15:
        return Conv2dSame(in_channels, out_channels, kernel, stride, 0, dilation, groups, bias)
    half = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
    padding: str | tuple[int, int] = random.choice(
        (half, half, "valid", (0, 0), (random.randint(0, kernel[0]), random.randint(0, kernel[1])))
    )
    if random.random() < 0.15 and stride == (1, 1):
        padding = "same"
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias, mode)


def _norm(random: Random, channels: int, acts: tuple[str, ...] = ACTS) -> nn.Module:
    kind = random.random()
    if kind < 0.06:
        return nn.GroupNorm(2, channels)
    if kind < 0.10:
        return nn.BatchNorm2d(channels, track_running_stats=False)
    if kind < 0.18:
        return BatchNormAct2d(
            channels, apply_act=len(acts) > 1 and random.random() < 0.7, inplace=random.random() < 0.5
        )
    return nn.BatchNorm2d(
        channels,
        eps=random.choice((1e-5, 1e-3, 0.1)),
        momentum=random.choice((0.1, 0.1, 0.5, None)),
        affine=random.random() < 0.85,
    )
