"""Residual blocks without their addition: the skip inside a kernel.

Source: RMNet (Meng et al., arXiv:2111.00687): *reserve* the input through a live ReLU in channels of its own, *merge*
it into the kernel behind; without an activation between, the skip is a tap of the kernel (as in RepVGG).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.algebra.convmap import ConvMap
from growshrink.algebra.dataflow import InputSize, inputs_for
from growshrink.base.copying import copy_net
from growshrink.base.seeding import generator
from growshrink.depth.chains import ACTIVATIONS, Link, chains_of
from growshrink.errors import AlgebraError, FuseError, MergeError
from growshrink.proofs._compare import EXACT_FLOAT64
from growshrink.transforms import fold
from growshrink.transforms._fuse import check_unchanged, relative_error, replace_module


@torch.no_grad()
def absorb_skips(model: nn.Module, chains: Sequence[Sequence[Link]]) -> None:
    """Put skips over single convolutions into their kernels, in a folded net, in place, wherever that is exact.

    `chains` are what became one convolution, of the last one's name. A block (any module around it) is replaced by a
    convolution and its activation if these give what the block gives.
    """
    for chain in chains:
        for name in _around(chain[-1].conv):
            convs = [module for module in model.get_submodule(name).modules() if isinstance(module, nn.Conv2d)]
            try:
                total = reduce(add, map(ConvMap.from_conv2d, convs))
                maps = [total]
                if total.in_channels == total.out_channels:
                    maps.append(total + ConvMap.identity(total.in_channels, device=total.kernel.device))
                bodies = [nn.Sequential(m.to_conv2d(dtype=convs[0].weight.dtype)) for m in maps]
            except AlgebraError:
                continue
            if _replaced(model, name, bodies, _noise(convs[0], chain)):
                break


def reserve_skips(model: nn.Module, *, input_size: InputSize | None = None) -> nn.Module:
    """RMNet: a folded copy without the additions of blocks of two convolutions and a ReLU between, exactly.

    The first convolution hands the block's input on in channels of its own, which ReLU leaves alone because they are
    not negative; the second adds them. Chains then go on from block to block, for the depth knob to merge.

    Raises:
        MergeError: No block is like that, behind a ReLU, with an identity for its skip.

    >>> block = nn.Sequential(nn.ReLU(), timm.models.resnet.BasicBlock(4, 4))
    >>> gs.depth.reserve_skips(block, input_size=(4, 8, 8))[1][0]
    Conv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    chains = [chain for chain in chains_of(model, input_size).chains if len(chain) == 2 and len(chain[0].acts) == 1]
    inputs = inputs_for(model, input_size)

    def commit(net: nn.Module) -> None:
        fold(net, inplace=True, input_size=inputs)
        if not sum(_reserved(net, chain) for chain in chains):
            raise MergeError("there is no block of two convolutions, a ReLU and an identity skip to reserve.")

    try:
        check_unchanged(model, commit, inputs)
    except FuseError as error:
        raise MergeError(f"a block reads negative numbers, which ReLU does not hand on: {error}") from error
    commit(net := copy_net(model))
    return net


@torch.no_grad()
def _reserved(net: nn.Module, chain: Sequence[Link]) -> bool:
    first, second = (net.get_submodule(link.conv) for link in chain)
    assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
    for conv in (first, second):
        same = tuple((k - 1) // 2 for k in conv.kernel_size)
        if (conv.stride, conv.dilation, conv.groups, conv.padding) != ((1, 1), (1, 1), 1, same):
            return False
    if first.in_channels != second.out_channels:
        return False
    body, x = nn.Sequential(_beside(first, 0), nn.ReLU(), _beside(second, 1)), _noise(first, chain).relu()
    return any(_replaced(net, name, [body], x) for name in _around(chain[1].conv))


def _around(conv: str) -> list[str]:
    """The modules around a convolution, the innermost first."""
    parts = conv.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]


def _noise(conv: nn.Conv2d, chain: Sequence[Link]) -> Tensor:
    size = (2, conv.in_channels, *chain[0].size)
    return torch.randn(size, dtype=torch.float64, generator=generator("skips"))


def _replaced(model: nn.Module, name: str, bodies: Sequence[nn.Sequential], x: Tensor) -> bool:
    """Replace a block by the first of the bodies, with an activation behind or without, that computes the same."""
    block = model.get_submodule(name)
    if isinstance(block, nn.Sequential):
        return False
    try:
        expected = copy_net(block).cpu().double().eval()(x.clone())
    except Exception:  # it takes something else than one map of this size
        return False
    for act in (nn.Identity(), *(module for module in block.modules() if type(module) in ACTIVATIONS)):
        for body in bodies:
            new = nn.Sequential(*body, act).train(block.training)
            if relative_error(copy_net(new).cpu().double().eval()(x.clone()), expected) <= EXACT_FLOAT64:
                replace_module(model, name, new)
                return True
    return False


def _beside(conv: nn.Conv2d, dim: int) -> nn.Conv2d:
    """The convolution with the identity on its input beside it: as more outputs (`dim` 0), or more inputs (1)."""
    own = ConvMap.from_conv2d(conv)
    channels = own.kernel.shape[1 - dim]
    identity = nn.init.dirac_(torch.empty(channels, channels, *conv.kernel_size)).to(own.kernel)
    bias = F.pad(own.bias, (0, 0 if dim else channels))
    wider = replace(own, kernel=torch.cat([own.kernel, identity], dim), bias=bias, biased=True)
    return wider.to_conv2d(dtype=conv.weight.dtype)
