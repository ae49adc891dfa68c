"""Which way of sampling widths is worth its cost: every mode of NetAugTask against the plain net, on one data set.

    python tools/netaug_modes.py --data cifar10 --data-dir D --pool 2 --seeds 3 --file runs/modes.jsonl

Each arm trains the same ReduceNet (its base is the plain net), for the same number of updates or, for the arms named
plain-xF, for F times as many. Scores are of the averaged weights on a part of the training set; the test set is not
read. One line of JSON per run is appended to --file; runs that are there already are not done again. Ends with a table.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

import growshrink as gs
from growshrink.base.limits import Count, OneOf
from growshrink.base.progress import progress_bar
from growshrink.base.reading import parse_json, read_bytes
from growshrink.base.writing import json_line, write_atomic
from growshrink.cli.forms import pick, plain_options
from growshrink.cli.options import DataOptions, LengthOptions, ModelOptions, RunOptions
from growshrink.cli.program import run_program
from growshrink.data.batches import Augment
from growshrink.data.datasets import DataSet, load_data, pooled
from growshrink.data.feed import MemoryFeed
from growshrink.errors import RunError
from growshrink.proofs._profile import training_macs
from growshrink.schedules.functions import cosine, rewarm
from growshrink.supernet.cost import StepCost
from growshrink.training import TrainConfig, Trainer
from growshrink.training._evaluate import evaluate
from inputs import FileOptions

#: Arguments of NetAugTask; a number is a plain net trained that many times as long.
ARMS: dict[str, dict[str, Any] | float] = {
    "plain-x1": 1.0,
    "plain-x1.4": 1.4,
    "netaug": {"mode": "netaug"},
    "netaug+distil": {"mode": "netaug", "inplace_distil": 0.5},
    # In the updates that have an augmented pass it weighs what the base's does ...
    "lazy8": {"mode": "lazy", "every": 8, "alpha": 0.125, "inplace_distil": 0.0},
    "lazy8+distil": {"mode": "lazy", "every": 8, "alpha": 0.125, "inplace_distil": 0.5},
    "suffix4+distil": {"mode": "suffix", "every": 4, "alpha": 0.25, "inplace_distil": 0.5},
    # ... or more, so that it weighs the same on average.
    "lazy8+distil, alpha 1": {"mode": "lazy", "every": 8, "alpha": 1.0, "inplace_distil": 0.5},
    "suffix4+distil, alpha 1": {"mode": "suffix", "every": 4, "alpha": 1.0, "inplace_distil": 0.5},
    "single": {"mode": "single"},
    "sandwich": {"mode": "sandwich"},
    "plain-x4": 4.0,
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of netaug_modes; the model is a ReduceNet, epochs are those of every arm but the longer plain ones."""

    pool: Count = 1
    """Average this many pixels by as many into one first: cheaper images."""
    modes: tuple[Annotated[str, OneOf("no such arm", tuple(ARMS))], ...] = tuple(ARMS)
    """Which of the arms to run, in this order."""
    length: LengthOptions = pick(LengthOptions(epochs=20.0), "epochs", "seeds")
    training: TrainConfig = pick(TrainConfig(lr=0.2), "lr")
    data: DataOptions = pick(DataOptions(batch_size=128), "data", "data_dir", "batch_size")
    model: ModelOptions = ModelOptions(model_kwargs=("width=0.5",))
    rounds: gs.Round = pick(gs.Round(epochs=1, ratio=4.0), "ratio")
    output: FileOptions = FileOptions(file=Path("runs/netaug_modes.jsonl"))
    running: RunOptions = pick(RunOptions(amp="off"), "seed", "amp", "quiet")


def main(args: Args) -> None:
    """Run what is missing, print the table."""
    warnings.simplefilter("ignore")
    if (file := args.output.file) is None:
        raise RunError("--file: name one.")
    data = pooled(load_data(args.data.name, args.data.data_dir, progress=not args.running.quiet), args.pool)
    file.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in plain_options(args).items() if key not in NOT_OF_A_RUN}
    done = read_results(file) if file.exists() else []
    for seed in range(args.running.seed, args.running.seed + args.length.seeds):
        for arm in args.modes:
            if any(r["arm"] == arm and r["seed"] == seed and r["settings"] == settings for r in done):
                continue
            result = {"arm": arm, "seed": seed, **train(args, data, arm, seed), "settings": settings}
            done.append(result)
            write_atomic(file, "".join(map(json_line, done)).encode())
    print(table([r for r in done if r["settings"] == settings and r["arm"] in args.modes]))


