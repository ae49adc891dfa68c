"""What to do after pruning? Fine-tune, rewind, or train the pruned shape from scratch: at equal budget, paired seeds.

    python recipes/prune_retrain.py                            digits: 7 arms, 5 seeds, learning rates tuned per arm
    python recipes/prune_retrain.py --data cifar10 --data-dir D --epochs 30 --macs 0.4 --criterion l2

For each seed a dense net is trained and pruned to --macs by --criterion. Then every arm trains its net for as many
epochs as the dense net had (scratch-b: for as many MACs), with the learning rate that was best for this arm on val on
--tuning-seeds other seeds. Two arms are controls: random channels at the criterion's widths, and random widths.

Every run, tuning included, is a line of DIR/results.jsonl; a killed recipe goes on when started again, and several
processes with the same --out share the work. The comparison is in DIR/prune_retrain.json, and on the screen.
"""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from growshrink.analysis._rank import jsonable
from growshrink.analysis.channels import CRITERIA
from growshrink.analysis.prune import Budget
from growshrink.analysis.results import Results
from growshrink.analysis.retrain import (
    RETRAIN_ARMS,
    Dense,
    best_rates,
    compare_arms,
    format_comparison,
    run_arm,
    start_arm,
    train_dense,
)
from growshrink.analysis.trained import num_updates
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
    SomeOrAll,
)
from growshrink.base.reading import load_weights, read_tensors
from growshrink.base.writing import write_atomic, write_json
from growshrink.cli.limits import DataName, ModelName
from growshrink.cli.options import Options
from growshrink.cli.program import run_program
from growshrink.data.feed import MemoryFeed
from growshrink.errors import AnalysisError, did_you_mean
from growshrink.proofs._profile import training_macs
from growshrink.training import evaluate

#: Tuning seeds are these on: no measured run shares a net with them.
TUNING = 100_000


@dataclass(kw_only=True)
class Args:
    """Options of prune_retrain."""

    # ---- what is pruned, and how
    model: ModelName = "reducenet20"
    """Any timm model of convolutions."""
    model_kwargs: tuple[Argument, ...] = ()
    """KEY=VALUE arguments for timm.create_model."""
    macs: SomeOrAll = 0.5
    """Of the pruned net over the dense one's."""
    tolerance: PartOf = 0.05
    """Relative, of that."""
    criterion: str = "l1"
    """l1, l2, bn_scale, fpgm, taylor."""
    arms: tuple[str, ...] = tuple(RETRAIN_ARMS)
    """Which of the arms."""

    # ---- training
    data: DataName = "digits"
    """digits, fashion-mnist, cifar10, cifar100, or a folder train/CLASS/*, test/CLASS/* of images."""
    data_dir: InFolder | None = None
    """Where the data set lies (digits need none)."""
    epochs: Positive = 10.0
    """Of the dense net and of every arm."""
    batch_size: BatchSize = 64
    """Images per update."""
    lr: Positive = 0.1
    """Peak learning rate of the dense net."""
    lrs: tuple[Positive, ...] = (0.1, 0.03, 0.01)
    """Peak learning rates that each arm is tuned over."""
    weight_decay: NotNegative = 5e-4
    """Of SGD."""
    amp: bool = False
    """bfloat16 autocast."""

    # ---- the run
    seeds: Count = 5
    """How many are measured: with 5 no p value can be below 0.0625."""
    tuning_seeds: Count = 1
    """How many learning rates are tuned on; none of them is measured."""
    out: Path | None = None
    """Folder of the run, which may be a run with the same options already; by default runs/retrain-DATA-MODEL."""
    seed: Seed = 0
    """The first of the seeds."""
    device: Device = "cpu"
    """cpu, cuda, cuda:1, mps."""
    quiet: bool = False
    """No progress bar."""


def main(args: Args) -> None:
    """Run it, or a part of it; errors of the user's are raised as GrowShrinkError."""
    check(args)
    name = f"retrain-{Path(args.data).resolve().name}-{args.model}".replace("/", "-")
    with Results(args.out or Path("runs") / name, identity(args)) as results:
        tuning = [TUNING + args.seed + number for number in range(args.tuning_seeds)]
        measured = [args.seed + number for number in range(args.seeds)]
        rates = best_rates(work(args, results, [(s, a, lr) for s in tuning for a in args.arms for lr in args.lrs]))
        found = work(args, results, [(s, a, rates[a]) for s in measured for a in args.arms])
        dense = [results.done()[f"seed {seed}, dense"] for seed in measured]
        summary = compare_arms(found, dense)
        summary["tuned_rates"] = rates
        summary["what"] = {arm: RETRAIN_ARMS[arm] for arm in args.arms}
        summary["about"] = {"command": shlex.join(["python", *sys.argv]), "versions": versions(), **identity(args)}
        write_json(results.path / "prune_retrain.json", jsonable(summary))
        results.finish()
        print(f"{args.model} on {args.data}, pruned by {args.criterion} to {args.macs:g} of the MACs")
        print(format_comparison(summary))
        print(f"{results.path / 'prune_retrain.json'} has the figures, results.jsonl every run.")


