"""What a table is made from, without anything that trains: published experiments stay readable when plans change."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from growshrink.base.config import Checked, from_dict
from growshrink.evidence.record import Job, RunRecord


@dataclass(frozen=True, kw_only=True)
class Tuning(Checked):
    """How the learning rate of every arm is chosen: the same trials for each, judged on the val split.

    `budget` is that of a trial, in epochs of the plain net; `seeds` are others than the experiment's.
    """

    lr: tuple[float, ...]
    budget: float
    seeds: tuple[int, ...] = (100,)


@dataclass(frozen=True, kw_only=True)
class ArmComparison(Checked):
    """The part of an experiment that its table depends on; `lr` is that of an arm without trials."""

    data: str
    model: str
    model_kwargs: Mapping[str, Any]
    pool: int
    budget: float
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    lr: float
    tuning: Tuning | None
    images: int | None = None
    predictions: tuple[str, ...] = ()

    @staticmethod
    def from_plan(plan: Mapping[str, Any]) -> ArmComparison:
        """Read plan.json of an experiment's folder, without what only training needs; PlanError for what is none."""
        kept = {entry.name: plan[entry.name] for entry in fields(ArmComparison) if entry.name in plan}
        config = plan.get("config")
        lr = config.get("lr") if isinstance(config, Mapping) else None
        return from_dict(ArmComparison, {**kept, "lr": lr}, "the plan")


def trials_of(comparison: ArmComparison) -> list[Job]:
    """List the runs that learning rates are chosen by."""
    if (tuning := comparison.tuning) is None:
        return []
    pairs = itertools.product(comparison.arms, tuning.lr)
    return [Job(kind="trial", arm=arm, seeds=tuning.seeds, lr=lr, budget=tuning.budget) for arm, lr in pairs]


def chosen_lr(comparison: ArmComparison, records: Sequence[RunRecord]) -> dict[str, float]:
    """Choose for every arm the learning rate with the best mean val top-1 of its trials; without any, the config's."""
    best = dict.fromkeys(comparison.arms, comparison.lr)
    done = {record.job: record for record in records}
    for arm in comparison.arms:
        trials = [done[job] for job in trials_of(comparison) if job.arm == arm and job in done]
        if trials:
            best[arm] = max(trials, key=lambda trial: trial.val).job.lr
    return best


def runs_of(
    comparison: ArmComparison, lr: Mapping[str, float], records: Sequence[RunRecord]
) -> dict[str, list[RunRecord]]:
    """Find the finished runs that the table is made of, for every arm, in the order of the seeds."""
    found: dict[str, list[RunRecord]] = {}
    order = {seed: number for number, seed in enumerate(comparison.seeds)}
    for arm in comparison.arms:
        wanted = Job(arm=arm, seeds=(), lr=lr[arm], budget=comparison.budget)
        runs = [run for run in records if replace(run.job, seeds=()) == wanted and order.keys() & set(run.seeds)]
        found[arm] = sorted(runs, key=lambda run: min(order.get(seed, len(order)) for seed in run.seeds))
    return found
