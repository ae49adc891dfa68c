"""The affine map of a module inside a branch, and the modules that have one of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from growshrink.algebra.convmap import ConvMap
from growshrink.errors import AlgebraError
from growshrink.layers.activations import VanishingReLU
from growshrink.layers.recompute import Recomputed


class Mergeable(Recomputed):
    """Base of the modules that are one affine map once their activations are gone."""

    was_grown = True  # the net is; see growshrink.set_lambda

    if TYPE_CHECKING:  # TorchScript compiles the methods of a base class too

        def as_convmap(self, dtype: torch.dtype = torch.float64) -> ConvMap:
            """The whole module as one map; AlgebraError naming the part that is not affine."""
            ...


def convmap_of(
    module: nn.Module,
    name: str,
    channels: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> ConvMap:
    """The affine map of a module inside a branch; AlgebraError, with its `name`, if it is not affine.

    Types are compared exactly: a subclass may compute something else (one of `VanishingReLU` has a `linear_map` of its
    own, or none). `channels` and `device` are those of the input, for a module that does not know them.
    """
    with named(name):
        if isinstance(module, Mergeable):
            return module.as_convmap(dtype)
        if type(module) is nn.Conv2d:
            return ConvMap.from_conv2d(module, dtype)
        if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d):
            return ConvMap.from_bn(module, dtype)
        if isinstance(module, VanishingReLU) and "linear_map" in vars(type(module)):
            module.check_vanished()
            return module.linear_map(channels, dtype)
        if type(module) is nn.AvgPool2d:
            return ConvMap.from_avg_pool(module, channels, dtype, device)
        if type(module) is nn.Identity:
            return ConvMap.identity(channels, dtype, device)
        raise AlgebraError(f"{type(module).__name__} is not known to be affine.")


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the name of a module in front of the message of an AlgebraError that comes from it."""
    try:
        yield
    except AlgebraError as error:
        separator = "." if error.module else ": "
        raise AlgebraError(f"{name}{separator}{error}", module=name) from error
