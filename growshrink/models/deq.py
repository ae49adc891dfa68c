"""Nets of layers at equilibrium, one a stage: `reducenet20_deq`, and `mdeq_tiny` with two resolutions in each.

A stage is one convolution, batch norm, and a `ConvEquilibrium` of what they give: with two kernels a stage, the
parameters of a ReduceNet with two blocks a stage. `steps=K` makes nets of K explicit steps, tied; `gs.unroll` makes
them of a trained net. Source: Bai et al. (arXiv:1909.01377, arXiv:2006.08656); a contraction by construction is ours.
"""

from typing import Any

import torch
from timm.layers import register_notrace_module
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.algebra.solvers import SOLVER, Solver
from growshrink.layers.equilibrium import ConvEquilibrium, name_equilibria
from growshrink.models.staged import StagedNet, check_options, cifar_cfg, conv_norm_act, register_variants

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.


@register_notrace_module  # the number of its maps is not to be traced
class EquilibriumBlock(nn.Module):
    """Conv and BN for each of `levels` resolutions, each half of the one before -> equilibrium -> all at the coarsest.

    The `out_channels` are divided among the levels, which come side by side. `options` are those of `ConvEquilibrium`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, levels: int, **options: Any) -> None:
        super().__init__()
        channels = max(1, out_channels // levels)
        factory = {key: options[key] for key in ("device", "dtype")}
        self.inject = nn.ModuleList(
            conv_norm_act(channels if level else in_channels, channels, 2 if level else stride, True, **factory)
            for level in range(levels)
        )
        self.equilibrium = ConvEquilibrium(channels, levels, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        injected: list[Tensor] = []
        for inject in self.inject:
            injected.append(inject(F.relu(injected[-1]) if len(injected) > 0 else x))
        size = [injected[-1].shape[2], injected[-1].shape[3]]
        return torch.cat([F.interpolate(z, size, mode="area") for z in self.equilibrium(injected)], 1)


class EquilibriumNet(StagedNet):
    """Stem, one `EquilibriumBlock` a stage, pooled linear classifier. Arguments as of `ReduceNet`, and three more.

    `levels` are the resolutions of each stage, `steps` the explicit steps of each equilibrium (None solves), `solver`
    says how they are solved. `depths` are 1 in all stages.
    """

    def __init__(
        self,
        depths: tuple[int, ...] = (1, 1, 1),
        channels: tuple[int, ...] = (16, 32, 64),
        strides: tuple[int, ...] = (1, 2, 2),
        levels: int = 1,
        *,
        width: float = 1.0,
        steps: int | None = None,
        solver: Solver = SOLVER,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **head: Any,
    ) -> None:
        check_options(width, 0)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [max(1, round(c * width / levels)) * levels for c in channels]
        stem = conv_norm_act(in_chans, widths[0] // levels, 1, **factory)
        ins = (widths[0] // levels, *widths)
        shapes = zip(ins, widths, strides, strict=False)
        stages = [[EquilibriumBlock(*shape, levels, steps=steps, solver=solver, **factory)] for shape in shapes]
        reductions = [stride * 2 ** (levels - 1) for stride in strides]
        super().__init__(stem, stages, widths, (1, *reductions), in_chans=in_chans, **factory, **head)
        name_equilibria(self)


_VARIANTS: dict[str, dict[str, Any]] = {
    "reducenet20_deq": {"depths": (1, 1, 1)},
    "mdeq_tiny": {"depths": (1, 1, 1), "channels": (32, 48, 64), "strides": (1, 1, 1), "levels": 2},
}
_CFG = cifar_cfg(origin_url="https://arxiv.org/abs/2006.08656")
_TINY = {**_CFG, "pool_size": (4, 4)}
default_cfgs = generate_default_cfgs({"reducenet20_deq.untrained": _CFG, "mdeq_tiny.untrained": _TINY})


def _describe(name: str) -> str:
    return f"A net with {_VARIANTS[name].get('levels', 1)} resolution(s) of a stage at equilibrium, for small images."


register_variants(__name__, EquilibriumNet, _VARIANTS, _describe)
