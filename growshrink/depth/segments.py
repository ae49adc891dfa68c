"""Segments: convolutions in a row that are to become one, and nets made for them.

In a ReduceNet they are the blocks of a stage, whose skips merge too. In any other net they are those of a chain
(`growshrink.depth.chains`), which a skip may span: it stays, or becomes a tap of the kernel (`absorb_skips`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.copying import copy_net
from growshrink.depth.chains import Link, chains_of
from growshrink.depth.merge import merge_runs
from growshrink.depth.skips import absorb_skips
from growshrink.errors import PlanError
from growshrink.layers.activations import VanishingAct, VanishingReLU
from growshrink.layers.grown import grown_modules
from growshrink.models.reducenet import ReduceNet
from growshrink.models.staged import Block
from growshrink.transforms import fold
from growshrink.transforms._fuse import replace_module


class Segment(NamedTuple):
    """Blocks `start` to `stop - 1` of a stage (convolutions of chain number `stage`), as one convolution.

    Wide, every kernel is kept: the merged one is 5x5, 7x7, ... Slim, of all but the first only the centre is: 3x3.
    """

    stage: int
    start: int
    stop: int
    slim: bool = False

    @property
    def length(self) -> int:
        """Number of blocks."""
        return self.stop - self.start

    def __str__(self) -> str:
        """`stages.0[1:3]`, or `stages.0[1:3]-slim`."""
        return f"stages.{self.stage}[{self.start}:{self.stop}]" + "-slim" * self.slim


#: A whole net in segments, in order.
Cut = tuple[Segment, ...]


def uncut(model: nn.Module) -> Cut:
    """The net as it is: a segment for each block."""
    return tuple(all_segments(model, longest=1))


def all_segments(model: nn.Module, longest: int) -> list[Segment]:
    """Every run of at most `longest` neighbours of one stage, wide, and slim where the first kernel is the largest."""
    if isinstance(model, ReduceNet):
        check_reducenet(model)
    return [
        Segment(stage, start, stop, slim)
        for stage, links in enumerate(links_of(model))
        for start in range(len(links))
        for stop in range(start + 1, min(start + longest, len(links)) + 1)
        for slim in ((False, True) if _slims(model, links[start:stop]) else (False,))
    ]


def links_of(model: nn.Module, like: nn.Module | None = None) -> Sequence[Sequence[Link]]:
    """The convolutions that can be merged with their neighbours, stage by stage; PlanError if none can.

    `model` may be a copy of `like` that is cut.
    """
    if isinstance(model, ReduceNet):
        blocks = [[f"stages.{s}.{i}" for i in range(len(found))] for s, found in enumerate(stages_of(model))]
        return [[Link(f"{at}.conv", (f"{at}.act",), f"{at}.bn", (0, 0)) for at in stage] for stage in blocks]
    found = chains_of(model, like=like)
    if not found.chains:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(found.ends.items())[:3])
        raise PlanError(f"{type(model).__name__}: no two convolutions in a row for the depth knob to merge: {reasons}.")
    return found.chains


def _slims(model: nn.Module, links: Sequence[Link]) -> bool:
    first, *rest = (max(cast(nn.Conv2d, model.get_submodule(link.conv)).kernel_size) for link in links)
    return bool(rest) and first >= max(rest) > 1


def check_reducenet(model: ReduceNet) -> None:
    """PlanError unless the net is a plain ReduceNet, each block with its own padding and ReLU."""
    if grown := grown_modules(model):
        raise PlanError(f"{next(iter(grown))} carries branches: growshrink.fuse comes before the depth knob.")
    for stage, blocks in enumerate(stages_of(model)):
        for index, block in enumerate(blocks):
            if type(block) is not Block or type(block.act) is not nn.ReLU or block.margin != 0:
                raise PlanError(
                    f"stages.{stage}.{index}: the depth knob starts from a net as timm.create_model makes it, with "
                    'pad="each" and a ReLU at the end of each block.'
                )


def vanish_cut(model: nn.Module, cut: Sequence[Segment]) -> nn.Module:
    """A copy of a plain net in which the activations inside the segments can vanish, and which then merges.

    In a segment of several convolutions every activation but the last becomes a vanishing one of lam 1. Of a wide
    segment all padding moves to the first convolution; of a slim one all kernels but the first shrink to their centres.
    Train with lam falling to 0, then `merge_cut`.
    """
    check_cut(model, cut)
    net = copy_net(model)
    vars(net)["was_grown"] = True  # of an empty cut too: it has a lam to set, if of no activation
    chains = links_of(net, like=model)
    for segment in cut:
        _vanish(net, chains[segment.stage][segment.start : segment.stop], segment.slim)
    return net


def _vanish(model: nn.Module, links: Sequence[Link], slim: bool) -> None:
    front, stride = [0, 0], [1, 1]
    for position, link in enumerate(links):
        conv = cast(nn.Conv2d, model.get_submodule(link.conv))
        front = [f + s * p for f, s, p in zip(front, stride, cast(tuple[int, int], conv.padding), strict=True)]
        stride = [s * own for s, own in zip(stride, conv.stride, strict=True)]
        if slim and position:
            replace_module(model, link.conv, _centre(conv))
        elif not slim:
            conv.padding = (0, 0)
        for name in link.acts if position < len(links) - 1 else ():
            act = model.get_submodule(name)
            device = conv.weight.device
            new = VanishingReLU(device=device) if type(act) is nn.ReLU else VanishingAct(act, device=device)
            replace_module(model, name, new.train(act.training))
    if not slim:
        cast(nn.Conv2d, model.get_submodule(links[0].conv)).padding = (front[0], front[1])
        for link in links:
            if isinstance(block := model.get_submodule(link.conv.rpartition(".")[0]), Block):
                block.margin = cast(nn.Conv2d, block.conv).padding[0] - 1  # type: ignore[operator]


def merge_cut(model: nn.Module, cut: Sequence[Segment], *, input_size: InputSize | None = None) -> nn.Module:
    """The inference form of a net from `vanish_cut` whose lam is 0: one convolution per segment, on a copy, exactly.

    Skips that span one convolution become a part of its kernel, where there is no more in their block.
    """
    merged, links = merge_links(model, cut, input_size)
    if not isinstance(model, ReduceNet):  # whose skips folding merges
        absorb_skips(merged, links)
    return merged


def merge_links(
    model: nn.Module, cut: Sequence[Segment], input_size: InputSize | None = None
) -> tuple[nn.Module, list[Sequence[Link]]]:
    """`merge_cut` with skips as they are, and the links that were merged."""
    chains = links_of(model)
    links = [chains[run.stage][run.start : run.stop] for run in cut if run.length > 1]
    if not links:
        return fold(model, input_size=input_size), links
    names = [[link.conv for link in run] for run in links]
    return merge_runs(model, names, if_costlier="allow", input_size=input_size), links


def cut_at(model: nn.Module, segment: Segment) -> Cut:
    """The cut that merges one segment and nothing else."""
    inside = {(segment.stage, index) for index in range(segment.start, segment.stop)}
    return tuple(sorted([segment, *(alone for alone in uncut(model) if (alone.stage, alone.start) not in inside)]))


def stages_of(model: nn.Module) -> list[list[Block]]:
    """The blocks of a ReduceNet, stage by stage."""
    return [[cast(Block, block) for block in stage.children()] for stage in cast(nn.Sequential, model.stages)]


def _centre(conv: nn.Conv2d) -> nn.Conv2d:
    """The centre of a kernel as a pointwise convolution."""
    options: dict[str, Any] = {"stride": conv.stride, "groups": conv.groups, "bias": conv.bias is not None}
    options |= {"device": conv.weight.device, "dtype": conv.weight.dtype}
    new = nn.utils.skip_init(nn.Conv2d, conv.in_channels, conv.out_channels, 1, **options)
    rows, columns = (slice(k // 2, k // 2 + 1) for k in conv.kernel_size)
    with torch.no_grad():
        new.weight.copy_(conv.weight[:, :, rows, columns])
        if new.bias is not None and conv.bias is not None:
            new.bias.copy_(conv.bias)
    return new.train(conv.training).requires_grad_(conv.weight.requires_grad)


def check_cut(model: nn.Module, cut: Sequence[Segment]) -> None:
    """PlanError unless the segments cover the blocks of the net, each once."""
    if isinstance(model, ReduceNet):
        check_reducenet(model)
    blocks = [(stage, index) for stage, found in enumerate(links_of(model)) for index in range(len(found))]
    covered = [(segment.stage, index) for segment in cut for index in range(segment.start, segment.stop)]
    if blocks != covered:
        raise PlanError(f"the segments {', '.join(map(str, cut))} do not cover the {len(blocks)} blocks, each once.")
