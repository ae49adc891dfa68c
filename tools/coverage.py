"""Does grow -> train -> fuse work on every net of timm, and come back as that net? A table, net by net.

    python tools/coverage.py                                        one net of each of timm's families
    python tools/coverage.py "resnet*" "mobilenetv*" --branches dbb  what matches, with other branches
    python tools/coverage.py "*" --max-params 30                    every net of up to 30 million parameters (hours)
    python tools/coverage.py --zoo                                  torchvision's, a YOLO-like net, MLPerf Tiny's four

Each net is grown with silent branches, gets random norms (and branches that are at work), is fused, and what was fused
is loaded, strictly, into a fresh `timm.create_model` that has to compute the same. `share` is how much of the MACs of
the eligible layers (convolutions and linear ones) was grown; eligible are all but the stem, the classifier, and those
that run never, on 1x1 maps, or on one token. Nets with less than half their MACs in layers are left out, and counted.
Exit code 1 if a net crashed or is not exact.
"""

from __future__ import annotations

import copy
import functools
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Annotated

import timm
import torch
import tyro
from torch import nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.algebra.dataflow import InputSize, trace
from growshrink.base.limits import Positive
from growshrink.base.progress import progress_bar
from growshrink.cli.forms import pick
from growshrink.cli.options import GrowOptions
from growshrink.cli.program import run_program
from growshrink.errors import did_you_mean
from growshrink.layers.as_conv import WeightLayer
from growshrink.layers.grown import grown_modules
from growshrink.proofs._compare import EXACT_FLOAT32, EXACT_FLOAT64, LEAST_EFFECT, branch_effect
from growshrink.proofs.probes import random_images, randomize_norms_
from inputs import NetOptions
from zoo import ZOO

#: How the reasons begin of layers that cannot be grown at all.
NOT_ELIGIBLE = ("the stem", "the classifier", "it runs 0 times", "it is seen on 1x1 maps", "it is seen on one token")
LEAST_LAYER_SHARE = 0.5
#: A net whose outputs move by no more when its pixels move by their last bits (1e-15) is steady enough for a proof.
STEADY = 1e-14
HOPELESS = 1e-3


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of coverage; every branch is grown on a net of its own; some nets take only their own image size."""

    patterns: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of timm models, with wildcards. By default the first net of each family that the limit lets through."""
    zoo: bool = False
    """Nets that are not timm's, grown with the first of --branches; `patterns` choose among them."""
    max_params: Positive = 10.0
    """Largest net, in millions of parameters."""
    grow: GrowOptions = pick(GrowOptions(branches=("bottleneck", "insert", "dbb")), "branches")
    rounds: gs.Round = pick(gs.Round(epochs=1, ratio=0.5), "ratio")
    nets: NetOptions = pick(NetOptions(pixels=64), "pixels")


@dataclass(frozen=True)
class Result:
    """What became of one net with one kind of branch."""

    convs: int
    linears: int
    grown: int
    share: float
    reasons: Counter[str]
    max_rel: float  # float64; NaN where the net does not run in it
    max_rel_float32: float
    effect: float
    wrong: bool


def main(args: Args) -> int:
    """Print the table and its totals; 1 if a net crashed or is not exact."""
    torch.manual_seed(0)
    if args.zoo:
        return cover_zoo(args)
    names = [name for pattern in args.patterns for name in timm.list_models(pattern)]
    for pattern in args.patterns:
        if not timm.list_models(pattern):
            raise gs.errors.GrowShrinkError(
                f"{pattern}: matches no model of timm{did_you_mean(pattern, timm.list_models())}"
            )
    names.sort(key=num_params)  # small ones first: a run that is stopped early has seen the most nets
    groups = [[name] for name in names] or [timm.list_models(module=module) for module in timm.list_modules()]
    print(
        f"{'model':32s} {'branch':11s} {'convs':>5s} {'linears':>7s} {'grown':>5s} share  float64  float32 effect "
        "seconds  left alone"
    )
    results: dict[tuple[str, str], Result] = {}
    others = Counter[str]()
    try:
        num_wrong = cover_all(args, groups, results, others)
    finally:  # stopped by Ctrl-C, too
        print_totals(results, others)
    return int(num_wrong > 0)


