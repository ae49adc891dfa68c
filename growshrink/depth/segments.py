"""Segments: runs of a ReduceNet's blocks that are to become one convolution, and nets made for them."""

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.copying import copy_net
from growshrink.depth.merge import merge_runs
from growshrink.errors import PlanError
from growshrink.layers.activations import VanishingReLU
from growshrink.layers.grown import grown_modules
from growshrink.models.reducenet import ReduceNet
from growshrink.models.staged import Block, front_padding
from growshrink.transforms import fold


class Segment(NamedTuple):
    """Blocks `start` to `stop - 1` of a stage, as one convolution.

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
    """Every run of at most `longest` neighbouring blocks of one stage, wide and slim."""
    check_reducenet(model)
    return [
        Segment(stage, start, stop, slim)
        for stage, blocks in enumerate(stages_of(model))
        for start in range(len(blocks))
        for stop in range(start + 1, min(start + longest, len(blocks)) + 1)
        for slim in ((False, True) if stop - start > 1 else (False,))
    ]


def random_cut(segments: Iterable[Segment], draw: random.Random) -> Cut:
    """A cut of the whole net into some of the segments, drawn from front to back."""
    segments, cut = list(segments), list[Segment]()
    for stage in sorted({segment.stage for segment in segments}):
        start = 0
        while following := [s for s in segments if s.stage == stage and s.start == start]:
            cut.append(draw.choice(following))
            start = cut[-1].stop
    return tuple(cut)


def check_reducenet(model: nn.Module) -> None:
    """PlanError unless the net is a plain ReduceNet, each block with its own padding and ReLU."""
    if not isinstance(model, ReduceNet):
        raise PlanError(f"the depth knob turns ReduceNets, not {type(model).__name__}.")
    if grown := grown_modules(model):
        raise PlanError(f"{next(iter(grown))} carries branches: growshrink.fuse comes before the depth knob.")
    for stage, blocks in enumerate(stages_of(model)):
        for index, block in enumerate(blocks):
            if type(block) is not Block or type(block.act) is not nn.ReLU or block.margin != 0:
                raise PlanError(
                    f"stages.{stage}.{index}: the depth knob starts from a net as timm.create_model makes it, with "
                    'pad="each" and a ReLU at the end of each block.'
                )


def vanish_cut(model: nn.Module, cut: Sequence[Segment]) -> ReduceNet:
    """A copy of a plain ReduceNet in which the activations inside the segments can vanish, and which then merges.

    In a segment of several blocks every ReLU but the last becomes a `VanishingReLU` of lam 1. Of a wide segment all
    padding moves to the first convolution; of a slim one all kernels but the first shrink to their centres. Train with
    lam falling to 0, then `merge_cut`.
    """
    check_reducenet(model)
    check_cut(model, cut)
    model = cast(ReduceNet, copy_net(model))
    vars(model)["was_grown"] = True  # of an empty cut too: it has a lam to set, if of no activation
    for segment in cut:
        blocks = stages_of(model)[segment.stage][segment.start : segment.stop]
        for position, block in enumerate(blocks):
            conv = block.conv
            assert isinstance(conv, nn.Conv2d)
            if segment.slim and position:
                block.conv = _centre(conv)
            elif not segment.slim:
                padding = 0 if position else front_padding(conv.stride[0], segment.length)
                conv.padding = (padding, padding)
                block.margin = padding - 1
            if position < segment.length - 1:
                act = VanishingReLU(1.0, device=conv.weight.device)
                block.act = act.train(block.training)  # type: ignore[assignment]
    return model


def merge_cut(model: nn.Module, cut: Sequence[Segment], *, input_size: InputSize | None = None) -> nn.Module:
    """The inference form of a net from `vanish_cut` whose lam is 0: one convolution per segment, on a copy, exactly."""
    runs = [segment for segment in cut if segment.length > 1]
    names = [[f"stages.{run.stage}.{index}.conv" for index in range(run.start, run.stop)] for run in runs]
    if not names:
        return fold(model, input_size=input_size)
    return merge_runs(model, names, if_costlier="allow", input_size=input_size)


def cut_at(model: nn.Module, segment: Segment) -> Cut:
    """The cut that merges one segment and nothing else."""
    inside = {(segment.stage, index) for index in range(segment.start, segment.stop)}
    return tuple(sorted([segment, *(alone for alone in uncut(model) if (alone.stage, alone.start) not in inside)]))


def stages_of(model: nn.Module) -> list[list[Block]]:
    """The blocks of a ReduceNet, stage by stage."""
    return [[cast(Block, block) for block in stage.children()] for stage in cast(nn.Sequential, model.stages)]


def _centre(conv: nn.Conv2d) -> nn.Conv2d:
    """The centre of a kernel as a pointwise convolution."""
    weight = conv.weight.detach()[:, :, 1:2, 1:2].clone(memory_format=torch.contiguous_format)
    with torch.device("meta"):
        pointwise = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False)
    pointwise.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    return pointwise.train(conv.training)


def check_cut(model: nn.Module, cut: Sequence[Segment]) -> None:
    """PlanError unless the segments cover the blocks of the net, each once."""
    blocks = [(stage, index) for stage, found in enumerate(stages_of(model)) for index in range(len(found))]
    covered = [(segment.stage, index) for segment in cut for index in range(segment.start, segment.stop)]
    if blocks != covered:
        raise PlanError(f"the segments {', '.join(map(str, cut))} do not cover the {len(blocks)} blocks, each once.")
