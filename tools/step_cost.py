"""What a training step with sampled widths costs: MACs counted, time measured in pairs, both over a plain step.

    python tools/step_cost.py                               every mode on reducenet20 grown with ratio 4, and _x4
    python tools/step_cost.py resnet18 --ratio 2 --pixels 64 --batch-size 16
    python tools/step_cost.py reducenet20 resnet18 --branches se condconv moe --ratio 4     of branches, at full width
    python tools/step_cost.py resnet18 --branches dbb --recompute       for less memory: grown layers run once more
    python tools/step_cost.py resnet18 --branches dbb --resident        and what processes that train the nets take
    python tools/step_cost.py --strict                      exit 1 if the default mode costs more than 1.5 plain steps

A plain step trains the plain net. The two take turns and each pair of turns gives a ratio (see benchmark.py); a mode
that augments in every k-th update only is timed over k updates at once. "memory" is counted: weights, gradients and
what the backward pass needs. --resident (on Linux, with --branches) prints beside it, in MB of the grown and the plain
net, the peak of the resident memory of a process of its own in three updates, less what it held before them: gradients,
momentum, what the backward pass needs, and what operations take while they run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch

import growshrink as gs
from growshrink.cli.forms import pick
from growshrink.cli.options import GrowOptions
from growshrink.cli.program import run_program
from growshrink.errors import RunError
from growshrink.layers import recompute
from growshrink.proofs._profile import training_macs, training_memory
from growshrink.supernet.cost import StepCost
from growshrink.training import TrainConfig, Trainer
from inputs import NetOptions
from paired import Bench, OneBatch, TimedArgs, channels_last, conditions, load

#: NetAugTask's own defaults, and every mode.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "netaug": {"mode": "netaug"},
    "netaug, distilled": {"mode": "netaug", "inplace_distil": 0.5},
    "lazy, every 4th": {"mode": "lazy", "every": 4},
    "lazy, every 8th": {"mode": "lazy", "every": 8},
    "suffix": {"mode": "suffix"},
    "suffix, every 4th": {"mode": "suffix", "every": 4},
    "single": {"mode": "single"},
    "sandwich": {"mode": "sandwich"},
    "sandwich, every 8th": {"mode": "sandwich", "every": 8},
}
DEFAULT_AT_MOST = 1.5
#: MACs, memory and paired times, over the plain net's.
Cost = tuple[float, float, Any]


@dataclass(frozen=True, kw_only=True)
class Args(TimedArgs):
    """Options of step_cost; plain models are grown."""

    nets: NetOptions = NetOptions(models=("reducenet20", "reducenet20_x4"))
    rounds: gs.Round = pick(gs.Round(epochs=1, ratio=4.0), "ratio")
    grow: GrowOptions = pick(GrowOptions(branches=()), "branches")
    training: TrainConfig = pick(TrainConfig(lr=1e-3), "recompute")
    resident: bool = False
    """Also print the peak of resident memory, measured."""


def main(args: Args) -> int:
    """Measure and print; the exit status."""
    nets = args.nets
    if nets.batch_size < 2:
        raise RunError(f"--batch-size {nets.batch_size}: must be at least 2.")
    bench = args.bench()
    before, missed = load(), False
    print(f"{'model':16s} {'mode':22s} {'MACs':>6s} {'memory':>6s} {'time':>6s}  quartiles")
    for name in nets.models:
        rows: Mapping[str, Mapping[str, Any]] = {kind: {} for kind in args.grow.branches} or MODES
        for mode, options in rows.items():
            of = branch_cost if args.grow.branches else measure
            with recompute(args.training.recompute):  # for what is counted; trainers have it in their configs
                macs, memory, row = of(bench, args, name, mode, options)
            missed |= mode == "default" and macs > DEFAULT_AT_MOST
            times = f"{row.ratio:6.2f}  {row.q1:.2f} .. {row.q3:.2f}"
            measured = resident_memory(args, name, mode) if args.resident and args.grow.branches else ""
            print(f"{name:16s} {mode:22s} {macs:6.2f} {memory:6.2f} {times}{measured}", flush=True)
    how = "; grown layers recomputed" if args.training.recompute else ""
    settings = f"batch {nets.batch_size}, {nets.pixels} pixels"
    print(f"\nOver a step of the plain net; {settings}; {conditions(before)}{how}")
    if missed:
        print(f"MISSED: the default mode is to cost at most {DEFAULT_AT_MOST} plain steps in MACs.")
    return int(args.pairs.strict and missed)


def branch_cost(bench: Bench, args: Args, name: str, kind: str, options: Mapping[str, Any]) -> Cost:
    """MACs and memory of an update of a net grown with one kind over the plain net's, and the paired times."""
    size, batch = (3, args.nets.pixels, args.nets.pixels), args.nets.batch_size
    trainers = [trainer_of(args, name, each) for each in (kind, None)]
    grown, plain = (trainer.model for trainer in trainers)
    row = bench.compare(f"{name}: {kind}", *(partial(advance, trainer) for trainer in trainers), at_least=0.0)
    macs = training_macs(grown, size, batch) / training_macs(plain, size, batch)
    return macs, training_memory(grown, size, batch) / training_memory(plain, size, batch), row


