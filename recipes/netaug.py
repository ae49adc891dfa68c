"""NetAug: train a small net inside a family of wider nets that share its weights, and deploy the small one.

    python recipes/netaug.py                                          digits, about a minute on 2 cores
    python recipes/netaug.py --data cifar10 --data-dir D --epochs 60 --batch-size 128 --lr 0.2
    python recipes/netaug.py --widths suffix,inplace_distil=0.5        other ways to draw the wider nets; see --help
    python recipes/netaug.py --exit choose                            branches go linear, the best width is merged
    python recipes/netaug.py --model reducenet20_x4 --exit choose     a net that is built grown has no other exit

Prints what the base net, the widest net and the deployed net reach on the val split, what a step costs in MACs and in
time over a plain step, and leaves runs/NAME/ with report.md, netaug.png, plain.safetensors (the net to deploy), and
init.safetensors and supernet.safetensors (all widths, with the width space) for tools/angle_rank.py.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import growshrink as gs
from growshrink.base.limits import Share
from growshrink.base.reading import read_json
from growshrink.base.writing import save_picture, write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import LengthOptions, Options, TimingOptions
from growshrink.cli.program import run_program
from growshrink.data.feed import Feed
from growshrink.errors import PlanError
from growshrink.supernet import load_supernet
from growshrink.training import Trainer

#: Shares that every exit allows.
ROUND = gs.Round(
    epochs=1, ratio=4.0, hold=0.5, vanish=0.2, settle=0.3, exit=gs.cycle.Drop(), widths=gs.cycle.NetAug("lazy")
)


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    """Options of netaug.

    Modes of --widths: netaug has the base and one wider net in every update, lazy in every 8th; in suffix only the
    blocks from a random one on are widened, the others run once for both; single is one random net and no base,
    sandwich the widest, random ones and the base.
    """

    alive: Share | None = None
    """Share of the run with activations alive; by default all of it before a drop, and half of it before a fuse."""
    rounds: gs.Round = pick(ROUND, "ratio", "exit", "widths")
    timing: TimingOptions = pick(TimingOptions(turns=20), "turns")
    length: LengthOptions = pick(LengthOptions(epochs=40.0), "epochs")


def main(args: Args) -> None:
    """Run it; errors of the user's are raised as GrowShrinkError."""
    plan = make_plan(args)  # before there is a folder, or data are decoded
    with args.running.claim(f"netaug-{args.title}") as folder:
        summary_file = folder.path / "netaug.json"
        if folder.finished and summary_file.exists():
            print(f"{folder.path} is finished: {folder.path / 'report.md'}")
            return
        torch.manual_seed(args.running.seed)
        feed = args.feed()
        model, about = args.model.make(feed)
        if not folder.finished:  # else it was stopped between the training and its summary
            args.run_cycle(plan, folder, feed, model, about)
        report = read_json(folder.path / "report.json")
        cost = cost_of_a_step(args, feed, folder.path, about) if args.timing.turns else None
        summary = {**summarise(report), "seconds_of_a_step": cost}
        draw(folder.path, summary)
        write_json(summary_file, summary)
    print(text(summary))
    print(f"Read {folder.path / 'report.md'}, look at {folder.path / 'netaug.png'}")


def make_plan(args: Args) -> gs.CyclePlan:
    """One round, all of it with sampled widths."""
    if args.rounds.widths is None:
        raise PlanError("--widths none: there would be no wider net.")
    merges = args.rounds.exit.linear
    hold = (0.5 if merges else 1.0) if args.alive is None else args.alive
    vanish = min(0.2, 1.0 - hold) if merges else 1.0 - hold
    settle = max(0.0, 1.0 - hold - vanish)
    plan = replace(args.rounds, epochs=args.length.epochs, hold=hold, vanish=vanish, settle=settle)
    return gs.CyclePlan(rounds=(plan,), seed=args.running.seed)


