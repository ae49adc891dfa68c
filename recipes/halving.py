"""What scan.py scans (not a program): depth and width of a plain net under a bound on its cost, by successive halving.

Every candidate is small enough by construction, is grown with the branches of an arm and trained for a short budget;
the better half is trained for twice as long, until one is left.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

from growshrink.algebra.dataflow import InputSize
from growshrink.base.config import Checked, from_dict, to_dict
from growshrink.base.timing import interleaved_timings
from growshrink.base.writing import save_picture, write_atomic, write_json
from growshrink.errors import PlanError, RunError
from growshrink.evidence.experiment import Experiment
from growshrink.evidence.record import Job, RunRecord, read_runs
from growshrink.proofs._profile import profile
from growshrink.proofs.probes import random_images
from growshrink.transforms import fold

#: Kinds of memory, in bytes: activations at their peak (RAM) and weights (flash), see `Profile.memory`.
MEMORY = ("ram_float32", "ram_int8", "flash_float32", "flash_int8")
BOUNDS = ("macs", "params", "ms", *MEMORY)


@dataclass(frozen=True)
class Candidate(Checked):
    """A plain net, and what it costs: MACs and parameters, or milliseconds for one image."""

    width: float
    depth: int
    cost: float

    @property
    def name(self) -> str:
        """For folders and tables."""
        return f"width-{self.width:g}-depth-{self.depth}"

    def of(self, experiment: Experiment) -> Experiment:
        """Put this net into an experiment."""
        kwargs = {**experiment.model_kwargs, "width": self.width, "depths": [self.depth] * 3}
        return replace(experiment, model_kwargs=kwargs)


@dataclass(frozen=True, kw_only=True)
class ScanPlan(Checked):
    """What is scanned: plan.json of a scan's folder, with the options of `halve` and `candidates_of`.

    The budget of `experiment` is not used. `candidates` are measured once: milliseconds differ between machines.
    """

    experiment: Experiment
    bound: str
    at_most: float
    widths: tuple[float, ...]
    depths: tuple[int, ...]
    arm: str
    budget: float
    candidates: tuple[Candidate, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Convert to plain lists and numbers."""
        return to_dict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ScanPlan:
        """Convert back from `to_json`; PlanError for what is no plan of a scan."""
        return from_dict(ScanPlan, values, "the plan of the scan")

    def differs(self, old: ScanPlan) -> str | None:
        """Name the first key in which this is another scan than `old`; candidates follow from the others."""
        return next((key for key in vars(self) if key != "candidates" and vars(old)[key] != vars(self)[key]), None)


@dataclass(frozen=True)
class Entry:
    """What a candidate reached in one rung, val and test top-1 in percent, means over the seeds."""

    candidate: Candidate
    arm: str
    rung: int
    budget: float
    val: float
    test: float


def candidates_of(
    experiment: Experiment,
    widths: Sequence[float],
    depths: Sequence[int],
    *,
    bound: str,
    at_most: float,
    input_size: InputSize,
    num_classes: int,
) -> list[Candidate]:
    """All nets of the grid of channel multipliers and blocks per stage that cost `at_most`, the cheapest first.

    The model must take `width` and `depths`, as ReduceNets of three stages do. `bound` is "macs", "params", "ms" (a
    batch of one image through the folded net, on this machine, one thread), or bytes of memory, one of `MEMORY`.

    Raises:
        PlanError: Nothing of the grid is that cheap, or the model does not take the arguments.
    """
    nets = {}
    kwargs = {**experiment.model_kwargs, "num_classes": num_classes, "in_chans": input_size[0]}
    for width, depth in itertools.product(widths, depths):
        options = {**kwargs, "width": width, "depths": (depth,) * 3}
        try:
            nets[width, depth] = timm.create_model(experiment.model, **options)
        except (TypeError, ValueError) as error:
            raise PlanError(f"{experiment.model} with width {width:g} and depth {depth}: {error}") from error
    if bound == "ms":
        image = random_images(input_size, 1, torch.float32, 0)
        calls = {str(key): partial(fold(net.eval()), image) for key, net in nets.items()}
        with torch.no_grad():
            times = interleaved_timings(calls, own_thread=torch.get_num_threads() == 1)
        costs = {key: times[str(key)] for key in nets}
    else:
        profiles = {key: profile(net, input_size) for key, net in nets.items()}
        costs = {key: float({**asdict(each), **each.memory}[bound]) for key, each in profiles.items()}
    found = [Candidate(width, depth, costs[width, depth]) for width, depth in nets if costs[width, depth] <= at_most]
    if not found:
        raise PlanError(f"no net of the grid has {bound} <= {at_most:g}; the cheapest has {min(costs.values()):g}.")
    return sorted(found, key=lambda candidate: candidate.cost)