def trainer_of(args: Args, name: str, kind: str | None) -> Trainer:
    """One that trains the net, grown with a kind of branch or plain, always on the same batch."""
    size, batch = (3, args.nets.pixels, args.nets.pixels), args.nets.batch_size
    net = timm.create_model(name, num_classes=10)
    if kind is not None:
        gs.grow(net, kind, ratio=args.rounds.ratio, init="paper", input_size=size, inplace=True)
    images = torch.randn(batch, *size).contiguous(memory_format=torch.channels_last)
    return Trainer(channels_last(net), args.training, OneBatch((images, torch.randint(10, (batch,))), batch))


def advance(trainer: Trainer) -> None:
    """One update."""
    one = gs.schedules.constant(1.0)
    trainer.train(trainer.update + 1, learning_rate=one, lam=one)


def resident_memory(args: Args, name: str, kind: str) -> str:
    """MB of the grown and the plain net, counted and measured."""
    found = []
    for each in (kind, None):
        with get_context("spawn").Pool(1) as process:
            found.append(process.apply(_peak, (args, name, each)))
    counted, peaks = zip(*found, strict=True)
    return "".join(
        f"  {a:6.0f} / {b:4.0f} = {a / b:5.2f} MB {how}" for (a, b), how in ((counted, "counted"), (peaks, "resident"))
    )


def _peak(args: Args, name: str, kind: str | None) -> tuple[float, float]:
    args.running.set_threads()
    trainer = trainer_of(args, name, kind)
    with recompute(args.training.recompute):
        counted = training_memory(trainer.model, (3, args.nets.pixels, args.nets.pixels), args.nets.batch_size)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    for _ in range(3):
        advance(trainer)
    return counted / 1e6, _resident("VmHWM") - before


def _resident(key: str) -> float:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1.024e-3


def measure(bench: Bench, args: Args, name: str, mode: str, options: Mapping[str, Any]) -> Cost:
    """MACs and memory of an average update over the plain net's, and the paired times."""
    size = (3, args.nets.pixels, args.nets.pixels)
    plain = timm.create_model(name.split("_x")[0], num_classes=10)
    grown = timm.create_model(name, num_classes=10)
    if "_x" not in name:
        gs.grow(grown, ratio=args.rounds.ratio, inplace=True, input_size=size)
    task = gs.NetAugTask(grown, verbose=False, input_size=size, **options)
    images = torch.randn(args.nets.batch_size, *size).contiguous(memory_format=torch.channels_last)
    batches = OneBatch((images, torch.randint(10, (args.nets.batch_size,))), args.nets.batch_size)
    trainers = [Trainer(channels_last(net), args.training, batches) for net in (grown, plain)]
    task.attach(trainers[0].optimizer)
    one = gs.schedules.constant(1.0)

    def several(trainer: Trainer, task: gs.NetAugTask | None) -> None:
        trainer.train(trainer.update + period, learning_rate=one, lam=one, task=task)

    period = task.every
    row = bench.compare(
        f"{name}: {mode}", lambda: several(trainers[0], task), lambda: several(trainers[1], None), at_least=0.0
    )
    macs = StepCost(task, size).mean(0, 64 * period) / training_macs(plain, size)
    sizes = size, args.nets.batch_size
    return macs, training_memory(grown, *sizes) / training_memory(plain, *sizes), row


if __name__ == "__main__":
    run_program(main, Args, __doc__)
