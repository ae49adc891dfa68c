"""Resuming a run: as the same one only, from its newest checkpoint that is whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from growshrink.base.config import from_dict
from growshrink.base.ranks import num_ranks
from growshrink.base.reading import reason
from growshrink.cycle.layout import Phases
from growshrink.cycle.plan import CyclePlan
from growshrink.cycle.records import Grew, RunState, replay
from growshrink.cycle.running import Run
from growshrink.cycle.state import load_values, newest_run, set_values
from growshrink.data.feed import Feed
from growshrink.errors import RunError
from growshrink.layers.swaps import expand_online
from growshrink.runs.folder import difference
from growshrink.training.trainer import TrainConfig


def identity_of(
    feed: Feed, plan: CyclePlan, updates: int, config: TrainConfig, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the result of a run depends on, as plain values."""
    data = {
        "name": feed.name,
        "batch_size": feed.train.batch_size,
        "input_size": list(feed.input_size),
        "mean": list(feed.mean),
        "std": list(feed.std),
        "val_images": len(feed.val),
        "test_images": len(feed.test),
        "fingerprint": getattr(feed, "fingerprint", None),  # a feed of the user's own need not have one
    }
    values = {"plan": plan.to_dict(), "config": asdict(config), "data": data, "updates": updates, "ranks": num_ranks()}
    return {**about, **values}


def restore(run: Run, phases: Phases, plan: CyclePlan) -> None:
    """Load the newest checkpoint that is whole, if there is one; `run.phase` is then where to continue."""
    newest = newest_run(run.folder.path, run.journal.warn)
    if newest is None:  # killed before the first checkpoint: start again
        run.journal.restart([], 0)
        return
    path, saved = newest
    try:
        if found := difference(saved["identity"], run.identity):
            raise RunError(f"it is of a run with another {found}.")
        run.phase = _position(saved, phases)
        _take_over(run, saved, phases, plan)
        run.journal.restart(run.state.history, run.trainer.update)
    except RunError as error:
        raise RunError(f"{path}: {error}") from error
    except Exception as error:  # its digest is right, but anybody can make one
        raise RunError(f"{path}: of another model or plan ({reason(error)}).") from error


def _position(saved: Mapping[str, Any], phases: Phases) -> int:
    """The number of the phase a checkpoint is in; RunError if it is nowhere in the plan."""
    first, update = saved["next_phase"], saved["update"]
    starts = [*(phase.start for phase in phases.all), phases.total]
    stops = [*(phase.stop for phase in phases.all), phases.total + 1]
    whole = type(first) is type(update) is int
    if not (whole and 0 <= first < len(starts) and starts[first] <= update < stops[first]):
        raise RunError(f"update {update!r} is not in phase {first!r} of {len(phases.all)}")
    return int(first)


def _take_over(run: Run, saved: Mapping[str, Any], phases: Phases, plan: CyclePlan) -> None:
    run.state = from_dict(RunState, saved["run"], "its state", RunError)
    _check_log(run.state, plan)
    run.lam.load_state_dict(run.state.lam)
    phase = phases.all[min(run.phase, len(phases.all) - 1)]
    apart = phase.apart and saved["update"] > phase.start
    run.trainer = run.make_trainer(run.teachers[phase.round] if apart else replay(run.initial, run.state.log, run.size))
    run.trainer.update = saved["update"]
    if "cut_short" in saved:
        first, total = saved["cut_short"]
        run.trainer.cut_short = first, total.to(run.device)
    run.before = saved.get("before")
    if "teacher" in saved:
        teacher = copy.deepcopy(run.teachers.get(phase.round))
        if teacher is None:
            teacher = expand_online(replay(run.initial, run.state.log[: run.state.teacher_log], run.size))
        load_values(teacher, saved["teacher"])
        run.teaching.set_teacher(run.placed(teacher))
    if run.trainer.ema is not None:
        expand_online(run.trainer.ema, inplace=True)  # only the net in training is ever collapsed
    set_values(run.trainer, saved)


def _check_log(state: RunState, plan: CyclePlan) -> None:
    """RunError unless what was grown is what the plan grows: a file may not ask for branches of any size."""
    for change in state.log:
        if isinstance(change, Grew) and change.names:
            wanted = plan.rounds[change.round - 1]
            grown = [*change.branches, change.ratio, change.guide]
            if grown != [*wanted.branch, wanted.ratio, wanted.guide]:
                raise RunError(
                    f"its round {change.round} has grown {change.branches!r} of ratio {change.ratio!r}, "
                    "which is not in the plan."
                )
