"""Does growing pay? Arms that all end as the same plain net, on equal budgets of training compute, with several seeds.

    python recipes/compare.py recipes/plans/digits.json --out runs/digits            a minute: does it run?
    python recipes/compare.py recipes/plans/cifar10.json --data-dir D --workers 2    hours
    python recipes/compare.py --list                                                 the arms there are
    python recipes/compare.py --table docs/evidence/digits-ablation                  rebuild a table from its runs
    python recipes/compare.py --table                                                all tables in docs/evidence/
    python recipes/compare.py --curve DIR DIR --out OUT                              one net at several budgets

A plan file names data, net, budget, seeds and arms (see recipes/plans/). Learning rates are tuned first, if the plan
says so: the same trials for every arm, judged on a part of the training set. A finished run is a line of runs.jsonl in
--out, with config, versions, scores and history. What has a line is not trained again, here or on another machine that
has plan.json and runs.jsonl, so arms, seeds and rates may be added there; unfinished runs are resumed from --out/runs/.
README.md (the table, the verdicts), table.json and curves.png are made from these two files alone.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from arm_table import add_int8, write_table
from curve import write_curve
from growshrink.base.limits import InFolder, Threads
from growshrink.base.progress import progress_bar
from growshrink.base.reading import read_json
from growshrink.cli.program import run_program
from growshrink.errors import RunError
from growshrink.evidence.arms import ARMS
from growshrink.evidence.experiment import Experiment
from growshrink.evidence.record import PLAN_FILE, ArmComparison, Job, chosen_lr, read_plan, read_runs, trials_of
from halving import ScanPlan, write_scan_report
from jobs import ExperimentOptions, check_jobs, jobs_of, keep_plan, run_job

#: Where the published experiments lie.
EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence"


@dataclass(frozen=True, kw_only=True)
class Args(ExperimentOptions):
    """Options of compare; by default the results go to docs/evidence/ and the plan's name."""

    workers: Threads = 1
    """Runs at a time, each in a process with its share of the cores."""
    stack: bool = True
    """Train all seeds of an arm side by side, as one net with grouped convolutions."""
    quantised: bool = True
    """Quantise the finished nets too, where ONNX is installed, for the int8 column (3 s a seed on CIFAR-10)."""
    list: bool = False
    """Only print the arms."""
    table: tuple[InFolder, ...] | None = None
    """Train nothing: only rebuild the tables in these folders, of scans too; without a folder all in docs/evidence/."""

    curve: tuple[InFolder, ...] | None = None
    """Train nothing: write curve.md and curve.png into --out, from folders of one net at several budgets."""


def main(args: Args) -> None:
    """Tune, train what is missing, write the table."""
    if args.list:
        for name, arm in ARMS.items():
            print(f"{name:16s} {arm.about}")
        return
    if args.curve is not None:
        if args.experiment is not None or args.running.out is None or not args.curve:
            raise RunError("--curve takes folders of results, --out OUT and no plan file.")
        write_curve(args.curve, args.running.out)
        print(f"Read {args.running.out / 'curve.md'}")
        return
    if args.table is not None:
        if args.experiment is not None:
            raise RunError("--table takes folders of results, and no plan file.")
        for folder in args.table or sorted(path.parent for path in EVIDENCE.glob(f"*/{PLAN_FILE}")):
            rebuild(folder)
        return
    experiment = Experiment.from_dict(read_json(args.plan))
    out = args.running.out or EVIDENCE / args.plan.stem
    keep_plan(experiment, out)
    trials = trials_of(experiment.comparison)
    records = read_runs(out)
    runs = [*trials, *jobs_of(experiment, chosen_lr(experiment.comparison, records), records, stack=args.stack)]
    check_jobs([(experiment, job) for job in runs], out, args.data.data_dir)
    train(args, experiment, trials, out, "tuning")
    records = read_runs(out)
    lr = chosen_lr(experiment.comparison, records)
    train(args, experiment, jobs_of(experiment, lr, records, stack=args.stack), out, "training")
    if args.quantised:
        quantise(experiment, out, args.data.data_dir)
    rebuild(out)


def quantise(experiment: Experiment, out: Path, data_dir: Path | None) -> None:
    """Add what lines lack of int8, of runs whose folders are still there."""
    try:
        add_int8(experiment, out, data_dir)
    except RunError as error:
        print(f"No int8: {error}")


def rebuild(out: Path) -> None:
    """Write the table, or a scan's report, from plan.json and runs.jsonl."""
    plan = read_plan(out)
    if plan is None:
        raise RunError(f"{out}: holds no experiment (there is no {PLAN_FILE} in it).")
    if "candidates" in plan:
        write_scan_report(ScanPlan.from_dict(plan), out)
        print(f"Read {out / 'report.md'}")
        return
    for row in write_table(ArmComparison.from_plan(plan), read_runs(out), out):
        print(f"{row.arm:16s} {row.top1:6.2f}  {row.verdict}")
    print(f"Read {out / 'README.md'}")


def train(args: Args, experiment: Experiment, jobs: Sequence[Job], out: Path, what: str) -> None:
    """Do the jobs that are not finished, `workers` at a time."""
    finished = {record.job for record in read_runs(out)}
    missing = [job for job in jobs if job not in finished]
    do = partial(run_job, experiment, out=out, data_dir=args.data.data_dir, device=args.running.device_name)
    if args.workers == 1 or len(missing) <= 1:
        for number, job in enumerate(missing, start=1):
            print(f"{what}: run {number} of {len(missing)}, {job.name}", flush=True)
            do(job, progress=not args.running.quiet)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // args.workers)
    with (
        ProcessPoolExecutor(args.workers, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool,
        progress_bar(total=len(missing), what=what, unit="run", show=not args.running.quiet) as bar,
    ):
        futures = {pool.submit(do, job, progress=False): job for job in missing}
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
                bar.write(f"{time.strftime('%H:%M:%S')} {futures[future].name}")
        except BaseException:  # a signal to this program alone: the runs are to end too, at their last checkpoints
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from the last checkpoints")
