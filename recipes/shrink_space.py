"""AngleNAS's loop on a space of widths: does dropping choices by angle leave better subnets than dropping them blindly?

    python recipes/shrink_space.py                                  digits: 4 drivers, 3 seeds
    python recipes/shrink_space.py --data cifar10 --data-dir D --first-epochs 50 --later-epochs 5 --drivers angle random

For each seed a supernet is trained on all widths. From there every driver goes through the same loop with the same
number of updates: score sampled subnets, give each width of each layer the mean score of those that contain it, drop
the lowest, train on. Drivers: angle (as published), null (the angle that structure alone would give), supernet_accuracy
(with batch norm statistics recalibrated), random; any score there is. Judged by subnets drawn from what is left, on the
test split: accuracy drops by val, and so does the choice of the best of those that were drawn.

Every loop is a line of DIR/results.jsonl; a killed recipe continues when started again, and several processes with the
same --out share the work. The comparison is in DIR/shrink_space.json, and on the screen.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from torch import Tensor, nn

import growshrink as gs
from growshrink.analysis import stats
from growshrink.analysis._angle import supernet_table
from growshrink.analysis._rank import jsonable
from growshrink.analysis.scores import FAST, SCORES, Bench
from growshrink.base.environment import versions
from growshrink.base.limits import Count, OneOf
from growshrink.base.progress import progress_bar
from growshrink.base.writing import write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import DataOptions, LengthOptions, ModelOptions, command
from growshrink.cli.program import run_program
from growshrink.data.feed import MemoryFeed
from growshrink.errors import AnalysisError
from results import Results, StudyOptions, load_weights
from shrinking import RANDOM, ShrinkPlan, shrink
from trained import as_supernet, num_updates, train_supernet


@dataclass(frozen=True, kw_only=True)
class Args(StudyOptions):
    """Options of shrink_space; a model that is not built grown is grown with bottlenecks."""

    drivers: tuple[Annotated[str, OneOf("no such score", (*SCORES, RANDOM))], ...] = (
        "angle",
        "null",
        "supernet_accuracy",
        "random",
    )
    """What choices are dropped by."""
    judged: Count = 50
    """Subnets of the final space that are evaluated."""
    loop: ShrinkPlan = ShrinkPlan()
    length: LengthOptions = pick(LengthOptions(seeds=3), "seeds")
    data: DataOptions = pick(DataOptions(val_fraction=0.3), "data", "data_dir", "val_fraction", "batch_size")
    model: ModelOptions = ModelOptions(model="reducenet20_x4")


def main(args: Args) -> None:
    """Run it, or a part of it; errors of the user's are raised as GrowShrinkError."""
    if args.judged < 2 or not args.drivers or not args.data.val_fraction:
        raise AnalysisError("needs at least 2 --judged, one of --drivers, and --val-fraction > 0.")
    with args.results("shrink") as results:
        loops = {f"seed {seed}, {driver}": (seed, driver) for seed in args.seeds() for driver in args.drivers}
        feed = args.memory_feed()
        net, about = args.net(feed, args.running.seed)
        space, _ = as_supernet(net, about, input_size=feed.input_size, seed=args.running.seed)
        for key in args.jobs(results, list(loops), net, feed, updates_of(args, feed, space)):
            results.append({"key": key, **run_loop(args, results, *loops[key])})
        records = [results.done()[key] for key in loops]
        summary = compare(records, args.drivers)
        summary["about"] = {"command": command(), "versions": versions(), **args.identity()}
        write_json(results.path / "shrink_space.json", jsonable(summary))
        results.finish()
        print(text(summary))
        print(f"{results.path / 'shrink_space.json'} has the figures, results.jsonl every loop with its scores.")


