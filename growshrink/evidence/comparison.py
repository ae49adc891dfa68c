"""What a table is made from: the arms that are compared, their learning rates, their finished runs.

Nothing here trains. A published experiment stays readable when plans of training are written in another way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from growshrink.base.config import Checked, from_dict
from growshrink.evidence.record import Job, RunRecord


@dataclass(frozen=True, kw_only=True)
class Tuning(Checked):
    """How the learning rate of every arm is chosen: the same trials for each, judged on the val split.

    Attributes:
        lr: Learning rates to try.
        budget: Of a trial, in epochs of the plain net.
        seeds: Of the trials; none of the experiment's.
    """

    lr: tuple[float, ...]
    budget: float
    seeds: tuple[int, ...] = (100,)


@dataclass(frozen=True, kw_only=True)
class Comparison(Checked):
    """The part of an experiment that its table depends on; attributes as in `Experiment`.

    Attributes:
        data: Name of the data set.
        model: Name of the plain net.
        model_kwargs: Its arguments.
        pool: Pixels averaged into one, along each side.
        budget: Training MACs of every run, as epochs of the plain net.
        seeds: One a net.
        arms: In the order of the table.
        lr: Learning rate of an arm without trials.
        tuning: How learning rates are chosen.
    """

    data: str
    model: str
    model_kwargs: Mapping[str, Any]
    pool: int
    budget: float
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    lr: float
    tuning: Tuning | None

    @staticmethod
    def from_plan(plan: Mapping[str, Any]) -> Comparison:
        """Read plan.json of an experiment's folder; what only training needs is not looked at.

        Raises:
            PlanError: A key is missing, or has a value that cannot be.
        """
        kept = {entry.name: plan[entry.name] for entry in fields(Comparison) if entry.name in plan}
        config = plan.get("config")
        lr = config.get("lr") if isinstance(config, Mapping) else None
        return from_dict(Comparison, {**kept, "lr": lr}, "the plan")


def trials_of(comparison: Comparison) -> list[Job]:
    """List the runs that learning rates are chosen by."""
    tuning = comparison.tuning
    if tuning is None:
        return []
    return [
        Job(kind="trial", arm=arm, seeds=tuning.seeds, lr=lr, budget=tuning.budget)
        for arm in comparison.arms
        for lr in tuning.lr
    ]


def chosen_lr(comparison: Comparison, records: Sequence[RunRecord]) -> dict[str, float]:
    """Choose for every arm the learning rate with the best mean val top-1 of its trials; without any, the config's."""
    best = dict.fromkeys(comparison.arms, comparison.lr)
    done = {record.job: record for record in records}
    for arm in comparison.arms:
        trials = [done[job] for job in trials_of(comparison) if job.arm == arm and job in done]
        if trials:
            best[arm] = max(trials, key=lambda trial: trial.val).job.lr
    return best


def runs_of(
    comparison: Comparison, lr: Mapping[str, float], records: Sequence[RunRecord]
) -> dict[str, list[RunRecord]]:
    """Find the finished runs that the table is made of, for every arm, in the order of the seeds."""
    found: dict[str, list[RunRecord]] = {}
    order = {seed: number for number, seed in enumerate(comparison.seeds)}
    for arm in comparison.arms:
        wanted = ("run", "", arm, lr[arm], comparison.budget)
        runs = [run for run in records if _without_seeds(run.job) == wanted and order.keys() & set(run.seeds)]
        found[arm] = sorted(runs, key=lambda run: min(order.get(seed, len(order)) for seed in run.seeds))
    return found


def _without_seeds(job: Job) -> tuple[str, str, str, float, float]:
    return job.kind, job.net, job.arm, job.lr, job.budget
