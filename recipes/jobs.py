"""The runs of an experiment: which are missing, what each costs, and doing one (for compare.py; not a program)."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from growshrink.base.config import to_dict
from growshrink.base.limits import InFile
from growshrink.base.reading import read_json
from growshrink.base.writing import write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import DataOptions, RunOptions
from growshrink.cycle import lay_out, run_cycle
from growshrink.cycle.costs import Costs, teacher_nets
from growshrink.cycle.records import RoundRecord
from growshrink.data.batches import Augment
from growshrink.data.feed import Feed, MemoryFeed
from growshrink.errors import DivergedError, PlanError, RunError
from growshrink.evidence.arms import Arm
from growshrink.evidence.experiment import Experiment, about_net, data_of, net_of, plain_of
from growshrink.evidence.record import (
    PLAN_FILE,
    ArmComparison,
    Cost,
    History,
    Job,
    RunRecord,
    SeedScore,
    append_run,
    chosen_lr,
    read_plan,
    read_runs,
    runs_of,
    states_of,
)
from growshrink.layers import recompute
from growshrink.proofs._profile import training_macs
from growshrink.runs.folder import MARKER, RunFolder
from growshrink.training._evaluate import evaluate
from side_by_side import DenseGroups, StackedFeed, stack_nets, unstack_net

#: How far the cost of a run may be from its budget.
TOLERANCE = 0.02
#: What may be added to between two starts of an experiment.
MAY_GROW = ("arms", "seeds", "own_arms", "tuning")
#: Optimizers (of timm's names) to which S nets side by side are S nets.
ELEMENTWISE = ("sgd", "nesterov", "momentum", "adam", "adamw", "nadam", "nadamw", "radam", "rmsprop", "lion")


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    """Options of programs that compare arms."""

    experiment: Annotated[InFile | None, tyro.conf.Positional] = None
    """A JSON file: data, net, seeds and training (see recipes/plans/)."""
    data: DataOptions = pick(DataOptions(), "data_dir")
    running: RunOptions = pick(RunOptions(), "out", "device", "quiet")

    @property
    def plan(self) -> Path:
        """The file."""
        if self.experiment is None:
            raise RunError("name a plan file, e.g. recipes/plans/digits.json (recipes/compare.py --list has the arms).")
        return self.experiment


def keep_plan(experiment: Experiment, out: Path) -> None:
    """Write plan.json into the folder of an experiment; RunError if it holds the runs of another."""
    old = read_plan(out)
    if old is not None and (key := differs(experiment, old)):
        raise RunError(f"{out}: holds the results of another plan ({key} differs). Choose another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / PLAN_FILE, experiment.to_json())


def differs(experiment: Experiment, old: Mapping[str, Any]) -> str | None:
    """Find the first key in which it is more than the one `old` (of `to_json`) with other arms and seeds."""
    new, old = experiment.to_json(), Experiment.from_dict(old).to_json()  # which fills in what there was not yet
    changed = [key for key in new if old[key] != new[key] and key not in MAY_GROW]
    own = new["own_arms"]
    changed += [f"own_arms, {name}," for name, arm in old["own_arms"].items() if own.get(name, arm) != arm]
    if new["tuning"] != old["tuning"]:  # an arm whose best rate is the last of the grid needs one more
        before, now = old["tuning"] or {"lr": ()}, new["tuning"] or {"lr": ()}
        if not set(before["lr"]) <= set(now["lr"]) or (old["tuning"] and {**now, "lr": 0} != {**before, "lr": 0}):
            changed.append("tuning")
    return next(iter(changed), None)


def stackable(experiment: Experiment, name: str) -> bool:
    """Say whether the seeds of an arm may be trained side by side: nothing is decided for all of them at once."""
    arm = experiment.arm(name)
    listens = any(entry.controlled or entry.exit.decides for entry in arm.rounds)
    config = arm.trained(experiment.config, experiment.config.lr)
    elementwise = config.optimizer in ELEMENTWISE and config.clip_grad is None
    return (
        arm.shrinks and elementwise and not listens and arm.gradients is None and not arm.mixes
    )  # a peak is scored by run_cycle, which knows of one net only


def jobs_of(
    experiment: Experiment, lr: Mapping[str, float], records: Sequence[RunRecord] = (), *, stack: bool
) -> list[Job]:
    """List the runs that are missing from `records`, with the learning rate of each arm.

    Only seeds that an arm lacks are trained, side by side with `stack`, however the others were trained.
    """
    jobs = []
    for arm, runs in runs_of(experiment.comparison, lr, records).items():
        done = {seed for run in runs for seed in run.seeds}
        missing = tuple(seed for seed in experiment.seeds if seed not in done)
        groups = [missing] if stack and missing and stackable(experiment, arm) else [(seed,) for seed in missing]
        jobs += [Job(arm=arm, seeds=seeds, lr=lr[arm], budget=experiment.budget) for seeds in groups]
    return jobs


def check_jobs(runs: Iterable[tuple[Experiment, Job]], out: Path, data_dir: Path | None) -> None:
    """Raise, before any training, what `run_job` would where a budget is too small or a net or teacher is wrong."""
    done, seen = {record.job for record in read_runs(out)}, set()
    for experiment, job in runs:
        key = job.net, job.arm, job.budget
        if job not in done and key not in seen:
            seen.add(key)
            arm, feeds = experiment.arm(job.arm), [feed_of(experiment, job.seeds[0], data_dir, torch.device("cpu"))]
            try:
                net, feed, teachers = _side_by_side(experiment, arm, feeds, job.seeds[:1], out)
                _epochs(experiment, job, feeds, net, feed, teachers)
            except PlanError as error:
                raise PlanError(f"{job.name}: {error}") from error


def _epochs(
    experiment: Experiment, job: Job, feeds: Sequence[Feed], net: nn.Module, feed: Feed, teachers: Any
) -> tuple[float, float]:
    """Epochs of a run, and its budget in MACs for one seed."""
    plain, batch_size = net_of(experiment, experiment.model, feeds[0], job.seeds[0]), feed.train.batch_size
    budget = batch_size * round(job.budget * feed.train.updates_per_epoch)
    budget *= training_macs(plain, feeds[0].input_size, batch_size)
    arm, whole = experiment.arm(job.arm), budget * len(feeds)
    return matched_epochs(arm, net, feed, whole, job.seeds[0], teachers=teachers), budget


def run_job(experiment: Experiment, job: Job, out: Path, *, data_dir: Path | None, device: str, progress: bool) -> None:
    """Do a run, or the rest of it, and append its line to the record; do nothing if there is such a line."""
    done = {record.job: record for record in read_runs(out)}
    if job in done:
        return
    if (trial := done.get(replace(job, kind="trial"))) and trial.diverged is None:  # of the same seeds: it is the run
        append_run(out, replace(trial, job=job))
        return
    folder = RunFolder.claim(out / job.folder, resume=True)
    arm = experiment.arm(job.arm)
    with folder, recompute(arm.trained(experiment.config, job.lr).recompute):  # for what is counted
        if job in {record.job for record in read_runs(out)}:  # another process was faster
            return
        folder.finished = False  # it was ended before its line was written: its last checkpoint has all to be scored
        where = torch.device(device)
        feeds = [feed_of(experiment, seed, data_dir, where) for seed in job.seeds]
        net, feed, teachers = _side_by_side(experiment, arm, feeds, job.seeds, out)
        count, batch_size = len(feeds), feed.train.batch_size
        epochs, budget = _epochs(experiment, job, feeds, net, feed, teachers)
        plan, config = arm.plan(epochs, job.seeds[0], experiment.given), arm.trained(experiment.config, job.lr)
        config = replace(config, graphs=where.type == "cuda" and not config.compile and not config.recompute)
        model = about_net(experiment, arm.model(experiment.model), feed, **arm.model_kwargs)
        about = {
            "command": shlex.join(sys.argv),
            **({"model": model} if count == 1 else {}),
            "experiment": {key: value for key, value in experiment.to_json().items() if key not in MAY_GROW},
            "job": to_dict(job),
        }
        how: dict[str, Any] = {"device": where, "progress": progress, "about": about}
        torch.manual_seed(job.seeds[0])
        try:
            with DenseGroups(count) if count > 1 else nullcontext():
                result = run_cycle(net, feed, plan, out_dir=folder, config=config, teachers=teachers, **how)
        except DivergedError as error:
            if job.kind != "trial":
                raise
            lost = tuple(SeedScore(seed=seed, val=0.0, test=None, loss=None) for seed in job.seeds)
            append_run(out, _record(job, arm, folder, scores=lost, cost=None, diverged=str(error)))
            return
        spent = result.training_macs / count
        if not abs(spent / budget - 1) <= TOLERANCE:
            raise PlanError(f"{job.name}: cost {spent:.3e} MACs of a budget of {budget:.3e}.")
        like = plain_of(experiment, job.arm, feeds[0], job.seeds[0]).to(where)
        trained = [result.model] if count == 1 else unstack_net(result.model, like, count)
        scores = tuple(
            _score(one, own, seed, arm, result.rounds) for one, own, seed in zip(trained, feeds, job.seeds, strict=True)
        )
        images = result.phases.total * batch_size
        cost = Cost(epochs=epochs, macs=spent, budget=budget, images=images, seconds=result.seconds)
        rounds, history = tuple(to_dict(result.rounds)), History.from_rows(result.history)
        append_run(out, _record(job, arm, folder, scores=scores, cost=cost, rounds=rounds, history=history))


def _side_by_side(
    experiment: Experiment, arm: Arm, feeds: Sequence[Feed], seeds: Sequence[int], out: Path
) -> tuple[nn.Module, Feed, dict[int, nn.Module]]:
    """Make the nets of all seeds, their feeds and their teachers into one of each."""
    name, size = arm.model(experiment.model), feeds[0].input_size
    nets = [net_of(experiment, name, feed, seed, **arm.model_kwargs) for feed, seed in zip(feeds, seeds, strict=True)]
    if arm.init:
        for net, seed in zip(nets, seeds, strict=True):
            load_start_(net, arm.init, seed, out)
    teachers = [
        teacher_nets(arm.plan(1.0, seed, experiment.given), feed, about_net(experiment, name, feed, **arm.model_kwargs))
        for feed, seed in zip(feeds, seeds, strict=True)
    ]
    if len(nets) == 1:
        return nets[0], feeds[0], teachers[0]
    stacked = {number: stack_nets([each[number] for each in teachers], size) for number in teachers[0]}
    return stack_nets(nets, size), StackedFeed(feeds), stacked  # widths are sampled in steps of its own


def _record(job: Job, arm: Arm, folder: RunFolder, **found: Any) -> RunRecord:
    """Collect what is kept of a run, from its folder and what was `found`."""
    about = read_json(folder.path / MARKER)
    kept = {key: about[key] for key in ("command", "plan", "config", "data", "updates", "versions")}
    return RunRecord(job=job, about=arm.about, **found, **kept)


def matched_epochs(arm: Arm, net: nn.Module, feed: Feed, budget: float, seed: int = 0, **nets: Any) -> float:
    """How many epochs of an arm cost `budget` MACs, to within a quarter of the tolerance where updates are fine enough.

    Sampled widths, and so their cost, depend on the `seed`; `nets` are the `teachers` of `Costs`. PlanError if the
    budget is too small for the arm's phases.
    """
    updates_per_epoch, batch_size = feed.train.updates_per_epoch, feed.train.batch_size
    epochs = budget / (batch_size * updates_per_epoch * training_macs(net, feed.input_size, batch_size))
    costs = Costs(net, arm.plan(epochs, seed), feed.train, feed.input_size, **nets)
    off: dict[float, float] = {}
    for _ in range(12):
        ratio = lay_out(arm.plan(epochs, seed), updates_per_epoch, built_grown=arm.expansion > 0).macs(costs) / budget
        off[epochs] = abs(ratio - 1)
        if off[epochs] <= TOLERANCE / 4:
            break
        epochs /= ratio
    nearest = min(off, key=off.__getitem__)
    if off[nearest] <= TOLERANCE:  # a short run is counted in whole updates
        return nearest
    raise PlanError(f"{arm.about!r}: no number of epochs costs {budget:.3e} MACs; give it a larger budget.")


def _score(net: nn.Module, feed: Feed, seed: int, arm: Arm, rounds: Sequence[RoundRecord]) -> SeedScore:
    if not arm.shrinks:  # judged at its peak, by the records; the mean over the seeds where they were stacked
        peak = rounds[-1].top1.peak
        assert peak is not None
        return SeedScore(seed=seed, val=peak, test=None, loss=None)
    test = evaluate(net, feed.test)
    return SeedScore(seed=seed, val=evaluate(net, feed.val).top1, test=test.top1, loss=test.loss)


def feed_of(experiment: Experiment, seed: int, data_dir: Path | None, device: torch.device) -> Feed:
    """The batches of one seed; decoded data sets are kept."""
    data = data_of(experiment, seed, data_dir)
    crop = data.input_size[1] // 8 if experiment.crop is None else experiment.crop
    augment = Augment(crop=crop, flip=experiment.flip)
    return MemoryFeed.of(data, batch_size=experiment.batch_size, augment=augment, seed=seed, device=device)


def load_start_(net: nn.Module, init: str, seed: int, out: Path) -> None:
    """Load into a plain net what another experiment's arm learned, but for the classifier, which stays as it is.

    `init` is "FOLDER/ARM": the experiment's folder, beside `out`, and the arm; its net of this `seed` is taken, the
    first where there is none. RunError where that experiment or its weights are missing, or are of another net.
    """
    folder, _, arm = init.partition("/")
    source = out.parent / folder
    if (plan := read_plan(source)) is None:
        raise RunError(f"{source}: init={init!r}: holds no experiment. Run that one first, with --out {source}.")
    comparison, records = ArmComparison.from_plan(plan), read_runs(source)
    runs = runs_of(comparison, chosen_lr(comparison, records), records).get(arm)
    if not runs:
        raise RunError(f"{source}: init={init!r}: has no finished run of the arm {arm!r}.")
    run = next((run for run in runs if seed in run.seeds), runs[0])
    state = states_of(source, run.job)[run.seeds.index(seed) if seed in run.seeds else 0]
    classifier = next(name for name, module in net.named_modules() if module is net.get_classifier())  # type: ignore[operator]
    own = {key: value for key, value in net.state_dict().items() if key.startswith(f"{classifier}.")}
    try:
        net.load_state_dict({**state, **own}, strict=True)
    except RuntimeError as error:
        raise RunError(f"{source}: init={init!r}: the weights are those of another net: {error}") from error
