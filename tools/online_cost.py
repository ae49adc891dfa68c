"""What a training step of linear branches costs: plain net, branch by branch, and merged online, timed in pairs.

    python tools/online_cost.py                                  every default, about 10 minutes on 2 cores
    python tools/online_cost.py --nets reducenet20@32 --branches dbb expandnet --strict
    python tools/online_cost.py --nets resnet50@128 --batch-size 32 --report     and each convolution's own times
    python tools/online_cost.py --threads 1 --processor-time --authors FOLDER    and DBB beside its authors' module

Every net is grown with every kind of branch, given frozen statistics and collapsed (gs.collapse_online). An update of
SGD (forward, backward, step, inside gs.layers.merge_once) of the grown net and one of the plain net take turns; each
pair of turns gives a ratio, and the table shows their medians and quartiles. Merging costs nothing per image, but what
it costs per update is spread over few pixels where maps and batches are small and channels many. "MACs" is the bound
that this sets: the collapsed step over the plain one in multiply-accumulates, where every chain of kernels is
multiplied out or run one by one, whichever is less (for a batch in one part). Targets of DBB, OREPA and ExpandNet: at
most 1.1 plain steps where the bound is below 1.05, else 1.15 times the bound. "memory" is what a step holds when its
backward pass begins, over plain, collapsed and branch by branch.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal
from unittest.mock import patch

import timm
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.algebra import convmap
from growshrink.base.limits import Count, InFolder
from growshrink.base.timing import Call
from growshrink.cli.forms import pick
from growshrink.cli.options import BatchOptions, GrowOptions
from growshrink.cli.program import run_program
from growshrink.errors import RunError, did_you_mean
from growshrink.proofs._profile import training_macs, training_memory
from paired import Bench, Row, TimedArgs, channels_last, conditions, load

#: Most plain steps that a merged one may cost, or most times its bound in MACs, whichever is more.
AT_MOST, OVER_BOUND = 1.1, 1.15
#: The branches the target is for.
TARGETS = ("dbb", "orepa", "expandnet")


@dataclass(frozen=True, kw_only=True)
class Args(TimedArgs):
    """Options of online_cost."""

    nets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL@PIXELS ...")] = (
        "reducenet20@32",
        "mobilenetv2_050@96",
        "resnet18@64",
        "resnet18@128",
    )
    """timm models, and the side of the images each is trained on."""
    choose: Literal["measured", "always"] = "measured"
    """Which convolutions run merged: those where that is measured to be faster, or all."""
    parts: Count = 1
    """How many parts of a batch accumulate the gradients of an update."""
    report: bool = False
    """Also print what every convolution costs either way."""
    authors: InFolder | None = None
    """A clone of DingXiaoH/DiverseBranchBlock: a stack of its modules is timed beside one grown with "dbb"."""
    batches: BatchOptions = BatchOptions(batch_size=128)
    grow: GrowOptions = pick(GrowOptions(branches=TARGETS), "branches")
    rounds: gs.Round = pick(gs.Round(epochs=1), "ratio")


def main(args: Args) -> int:
    """Measure and print; the exit status."""
    if args.authors is not None and not (args.authors / "diversebranchblock.py").is_file():
        raise RunError(f"--authors {args.authors}: no diversebranchblock.py in it; clone DingXiaoH/DiverseBranchBlock.")
    if args.batches.batch_size < 2:
        raise RunError(f"--batch-size {args.batches.batch_size}: must be at least 2.")
    nets = [parse(net) for net in args.nets]
    bench = args.bench(5)
    before = load()
    print(
        f"{'net':22s} {'branches':16s} {'plain ms':>9s}  {'branch by branch':24s} {'merged':24s} "
        f"{'MACs':>5s} {'memory':>11s} merged in"
    )
    for name, pixels in nets:
        for branch in args.grow.branches:
            grown, collapsed, macs, memory, report = measure(bench, args, name, pixels, branch)
            counts = f"{macs:5.2f} {memory[0]:5.2f} {memory[1]:5.2f} {len(report.collapsed)} of {len(report.rows)}"
            print(
                f"{f'{name}@{pixels}':22s} {branch:16s} {collapsed.b:9.1f}  {ratio(grown):24s} {ratio(collapsed):24s} "
                f"{counts}  {collapsed.verdict}".rstrip(),
                flush=True,
            )
            if args.report:
                print(report)
    if args.authors is not None:
        for row in beside_authors(bench, args.authors):
            print(f"{row.what:63s} {ratio(row)}  {row.verdict}".rstrip(), flush=True)
    settings = f"batch {args.batches.batch_size} in {args.parts} parts, ratio {args.rounds.ratio:g}"
    print(f"\nOver an update of the plain net; {settings}; {conditions(before)}")
    missed = sum(row.verdict == "MISSED" for row in bench.rows)
    if missed:
        print(f"{missed} of {sum(bool(row.verdict) for row in bench.rows)} targets MISSED.")
    return int(args.pairs.strict and missed > 0)


def parse(net: str) -> tuple[str, int]:
    """`MODEL@PIXELS`."""
    name, _, pixels = net.partition("@")
    if not timm.is_model(name):
        raise RunError(f"--nets {net}: timm knows no model {name!r}{did_you_mean(name, timm.list_models())}")
    if not (pixels.isdecimal() and int(pixels) > 0):
        raise RunError(f"--nets {net}: write MODEL@PIXELS, for example resnet18@64.")
    return name, int(pixels)


def measure(
    bench: Bench, args: Args, name: str, pixels: int, branch: str
) -> tuple[Row, Row, float, tuple[float, float], gs.transforms.CollapseReport]:
    """A step over one of the plain net: times by branch and collapsed, MACs, memory collapsed and by branch; report."""
    torch.manual_seed(0)
    size = (3, pixels, pixels)
    images = torch.randn(args.batches.batch_size, *size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (args.batches.batch_size,))
    plain = channels_last(timm.create_model(name, num_classes=10)).train()
    grown = channels_last(gs.grow(plain, branch, ratio=args.rounds.ratio, input_size=size))
    collapsed = gs.collapse_online(
        grown,
        choose=args.choose,
        batch_size=args.batches.batch_size,
        input_size=size,
        rounds=2 if args.pairs.quick else 5,
        progress=bench.progress,
    )
    sizes = size, args.batches.batch_size
    everything = gs.collapse_online(grown, choose="always", input_size=size)
    with patch.object(convmap, "MACS_PER_ELEMENT", 0):
        bound = training_macs(everything, *sizes) / training_macs(plain, *sizes)
    held = training_memory(plain, *sizes)
    memory = training_memory(collapsed, *sizes) / held, training_memory(grown, *sizes) / held
    target = max(AT_MOST, OVER_BOUND * bound if bound > 1.05 else 0.0) if branch in TARGETS else math.inf
    step = update(plain, images, labels, args.parts)
    what = f"{name}@{pixels}: {branch}"
    return (
        bench.compare(f"{what}, branch by branch / plain", update(grown, images, labels, args.parts), step),
        bench.compare(f"{what}, merged / plain", update(collapsed, images, labels, args.parts), step, at_most=target),
        bound,
        memory,
        gs.transforms.collapse_report(collapsed),
    )


def beside_authors(bench: Bench, folder: Path) -> list[Row]:
    """A step of 12 convolutions grown with "dbb", over one of 12 modules of DBB's authors, and both over plain."""
    sys.path.insert(0, str(folder))
    block = importlib.import_module("diversebranchblock").DiverseBranchBlock
    torch.manual_seed(0)
    width, size = 32, (3, 32, 32)
    images = torch.randn(32, *size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (32,))
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]

    def stack(make: Callable[[int], list[nn.Module]]) -> nn.Module:
        parts = [part for index in range(12) for part in (*make(width if index else 3), nn.ReLU())]
        return channels_last(nn.Sequential(*parts, *end)).train()

    plain = stack(lambda inputs: [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)])
    ours = channels_last(gs.grow(plain, "dbb", where=".*", init="paper", input_size=size))
    theirs = stack(lambda inputs: [block(inputs, width, 3, padding=1)])
    steps = {name: update(net, images, labels) for name, net in (("ours", ours), ("theirs", theirs), ("plain", plain))}
    return [
        bench.compare("authors: DBB branch by branch, ours / theirs", steps["ours"], steps["theirs"], at_most=1.0),
        bench.compare("authors: DBB branch by branch, ours / plain", steps["ours"], steps["plain"]),
        bench.compare("authors: DBB branch by branch, theirs / plain", steps["theirs"], steps["plain"]),
    ]


def update(net: nn.Module, images: Tensor, labels: Tensor, parts: int = 1) -> Call:
    """One update of SGD, with gradients accumulated over so many parts of the batch, as a call."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return partial(_update, net, optimizer, parts, images, labels)


def _update(net: nn.Module, optimizer: torch.optim.Optimizer, parts: int, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    with gs.layers.merge_once(net):
        for part in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            (F.cross_entropy(net(part[0]), part[1]) / parts).backward()
    optimizer.step()


def ratio(row: Row) -> str:
    """Median and quartiles."""
    return f"{row.ratio:5.2f} ({row.q1:.2f} .. {row.q3:.2f})"


if __name__ == "__main__":
    run_program(main, Args, __doc__)
