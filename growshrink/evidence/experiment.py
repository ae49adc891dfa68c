"""An experiment: arms on equal budgets of training MACs, several seeds each, and the runs it is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from growshrink.base.reading import read_json
from growshrink.base.writing import write_json
from growshrink.cycle import run_cycle
from growshrink.cycle.cost import PlanCost
from growshrink.cycle.timeline import Timeline
from growshrink.data.batches import Augment
from growshrink.data.datasets import DataSet, load_data, pooled
from growshrink.data.feed import Feed, MemoryFeed
from growshrink.errors import DivergedError, PlanError, did_you_mean
from growshrink.evidence.arms import ARMS, PLAIN, Arm
from growshrink.evidence.stack import StackedFeed, stack_nets, unstack_net
from growshrink.proofs._profile import training_macs
from growshrink.runs.folder import RunFolder
from growshrink.training._evaluate import evaluate
from growshrink.training.trainer import TrainConfig

#: What may be added to between two starts of an experiment.
MAY_GROW = ("arms", "seeds", "own_arms")
#: How far the cost of a run may be from its budget.
TOLERANCE = 0.02
#: Optimizers (of timm's names) to which S nets side by side are S nets.
ELEMENTWISE = ("sgd", "nesterov", "momentum", "adam", "adamw", "nadam", "nadamw", "radam", "rmsprop", "lion")
#: What a run leaves beside run_cycle's files: the scores of every seed.
SCORES = "seeds.json"


@dataclass(frozen=True, kw_only=True)
class Tuning:
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
class Experiment:
    """What is compared with what, on what.

    Attributes:
        data: A name of `load_data`'s.
        model: The plain net, a name of timm's (arms with an expansion need a ReduceNet).
        model_kwargs: For `timm.create_model`, beside the classes and channels of the data.
        pool: Average so many pixels by as many into one first.
        budget: Training MACs of every run, as epochs of the plain net (forward and backward).
        seeds: Of weights, val split, order and augmentation; the same for every arm.
        arms: Which, in the order of the table; "plain" must be among them.
        own_arms: Arms that `ARMS` does not have.
        batch_size: Images per update.
        config: How all arms are trained, the learning rate excepted where it is tuned.
        crop: Padding in pixels of the random crop; None for an eighth of the image.
        flip: Mirror at random.
        tuning: How learning rates are chosen; None takes the config's for all.
    """

    data: str
    model: str = "reducenet20"
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    pool: int = 1
    budget: float = 30.0
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = tuple(ARMS)
    own_arms: Mapping[str, Arm] = field(default_factory=dict)
    batch_size: int = 128
    config: TrainConfig = TrainConfig(lr=0.2)  # noqa: RUF009 - frozen
    crop: int | None = None
    flip: bool = True
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        known = {**ARMS, **self.own_arms}
        for name in self.arms:
            if name not in known:
                raise PlanError(f"arms: no arm {name!r}{did_you_mean(name, known)}")
        if PLAIN not in self.arms:
            raise PlanError(f"arms: {PLAIN!r} must be among them: it is what the others are compared with.")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise PlanError(f"seeds={self.seeds!r}: at least one, none twice.")
        if not self.budget > 0:
            raise PlanError(f"budget={self.budget!r}: epochs of the plain net, must be above 0.")
        if self.tuning and set(self.tuning.seeds) & set(self.seeds):
            raise PlanError("tuning.seeds: must be others than the experiment's.")

    def arm(self, name: str) -> Arm:
        """By its name."""
        return {**ARMS, **self.own_arms}[name]

    def stackable(self, name: str) -> bool:
        """Whether the seeds of an arm may be trained side by side: nothing is decided for all of them at once."""
        arm = self.arm(name)
        listens = any(
            entry.control != "schedule" or entry.exit == "choose" or entry.accept_within is not None
            for entry in arm.rounds
        )
        elementwise = self.config.optimizer in ELEMENTWISE and self.config.clip_grad is None
        return arm.shrinks and elementwise and not listens  # a peak is scored by run_cycle, which knows of one net only

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; the inverse of `from_dict`."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def differs(self, old: Mapping[str, Any]) -> str | None:
        """The first key in which this is more than the experiment `old` (of `to_json`) with other arms and seeds."""
        new, old = self.to_json(), Experiment.from_dict(old).to_json()  # which fills in what there was not yet
        changed = [key for key in new if old[key] != new[key] and key not in MAY_GROW]
        changed += [
            f"own_arms, {name}," for name, arm in old["own_arms"].items() if new["own_arms"].get(name, arm) != arm
        ]
        return next(iter(changed), None)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Experiment:
        """From a plan file; PlanError for unknown keys and values that cannot be."""
        if not isinstance(values, Mapping):
            raise PlanError(f"the plan must be an object, got {values!r}.")
        known = dict(values)
        names = [entry.name for entry in fields(Experiment)]
        for key in known:
            if key not in names:
                raise PlanError(f"the plan: {key!r} is not an option of an experiment{did_you_mean(key, names)}")
        try:
            for key in ("seeds", "arms"):
                if key in known:
                    known[key] = tuple(known[key])
            if "config" in known:
                known["config"] = TrainConfig(**known["config"])
            if known.get("tuning"):
                tuning: dict[str, Any] = {**known["tuning"]}
                lists = {key: tuple(value) for key, value in tuning.items() if isinstance(value, list)}
                known["tuning"] = Tuning(**{**tuning, **lists})
            if "own_arms" in known:
                known["own_arms"] = {name: Arm.from_dict(arm) for name, arm in known["own_arms"].items()}
            return Experiment(**known)
        except (TypeError, AttributeError) as error:
            raise PlanError(f"the plan: {error}.") from error


@dataclass(frozen=True)
class Job:
    """One training run: an arm with all its seeds side by side, or with one."""

    arm: str
    seeds: tuple[int, ...]
    lr: float
    budget: float

    @property
    def folder(self) -> str:
        """Of the run, under the experiment's."""
        seeds = "-".join(map(str, self.seeds))
        return f"{self.arm}/budget-{self.budget:g}-lr-{self.lr:g}-seeds-{seeds}"


