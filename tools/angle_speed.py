"""How fast subnets are scored by their angle: a table's look-ups, over slicing and concatenating the weights.

    python tools/angle_speed.py                             reducenet20_x4, 4**9 subnets
    python tools/angle_speed.py --model reducenet56_x2
    python tools/angle_speed.py --strict                    exit 1 if a target is missed, or the two disagree

The two take turns and each pair of turns gives a ratio (see paired.py). The weights are random: times do not depend on
them. Both compute in float64, and the largest difference of their angles is printed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import timm
import torch
from torch import nn

import growshrink as gs
from growshrink.analysis._angle import AngleTable, supernet_table
from growshrink.analysis.layers import Layer, Side, supernet_layers
from growshrink.base.limits import Count
from growshrink.base.timing import machine, seconds_of
from growshrink.cli.forms import pick
from growshrink.cli.options import ModelOptions
from growshrink.cli.program import run_program
from growshrink.errors import AnalysisError
from growshrink.layers.grown import grown_modules
from inputs import NetOptions
from paired import PairOptions, TimedArgs, load

MODEL = "reducenet20_x4"
#: Targets: subnets a second, times the slow way, radians.
RATE, RATIO, DIFFERENCE = 1e6, 200.0, 1e-12
#: More subnets than this are not ranked at a time.
MANY = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Args(TimedArgs):
    """Options of angle_speed; the model is built grown, without grouped convolutions."""

    many: Count = 100_000
    """Subnets of a turn by look-up."""
    few: Count = 20
    """Subnets of a turn by slicing, and those that are compared."""
    model: ModelOptions = pick(ModelOptions(model=MODEL), "model")
    nets: NetOptions = pick(NetOptions(), "pixels")
    pairs: PairOptions = PairOptions(seconds=10.0)


def main(args: Args) -> int:
    """Measure and print; the exit status."""
    torch.manual_seed(0)
    name = args.model.name
    init = timm.create_model(name, num_classes=10)
    if not grown_modules(init):
        raise AnalysisError(f"--model {name}: has no widths; take one that is built grown, such as {MODEL}.")
    trained = moved(init)
    size = (3, args.nets.pixels, args.nets.pixels)
    table = supernet_table(init, trained, gs.width_space(init), input_size=size)
    slow = slicing(supernet_layers(init, size), init, trained)
    index = table.sample(args.many)
    few = table.sample(args.few, seed=1)
    widths = [table.width(row) for row in few]

    bench = args.bench()
    before = load()
    row = bench.compare(
        "angle: look-up / slice and concatenate",
        lambda: table.score(index),
        lambda: [slow(width) for width in widths],
        at_least=RATIO,
        images=(len(index), len(few)),
    )
    difference = float(np.abs(table.score(few).angle - [slow(width) for width in widths]).max())
    missed = row.a < RATE or row.ratio < RATIO or difference > DIFFERENCE
    print(f"{name}: {row.a:,.0f} subnets/s by look-up (target {RATE:,.0f}), {row.b:,.0f} by slicing")
    print(f"ratio {row.ratio:,.0f}, quartiles {row.q1:,.0f} .. {row.q3:,.0f} of {row.repeats} pairs (target {RATIO:g})")
    print(f"largest difference {difference:.1e} rad of {args.few} subnets (target {DIFFERENCE:g})")
    print(ranked(table))
    about = machine()
    print(f"on {about['processor']}, {about['cores']} cores; load average {before} before, {load()} after")
    if missed and not args.pairs.quick:
        print("A target is MISSED.")
    return int(args.pairs.strict and missed)


def moved(model: nn.Module) -> nn.Module:
    """A copy whose kernels have moved by about a third of their size."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            spread = float(p.std()) if p.numel() > 1 else 1.0
            p.add_(torch.randn_like(p), alpha=0.3 * spread)
    return other


def slicing(layers: Sequence[Layer], init: nn.Module, trained: nn.Module) -> Callable[[Mapping[str, int]], float]:
    """The obvious way: cut the kernels of a subnet out, put each state into one vector, compare these in float64."""
    before, after = ({n: p.detach().double().numpy() for n, p in net.named_parameters()} for net in (init, trained))
    pieces = []
    for layer in layers:
        if any(side is not None and side.divisor > 1 for side in (layer.rows, layer.columns)):
            raise AnalysisError(f"{layer.name}: grouped convolutions are not sliced here.")
        if layer.in_vector:
            pieces.append((layer, before[layer.name], after[layer.name]))

    def angle(width: Mapping[str, int]) -> float:
        cut = [(w0, w1, (_kept(layer.rows, width), _kept(layer.columns, width))) for layer, w0, w1 in pieces]
        a = np.concatenate([w0[kept].ravel() for w0, _, kept in cut])
        b = np.concatenate([w1[kept].ravel() for _, w1, kept in cut])
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
        return float(2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b)))

    return angle


def ranked(table: AngleTable) -> str:
    """How long all subnets take to be enumerated, scored and sorted."""
    if table.size > MANY:
        return f"{table.size:,} subnets: too many to rank all of them here"
    seconds = seconds_of(lambda: np.argsort(-table.score(table.all()).angle))
    return f"all {table.size:,} subnets ranked in {seconds:.2f} s"


def _kept(side: Side | None, width: Mapping[str, int]) -> slice:
    if side is None or side.switch and width[side.variable]:
        return slice(None)
    return slice(0 if side.switch else width[side.variable])


if __name__ == "__main__":
    run_program(main, Args, __doc__)