def cover_all(args: Args, groups: list[list[str]], results: dict[tuple[str, str], Result], others: Counter[str]) -> int:
    """Fill `results` and the count of `others`, a line on the screen each; how many are wrong."""
    num_wrong = 0
    for group in (bar := progress_bar(groups, unit="net")):
        name = next((name for name in group if num_params(name) <= args.max_params * 1e6), None)
        if name is None:
            others["too large"] += 1
            continue
        size = size_for(name, args.nets.pixels)
        if size is None or layer_share(name, size) < LEAST_LAYER_SHARE:
            others["with most of its MACs outside convolutions and linear layers"] += 1
            continue
        for branch in args.grow.branches:
            start = time.perf_counter()
            try:
                results[name, branch] = result = cover(name, branch, size, args.rounds.ratio)
            except gs.errors.GrowError as error:
                others["without anything to grow"] += 1
                bar.write(f"{name:32s} {branch:11s} {error}", file=sys.stdout)
                continue
            except Exception as error:  # of any net, in any way: that is what is looked for
                num_wrong += 1
                others["that crashed"] += 1
                bar.write(f"{name:32s} {branch:11s} CRASHED {type(error).__name__}: {error}", file=sys.stdout)
                continue
            num_wrong += result.wrong
            reasons = ", ".join(f"{count} {reason}" for reason, count in result.reasons.most_common())
            seconds = time.perf_counter() - start
            bar.write(
                f"{name:32s} {branch:11s} {result.convs:5d} {result.linears:7d} {result.grown:5d} "
                f"{result.share:5.0%} {result.max_rel:8.1e} {result.max_rel_float32:8.1e} {result.effect:6.2f} "
                f"{seconds:7.1f}  {reasons}{'  NOT EXACT' if result.wrong else ''}",
                file=sys.stdout,
            )
    return num_wrong


def cover_zoo(args: Args) -> int:
    """Print a table of the nets in `zoo.ZOO`; 1 if one crashed or is not exact."""
    wrong = 0
    for pattern in args.patterns:
        if not any(fnmatch(name, pattern) for name in ZOO):
            raise gs.errors.GrowShrinkError(f"{pattern}: no net of the zoo is called so.")
    print("| net | of | layers | grown | float64 | float32 | effect |\n|---|---|---|---|---|---|---|", flush=True)
    for name, entry in ZOO.items():
        if args.patterns and not any(fnmatch(name, pattern) for pattern in args.patterns):
            continue
        torch.manual_seed(0)
        example = {"example_inputs": entry.example_inputs}
        try:
            grown = gs.grow(entry.make().eval(), args.grow.branches[0], ratio=args.rounds.ratio, **example)
            report = gs.growth_report(grown, **example)
            proof = gs.verify(grown, **example)
            wrong += not proof.ok
            figures = f"{proof.max_rel:.1e} | {proof.max_rel_float32:.1e} | {proof.effect:.2f}"
            figures += "" if proof.ok else " NOT EXACT"
        except Exception as error:  # of any net, in any way: that is what is looked for
            wrong += 1
            print(f"| {name} | {entry.kind} | {type(error).__name__}: {str(error).splitlines()[0]} |", flush=True)
            continue
        print(f"| {name} | {entry.kind} | {len(report.rows)} | {len(report.grown)} | {figures} |", flush=True)
    return min(1, wrong)


def print_totals(results: dict[tuple[str, str], Result], others: Counter[str]) -> None:
    """What the table comes to."""
    nets = len({name for name, _ in results})
    median = statistics.median(result.share for result in results.values()) if results else 0.0
    wrong = sum(result.wrong for result in results.values())
    above = sum(not result.max_rel_float32 <= EXACT_FLOAT32 for result in results.values())
    print(f"{nets} nets, {len(results)} grown and fused, {wrong} wrong; median share of eligible MACs {median:.1%}")
    print(f"{above} above {EXACT_FLOAT32:.0e} in float32, within 10 times the net's own rounding where not wrong")
    for what, count in others.items():
        print(f"left out: {count} {what}")


def cover(name: str, branch: str, size: InputSize, ratio: float) -> Result:
    """Grow, fuse and land one net; any exception is a finding."""
    torch.manual_seed(0)
    plain = timm.create_model(name).eval()
    flow = trace(plain, size)
    grown = gs.grow(plain, branch.split("+"), ratio=ratio, input_size=size)
    report = gs.growth_report(grown, input_size=size)
    macs, eligible = 0, 0
    for row in report.rows:
        cost = _macs(plain.get_submodule(row.name), flow.output_sizes.get(row.name))
        macs += cost * bool(row.branches)
        eligible += cost * (not row.reason.startswith(NOT_ELIGIBLE))
    grown = steady(grown, size)
    land = partial(_landed, name=name, size=size)
    single = gs.compare(grown, land(grown), input_size=size, dtype=torch.float32).max_rel
    allowed = EXACT_FLOAT32
    try:
        proof = gs.verify(grown, land, input_size=size, randomize_norms=False)
        double, effect = proof.max_rel, proof.effect
        exact = double <= EXACT_FLOAT64 and effect >= LEAST_EFFECT
        # where float32 alone turns a net into noise, it says nothing about the fuse
        allowed = max(allowed, 10 * proof.rounding_float32) if proof.rounding_float32 < HOPELESS else float("inf")
    except RuntimeError:  # it makes float32 constants inside
        double, effect, exact = float("nan"), branch_effect(grown.float(), input_size=size), True
    reasons = Counter(_brief(reason) for reason in report.skipped.values())
    num_linear = sum(isinstance(plain.get_submodule(row.name), nn.Linear) for row in report.rows)
    return Result(
        len(report.rows) - num_linear,
        num_linear,
        len(grown_modules(grown)),
        macs / max(1, eligible),
        reasons,
        double,
        single,
        effect,
        not (exact and single <= allowed),
    )