def jobs_of(experiment: Experiment, lr: Mapping[str, float], *, stack: bool) -> list[Job]:
    """The runs that the table is made of, with the learning rate of each arm."""
    alone = [(seed,) for seed in experiment.seeds]
    jobs = []
    for arm in experiment.arms:
        groups = [experiment.seeds] if stack and experiment.stackable(arm) else alone
        jobs += [Job(arm, seeds, lr[arm], experiment.budget) for seeds in groups]
    return jobs


def trials_of(experiment: Experiment) -> list[Job]:
    """The runs that learning rates are chosen by."""
    tuning = experiment.tuning
    if tuning is None:
        return []
    return [Job(arm, tuning.seeds, lr, tuning.budget) for arm in experiment.arms for lr in tuning.lr]


def chosen_lr(experiment: Experiment, out: Path) -> dict[str, float]:
    """Of every arm the learning rate with the best mean val top-1 of its finished trials; without any, the config's."""
    best = dict.fromkeys(experiment.arms, experiment.config.lr)
    for arm in experiment.arms:
        trials = [job for job in trials_of(experiment) if job.arm == arm and read_scores(out, job)]
        if trials:
            best[arm] = max(trials, key=lambda job: _mean(read_scores(out, job), "val")).lr
    return best


def read_scores(out: Path, job: Job) -> list[dict[str, Any]]:
    """What a finished run says of its seeds; an empty list if it is not finished."""
    path = out / job.folder / SCORES
    return list(read_json(path)["seeds"]) if path.exists() else []