def summarise(report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the run."""
    (record,) = report["rounds"]
    left = record["left_by"]
    return {
        "val_top1": {
            "base": record["top1"]["base"],
            "augmented": record["top1"]["peak"],
            "deployed": record["top1"]["fused"],
        },
        "test_top1": report["final"]["top1"],
        "macs_of_a_step": left["step_macs"] / record["plain_step_macs"],
        "exit": left["exit"],
        "width": left["width"],
        "candidates": left.get("candidates", []),
        "nets": left["nets"],
    }


def cost_of_a_step(args: Args, feed: Feed, path: Path, about: Mapping[str, Any]) -> dict[str, float]:
    """Time of a step of this run over that of a plain step, taking turns: median and quartiles of the ratios."""
    supernet, space, _ = load_supernet(path / "supernet.safetensors")
    plain = timm.create_model(about["plain_name"], **about["plain_kwargs"])
    trainers = [Trainer(place(net, args), args.training, feed.train) for net in (supernet, plain)]
    assert args.rounds.widths is not None
    task = gs.NetAugTask(
        trainers[0].model,
        space=space,
        seed=args.running.seed,
        verbose=False,
        input_size=feed.input_size,
        **asdict(args.rounds.widths),
    ).attach(trainers[0].optimizer)

    def seconds(trainer: Trainer, task: gs.NetAugTask | None) -> float:
        began = time.perf_counter()
        one = gs.schedules.constant(1.0)
        float(trainer.train(trainer.update + task_period, learning_rate=one, lam=one, task=task))  # waits
        return time.perf_counter() - began

    task_period = task.every  # a lazy task is dear in one update of several
    seconds(trainers[0], task), seconds(trainers[1], None)
    ratios = [seconds(trainers[0], task) / seconds(trainers[1], None) for _ in range(args.timing.turns)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ratio": middle, "low": low, "high": high, "pairs": len(ratios)}


def place(net: nn.Module, args: Args) -> nn.Module:
    """Where and how the run had it."""
    return net.to(args.running.torch_device()).to(memory_format=torch.channels_last)


def text(summary: Mapping[str, Any]) -> str:
    """The figures as a table."""
    top1, cost = summary["val_top1"], summary["seconds_of_a_step"]
    rows = [
        ("base net", f"{top1['base']:.2f} %", "val"),
        ("widest net, statistics recalibrated", f"{top1['augmented']:.2f} %", "val, at the end of the hold"),
        (f"deployed net ({summary['exit']})", f"{top1['deployed']:.2f} %", "val"),
        ("deployed net", f"{summary['test_top1']:.2f} %", "test, read once"),
        ("MACs of an average step", f"{summary['macs_of_a_step']:.2f}", "times a plain step"),
    ]
    if cost is not None:
        rows.append(
            ("time of an average step", f"{cost['ratio']:.2f}", f"times ({cost['low']:.2f} .. {cost['high']:.2f})")
        )
    return "\n".join(f"{what:36s} {value:>9s}  {note}" for what, value, note in rows)


def draw(path: Path, summary: Mapping[str, Any]) -> None:
    """netaug.png: accuracy over the run with its stages, and of the widths that could have been deployed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    over_time, by_width = figure.subplots(1, 2, width_ratios=(2, 1), sharey=False)
    history = list(map(json.loads, (path / "log.jsonl").read_text().splitlines()))
    over_time.plot(
        [row["update"] for row in history], [row["val_top1"] for row in history], color="C0", label="base net"
    )
    for name, label, colour, dashes in (  # where both are the same, each shows in the gaps of the other
        ("augmented", "widest net, end of the hold", "C3", (0, (5, 5))),
        ("deployed", "deployed net", "C2", (5, (5, 5))),
    ):
        over_time.axhline(summary["val_top1"][name], color=colour, linestyle=dashes, label=label)
    low = min(row["val_top1"] for row in history[len(history) // 4 :])
    low = min(low, *summary["val_top1"].values())
    top = max(*(row["val_top1"] for row in history), *summary["val_top1"].values())
    over_time.set_ylim(low - 0.1 * (top - low) - 0.1, top + 0.1 * (top - low) + 0.1)
    over_time.set_xlabel("optimizer updates")
    over_time.set_ylabel("val top-1 (%)")
    over_time.legend(frameon=False)
    bars = summary["candidates"] or [{"width": name, "top1": value} for name, value in summary["val_top1"].items()]
    names = [bar["width"] if isinstance(bar["width"], str) else "random" for bar in bars]
    by_width.plot([bar["top1"] for bar in bars], range(len(bars)), "o", color="0.3")
    for row, bar in enumerate(bars):
        by_width.annotate(f"{bar['top1']:.2f}", (bar["top1"], row), (0, 7), textcoords="offset points", ha="center")
    by_width.set_yticks(range(len(bars)), names)
    by_width.set(xlim=(min(bar["top1"] for bar in bars) - 1.0, max(bar["top1"] for bar in bars) + 1.0))
    by_width.set_ylim(len(bars) - 0.5, -0.7)
    by_width.set_xlabel("val top-1 (%)")
    by_width.set_title("fused at width" if summary["candidates"] else "nets of the run")
    figure.suptitle(f"deployed: test top-1 {summary['test_top1']:.2f} %, a step costs {summary['macs_of_a_step']:.2f}x")
    save_picture(figure, path / "netaug.png")


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="--resume continues from there")
