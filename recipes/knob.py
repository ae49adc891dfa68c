"""The depth knob: which activations of a net go, so that the merged net meets a latency on this machine.

Latency and loss are measured per segment of neighbouring blocks and taken to add up; dynamic programming over blocks
finds the best cut for a latency. Source: Kim et al., Efficient Latency-Aware CNN Depth Compression (arXiv:2301.12187),
who train per segment; here the activations are silenced in the trained net and the batch norms recalibrated.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.copying import copy_net
from growshrink.base.progress import progress_bar
from growshrink.depth.segments import (
    Cut,
    Segment,
    all_segments,
    check_cut,
    cut_at,
    merge_links,
    stages_of,
    vanish_cut,
)
from growshrink.errors import PlanError
from growshrink.layers.activations import set_lambda
from growshrink.models.reducenet import ReduceNet
from growshrink.models.staged import Block, block_conv, front_padding
from growshrink.training.calibrate import calibrate_bn
from growshrink.transforms._fuse import replace_module
from latency import Latencies, measure_cuts
from trained import reinitialise

#: Latencies closer than this share of the net's are taken for equal while searching.
RESOLUTION = 1 / 2000


@dataclass(frozen=True)
class DepthPlan:
    """One way to cut a net: predicted latency when merged, and predicted rise of the loss before any training."""

    cut: Cut
    ms: float
    harm: float

    def __str__(self) -> str:
        """What becomes one convolution."""
        return " ".join(str(segment) for segment in self.cut if segment.length > 1) or "nothing merged"


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan, and the measured latency of its merged net.

    `share` is that latency over the net's own, measured in the same turns; `error` is relative, of the predicted share.
    """

    plan: DepthPlan
    ms: float
    share: float
    error: float


def segment_harms(
    model: nn.Module,
    batches: Sequence[Tensor],
    loss: Callable[[nn.Module], float],
    *,
    longest: int = 4,
    progress: bool = False,
) -> dict[Segment, float]:
    """Measure how much the loss of a trained plain net rises when a segment gives up its activations; never < 0.

    `batches` are training images `(N, C, H, W)`, on which batch norms are recalibrated; `loss` is taken on images that
    the net was not trained on; a segment has at most `longest` blocks.
    """
    own = loss(model)
    harms = {}
    for segment in progress_bar(all_segments(model, longest), "harms", show=progress):
        harms[segment] = 0.0
        if segment.length > 1:
            silenced = vanish_cut(model, cut_at(model, segment))
            set_lambda(silenced, 0.0)
            calibrate_bn(silenced, batches)
            harms[segment] = max(0.0, loss(silenced) - own)
    return harms


def depth_frontier(latencies: Latencies, harms: Mapping[Segment, float]) -> list[DepthPlan]:
    """The plans no other beats in both predicted latency and harm, fastest first; none is slower than the net."""
    step = latencies.net_ms * RESOLUTION
    ways = [DepthPlan((), latencies.net_ms, 0.0)]
    for stage in sorted({segment.stage for segment in harms}):
        own = [segment for segment in harms if segment.stage == stage]
        at = {0: ways}
        for stop in range(1, 1 + max(segment.stop for segment in own)):
            found = [
                DepthPlan((*way.cut, segment), way.ms + latencies.change_ms[segment], way.harm + harms[segment])
                for segment in own
                if segment.stop == stop
                for way in at[segment.start]
            ]
            at[stop] = _frontier(found, step)
        ways = at[stop]
    return [way for way in ways if way.ms <= latencies.net_ms]


def plan_depth(latencies: Latencies, harms: Mapping[Segment, float], *, target_ms: float) -> DepthPlan:
    """The plan of the least harm whose predicted latency meets the target; PlanError if none does."""
    frontier = depth_frontier(latencies, harms)
    fitting = [plan for plan in frontier if plan.ms <= target_ms]
    if not fitting:
        raise PlanError(
            f"{target_ms=:.3f}: no cut of the net is that fast here. The fastest takes {frontier[0].ms:.3f} ms, the "
            f"net as it is {latencies.net_ms:.3f} ms."
        )
    return fitting[-1]


def measure_plans(
    model: nn.Module,
    plans: Sequence[DepthPlan],
    latencies: Latencies,
    input_size: InputSize,
    *,
    batch_size: int = 1,
    rounds: int = 200,
) -> list[MeasuredPlan]:
    """Time the nets that plans lead to, before any training; those slower than the net as it is are left out.

    (The plan that merges nothing is that net, and stays.) `latencies` are those the plans were made with.
    """
    net_ms, times = measure_cuts(model, [plan.cut for plan in plans], input_size, batch_size=batch_size, rounds=rounds)
    measured = [
        MeasuredPlan(plan, ms, ms / net_ms, (plan.ms / latencies.net_ms) / (ms / net_ms) - 1)
        for plan, ms in zip(plans, times, strict=True)
    ]
    return [m for m in measured if m.share <= 1 or all(segment.length == 1 for segment in m.plan.cut)]


def plain_at_depth(model: nn.Module, cut: Sequence[Segment]) -> nn.Module:
    """A fresh net with the shape the merged one has, a block per segment: what the knob is to be compared with."""
    check_cut(model, cut)
    if not isinstance(model, ReduceNet):
        return _plain_links(model, cut)
    model = copy_net(model)
    stages: dict[int, list[Block]] = {}
    for segment in cut:
        stages.setdefault(segment.stage, []).append(_block_like(model, segment))
    model.stages = nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages.values()))
    model.init_weights()
    return model


def _plain_links(model: nn.Module, cut: Sequence[Segment]) -> nn.Module:
    vanished, net = vanish_cut(model, cut), copy_net(model)
    set_lambda(vanished, 0.0)
    merged, runs = merge_links(vanished, cut)
    for links in runs:
        last = links[-1].conv
        like, old = cast(nn.Conv2d, merged.get_submodule(last)), cast(nn.Conv2d, net.get_submodule(last))
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        options: dict[str, Any] = {name: getattr(like, name) for name in names}
        replace_module(net, last, nn.Conv2d(**options, bias=old.bias is not None).to(old.weight))
        for link in links[:-1]:
            for name in (*link.acts, link.conv, *([link.norm] if link.norm is not None else [])):
                replace_module(net, name, nn.Identity())
    reinitialise(net)
    return net


def _block_like(model: nn.Module, segment: Segment) -> Block:
    """A fresh block with a convolution of the merged kernel's size."""
    blocks = stages_of(model)[segment.stage][segment.start : segment.stop]
    first, last = blocks[0].conv, blocks[-1].conv
    assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)
    stride = first.stride[0]
    factory: dict[str, Any] = {"device": first.weight.device, "dtype": first.weight.dtype}
    padding = 1 if segment.slim else front_padding(stride, segment.length)
    channels = first.in_channels, 0, last.out_channels
    block = Block(first.in_channels, last.out_channels, stride, **factory)
    block.conv = block_conv(channels, 2 * padding + 1, stride, padding, **factory)
    return block


def _frontier(ways: Iterable[DepthPlan], step: float) -> list[DepthPlan]:
    """By rising latency, each with less harm than all before it; one per step."""
    kept: dict[int, DepthPlan] = {}
    least = float("inf")
    for way in sorted(ways, key=lambda way: (way.ms, way.harm)):
        if way.harm < least:
            kept[round(way.ms / step)] = way
            least = way.harm
    return list(kept.values())
