"""What a branch is.

A new kind of branch is one subclass of `Branch` and nothing else: naming it in the class statement
(`class Mine(Branch, kind="mine")`) makes it known to `grow`, to the plans, to coverage and to the tests.
"""

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from growshrink.algebra.convmap import ConvMap, compose
from growshrink.algebra.taps import Pair
from growshrink.branches.geometry import freeze_, leave_one_trained_, scaled_identity
from growshrink.layers.branch import Branch
from growshrink.layers.mapping import convmap_of


class Chain(Branch, kind=""):
    """Base of the linear branches that are modules in a row, none of which changes shape but by its own geometry.

    Args:
        conv: What the branch is for.
        ratio: As for every branch.
        crop: Pixels of the input left out on each side, `(vertical, horizontal)`, before the first module.
        parts: The modules by name, in order.
    """

    if TYPE_CHECKING:  # TorchScript cannot read the annotations of a class in this file
        path: nn.Sequential

    def __init__(self, conv: nn.Conv2d, ratio: float, /, *, crop: Pair = (0, 0), **parts: nn.Module) -> None:
        super().__init__(conv, ratio)
        self.crop = crop
        self.out_channels = conv.out_channels
        self.path = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        vertical, horizontal = self.crop
        if vertical or horizontal:
            x = x[:, :, vertical : x.shape[2] - vertical, horizontal : x.shape[3] - horizontal]
        return self.path(x)

    def make_linear_(self, scale: float, trained: str) -> None:
        parts = {name: part for name, part in self.path.named_children() if not isinstance(part, nn.BatchNorm2d)}
        if not parts:  # the identity, whose norm was all it trained
            parts["weight"] = scaled_identity(self.out_channels, 1.0)
        leave_one_trained_([part for part in parts.values() if isinstance(part, nn.Conv2d)], trained)
        parts["scale"] = scaled_identity(self.out_channels, scale)
        freeze_(parts["scale"])
        self.path = nn.Sequential(OrderedDict(parts))

    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        maps: list[ConvMap] = []
        for name, part in self.path.named_children():
            channels = maps[-1].out_channels if maps else kernel.in_channels
            maps.append(convmap_of(part, f"path.{name}", channels, kernel.kernel.dtype, kernel.kernel.device))
        total = compose(maps)
        (top, bottom), (left, right) = total.padding
        vertical, horizontal = self.crop
        return replace(total, padding=((top - vertical, bottom - vertical), (left - horizontal, right - horizontal)))
