"""What to do after pruning? Fine-tune, rewind, or train the pruned shape from scratch: at equal budget, paired seeds.

    python recipes/prune_retrain.py                            digits: 8 arms, 5 seeds, learning rates tuned per arm
    python recipes/prune_retrain.py --data cifar10 --data-dir D --epochs 30 --macs 0.4 --criterion l2
    python recipes/prune_retrain.py --arms sparse sparse-rewind sparse-init sparse-fresh sparse-random narrow --macs 0.1

For each seed a dense net is trained and pruned to --macs by --criterion. Then every arm trains its net for as many
epochs as the dense net had (scratch-b: for as many MACs), with the learning rate that was best for this arm on val on
--tuning-seeds other seeds. Two arms are controls: random channels at the criterion's widths, and random widths.
The arms "sparse..." keep --macs of the single weights instead, whatever the criterion. Without tuning (--tuning-seeds
0) every arm runs at each of --lrs, and there is a table for each: does the rate explain what an arm is worth?

Every run, tuning included, is a line of DIR/results.jsonl; a killed recipe continues when started again, and several
processes with the same --out share the work. The comparison is in DIR/prune_retrain.json, and on the screen.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import nn

from growshrink.analysis._rank import jsonable
from growshrink.analysis.channels import CRITERIA, ChannelSpace
from growshrink.analysis.prune import Budget, draw_widths
from growshrink.base.environment import versions
from growshrink.base.limits import OneOf, Positive, Whole
from growshrink.base.reading import read_tensors
from growshrink.base.writing import write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import LengthOptions, RunOptions, command
from growshrink.cli.program import run_program
from growshrink.data.feed import MemoryFeed
from growshrink.errors import AnalysisError
from growshrink.proofs._profile import training_macs
from growshrink.training import TrainConfig, evaluate
from results import Results, StudyOptions, load_weights
from retraining import (
    RETRAIN_ARMS,
    SPARSE_ARMS,
    Dense,
    best_rates,
    compare_arms,
    format_comparison,
    run_arm,
    start_arm,
    train_dense,
)
from trained import num_updates

#: Tuning seeds are these on: no measured run shares a net with them.
TUNING = 100_000


@dataclass(frozen=True, kw_only=True)
class Args(StudyOptions):
    """Options of prune_retrain; the model is one of convolutions."""

    criterion: Annotated[str, OneOf("no such criterion", tuple(CRITERIA))] = "l1"
    """What is pruned by."""
    arms: tuple[Annotated[str, OneOf("no such arm", (*RETRAIN_ARMS, *SPARSE_ARMS))], ...] = tuple(RETRAIN_ARMS)
    """Which of the arms; the default leaves out those of single weights."""
    lrs: tuple[Positive, ...] = (0.1, 0.03, 0.01)
    """Peak learning rates that each arm is tuned over; --lr is the dense net's."""
    tuning_seeds: Whole = 1
    """How many seeds learning rates are tuned on; none of them is measured. 0 measures at each rate."""
    budget: Budget = Budget()
    length: LengthOptions = pick(LengthOptions(epochs=10.0, seeds=5), "epochs", "seeds")
    training: TrainConfig = pick(TrainConfig(ema_decay=0.0), "lr", "weight_decay")
    running: RunOptions = pick(RunOptions(amp="off"), "out", "seed", "device", "amp", "quiet")


