"""Which net to deploy under a bound on its cost: scan depth and width, filled with branches and unfilled.

    python recipes/scan.py recipes/plans/digits.json --bound params --at-most 6000 --budget 8
    python recipes/scan.py recipes/plans/cifar10.json --data-dir D --at-most 1e6 --widths 0.25 0.5 1 --depths 1 2 3 5
    python recipes/scan.py PLAN --bound ms --at-most 0.5              milliseconds an image, on this machine, folded

The plan file names data, net, seeds and training, as for compare. Every net of the grid within the bound is trained for
a short budget, the better half (on the val split) for twice as long, until one is left: once with the branches of
--arm, once as plain nets for the same MACs. The test split takes no part in any choice. Started again with the same
--out, the program goes on where it was. Leaves report.md, scan.json and front.png there.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from growshrink.base.limits import Count, Device, InFile, InFolder, Multiplier, Operations, OutFolder, Positive
from growshrink.base.reading import read_json
from growshrink.base.writing import save_picture, write_atomic, write_json
from growshrink.cli.program import run_program
from growshrink.errors import PlanError, RunError
from growshrink.evidence.arms import PLAIN
from growshrink.evidence.experiment import Experiment, Job, feed_of, read_scores, run_job
from growshrink.evidence.scan import BOUNDS, Entry, candidates_of, front, halve


@dataclass(kw_only=True)
class Args:
    """Options of scan."""

    plan: Annotated[InFile, tyro.conf.Positional]
    """A JSON file: the experiment, as for compare (its model must be a ReduceNet; its budget and arms are not used)."""
    out: OutFolder = Path("runs/scan")
    """Folder of the results."""
    data_dir: InFolder | None = None
    """Where the data set lies."""
    bound: Annotated[Literal["macs", "params", "ms"], tyro.conf.arg(metavar="|".join(BOUNDS))] = "macs"
    """What is bounded, of the plain net: MACs or milliseconds an image, or parameters."""
    at_most: Operations = 1e6
    """The bound."""
    widths: tuple[Multiplier, ...] = (0.125, 0.25, 0.375, 0.5)
    """Channel multipliers of the grid."""
    depths: tuple[Count, ...] = (1, 2, 3)
    """Blocks per stage of the grid."""
    arm: str = "orepa-online"
    """What the nets are filled with: an arm of compare's."""
    budget: Positive = 5.0
    """Of the first rung, in epochs of each plain net."""
    device: Device = "cpu"
    """cpu, cuda, cuda:1."""
    quiet: bool = False
    """No progress bars."""


def main(args: Args) -> None:
    """Scan twice, and say which net won."""
    experiment = Experiment.from_dict(
        {**read_json(args.plan), "arms": [PLAIN] if args.arm == PLAIN else [PLAIN, args.arm]}
    )
    if not experiment.arm(args.arm).shrinks:
        raise PlanError(f"--arm {args.arm}: is an upper bound, and makes no plain net.")
    if not args.widths or not args.depths:
        raise PlanError("--widths, --depths: name at least one of each.")
    args.out.mkdir(parents=True, exist_ok=True)
    options = {
        **json.loads(json.dumps(asdict(args), default=str)),
        "experiment": experiment.to_json(),
    }
    for key in ("plan", "out", "data_dir", "quiet", "device"):
        del options[key]
    kept = args.out / "options.json"
    if kept.exists() and read_json(kept) != options:
        raise RunError(f"{args.out}: holds another scan. Choose another folder with --out.")
    write_json(kept, options)
    feed = feed_of(experiment, experiment.seeds[0], args.data_dir, torch.device("cpu"))
    candidates = candidates_of(
        experiment,
        args.widths,
        args.depths,
        bound=args.bound,
        at_most=args.at_most,
        input_size=feed.input_size,
        num_classes=len(feed.classes),
    )
    print(f"{len(candidates)} of {len(args.widths) * len(args.depths)} nets have {args.bound} <= {args.at_most:g}")

    def train(runs: Sequence[tuple[Experiment, Job, Path]]) -> None:
        for number, (own, job, folder) in enumerate(runs, start=1):
            if not read_scores(folder, job):
                print(f"run {number} of {len(runs)}: {folder.name}, {job.folder}", flush=True)
                run_job(own, job, folder, data_dir=args.data_dir, device=args.device, progress=not args.quiet)

    scans = {arm: halve(experiment, candidates, arm, args.budget, args.out, train) for arm in experiment.arms}
    write_report(args, scans)
    for arm, entries in scans.items():
        print(f"{arm}: {winner(entries)}")
    print(f"Read {args.out / 'report.md'}")


def winner(entries: Sequence[Entry]) -> str:
    """The last one standing, in a line."""
    last = entries[-1]
    return (
        f"{last.candidate.name}, cost {last.candidate.cost:g}, val {last.val:.2f} %, test {last.test:.2f} % after "
        f"{last.budget:g} epochs' worth"
    )


def write_report(args: Args, scans: dict[str, list[Entry]]) -> None:
    """report.md, scan.json, front.png."""
    lines = [f"# Scan: {args.bound} <= {args.at_most:g}", ""]
    for arm, entries in scans.items():
        best = {entry.candidate.name for entry in front(entries)}
        lines += [f"## {arm}", "", f"Won: {winner(entries)}.", ""]
        lines += [f"| net | {args.bound} | budget (epochs) | val top-1 | |", "|---|---|---|---|---|"]
        for entry in entries:
            mark = "on the front" if entry.rung == 0 and entry.candidate.name in best else ""
            lines.append(
                f"| {entry.candidate.name} | {entry.candidate.cost:g} | {entry.budget:g} | {entry.val:.2f} | {mark} |"
            )
        lines.append("")
    lines += ["![front](front.png)", "", f"`{shlex.join(['python', *sys.argv])}`", ""]
    write_json(args.out / "scan.json", {arm: [asdict(entry) for entry in entries] for arm, entries in scans.items()})
    draw(args, scans)
    write_atomic(args.out / "report.md", "\n".join(lines).encode())


def draw(args: Args, scans: dict[str, list[Entry]]) -> None:
    """Cost and accuracy of all candidates after the first rung, and the fronts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for colour, (arm, entries) in zip(("black", "C1"), scans.items(), strict=False):
        first = [entry for entry in entries if entry.rung == 0]
        axis.scatter([e.candidate.cost for e in first], [e.val for e in first], color=colour, s=14)
        best = front(entries)
        axis.step([e.candidate.cost for e in best], [e.val for e in best], where="post", color=colour, label=arm)
    axis.set_xlabel(f"{args.bound} of the plain net")
    axis.set_ylabel(f"val top-1 (%) after {args.budget:g} epochs' worth of training")
    axis.legend(frameon=False)
    save_picture(figure, args.out / "front.png")


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command goes on from the last checkpoints")
