"""Does growing pay? Arms that all end as the same plain net, on equal budgets of training compute, with several seeds.

    python recipes/compare.py recipes/plans/digits.json --out runs/digits            a minute: does it run?
    python recipes/compare.py recipes/plans/cifar10.json --data-dir D --workers 2    hours
    python recipes/compare.py --list                                                 the arms there are

A plan file names data, net, budget, seeds and arms (see recipes/plans/). Learning rates are tuned first, if the plan
says so: the same trials for every arm, judged on a part of the training set. Every run is a folder of its own with
config, versions and log. Started again, the program goes on where it was; nothing that is finished is done again.
Leaves README.md (the table, the verdicts), table.json and curves.png in --out.
"""

from __future__ import annotations

import multiprocessing
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

from growshrink.base.limits import Device, InFile, InFolder, OutFolder, Threads
from growshrink.base.reading import read_json
from growshrink.base.writing import write_json
from growshrink.cli.program import run_program
from growshrink.errors import RunError
from growshrink.evidence.arms import ARMS
from growshrink.evidence.experiment import Experiment, Job, chosen_lr, jobs_of, read_scores, run_job, trials_of
from growshrink.evidence.table import rows_of, write_table


@dataclass(kw_only=True)
class Args:
    """Options of compare."""

    plan: Annotated[InFile | None, tyro.conf.Positional] = None
    """A JSON file: the experiment."""
    out: OutFolder | None = None
    """Folder of the results; by default recipes/results/ and the plan's name."""
    data_dir: InFolder | None = None
    """Where the data set lies."""
    workers: Threads = 1
    """Runs at a time, each in a process with its share of the cores."""
    stack: bool = True
    """Train all seeds of an arm side by side, as one net with grouped convolutions."""
    device: Device = "cpu"
    """cpu, cuda, cuda:1."""
    list: bool = False
    """Only print the arms."""
    table: bool = False
    """Train nothing: only write the table of what is finished."""
    quiet: bool = False
    """No progress bars."""


def main(args: Args) -> None:
    """Tune, train what is missing, write the table."""
    if args.list:
        for name, arm in ARMS.items():
            print(f"{name:16s} {arm.about}")
        return
    if args.plan is None:
        raise RunError("name a plan file, e.g. recipes/plans/digits.json (or --list the arms).")
    experiment = Experiment.from_dict(read_json(args.plan))
    out = args.out or Path(__file__).parent / "results" / args.plan.stem
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "plan.json"
    if kept.exists() and (key := experiment.differs(read_json(kept))):
        raise RunError(f"{out}: holds the results of another plan ({key} differs). Choose another folder with --out.")
    write_json(kept, experiment.to_json())
    if not args.table:
        train(args, experiment, trials_of(experiment), out, "tuning")
    lr = chosen_lr(experiment, out)
    jobs = jobs_of(experiment, lr, stack=args.stack)
    if not args.table:
        train(args, experiment, jobs, out, "training")
    rows = rows_of(experiment, jobs, out)
    write_table(rows, experiment, jobs, out, shlex.join(["python", *sys.argv]))
    for row in rows:
        print(f"{row.arm:16s} {row.top1:6.2f}  {row.verdict}")
    print(f"Read {out / 'README.md'}")


def train(args: Args, experiment: Experiment, jobs: Sequence[Job], out: OutFolder, what: str) -> None:
    """All jobs, `workers` at a time."""
    missing = [job for job in jobs if not read_scores(out, job)]
    do = partial(run_job, experiment, out=out, data_dir=args.data_dir, device=args.device)
    if args.workers == 1 or len(missing) <= 1:
        for number, job in enumerate(missing, start=1):
            print(f"{what}: run {number} of {len(missing)}, {job.folder}", flush=True)
            do(job, progress=not args.quiet)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // args.workers)
    with (
        ProcessPoolExecutor(args.workers, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool,
        tqdm(total=len(missing), desc=what, unit="run", disable=args.quiet, ncols=110) as bar,
    ):
        futures = {pool.submit(do, job, progress=False): job for job in missing}
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
                bar.write(f"{time.strftime('%H:%M:%S')} {futures[future].folder}")
        except BaseException:  # a signal to this program alone: the runs are to end too, at their last checkpoints
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command goes on from the last checkpoints")
