"""An experiment: arms on equal budgets of training MACs, several seeds each, and the runs it is made of."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from growshrink.base.config import check_fields, from_dict, to_dict
from growshrink.base.limits import BatchSize, Count, Positive, Whole
from growshrink.base.reading import read_json
from growshrink.base.seeding import generator
from growshrink.base.writing import write_json
from growshrink.cycle import lay_out, run_cycle
from growshrink.cycle.costs import Costs, teacher_nets
from growshrink.cycle.records import RoundRecord
from growshrink.data.batches import Augment
from growshrink.data.datasets import DataSet, Split, load_data, pooled, stratified
from growshrink.data.feed import Feed, MemoryFeed
from growshrink.errors import DivergedError, PlanError, RunError, did_you_mean
from growshrink.evidence.arms import ARMS, PLAIN, Arm
from growshrink.evidence.record import (
    PLAN_FILE,
    ArmComparison,
    Cost,
    History,
    Job,
    RunRecord,
    SeedScore,
    Tuning,
    append_run,
    load_start_,
    read_plan,
    read_runs,
    runs_of,
    states_of,
)
from growshrink.evidence.stack import StackedFeed, stack_nets, unstack_net
from growshrink.proofs._profile import training_macs
from growshrink.runs.folder import MARKER, RunFolder
from growshrink.training._evaluate import evaluate
from growshrink.training.trainer import TrainConfig

#: What may be added to between two starts of an experiment.
MAY_GROW = ("arms", "seeds", "own_arms")
#: How far the cost of a run may be from its budget.
TOLERANCE = 0.02
#: Optimizers (of timm's names) to which S nets side by side are S nets.
ELEMENTWISE = ("sgd", "nesterov", "momentum", "adam", "adamw", "nadam", "nadamw", "radam", "rmsprop", "lion")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is compared with what, on what.

    Attributes:
        data: A name of `load_data`'s.
        model: The plain net, a name of timm's (arms with an expansion need a ReduceNet); `model_kwargs` are its
            arguments beside the classes and channels of the data.
        pool: Average so many pixels by as many into one first.
        given: Path of a run's folder, or of its plain.safetensors: the net that teaches where an arm has the teacher
            "given"; {seed} in it stands for the run's seed.
        images: Train on about so many images only, drawn from each seed's train split class by class; None for all.
        budget: Training MACs of every run, as epochs of the plain net (forward and backward).
        seeds: Of weights, val split, order and augmentation; the same for every arm.
        arms: In the order of the table, "plain" among them; `own_arms` are those that `ARMS` does not have.
        config: How all arms are trained, the learning rate excepted where it is tuned.
        crop: Padding in pixels of the random crop; None for an eighth of the image.
        flip: Mirror at random.
        tuning: How learning rates are chosen; None takes the config's for all.
        predictions: What is expected, one sentence each, written before the first run.
    """

    data: str
    model: str = "reducenet20"
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    pool: Count = 1
    given: str | None = None
    images: Count | None = None
    budget: Positive = 30.0
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = tuple(name for name, arm in ARMS.items() if not arm.needs_given)
    own_arms: Mapping[str, Arm] = field(default_factory=dict)
    batch_size: BatchSize = 128
    config: TrainConfig = TrainConfig(lr=0.2)  # noqa: RUF009 - frozen
    crop: Whole | None = None
    flip: bool = True
    tuning: Tuning | None = None
    predictions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        known = {**ARMS, **self.own_arms}
        for name in self.arms:
            if name not in known:
                raise PlanError(f"arms: no arm {name!r}{did_you_mean(name, known)}")
        if PLAIN not in self.arms:
            raise PlanError(f"arms: {PLAIN!r} must be among them: it is what the others are compared with.")
        if not self.given and (lacking := [name for name in self.arms if known[name].needs_given]):
            raise PlanError(f"given: arm {lacking[0]!r} needs the path of its teacher.")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise PlanError(f"seeds={self.seeds!r}: at least one, none twice.")
        if self.tuning and set(self.tuning.seeds) & set(self.seeds):
            raise PlanError("tuning.seeds: must be others than the experiment's.")

    def arm(self, name: str) -> Arm:
        """By its name."""
        return {**ARMS, **self.own_arms}[name]

    @property
    def comparison(self) -> ArmComparison:
        """The part of it that tables are made from."""
        kept = {entry.name: getattr(self, entry.name) for entry in fields(ArmComparison) if entry.name != "lr"}
        return ArmComparison(lr=self.config.lr, **kept)

    def stackable(self, name: str) -> bool:
        """Whether the seeds of an arm may be trained side by side: nothing is decided for all of them at once."""
        arm = self.arm(name)
        listens = any(entry.controlled or entry.exit.decides for entry in arm.rounds)
        config = arm.trained(self.config, self.config.lr)
        elementwise = config.optimizer in ELEMENTWISE and config.clip_grad is None
        return (
            arm.shrinks and elementwise and not listens and arm.gradients is None and not arm.mixes
        )  # a peak is scored by run_cycle, which knows of one net only

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; the inverse of `from_dict`."""
        return to_dict(self)

    def differs(self, old: Mapping[str, Any]) -> str | None:
        """The first key in which this is more than the experiment `old` (of `to_json`) with other arms and seeds."""
        new, old = self.to_json(), Experiment.from_dict(old).to_json()  # which fills in what there was not yet
        changed = [key for key in new if old[key] != new[key] and key not in MAY_GROW]
        own = new["own_arms"]
        changed += [f"own_arms, {name}," for name, arm in old["own_arms"].items() if own.get(name, arm) != arm]
        return next(iter(changed), None)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Experiment:
        """From a plan file; PlanError for unknown keys and values that cannot be."""
        return from_dict(Experiment, values, "the plan")


def keep_plan(experiment: Experiment, out: Path) -> None:
    """Write plan.json into the folder of an experiment; RunError if it holds the runs of another."""
    old = read_plan(out)
    if old is not None and (key := experiment.differs(old)):
        raise RunError(f"{out}: holds the results of another plan ({key} differs). Choose another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / PLAN_FILE, experiment.to_json())


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
        groups = [missing] if stack and missing and experiment.stackable(arm) else [(seed,) for seed in missing]
        jobs += [Job(arm=arm, seeds=seeds, lr=lr[arm], budget=experiment.budget) for seeds in groups]
    return jobs


def run_job(experiment: Experiment, job: Job, out: Path, *, data_dir: Path | None, device: str, progress: bool) -> None:
    """Do a run, or the rest of it, and append its line to the record; do nothing if there is such a line."""
    if job in {record.job for record in read_runs(out)}:
        return
    folder = RunFolder.claim(out / job.folder, resume=True)
    with folder:
        if job in {record.job for record in read_runs(out)}:  # another process was faster
            return
        folder.finished = False  # it was ended before its line was written: its last checkpoint has all to be scored
        arm = experiment.arm(job.arm)
        where = torch.device(device)
        feeds = [feed_of(experiment, seed, data_dir, where) for seed in job.seeds]
        plain = _net(experiment, experiment.model, feeds[0], job.seeds[0])
        net, feed, teachers = _side_by_side(experiment, arm, feeds, job.seeds, out)
        count, batch_size = len(feeds), feed.train.batch_size
        budget = batch_size * round(job.budget * feed.train.updates_per_epoch)
        budget *= training_macs(plain, feeds[0].input_size, batch_size)
        epochs = matched_epochs(arm, net, feed, budget * count, job.seeds[0], teachers=teachers)
        plan, config = arm.plan(epochs, job.seeds[0], experiment.given), arm.trained(experiment.config, job.lr)
        model = _about_net(experiment, arm.model(experiment.model), feed, **arm.model_kwargs)
        about = {
            "command": shlex.join(sys.argv),
            **({"model": model} if count == 1 else {}),
            "experiment": {key: value for key, value in experiment.to_json().items() if key not in MAY_GROW},
            "job": to_dict(job),
        }
        how: dict[str, Any] = {"device": where, "progress": progress, "about": about}
        torch.manual_seed(job.seeds[0])
        try:
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
    nets = [_net(experiment, name, feed, seed, **arm.model_kwargs) for feed, seed in zip(feeds, seeds, strict=True)]
    if arm.init:
        for net, seed in zip(nets, seeds, strict=True):
            load_start_(net, arm.init, seed, out)
    teachers = [
        teacher_nets(
            arm.plan(1.0, seed, experiment.given), feed, _about_net(experiment, name, feed, **arm.model_kwargs)
        )
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


def plain_of(experiment: Experiment, arm: str, feed: Feed | DataSet, seed: int) -> nn.Module:
    """Make the net that an arm of the experiment arrives at, with fresh weights."""
    return _net(experiment, experiment.model, feed, seed, **experiment.arm(arm).model_kwargs)


def _net(experiment: Experiment, name: str, feed: Feed | DataSet, seed: int, **overrides: Any) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **_about_net(experiment, name, feed, **overrides)["kwargs"])


def _about_net(experiment: Experiment, name: str, feed: Feed | DataSet, **overrides: Any) -> dict[str, Any]:
    """How to make a net of the experiment again, and its plain form."""
    kwargs = {"num_classes": len(feed.classes), "in_chans": feed.input_size[0], **experiment.model_kwargs, **overrides}
    return {"name": name, "kwargs": kwargs, "plain_name": experiment.model, "plain_kwargs": kwargs}


def feed_of(experiment: Experiment, seed: int, data_dir: Path | None, device: torch.device) -> Feed:
    """The batches of one seed; decoded data sets are kept."""
    data = data_of(experiment, seed, data_dir)
    crop = data.input_size[1] // 8 if experiment.crop is None else experiment.crop
    augment = Augment(crop=crop, flip=experiment.flip)
    return MemoryFeed.of(data, batch_size=experiment.batch_size, augment=augment, seed=seed, device=device)


def data_of(experiment: Experiment, seed: int, data_dir: Path | None) -> DataSet:
    """Load the images of one seed; decoded data sets are kept."""
    return _data(experiment.data, data_dir, seed, experiment.pool, experiment.images)


@lru_cache(maxsize=8)
def _data(name: str, data_dir: Path | None, seed: int, pool: int, images: int | None) -> DataSet:
    data = pooled(load_data(name, data_dir, seed=seed, progress=False), pool)
    labels = data.train.labels
    if images is None or images >= len(labels):
        return data
    _, picked = stratified(labels, images / len(labels), generator("images of an experiment", seed))
    return replace(data, train=Split(data.train.images[picked], labels[picked]))


def deployed_nets(experiment: Experiment, job: Job, out: Path, data: DataSet) -> list[nn.Module]:
    """Make the plain net of each seed of a finished run again, in eval mode, from its run folder in `out`."""
    nets = [plain_of(experiment, job.arm, data, seed) for seed in job.seeds]
    for net, state in zip(nets, states_of(out, job), strict=True):
        net.load_state_dict(state, strict=True)
        net.eval()
    return nets
