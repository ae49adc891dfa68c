"""A routed net for batches of one image: dense nets, of which those on the chosen path run."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from growshrink.base.copying import copy_net
from growshrink.errors import WidthError
from growshrink.layers.swaps import make_dense
from growshrink.layers.widths import Slots
from growshrink.supernet.chain import UnitChain


class _Part(nn.Module):
    """The units of a dense net from `start` to `stop`, the last part with the head."""

    def __init__(self, chain: UnitChain, model: nn.Module, width: Mapping[str, int], start: int, stop: int) -> None:
        super().__init__()
        self.net: Any = copy_net(model)
        Slots(self.net).set(width)
        make_dense(self.net)
        chain.keep_units(self.net, start, stop)
        self.last = stop == chain.length

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.forward_features(x)
        return self.net.forward_head(x) if self.last else x


class RoutedImage(nn.Module):
    """See `Routed.for_one_image`."""

    def __init__(
        self, chain: UnitChain, model: nn.Module, ends: Sequence[int], widths: Sequence[Sequence[Mapping[str, int]]]
    ) -> None:
        super().__init__()
        self.gates = nn.ModuleList()
        self.prefix = _Part(chain, model, widths[0][0], 0, ends[0])
        self.parts = nn.ModuleList(
            nn.ModuleList(_Part(chain, model, width, *span) for width in own)
            for own, span in zip(widths, pairwise(ends), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(1, C, H, W)` -> logits `(1, num_classes)`."""
        if x.shape[0] != 1:
            raise WidthError(f"{x.shape[0]} images: this net takes one at a time; Routed itself takes any number.")
        x = self.prefix(x)
        nets: Any
        for gate, nets in zip(self.gates, self.parts, strict=True):
            x = _pick([*nets], gate(x).argmax(), x)
        return x


def _pick(nets: Sequence[nn.Module], choice: Tensor, x: Tensor) -> Tensor:
    if len(nets) == 1:
        return nets[0](x)
    if not torch.compiler.is_exporting():
        return nets[int(choice)](x)
    return torch.cond(choice < 1, nets[0], lambda x: _pick(nets[1:], choice - 1, x), (x,))
