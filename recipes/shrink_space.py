"""AngleNAS's loop on a space of widths: does dropping choices by angle leave better subnets than dropping them blindly?

    python recipes/shrink_space.py                                  digits: 4 drivers, 3 seeds
    python recipes/shrink_space.py --data cifar10 --data-dir D --first-epochs 50 --later-epochs 5 --drivers angle random

For each seed a supernet is trained on all widths. From there every driver goes through the same loop with the same
number of updates: score sampled subnets, give each width of each layer the mean score of those that contain it, drop
the lowest, train on. Drivers: angle (as published), null (the angle that structure alone would give), supernet_accuracy
(with batch norm statistics taken anew), random; any score there is. Judged by subnets drawn from what is left, on the
test split: accuracy drops by val.

Every loop is a line of DIR/results.jsonl; a killed recipe goes on when started again, and several processes with the
same --out share the work. The comparison is in DIR/shrink_space.json, and on the screen.
"""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

import growshrink as gs
from growshrink.analysis import stats
from growshrink.analysis._angle import supernet_table
from growshrink.analysis._rank import jsonable
from growshrink.analysis.results import Results
from growshrink.analysis.scores import SCORES, Bench
from growshrink.analysis.shrink import RANDOM, ShrinkPlan, shrink
from growshrink.analysis.trained import as_supernet, num_updates, train_supernet
from growshrink.base.environment import versions
from growshrink.base.limits import (
    Argument,
    BatchSize,
    Count,
    Device,
    InFolder,
    NotNegative,
    PartOf,
    Positive,
    Seed,
    Whole,
)
from growshrink.base.reading import load_weights
from growshrink.base.writing import write_atomic, write_json
from growshrink.cli.limits import DataName, ModelName
from growshrink.cli.options import Options
from growshrink.cli.program import run_program
from growshrink.data.feed import MemoryFeed
from growshrink.errors import AnalysisError, did_you_mean


@dataclass(kw_only=True)
class Args:
    """Options of shrink_space."""

    # ---- the loop
    drivers: tuple[str, ...] = ("angle", "null", "supernet_accuracy", "random")
    """What choices are dropped by."""
    first_epochs: Positive = 10.0
    """Before the first drop."""
    later_epochs: Positive = 2.0
    """After each drop."""
    samples: Count = 50
    """Subnets sampled for each choice."""
    drop: Count = 3
    """Choices dropped at a time."""
    stop_size: Count = 1000
    """Stop once this many subnets are left, or fewer."""
    rebase_after: Whole = 12
    """Measure angles from the weights of then, once, when more choices than this are gone; 0 is never."""

    # ---- data and training
    model: ModelName = "reducenet20_x4"
    """Any timm model; one that is not grown at birth is grown with bottlenecks."""
    model_kwargs: tuple[Argument, ...] = ()
    """KEY=VALUE arguments for timm.create_model."""
    data: DataName = "digits"
    """digits, fashion-mnist, cifar10, cifar100, or a folder train/CLASS/*, test/CLASS/* of images."""
    data_dir: InFolder | None = None
    """Where the data set lies (digits need none)."""
    val_fraction: PartOf = 0.3
    """Share of the training images that accuracy as a driver is taken on."""
    batch_size: BatchSize = 64
    """Images per update."""
    lr: Positive = 0.1
    """Peak learning rate of each stage."""
    weight_decay: NotNegative = 5e-4
    """Of SGD."""

    # ---- the run
    seeds: Count = 3
    """How many."""
    judged: Count = 50
    """Subnets of the final space that are evaluated."""
    out: Path | None = None
    """Folder of the run, which may be a run with the same options already; by default runs/shrink-DATA-MODEL."""
    seed: Seed = 0
    """The first of the seeds."""
    device: Device = "cpu"
    """cpu, cuda, cuda:1, mps."""
    quiet: bool = False
    """No progress bar."""


def main(args: Args) -> None:
    """Run it, or a part of it; errors of the user's are raised as GrowShrinkError."""
    for driver in args.drivers:
        if driver not in SCORES and driver != RANDOM:
            raise AnalysisError(f"--drivers {driver}: no such score{did_you_mean(driver, (*SCORES, RANDOM))}")
    if args.seeds < 1 or args.judged < 2 or not args.drivers:
        raise AnalysisError("needs at least 1 --seeds, 2 --judged, and one of --drivers.")
    plan = make_plan(args)
    name = f"shrink-{Path(args.data).resolve().name}-{args.model}".replace("/", "-")
    with Results(args.out or Path("runs") / name, identity(args)) as results:
        loops = {
            f"seed {seed}, {driver}": (seed, driver)
            for seed in range(args.seed, args.seed + args.seeds)
            for driver in args.drivers
        }
        for key in results.unfinished(list(loops)):
            results.append({"key": key, **run_loop(args, results, plan, *loops[key])})
        records = [results.done()[key] for key in loops]
        summary = compare(records, args.drivers)
        summary["about"] = {"command": shlex.join(["python", *sys.argv]), "versions": versions(), **identity(args)}
        write_json(results.path / "shrink_space.json", jsonable(summary))
        results.finish()
        print(text(summary))
        print(f"{results.path / 'shrink_space.json'} has the figures, results.jsonl every loop with its scores.")


def make_plan(args: Args) -> ShrinkPlan:
    """The loop."""
    return ShrinkPlan(
        first_epochs=args.first_epochs,
        later_epochs=args.later_epochs,
        samples=args.samples,
        drop=args.drop,
        stop_size=args.stop_size,
        rebase_after=args.rebase_after or None,
    )