def read_results(path: Path) -> list[dict[str, Any]]:
    """The runs that are there already; RunError if a line is not one of them."""
    done = []
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            result = parse_json(line)
            numbers = [float(result[key]) for key in ("top1", "loss", "cost", "updates", "seconds", "seed")]
            if not (all(map(math.isfinite, numbers)) and result["arm"] in ARMS and "settings" in result):
                raise ValueError("not a run of these arms")
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise RunError(f"{path}, line {number}: not a result of netaug_modes ({error}); take it out.") from error
        done.append(result)
    return done


NOT_OF_A_RUN = ("data_dir", "modes", "seeds", "seed", "file", "quiet")


def train(args: Args, data: DataSet, arm: str, seed: int) -> dict[str, Any]:
    """One run of one arm."""
    feed = MemoryFeed.of(
        data,
        batch_size=args.data.batch_size,
        augment=Augment(crop=data.input_size[1] // 8, flip=args.data.data != "digits"),
        seed=seed,
    )
    torch.manual_seed(seed)
    net, _ = args.model.make(feed)
    plain_cost = training_macs(net, feed.input_size)
    options = ARMS[arm]
    factor = options if isinstance(options, float) else 1.0
    updates = max(1, round(args.length.epochs * feed.train.updates_per_epoch * factor))
    task, cost = None, float(plain_cost)
    if not isinstance(options, float):
        gs.grow(net, ratio=args.rounds.ratio, seed=seed, inplace=True, input_size=feed.input_size)
        gs.set_width(net, gs.width_space(net).base)  # before the trainer copies it for its average
    net = net.to(memory_format=torch.channels_last)
    trainer = Trainer(net, replace(args.training, amp=args.running.amp == "on"), feed.train)
    if not isinstance(options, float):
        task = gs.NetAugTask(net, seed=seed, verbose=False, input_size=feed.input_size, **options)
        task.attach(trainer.optimizer)
        cost = StepCost(task, feed.input_size).mean()
    began = time.perf_counter()
    with progress_bar(total=updates, what=f"{arm}, seed {seed}", show=not args.running.quiet) as bar:
        trainer.train(
            updates,
            learning_rate=rewarm(cosine(1.0, 0.0, steps=updates), [0], 100),
            lam=gs.schedules.constant(1.0),
            task=task,
            after_update=bar.update,
        )
    seconds = time.perf_counter() - began
    if arm == "single":
        trainer.calibrate_average()
    score = evaluate(trainer.best, feed.val)
    return {"top1": score.top1, "loss": score.loss, "cost": cost / plain_cost, "updates": updates, "seconds": seconds}


def table(results: list[dict[str, Any]]) -> str:
    """Mean and spread of every arm, and its difference to plain-x1 seed by seed."""
    plain = {r["seed"]: r["top1"] for r in results if r["arm"] == "plain-x1"}
    lines = ["| arm | seeds | MACs a step / plain | seconds / plain | val top-1 (sd) | less plain-x1, same seed (sd) |"]
    lines.append("|---|---|---|---|---|---|")
    seconds = {r["seed"]: r["seconds"] for r in results if r["arm"] == "plain-x1"}
    for arm in dict.fromkeys(r["arm"] for r in results):
        own = [r for r in results if r["arm"] == arm]
        gains = [r["top1"] - plain[r["seed"]] for r in own if r["seed"] in plain]
        ratio = statistics.median([r["seconds"] / seconds[r["seed"]] for r in own if r["seed"] in seconds] or [0.0])
        total = own[0]["cost"] * own[0]["updates"] / min(r["updates"] for r in results)
        lines.append(
            f"| {arm} | {len(own)} | {total:.2f} | {ratio:.2f} | {spread([r['top1'] for r in own])} | {spread(gains)} |"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f} ({statistics.stdev(values) if len(values) > 1 else 0.0:.2f})"


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from here")