def check(args: Args) -> None:
    """AnalysisError for what no run could be made of."""
    for arm in args.arms:
        if arm not in RETRAIN_ARMS:
            raise AnalysisError(f"--arms {arm}: no such arm{did_you_mean(arm, RETRAIN_ARMS)}")
    if args.criterion not in CRITERIA:
        raise AnalysisError(f"--criterion {args.criterion}: no such criterion{did_you_mean(args.criterion, CRITERIA)}")
    if args.seeds < 2 or args.tuning_seeds < 1 or not args.lrs or not args.arms or not args.epochs > 0:
        raise AnalysisError(
            "needs at least 2 --seeds, 1 --tuning-seeds, one of --lrs, one of --arms, and --epochs > 0."
        )
    Budget(args.macs, args.tolerance)


def identity(args: Args) -> dict[str, Any]:
    """What has to be the same for all that work on a run."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    return {
        "program": "prune_retrain",
        "options": {key: value for key, value in values.items() if key not in ("out", "quiet", "device")},
    }


def key_of(seed: int, arm: str, lr: float) -> str:
    """How the results name a run."""
    return f"seed {seed}, {arm}, lr {lr:g}"


def work(args: Args, results: Results, runs: Sequence[tuple[int, str, float]]) -> list[dict[str, Any]]:
    """Do the runs (seed, arm, learning rate) that nobody has done; the records of all of them."""
    by_key = {key_of(*run): run for run in runs}
    keys = list(by_key)
    for key in results.unfinished(keys):
        seed, arm, lr = by_key[key]
        options = shared(args, seed)
        feed = options.make_feed(options.torch_device())
        assert isinstance(feed, MemoryFeed)
        model, dense = dense_net(args, options, results, feed, seed)
        start = start_arm(
            arm,
            model,
            dense,
            feed,
            criterion=args.criterion,
            budget=Budget(args.macs, args.tolerance),
            epochs=args.epochs,
            seed=seed,
        )
        position = f"run {len(results.done().keys() & by_key.keys()) + 1} of {len(keys)}, {key}"
        total = round((1 - start.begin) * num_updates(feed, start.epochs))
        with tqdm(total=total, unit="update", desc=position, disable=args.quiet, leave=False) as bar:
            config = replace(options.train_config(), lr=lr)
            record = run_arm(start, feed, config, after_update=bar.update)
        results.append({"key": key, "seed": seed, "arm": arm, "lr": lr, **record})
    return [results.done()[key] for key in keys]


def shared(args: Args, seed: int) -> Options:
    """The options that other programs have too. Every seed has a val split of its own, all have one test split."""
    return Options.of(args, seed=seed, ema_decay=0.0)


def dense_net(args: Args, options: Options, results: Results, feed: MemoryFeed, seed: int) -> tuple[nn.Module, Dense]:
    """The dense net of a seed: trained by one process, and left in the folder with what it was before."""
    torch.manual_seed(seed)
    model, _ = options.make_model(feed)
    model = model.to(options.torch_device())
    path = results.path / f"dense-{seed}.safetensors"
    moments = ("init", "rewind", "trained")
    with results.once(seed):
        if not path.exists():
            total = num_updates(feed, args.epochs)
            with tqdm(total=total, unit="update", desc=f"dense, seed {seed}", disable=args.quiet, leave=False) as bar:
                made = train_dense(
                    model, feed, epochs=args.epochs, config=options.train_config(), after_update=bar.update
                )
            tensors = {
                f"{moment}/{name}": tensor.cpu().contiguous()
                for moment in moments
                for name, tensor in getattr(made, moment).items()
            }
            write_atomic(path, save(tensors))
        if f"seed {seed}, dense" not in results.done():
            load_weights(model, path, prefix="trained/")
            updates = num_updates(feed, args.epochs)
            results.append(
                {
                    "key": f"seed {seed}, dense",
                    "seed": seed,
                    "val": evaluate(model, feed.val).top1,
                    "test": evaluate(model, feed.test).top1,
                    "training_macs": updates * args.batch_size * training_macs(model, feed.input_size),
                }
            )
    states = read_tensors(path)
    for moment in moments:
        load_weights(copy.deepcopy(model), path, prefix=f"{moment}/")  # whatever an arm begins with has to fit
    return model, Dense(*(_of(states, moment) for moment in moments))


def _of(states: Mapping[str, torch.Tensor], moment: str) -> dict[str, torch.Tensor]:
    return {name.split("/", 1)[1]: tensor for name, tensor in states.items() if name.startswith(f"{moment}/")}


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command goes on from here")
