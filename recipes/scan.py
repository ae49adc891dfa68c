"""Which net to deploy under a bound on its cost: scan depth and width, filled with branches and unfilled.

    python recipes/scan.py recipes/plans/digits.json --bound params --at-most 6000 --budget 8
    python recipes/scan.py recipes/plans/cifar10.json --data-dir D --at-most 1e6 --channels 0.25 0.5 1
    python recipes/scan.py PLAN --bound ms --at-most 0.5              milliseconds an image, on this machine, folded

The plan file names data, net, seeds and training, as for compare. Every net of the grid within the bound is trained for
a short budget, the better half (on the val split) for twice as long, until one is left: once with the branches of
--fill, once as plain nets for the same MACs. The test split takes no part in any choice. A finished run is a line of
runs.jsonl in --out. Started again with the same --out, the program trains what has no line yet; unfinished runs are
resumed from --out/runs/. report.md, scan.json and front.png are made from plan.json and runs.jsonl alone
(recipes/compare.py --table FOLDER rebuilds them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from growshrink.base.limits import Count, Interval, OneOf, Positive
from growshrink.base.reading import read_json
from growshrink.base.writing import write_json
from growshrink.cli.program import run_program
from growshrink.errors import PlanError, RunError
from growshrink.evidence.arms import PLAIN
from growshrink.evidence.experiment import Experiment
from growshrink.evidence.record import PLAN_FILE, Job, RunRecord, read_plan, read_runs
from halving import BOUNDS, ScanPlan, candidates_of, halve, winner, write_scan_report
from jobs import ExperimentOptions, check_jobs, feed_of, run_job


@dataclass(frozen=True, kw_only=True)
class Args(ExperimentOptions):
    """Options of scan; the model of the experiment must be a ReduceNet, its budget and arms are not used."""

    bound: Annotated[str, OneOf("no such bound", BOUNDS)] = "macs"
    """What is bounded, of the plain net: MACs or milliseconds an image, parameters, or bytes of RAM or flash."""
    at_most: Annotated[float, Interval(0, 10**15, above=True)] = 1e6
    """The bound."""
    channels: tuple[Annotated[float, Interval(0, 100, above=True)], ...] = (0.125, 0.25, 0.375, 0.5)
    """Channel multipliers of the grid."""
    depths: tuple[Count, ...] = (1, 2, 3)
    """Blocks per stage of the grid."""
    fill: str = "orepa-online"
    """What the nets are filled with: an arm of compare's."""
    budget: Positive = 5.0
    """Budget of the first rung, in epochs of each plain net."""


def main(args: Args) -> None:
    """Scan twice, and say which net won."""
    experiment = Experiment.from_dict(
        {**read_json(args.plan), "arms": [PLAIN] if args.fill == PLAIN else [PLAIN, args.fill]}
    )
    if not experiment.arm(args.fill).shrinks:
        raise PlanError(f"--fill {args.fill}: is an upper bound, and makes no plain net.")
    if not args.channels or not args.depths:
        raise PlanError("--channels, --depths: name at least one of each.")
    running, data_dir = args.running, args.data.data_dir
    out, size = running.out or Path("runs/scan"), len(args.channels) * len(args.depths)
    plan = keep_scan(args, experiment, out)
    print(f"{len(plan.candidates)} of {size} nets have {args.bound} <= {args.at_most:g}")

    def train(runs: Sequence[tuple[Experiment, Job]]) -> list[RunRecord]:
        for number, (own, job) in enumerate(runs, start=1):
            if job not in {record.job for record in read_runs(out)}:
                print(f"run {number} of {len(runs)}: {job.name}", flush=True)
                run_job(own, job, out, data_dir=data_dir, device=running.device_name, progress=not running.quiet)
        finished = {record.job: record for record in read_runs(out)}
        return [finished[job] for _, job in runs]

    for arm in experiment.arms:
        job = Job(arm=arm, seeds=experiment.seeds, lr=experiment.config.lr, budget=args.budget)
        check_jobs([(net.of(experiment), replace(job, net=net.name)) for net in plan.candidates], out, data_dir)
    for arm in experiment.arms:
        halve(experiment, plan.candidates, arm, args.budget, train)
    for arm, entries in write_scan_report(plan, out).items():
        print(f"{arm}: {winner(entries)}")
    print(f"Read {out / 'report.md'}")


def keep_scan(args: Args, experiment: Experiment, out: Path) -> ScanPlan:
    """Write plan.json, or read the one that is there: costs are measured once.

    Raises:
        RunError: The folder holds another scan.
    """
    plan = ScanPlan(
        experiment=experiment,
        bound=args.bound,
        at_most=args.at_most,
        widths=args.channels,
        depths=args.depths,
        arm=args.fill,
        budget=args.budget,
    )
    values = read_plan(out)
    if values is not None:
        old = ScanPlan.from_dict(values)
        if key := plan.differs(old):
            raise RunError(f"{out}: holds another scan ({key} differs). Choose another folder with --out.")
        return old
    feed = feed_of(experiment, experiment.seeds[0], args.data.data_dir, torch.device("cpu"))
    candidates = candidates_of(
        experiment,
        args.channels,
        args.depths,
        bound=args.bound,
        at_most=args.at_most,
        input_size=feed.input_size,
        num_classes=len(feed.classes),
    )
    plan = replace(plan, candidates=tuple(candidates))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / PLAN_FILE, plan.to_json())
    return plan


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from the last checkpoints")