def identity(args: Args) -> dict[str, Any]:
    """What has to be the same for all that work on a run."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    return {
        "program": "shrink_space",
        "options": {key: value for key, value in values.items() if key not in ("out", "quiet", "device")},
    }


def run_loop(args: Args, results: Results, plan: ShrinkPlan, seed: int, driver: str) -> dict[str, Any]:
    """One driver on one seed: what is left, and how good its subnets are."""
    options = shared(args, seed)
    feed = options.make_feed(options.torch_device())
    assert isinstance(feed, MemoryFeed)
    init, model, space = first_stage(args, options, results, feed, plan, seed)
    done = f"loop {len(results.done()) + 1} of {args.seeds * len(args.drivers)}, seed {seed}, {driver}"
    with tqdm(unit="update", desc=done, disable=args.quiet, leave=False) as bar:
        shrunk = shrink(
            init,
            model,
            space,
            feed,
            driver=driver,
            plan=plan,
            config=options.train_config(),
            seed=seed,
            after_update=bar.update,
        )
    table = supernet_table(init, model, space, input_size=feed.input_size)
    index = table.index([shrunk.space.sample(seed, -1 - i) for i in range(args.judged)])
    unseen = replace(feed, val=feed.test)  # accuracy as a driver has seen val
    top1 = SCORES["supernet_accuracy"](Bench(init, model, table, unseen), index)
    size = table.score(index)
    return {
        "seed": seed,
        "driver": driver,
        "mean": float(top1.mean()),
        "best": float(top1.max()),
        "macs": float(np.mean(size.macs)),
        "params": float(np.mean(size.params)),
        "updates": shrunk.updates,
        "size": shrunk.space.size,
        "rebased_at": shrunk.rebased_at,
        "space": {name: list(values) for name, values in shrunk.space.choices.items()},
        "steps": shrunk.steps,
    }


def shared(args: Args, seed: int) -> Options:
    """The options that other programs have too."""
    return Options.of(args, seed=seed, ema_decay=0.0)


def first_stage(
    args: Args, options: Options, results: Results, feed: MemoryFeed, plan: ShrinkPlan, seed: int
) -> tuple[nn.Module, nn.Module, gs.layers.WidthSpace]:
    """The supernet of a seed before training and after the first stage, which all drivers share."""
    torch.manual_seed(seed)
    init, about = options.make_model(feed)
    space, _ = as_supernet(init, about, input_size=feed.input_size, seed=seed)
    init = init.to(options.torch_device())
    model = copy.deepcopy(init)
    path = results.path / f"supernet-{seed}.safetensors"
    with results.once(seed):
        if not path.exists():
            total = num_updates(feed, plan.first_epochs)
            with tqdm(total=total, unit="update", desc=f"supernet {seed}", disable=args.quiet, leave=False) as bar:
                train_supernet(
                    model,
                    feed,
                    epochs=plan.first_epochs,
                    config=options.train_config(),
                    seed=seed,
                    after_update=bar.update,
                )
            write_atomic(path, save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}))
    load_weights(model, path)
    return init, model, space


def compare(records: Sequence[Mapping[str, Any]], drivers: Sequence[str]) -> dict[str, Any]:
    """Mean subnet of what each driver leaves, and its difference from random dropping over paired seeds."""
    rows: dict[str, Any] = {}
    for driver in drivers:
        own = [record for record in records if record["driver"] == driver]
        rows[driver] = {
            key: [record[key] for record in own] for key in ("mean", "best", "macs", "params", "size", "updates")
        }
    others = [driver for driver in drivers if driver != RANDOM]
    num = len(rows[drivers[0]]["mean"])
    if RANDOM in rows and num > 1:
        tests = {driver: stats.paired(rows[driver]["mean"], rows[RANDOM]["mean"]) for driver in others}
        corrected = stats.holm([test.p for test in tests.values()])
        for (driver, test), p_holm in zip(tests.items(), corrected, strict=True):
            rows[driver]["over_random"] = {"difference": test.difference, "p": test.p, "p_holm": p_holm}
    return {"drivers": rows, "seeds": num}


def text(summary: Mapping[str, Any]) -> str:
    """The comparison as a table."""
    lines = [
        f"{'driver':18s} {'mean test top-1':>15s} {'best':>8s} {'MACs':>11s} {'left':>6s} {'updates':>8s} "
        f"{'over random':>24s} {'p (Holm)':>9s}"
    ]
    for driver, row in summary["drivers"].items():
        difference, p = "", ""
        if "over_random" in row:
            value, low, high = row["over_random"]["difference"]
            difference, p = f"{value:+.2f} ({low:+.2f}, {high:+.2f})", f"{row['over_random']['p_holm']:.3f}"
        mean, best, macs, left, updates = (np.mean(row[k]) for k in ("mean", "best", "macs", "size", "updates"))
        lines.append(
            f"{driver:18s} {mean:13.2f} % {best:6.2f} % {macs:11,.0f} {left:6.0f} {updates:8.0f} "
            f"{difference:>24s} {p:>9s}".rstrip()
        )
    num = summary["seeds"]
    told = f"with {num} seeds no p is below {2 / 2**num:.3f} before correction" if num > 1 else "one seed: no test"
    lines.append(f"Subnets drawn from what is left, statistics taken anew; paired seeds, Student's intervals; {told}.")
    lines.append("Compare MACs too: a driver that leaves larger nets has found nothing but size.")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command goes on from here")
