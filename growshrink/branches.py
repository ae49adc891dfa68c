"""The branches: what grow attaches to a convolution.

A new kind of branch is one subclass of `Branch` and nothing else: naming it in the class statement
(`class Mine(Branch, kind="mine")`) makes it a preset of `grow`, of the plans, of coverage and of the tests.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from growshrink.activations import VanishingReLU
from growshrink.algebra import ConvMap
from growshrink.errors import GrowError, near
from growshrink.grown import GrownConv2d, PureBottleneck, convmap_of


class Branch(nn.Module, ABC):
    """Something trainable beside or behind a convolution, linear once its activations have vanished.

    A subclass takes `(conv, ratio)`, ends in a batch norm called `norm`, and implements `forward` and `as_convmap`.
    """

    kinds: ClassVar[dict[str, type[Branch]]] = {}
    kind: ClassVar[str]
    #: The branch reads the input of its convolution. The kernel's gradient is then what the merged kernel's would be,
    #: so an optimizer may keep the kernel's state when the branch is fused.
    parallel: ClassVar[bool] = True

    if TYPE_CHECKING:  # TorchScript cannot read the annotations of a class in this file
        norm: nn.BatchNorm2d

    def __init_subclass__(cls, kind: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        assert kind not in Branch.kinds, f"branch kind {kind!r} is taken by {Branch.kinds[kind]}"
        cls.kind = kind
        Branch.kinds[kind] = cls

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__()
        self.skipped = False  # width 0: the convolution runs without this branch; see growshrink.set_width

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What the branch adds to its convolution's output.

        Args:
            x: Input of the convolution, `(N, I, H, W)`.
            y: Its output so far, earlier branches included, `(N, O, H', W')`.

        Returns:
            `(N, O, H', W')`.
        """

    @abstractmethod
    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        """What the branch adds, as an affine map of x; `kernel` is the map of the convolution so far (x to y)."""

    def silence_(self) -> None:
        """Make the branch add exactly 0, in train and eval mode, while every weight but this one can learn."""
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)


class Bottleneck(Branch, kind="bottleneck"):
    """In parallel: kxk -> BN -> vanishing ReLU -> 1x1 -> BN, middle width `ratio` times the output channels.

    The block of ReduceNet beside a kernel. The kxk repeats the convolution's geometry, the 1x1 its groups, so the two
    merge into a kernel of the same shape, exactly, borders included.
    """

    if TYPE_CHECKING:
        body: PureBottleneck

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio)
        self.body = PureBottleneck(
            conv.in_channels,
            middle_width(conv.out_channels, conv.groups, ratio),
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            padding_mode=conv.padding_mode,
        )
        self.norm = nn.BatchNorm2d(conv.out_channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Branch.forward`."""
        return self.norm(self.body(x))

    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        """See `Branch.as_convmap`."""
        return convmap_of(self.body, "body").then(convmap_of(self.norm, "norm"))


class Nest(Bottleneck, kind="nest"):
    """A bottleneck whose kxk is itself a grown convolution with a bottleneck branch.

    The inner branch starts loud (gamma 1): the outermost gamma is the one factor that makes the whole silent.
    """

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio)
        inner = self.body.conv
        GrownConv2d.from_conv(inner, [Bottleneck(inner, ratio)])


class Insert(Branch, kind="insert"):
    """In series, behind the output y: y + BN(1x1(vanishing ReLU(y))).

    A new layer for a kernel that is already trained: growing *into* a fused net. When linear it multiplies into the
    kernel, whose meaning thereby changes (its optimizer state starts afresh). It has no middle width.
    """

    parallel = False

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__(conv, ratio)
        self.act = VanishingReLU()
        self.pointwise = nn.Conv2d(conv.out_channels, conv.out_channels, 1, groups=conv.groups, bias=False)
        nn.init.kaiming_normal_(self.pointwise.weight, mode="fan_out", nonlinearity="relu")
        self.norm = nn.BatchNorm2d(conv.out_channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Branch.forward`."""
        return self.norm(self.pointwise(self.act(y)))

    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        """See `Branch.as_convmap`."""
        total = kernel
        for name in ("act", "pointwise", "norm"):
            total = total.then(convmap_of(getattr(self, name), name, total.out_channels))
        return total


@dataclass(frozen=True, kw_only=True)
class BranchSpec:
    """Which branch, and how wide.

    Attributes:
        kind: A key of `Branch.kinds`: "bottleneck", "insert", "nest", or one of your own.
        ratio: Middle width over output channels; None takes the `ratio` given to `grow`.
    """

    kind: str
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in Branch.kinds:
            raise GrowError(f"branch={self.kind!r}: no such branch{near(self.kind, Branch.kinds)}")
        if self.ratio is not None:
            check_ratio(self.ratio)

    def build(self, conv: nn.Conv2d, *, ratio: float, init: str, generator_seed: int) -> Branch:
        """A branch for `conv` on its device, in its dtype, memory format, mode and trainability.

        The weights depend on `generator_seed` alone; no random stream of the process is touched.
        """
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(generator_seed)
            branch = Branch.kinds[self.kind](conv, self.ratio or ratio)
        if init == "silent":
            branch.silence_()
        branch.to(device=conv.weight.device, dtype=conv.weight.dtype)
        if conv.weight.is_contiguous(memory_format=torch.channels_last) and not conv.weight.is_contiguous():
            branch.to(memory_format=torch.channels_last)
        branch.train(conv.training).requires_grad_(conv.weight.requires_grad)
        return branch


def middle_width(out_channels: int, groups: int, ratio: float) -> int:
    """`ratio` times the output channels, to the nearest multiple of the groups, at least one per group."""
    return max(1, round(ratio * out_channels / groups)) * groups


def check_ratio(ratio: float) -> None:
    """GrowError unless `ratio` is a finite number above 0."""
    if not (math.isfinite(ratio) and ratio > 0):
        raise GrowError(f"{ratio=}: the middle width over the output channels must be a number above 0.")
