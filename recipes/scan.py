"""Which net to deploy under a bound on its cost: scan depth and width, filled with branches and unfilled.

    python recipes/scan.py recipes/plans/digits.json --bound params --at-most 6000 --budget 8
    python recipes/scan.py recipes/plans/cifar10.json --data-dir D --at-most 1e6 --widths 0.25 0.5 1 --depths 1 2 3 5
    python recipes/scan.py PLAN --bound ms --at-most 0.5              milliseconds an image, on this machine, folded

The plan file names data, net, seeds and training, as for compare. Every net of the grid within the bound is trained for
a short budget, the better half (on the val split) for twice as long, until one is left: once with the branches of
--arm, once as plain nets for the same MACs. The test split takes no part in any choice. A finished run is a line of
runs.jsonl in --out. Started again with the same --out, the program trains what has no line yet; unfinished runs are
resumed from --out/runs/. report.md, scan.json and front.png are made from plan.json and runs.jsonl alone
(recipes/compare.py --table FOLDER rebuilds them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from growshrink.base.limits import Count, Device, InFile, InFolder, Multiplier, Operations, OutFolder, Positive
from growshrink.base.reading import read_json
from growshrink.base.writing import write_json
from growshrink.cli.program import run_program
from growshrink.errors import PlanError, RunError
from growshrink.evidence.arms import PLAIN
from growshrink.evidence.experiment import Experiment, feed_of, run_job
from growshrink.evidence.record import PLAN_FILE, Job, RunRecord, read_plan, read_runs
from growshrink.evidence.scan import BOUNDS, ScanPlan, candidates_of, halve
from growshrink.evidence.scan_table import winner, write_report


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
    plan = keep_scan(args, experiment)
    print(f"{len(plan.candidates)} of {len(args.widths) * len(args.depths)} nets have {args.bound} <= {args.at_most:g}")

    def train(runs: Sequence[tuple[Experiment, Job]]) -> list[RunRecord]:
        for number, (own, job) in enumerate(runs, start=1):
            if job not in {record.job for record in read_runs(args.out)}:
                print(f"run {number} of {len(runs)}: {job.name}", flush=True)
                run_job(own, job, args.out, data_dir=args.data_dir, device=args.device, progress=not args.quiet)
        finished = {record.job: record for record in read_runs(args.out)}
        return [finished[job] for _, job in runs]

    for arm in experiment.arms:
        halve(experiment, plan.candidates, arm, args.budget, train)
    for arm, entries in write_report(plan, args.out).items():
        print(f"{arm}: {winner(entries)}")
    print(f"Read {args.out / 'report.md'}")


def keep_scan(args: Args, experiment: Experiment) -> ScanPlan:
    """Write plan.json, or read the one that is there: costs are measured once.

    Raises:
        RunError: The folder holds another scan.
    """
    plan = ScanPlan(
        experiment=experiment,
        bound=args.bound,
        at_most=args.at_most,
        widths=args.widths,
        depths=args.depths,
        arm=args.arm,
        budget=args.budget,
    )
    values = read_plan(args.out)
    if values is not None:
        old = ScanPlan.from_dict(values)
        if key := plan.differs(old):
            raise RunError(f"{args.out}: holds another scan ({key} differs). Choose another folder with --out.")
        return old
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
    plan = replace(plan, candidates=tuple(candidates))
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / PLAN_FILE, plan.to_json())
    return plan


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command goes on from the last checkpoints")
