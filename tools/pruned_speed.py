"""What it costs to judge many pruned nets: a loop over Torch-Pruning beside ours, and where the time goes.

    python tools/pruned_speed.py                            three nets on 32x32 images, some minutes on one core
    python tools/pruned_speed.py reducenet20 --pixels 16 --subnets 10 --threads 1

Each random subnet at half the MACs is cut, its batch norm statistics are recalibrated, and it is evaluated. The ways
take turns at every subnet, on the same channels; times are those in which the thread had a core (use one thread), a
ratio is a median with quartiles. Images are noise: no time depends on what is on them.

loop    for every subnet: deepcopy, DependencyGraph, prune, forward passes in train mode, evaluation in large batches
today   `ChannelSpace.cut`, which traces once, `calibrate_bn` and `evaluate`, on the same batches
ours    the same with the norms folded (`ChannelSpace.fold`), in the batches of `MemoryFeed`
bound   the MACs of the forward passes alone, at the rate of a matrix product
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import timm
import torch
import torch_pruning
from torch import Tensor, nn

import growshrink as gs
from growshrink.analysis.channels import ChannelSpace, Kept
from growshrink.analysis.prune import Budget, draw_widths, random_channels, width_of
from growshrink.base.limits import Count
from growshrink.base.timing import seconds_of
from growshrink.cli.forms import pick
from growshrink.cli.options import RunOptions
from growshrink.cli.program import run_program
from growshrink.data.batches import Batch
from growshrink.data.datasets import DataSet
from growshrink.data.feed import MemoryFeed, ScoringBatches
from growshrink.training import evaluate
from inputs import NetOptions
from loaders import MEAN, STD, random_split
from paired import conditions, load

LARGE = 500
PARTS = ("copy", "trace", "cut", "recalibrate", "fold", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of pruned_speed."""

    nets: NetOptions = NetOptions(models=("reducenet20", "resnet18", "mobilenetv2_050"), batch_size=128)
    subnets: Count = 20
    """Pruned nets."""
    statistics: Count = 3
    """Batches that statistics are taken from."""
    images: Count = 1500
    """Images of the val split."""
    running: RunOptions = pick(RunOptions(), "threads", "quiet")


@dataclass
class Clock:
    """Seconds of each part, by subnet."""

    parts: list[dict[str, float]] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add to a part of the latest subnet."""
        began = time.thread_time()
        yield
        self.parts[-1][name] += time.thread_time() - began

    def totals(self) -> list[float]:
        """By subnet."""
        return [sum(parts.values()) for parts in self.parts]


@dataclass(frozen=True)
class Large:
    """A val split in large batches, made beforehand."""

    batches: list[Batch]

    def __len__(self) -> int:
        return sum(len(labels) for _, labels in self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def main(args: Args) -> None:
    """Measure and print."""
    args.running.set_threads()
    before = load()
    print(f"{'ms a subnet':24s}" + "".join(f"{name:>12s}" for name in (*PARTS, "total")) + "   loop / it (quartiles)")
    for name in args.nets.models:
        measure(args, name)
    settings = f"{args.subnets} subnets, {args.statistics} batches of {args.nets.batch_size}, {args.images} val images"
    print(f"\n{settings}, {args.nets.pixels} pixels; {conditions(before)}")


def measure(args: Args, name: str) -> None:
    """One net."""
    side, size = args.nets.pixels, (3, args.nets.pixels, args.nets.pixels)
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10).eval()
    train, val = (random_split(count, side) for count in (args.statistics * args.nets.batch_size, args.images))
    data = DataSet("noise", train, val, val, tuple(map(str, range(10))), MEAN, STD)
    feed = MemoryFeed.of(data, batch_size=args.nets.batch_size)
    calibration = [feed.train.batch(update)[0] for update in range(args.statistics)]
    images, labels = (torch.cat(parts) for parts in zip(*feed.val, strict=True))
    large = Large(list(zip(images.contiguous().split(LARGE), labels.split(LARGE), strict=True)))
    space = ChannelSpace(net, size)
    draws = draw_widths(space, Budget(0.5, 0.1), args.subnets)
    clocks: dict[str, Clock] = defaultdict(Clock)
    for number, row in enumerate(draws.index):
        kept = random_channels(space, width_of(space, row), number)
        theirs = loop(clocks["loop"], net, space, kept, [batch.contiguous() for batch in calibration], large)
        for way, batches, fold in (("today", large, False), ("ours", feed.val, True)):
            score = judge(clocks[way], space, kept, calibration, batches, fold)
            assert abs(score - theirs) <= 100.0 * 2 / args.images, (score, theirs)  # a tie may fall either way
    for way, clock in clocks.items():
        print(line(f"{name}: {way}", clock, clocks["loop"].totals()))
    passes = args.images + args.statistics * args.nets.batch_size
    rate = macs_a_second()
    bound = [macs * passes / rate for macs in draws.macs]
    ratio = statistics.median(a / b for a, b in zip(clocks["loop"].totals(), bound, strict=True))
    print(f"{name + ': bound':24s}{1e3 * statistics.median(bound):84.1f}   {ratio:.2f} at {rate / 1e9:.0f} GMAC/s")


def loop(
    clock: Clock, net: nn.Module, space: ChannelSpace, kept: Kept, calibration: list[Tensor], val: ScoringBatches
) -> float:
    """One subnet as a user of Torch-Pruning judges it; its top-1."""
    clock.parts.append(defaultdict(float))
    with clock.part("copy"):
        pruned = copy.deepcopy(net)
    with clock.part("trace"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(pruned, calibration[0][:1])
    with clock.part("cut"):
        modules = dict(pruned.named_modules())
        for name, channels in kept.items():
            gone = np.setdiff1d(np.arange(space.choices[name][-1]), channels).tolist()
            if gone:
                graph.get_pruning_group(modules[name], torch_pruning.prune_conv_out_channels, gone).prune()
    with clock.part("recalibrate"), torch.no_grad():
        for module in pruned.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        pruned.train()
        for images in calibration:
            pruned(images)
    with clock.part("evaluate"), torch.no_grad():
        pruned.eval()
        hits = sum(int((pruned(images).argmax(1) == labels).sum()) for images, labels in val)
    return 100.0 * hits / len(val)


def judge(
    clock: Clock, space: ChannelSpace, kept: Kept, calibration: list[Tensor], val: ScoringBatches, fold: bool
) -> float:
    """One subnet as we judge it; its top-1."""
    clock.parts.append(defaultdict(float))
    with clock.part("cut"):
        pruned = space.cut(kept)
    with clock.part("recalibrate"):
        gs.calibrate_bn(pruned, calibration)
    if fold:
        with clock.part("fold"):
            space.fold(pruned)
    with clock.part("evaluate"):
        return evaluate(pruned, val).top1


def line(name: str, clock: Clock, against: list[float]) -> str:
    """A row of the table."""
    medians = [1e3 * statistics.median(parts[part] for parts in clock.parts) for part in PARTS]
    ratios = [a / b for a, b in zip(against, clock.totals(), strict=True)]
    low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    cells = "".join(f"{value:12.1f}" for value in (*medians, 1e3 * statistics.median(clock.totals())))
    return f"{name:24s}{cells}   {ratio:.2f} ({low:.2f} .. {high:.2f})"


def macs_a_second(side: int = 1024) -> float:
    """Rate of a matrix product: the best of ten."""
    a = torch.randn(side, side)
    return side**3 / min(seconds_of(lambda: a @ a, own_thread=True) for _ in range(10))


if __name__ == "__main__":
    run_program(main, Args, __doc__)
