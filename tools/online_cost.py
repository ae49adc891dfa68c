"""What a training step of linear branches costs: plain net, branch by branch, and merged online, timed in pairs.

    python tools/online_cost.py                                  every default, about 10 minutes on 2 cores
    python tools/online_cost.py --nets reducenet20@32 --branches dbb expandnet --strict
    python tools/online_cost.py --nets resnet50@128 --batch-size 32 --report     and each convolution's own times

Every net is grown with every kind of branch, given frozen statistics and collapsed (gs.collapse_online). An update of
SGD (forward, backward, step) of the grown net and one of the plain net take turns; each pair of turns gives a ratio,
and the table shows their medians and quartiles. Target: DBB and ExpandNet, collapsed, at most 1.3 plain steps.
Merging costs nothing per image, but what it costs per update is spread over few pixels where maps and batches are
small and channels many: there the ratio rises, and `--choose measured` leaves to the branches what they do faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import timm
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.base.timing import Call
from growshrink.cli.forms import pick
from growshrink.cli.options import BatchOptions, GrowOptions
from growshrink.cli.program import run_program
from growshrink.errors import RunError, did_you_mean
from paired import Bench, Row, TimedArgs, channels_last, conditions, load

AT_MOST = 1.3
#: The branches the target is for.
TARGETS = ("dbb", "expandnet")


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
    report: bool = False
    """Also print what every convolution costs either way."""
    batches: BatchOptions = BatchOptions(batch_size=128)
    grow: GrowOptions = pick(GrowOptions(branches=TARGETS), "branches")
    rounds: gs.Round = pick(gs.Round(epochs=1), "ratio")


def main(args: Args) -> int:
    """Measure and print; the exit status."""
    if args.batches.batch_size < 2:
        raise RunError(f"--batch-size {args.batches.batch_size}: must be at least 2.")
    nets = [parse(net) for net in args.nets]
    bench = args.bench(5)
    before = load()
    print(f"{'net':22s} {'branches':16s} {'plain ms':>9s}  {'branch by branch':24s} {'merged':24s} merged in")
    for name, pixels in nets:
        for branch in args.grow.branches:
            grown, collapsed, report = measure(bench, args, name, pixels, branch)
            print(
                f"{f'{name}@{pixels}':22s} {branch:16s} {collapsed.b:9.1f}  {ratio(grown):24s} {ratio(collapsed):24s} "
                f"{len(report.collapsed)} of {len(report.rows)}  {collapsed.verdict}".rstrip(),
                flush=True,
            )
            if args.report:
                print(report)
    settings = f"batch {args.batches.batch_size}, ratio {args.rounds.ratio:g}"
    print(f"\nOver an update of the plain net; {settings}; {conditions(before)}")
    missed = sum(row.verdict == "MISSED" for row in bench.rows)
    if missed:
        print(f"{missed} of {sum(bool(row.verdict) for row in bench.rows)} targets MISSED (at most {AT_MOST}).")
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
) -> tuple[Row, Row, gs.transforms.CollapseReport]:
    """The step of the grown net over that of the plain one, branch by branch and collapsed, and what was collapsed."""
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
    target = AT_MOST if branch in TARGETS else math.inf
    step = update(plain, images, labels)
    what = f"{name}@{pixels}: {branch}"
    return (
        bench.compare(f"{what}, branch by branch / plain", update(grown, images, labels), step),
        bench.compare(f"{what}, merged / plain", update(collapsed, images, labels), step, at_most=target),
        gs.transforms.collapse_report(collapsed),
    )


def update(net: nn.Module, images: Tensor, labels: Tensor) -> Call:
    """One update of SGD, as a call."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, nesterov=True)
    return partial(_update, net, optimizer, images, labels)


def _update(net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()


def ratio(row: Row) -> str:
    """Median and quartiles."""
    return f"{row.ratio:5.2f} ({row.q1:.2f} .. {row.q3:.2f})"


if __name__ == "__main__":
    run_program(main, Args, __doc__)