def rungs_of(num_candidates: int, budget: float) -> list[tuple[int, float]]:
    """How many candidates are trained for how long, rung by rung: half of them for twice as long, down to one.

    >>> rungs_of(6, 5.0)
    [(6, 5.0), (3, 10.0), (2, 20.0), (1, 40.0)]

    Source: Jamieson and Talwalkar, Non-stochastic Best Arm Identification (arXiv:1502.07943).
    """
    rungs = [(num_candidates, budget)]
    while rungs[-1][0] > 1:
        rungs.append((math.ceil(rungs[-1][0] / 2), 2 * rungs[-1][1]))
    return rungs


def halve(
    experiment: Experiment,
    candidates: Iterable[Candidate],
    arm: str,
    budget: float,
    train: Callable[[Sequence[tuple[Experiment, Job]]], Sequence[RunRecord]],
) -> list[Entry]:
    """Successive halving of one arm ("plain" for nothing grown): all that was trained, the winner last.

    `budget` is that of the first rung, in epochs of each plain net; `train` does what is missing and returns the record
    of every run.
    """
    left, entries = list(candidates), list[Entry]()
    for rung, (number, epochs) in enumerate(rungs_of(len(left), budget)):
        left = left[:number]
        job = Job(arm=arm, seeds=experiment.seeds, lr=experiment.config.lr, budget=epochs)
        records = train([(candidate.of(experiment), replace(job, net=candidate.name)) for candidate in left])
        reached = [
            Entry(candidate, arm, rung, epochs, record.val, _mean_test(record))
            for candidate, record in zip(left, records, strict=True)
        ]
        reached.sort(key=lambda entry: entry.val, reverse=True)
        left = [entry.candidate for entry in reached]
        entries += reversed(reached)
    return entries


def front(entries: Iterable[Entry]) -> list[Entry]:
    """Those of the first rung, which all candidates were in, that no other beats at the same cost or less."""
    best: list[Entry] = []
    for entry in sorted((e for e in entries if e.rung == 0), key=lambda e: (e.candidate.cost, -e.val)):
        if not best or entry.val > best[-1].val:
            best.append(entry)
    return best


def _mean_test(record: RunRecord) -> float:
    tests = [score.test for score in record.scores if score.test is not None]
    return sum(tests) / len(tests)


def scans_of(plan: ScanPlan, out: Path) -> dict[str, list[Entry]]:
    """Read what the scan in the folder `out` found, by arm, from its finished runs; RunError if one is missing."""
    records = {record.job: record for record in read_runs(out)}

    def look_up(runs: Sequence[tuple[Experiment, Job]]) -> list[RunRecord]:
        if lacking := [job.name for _, job in runs if job not in records]:
            raise RunError(
                f"{out}: the scan is not finished ({lacking[0]} is missing). Continue it with recipes/scan.py."
            )
        return [records[job] for _, job in runs]

    return {arm: halve(plan.experiment, plan.candidates, arm, plan.budget, look_up) for arm in plan.experiment.arms}


def winner(entries: Sequence[Entry]) -> str:
    """Describe the last one standing, in a line."""
    last, net = entries[-1], entries[-1].candidate
    scores = f"val {last.val:.2f} %, test {last.test:.2f} %"
    return f"{net.name}, cost {net.cost:g}, {scores} after {last.budget:g} epochs' worth"


def write_scan_report(plan: ScanPlan, out: Path) -> dict[str, list[Entry]]:
    """Write report.md, scan.json and front.png of a scan, from its runs alone."""
    scans = scans_of(plan, out)
    lines = [f"# Scan: {plan.bound} <= {plan.at_most:g}", ""]
    for arm, entries in scans.items():
        best = {entry.candidate.name for entry in front(entries)}
        lines += [f"## {arm}", "", f"Won: {winner(entries)}.", ""]
        lines += [f"| net | {plan.bound} | budget (epochs) | val top-1 | |", "|---|---|---|---|---|"]
        for entry in entries:
            mark, net = "on the front" * (entry.rung == 0 and entry.candidate.name in best), entry.candidate
            lines.append(f"| {net.name} | {net.cost:g} | {entry.budget:g} | {entry.val:.2f} | {mark} |")
        lines.append("")
    command = f"python {read_runs(out)[-1].command}"
    lines += ["![front](front.png)", "", f"`{command}`", ""]
    write_json(out / "scan.json", {arm: [asdict(entry) for entry in entries] for arm, entries in scans.items()})
    draw_fronts(plan, scans, out)
    write_atomic(out / "report.md", "\n".join(lines).encode())
    return scans


def draw_fronts(plan: ScanPlan, scans: dict[str, list[Entry]], out: Path) -> None:
    """front.png: cost and accuracy of all candidates after the first rung, and the fronts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for colour, (arm, entries) in zip(("black", "C1"), scans.items(), strict=False):
        first = [entry for entry in entries if entry.rung == 0]
        axis.scatter([e.candidate.cost for e in first], [e.val for e in first], color=colour, s=14)
        best = front(entries)
        axis.step([e.candidate.cost for e in best], [e.val for e in best], where="post", color=colour, label=arm)
    axis.set_xlabel(f"{plan.bound} of the plain net")
    axis.set_ylabel(f"val top-1 (%) after {plan.budget:g} epochs' worth of training")
    axis.legend(frameon=False)
    save_picture(figure, out / "front.png")