def updates_of(args: Args, feed: MemoryFeed, space: gs.layers.WidthSpace) -> float:
    """Updates of a loop and its share of the supernet, about; a forward pass counts a third."""
    loop, widths = args.loop, list(map(len, space.choices.values()))
    steps = min(loop.max_iterations, -(-(sum(widths) - len(widths)) // loop.drop))
    trained = steps * num_updates(feed, loop.later_epochs) + num_updates(feed, loop.first_epochs) / len(args.drivers)
    by_accuracy = sum(driver not in (*FAST, RANDOM) for driver in args.drivers) / len(args.drivers)
    scored = args.judged * len(feed.data.test) + by_accuracy * steps * loop.samples * max(widths) * len(feed.data.val)
    return trained + scored / feed.train.batch_size / 3


def run_loop(args: Args, results: Results, seed: int, driver: str) -> dict[str, Any]:
    """One driver on one seed: what is left, and how good its subnets are."""
    feed = args.memory_feed(seed)
    init, model, space = first_stage(args, results, feed, seed)
    done = f"loop {len(results.done()) + 1} of {args.length.seeds * len(args.drivers)}, seed {seed}, {driver}"
    with progress_bar(what=done, show=not args.running.quiet) as bar:
        shrunk = shrink(
            init,
            model,
            space,
            feed,
            driver=driver,
            plan=args.loop,
            config=args.training,
            seed=seed,
            after_update=bar.update,
        )
    table = supernet_table(init, model, space, input_size=feed.input_size)
    index = table.index([shrunk.space.sample(seed, -1 - i) for i in range(args.judged)])
    unseen = replace(feed, val=feed.test)  # accuracy as a driver has seen val
    accuracy = SCORES["supernet_accuracy"]
    chosen, top1 = (accuracy(Bench(init, model, table, images), index) for images in (feed, unseen))
    size = table.score(index)
    return {
        "seed": seed,
        "driver": driver,
        "mean": float(top1.mean()),
        "best": float(top1[int(np.argmax(chosen))]),
        "macs": float(np.mean(size.macs)),
        "params": float(np.mean(size.params)),
        "updates": shrunk.updates,
        "size": shrunk.space.size,
        "rebased_at": shrunk.rebased_at,
        "space": {name: list(values) for name, values in shrunk.space.choices.items()},
        "steps": shrunk.steps,
    }


def first_stage(
    args: Args, results: Results, feed: MemoryFeed, seed: int
) -> tuple[nn.Module, nn.Module, gs.layers.WidthSpace]:
    """The supernet of a seed before training and after the first stage, which all drivers share."""
    init, about = args.net(feed, seed)
    space, _ = as_supernet(init, about, input_size=feed.input_size, seed=seed)
    init = init.to(args.running.torch_device())
    model, epochs = copy.deepcopy(init), args.loop.first_epochs

    def make() -> Mapping[str, Tensor]:
        with args.bar(num_updates(feed, epochs), f"supernet {seed}") as advance:
            how: dict[str, Any] = {"after_update": advance, "train": results.kept(f"supernet-{seed}")}
            train_supernet(model, feed, epochs=epochs, config=args.training, seed=seed, **how)
        return model.state_dict()

    load_weights(model, results.made_once(seed, f"supernet-{seed}.safetensors", make))
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
        for what, key in (("mean", "over_random"), ("best", "best_over_random")):
            tests = {driver: stats.paired(rows[driver][what], rows[RANDOM][what]) for driver in others}
            corrected = stats.holm([test.p for test in tests.values()])
            for (driver, test), p_holm in zip(tests.items(), corrected, strict=True):
                rows[driver][key] = {"difference": test.difference, "p": test.p, "p_holm": p_holm}
    return {"drivers": rows, "seeds": num}


def text(summary: Mapping[str, Any]) -> str:
    """The comparison as a table."""
    lines = [
        f"{'driver':18s} {'mean test top-1':>15s} {'best':>8s} {'MACs':>11s} {'left':>6s} {'updates':>8s} "
        f"{'over random':>24s} {'p (Holm)':>9s} {'best over random':>24s}"
    ]
    for driver, row in summary["drivers"].items():
        difference, p, best_difference = "", "", ""
        if "over_random" in row:
            difference, best_difference = (
                "{:+.2f} ({:+.2f}, {:+.2f})".format(*row[key]["difference"])
                for key in ("over_random", "best_over_random")
            )
            p = f"{row['over_random']['p_holm']:.3f}"
        mean, best, macs, left, updates = (np.mean(row[k]) for k in ("mean", "best", "macs", "size", "updates"))
        lines.append(
            f"{driver:18s} {mean:13.2f} % {best:6.2f} % {macs:11,.0f} {left:6.0f} {updates:8.0f} "
            f"{difference:>24s} {p:>9s} {best_difference:>24s}".rstrip()
        )
    num = summary["seeds"]
    told = f"with {num} seeds no p is below {2 / 2**num:.3f} before correction" if num > 1 else "one seed: no test"
    lines.append(
        f"Subnets drawn from what is left, statistics recalibrated; paired seeds, Student's intervals; {told}."
    )
    lines.append(
        "best: of the subnets drawn, that of the best val top-1; over the best of as many after random dropping, which "
        "has as many updates."
    )
    lines.append("Compare MACs too: a driver that leaves larger nets has found nothing but size.")
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from here")