def steady(net: nn.Module, size: InputSize) -> nn.Module:
    """A copy of a grown net with random norms, branches at work and lam 0, of several the one that rounds least.

    Some nets blow every rounding up with random statistics, others with their own (features that are nearly constant
    over random images), and a proof on such a net says more about the net than about the fuse.
    """
    best, least = net, float("inf")
    coarse = random_images((size[0], 4, 4), 32, torch.float32, seed=1)  # pixels of noise all look alike further in
    for seed in range(3):
        for own_statistics in (False, True):
            candidate = copy.deepcopy(net)
            randomize_norms_(candidate, seed)
            with torch.no_grad():  # scales that start at 1e-6, and kernels and norms at 0, would hide every branch
                for key, parameter in candidate.named_parameters():
                    if parameter.dim() > 1 and not parameter.any():
                        nn.init.trunc_normal_(parameter, std=0.02)
                    elif float(parameter.abs().max()) < 1e-3 and (parameter.any() or key.endswith(".weight")):
                        parameter.fill_(0.5)
            gs.set_lambda(candidate, 0.0)
            if own_statistics:
                gs.calibrate_bn(candidate, [F.interpolate(coarse, size[1:])])
            found = rounding(candidate, size)
            if best is net or found < least:
                best, least = candidate, found
            if not least > STEADY:  # or it does not run in float64
                return best
    return best


def rounding(net: nn.Module, size: InputSize) -> float:
    """Relative change of the outputs in float64 when every pixel moves by its last bits; NaN if there is no float64."""
    x = random_images(size, 2, torch.float64, seed=2)
    double = copy.deepcopy(net).double().eval()
    with torch.no_grad():
        try:
            exact = double(x)
        except RuntimeError:  # it makes float32 constants inside
            return float("nan")
        signs = (torch.randint(2, x.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(x)
        moved = double(x * (1 + 4 * torch.finfo(x.dtype).eps * signs))
        return float((moved - exact).abs().max() / exact.abs().max())


def _landed(grown: nn.Module, name: str, size: InputSize) -> nn.Module:
    """A fresh net with what `grown` was fused to."""
    fresh = timm.create_model(name).to(next(grown.parameters()).dtype).eval()
    fresh.load_state_dict(gs.fuse(grown, input_size=size).state_dict(), strict=True)
    return fresh


@functools.cache
def num_params(name: str) -> int:
    """Parameters of a timm model."""
    return sum(p.numel() for p in _empty(name).parameters())


def size_for(name: str, side: int) -> InputSize | None:
    """The image a net is tried on: of `side` pixels, or of its own size; None if it runs on neither."""
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    for size in ((cfg.input_size[0], side, side), cfg.input_size):
        try:
            trace(_empty(name), size)
        except gs.errors.GrowShrinkError:
            continue
        return size
    return None


def layer_share(name: str, size: InputSize) -> float:
    """Share of a net's MACs that is in `nn.Conv2d`s and `nn.Linear`s."""
    model = _empty(name)
    flow = trace(model, size)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, WeightLayer)}
    return sum(_macs(m, flow.output_sizes.get(n)) for n, m in layers.items()) / max(1, gs.profile(model, size).macs)


def _empty(name: str) -> nn.Module:
    """The net without memory, or with it where timm cannot make it so."""
    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except (RuntimeError, NotImplementedError):
        return timm.create_model(name)


def _macs(module: nn.Module, output: tuple[int, int] | None) -> int:
    assert isinstance(module, WeightLayer)
    return module.weight.numel() * output[0] * output[1] if output else 0


def _brief(reason: str) -> str:
    """A reason without the names of modules in it."""
    return reason.split(",")[0].split(" (")[0].split(": ")[-1]


if __name__ == "__main__":
    run_program(main, Args, __doc__)