def _mean(scores: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(score[key] for score in scores) / len(scores)


def run_job(experiment: Experiment, job: Job, out: Path, *, data_dir: Path | None, device: str, progress: bool) -> None:
    """Do a run, or the rest of it, or nothing if it is finished."""
    folder = RunFolder.claim(out / job.folder, resume=True)
    with folder:
        if folder.finished and (folder.path / SCORES).exists():
            return
        folder.finished = False  # it was ended between the two: its last checkpoint has all that is to be scored
        arm = experiment.arm(job.arm)
        where = torch.device(device)
        feeds = [feed_of(experiment, seed, data_dir, where) for seed in job.seeds]
        nets = [
            _net(experiment, arm.model(experiment.model), feed, seed)
            for feed, seed in zip(feeds, job.seeds, strict=True)
        ]
        plain = _net(experiment, experiment.model, feeds[0], job.seeds[0])
        budget = round(job.budget * feeds[0].train.updates_per_epoch) * training_macs(plain, feeds[0].input_size)
        single = len(nets) == 1
        feed: Feed = feeds[0] if single else StackedFeed(feeds)
        net = nets[0] if single else stack_nets(nets, feeds[0].input_size)  # widths are sampled in steps of its own
        whole = budget * feeds[0].train.batch_size * len(nets)
        epochs = matched_epochs(arm, net, feed, whole, job.seeds[0])
        torch.manual_seed(job.seeds[0])
        try:
            result = run_cycle(
                net,
                feed,
                arm.plan(epochs, job.seeds[0]),
                out_dir=folder,
                config=replace(experiment.config, lr=job.lr),
                device=where,
                progress=progress,
                about={
                    "experiment": {key: value for key, value in experiment.to_json().items() if key not in MAY_GROW},
                    "job": json.loads(json.dumps(asdict(job))),
                },
            )
        except DivergedError as error:
            if experiment.tuning is None or job.seeds != experiment.tuning.seeds:
                raise
            lost = [{"seed": seed, "val": 0.0, "test": None, "loss": None} for seed in job.seeds]
            write_json(folder.path / SCORES, {"seeds": lost, "diverged": str(error)})
            return
        spent = result.training_macs / len(nets)
        if not abs(spent / (budget * feeds[0].train.batch_size) - 1) <= TOLERANCE:
            raise PlanError(
                f"{job.folder}: cost {spent:.3e} MACs of a budget of {budget * feeds[0].train.batch_size:.3e}."
            )
        trained = [result.model] if single else unstack_net(result.model, plain.to(where), len(nets))
        write_json(
            folder.path / SCORES,
            {
                "seeds": [
                    _scores(net, one, seed, arm, result.rounds)
                    for net, one, seed in zip(trained, feeds, job.seeds, strict=True)
                ],
                "macs": spent,
                "budget": budget * feeds[0].train.batch_size,
                "images": result.timeline.total * feeds[0].train.batch_size,
                "seconds": result.seconds,
                "epochs": epochs,
            },
        )


def matched_epochs(arm: Arm, net: nn.Module, feed: Feed, budget: float, seed: int = 0) -> float:
    """How many epochs of an arm cost `budget` MACs, to within a quarter of the tolerance where updates are fine enough.

    Sampled widths, and so their cost, depend on the `seed`.

    Raises:
        PlanError: None do: the budget is too small for the phases of its rounds.
    """
    epochs = budget / (feed.train.batch_size * feed.train.updates_per_epoch * training_macs(net, feed.input_size))
    cost = PlanCost(net, arm.plan(epochs, seed), feed.train, feed.input_size)
    off: dict[float, float] = {}
    for _ in range(12):
        timeline = Timeline(arm.plan(epochs, seed), feed.train.updates_per_epoch, built_grown=arm.expansion > 0)
        ratio = cost.macs(timeline) / budget
        off[epochs] = abs(ratio - 1)
        if off[epochs] <= TOLERANCE / 4:
            break
        epochs /= ratio
    nearest = min(off, key=off.__getitem__)
    if off[nearest] <= TOLERANCE:  # a short run is counted in whole updates
        return nearest
    raise PlanError(f"{arm.about!r}: no number of epochs costs {budget:.3e} MACs; give it a larger budget.")


def _scores(net: nn.Module, feed: Feed, seed: int, arm: Arm, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not arm.shrinks:  # judged at its peak, by the records; the mean over the seeds where they were stacked
        return {"seed": seed, "val": rounds[-1]["top1"]["peak"], "test": None, "loss": None}
    test = evaluate(net, feed.test)
    return {"seed": seed, "val": evaluate(net, feed.val).top1, "test": test.top1, "loss": test.loss}


def _net(experiment: Experiment, name: str, feed: Feed, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    kwargs = {"num_classes": len(feed.classes), "in_chans": feed.input_size[0], **experiment.model_kwargs}
    return timm.create_model(name, **kwargs)


def feed_of(experiment: Experiment, seed: int, data_dir: Path | None, device: torch.device) -> Feed:
    """The batches of one seed; decoded data sets are kept."""
    data = _data(experiment.data, data_dir, seed, experiment.pool)
    crop = data.input_size[1] // 8 if experiment.crop is None else experiment.crop
    augment = Augment(crop=crop, flip=experiment.flip)
    return MemoryFeed.of(data, batch_size=experiment.batch_size, augment=augment, seed=seed, device=device)


@lru_cache(maxsize=8)
def _data(name: str, data_dir: Path | None, seed: int, pool: int) -> DataSet:
    return pooled(load_data(name, data_dir, seed=seed, progress=False), pool)