def main(args: Args) -> None:
    """Run it, or a part of it; errors of the user's are raised as GrowShrinkError."""
    if args.length.seeds < 2 or not args.lrs or not args.arms:
        raise AnalysisError("needs at least 2 --seeds, one of --lrs and one of --arms.")
    if RETRAIN_ARMS.keys() & set(args.arms):  # refuse, before any training, what cannot be pruned
        feed = args.memory_feed(args.running.seed)
        space = ChannelSpace(args.net(feed, args.running.seed)[0], feed.input_size)
        if "random-widths" in args.arms:
            draw_widths(space, args.budget, 1)
    with args.results("retrain") as results:
        tuning = [TUNING + args.running.seed + number for number in range(args.tuning_seeds)]
        measured = args.seeds()
        each = [dict.fromkeys(args.arms, lr) for lr in args.lrs]
        if tuning:
            each = [best_rates(work(args, results, [(s, a, lr) for s in tuning for a in args.arms for lr in args.lrs]))]
        summaries = []
        for rates in each:
            found = work(args, results, [(s, a, rates[a]) for s in measured for a in args.arms])
            dense = [results.done()[f"seed {seed}, dense"] for seed in measured]
            summaries.append({**compare_arms(found, dense), "tuned_rates" if tuning else "rates": rates})
        summary: dict[str, Any] = summaries[0] if tuning else {"at_each_rate": summaries}
        summary["what"] = {arm: (RETRAIN_ARMS | SPARSE_ARMS)[arm] for arm in args.arms}
        summary["about"] = {"command": command(), "versions": versions(), **args.identity()}
        write_json(results.path / "prune_retrain.json", jsonable(summary))
        results.finish()
        sparse = set(args.arms) <= set(SPARSE_ARMS)
        kept = "weights, the largest of" if sparse else f"MACs, by {args.criterion}, of"
        print(f"{args.budget.macs:g} of the {kept} {args.model.name} on {args.data.name}")
        print("\n\n".join(map(format_comparison, summaries)))
        print(f"{results.path / 'prune_retrain.json'} has the figures, results.jsonl every run.")


def key_of(seed: int, arm: str, lr: float) -> str:
    """How the results name a run."""
    return f"seed {seed}, {arm}, lr {lr:g}"


def work(args: Args, results: Results, runs: Sequence[tuple[int, str, float]]) -> list[dict[str, Any]]:
    """Do the runs (seed, arm, learning rate) that are missing; the records of all of them."""
    by_key = {key_of(*run): run for run in runs}
    keys = list(by_key)
    for key in results.unfinished(keys, args.say):
        seed, arm, lr = by_key[key]
        feed = args.memory_feed(seed)  # every seed has a val split of its own, all have one test split
        model, dense = dense_net(args, results, feed, seed)
        start = start_arm(
            arm,
            model,
            dense,
            feed,
            criterion=args.criterion,
            budget=args.budget,
            epochs=args.length.epochs,
            seed=seed,
        )
        position = f"run {len(results.done().keys() & by_key.keys()) + 1} of {len(keys)}, {key}"
        with args.bar(round((1 - start.begin) * num_updates(feed, start.epochs)), position) as advance:
            record = run_arm(
                start, feed, replace(args.training, lr=lr, amp=args.running.amp == "on"), after_update=advance
            )
        results.append({"key": key, "seed": seed, "arm": arm, "lr": lr, **record})
    return [results.done()[key] for key in keys]


def dense_net(args: Args, results: Results, feed: MemoryFeed, seed: int) -> tuple[nn.Module, Dense]:
    """The dense net of a seed: trained by one process, and left in the folder with what it was before."""
    model, _ = args.net(feed, seed)
    epochs, updates = args.length.epochs, num_updates(feed, args.length.epochs)
    moments = ("init", "rewind", "trained")

    def make() -> dict[str, torch.Tensor]:
        with args.bar(updates, f"dense, seed {seed}") as advance:
            made = train_dense(
                model,
                feed,
                epochs=epochs,
                config=replace(args.training, amp=args.running.amp == "on"),
                after_update=advance,
            )
        return {f"{moment}/{name}": t for moment in moments for name, t in getattr(made, moment).items()}

    path = results.made_once(seed, f"dense-{seed}.safetensors", make)
    with results.once(seed):
        if f"seed {seed}, dense" not in results.done():
            load_weights(model, path, prefix="trained/")
            results.append(
                {
                    "key": f"seed {seed}, dense",
                    "seed": seed,
                    "val": evaluate(model, feed.val).top1,
                    "test": evaluate(model, feed.test).top1,
                    "training_macs": updates * args.data.batch_size * training_macs(model, feed.input_size),
                }
            )
    states = read_tensors(path)
    for moment in moments:
        load_weights(copy.deepcopy(model), path, prefix=f"{moment}/")  # whatever an arm begins with has to fit
    return model, Dense(*(_of(states, moment) for moment in moments))


def _of(states: Mapping[str, torch.Tensor], moment: str) -> dict[str, torch.Tensor]:
    return {name.split("/", 1)[1]: tensor for name, tensor in states.items() if name.startswith(f"{moment}/")}


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from here")
