"""An experiment: arms on equal budgets of training MACs, several seeds each, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from growshrink.base.config import check_fields, from_dict, to_dict
from growshrink.base.limits import BatchSize, Count, Positive, Whole
from growshrink.base.seeding import generator
from growshrink.data.datasets import DataSet, Split, load_data, pooled, stratified
from growshrink.data.feed import Feed
from growshrink.errors import PlanError, did_you_mean
from growshrink.evidence.arms import ARMS, PLAIN, Arm
from growshrink.evidence.record import ArmComparison, Job, Tuning, states_of
from growshrink.training.trainer import TrainConfig


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
        seeds: Seeds of weights, val split, order and augmentation; the same for every arm.
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
        own = self.tuning and (self.tuning.seeds, self.tuning.budget) == (self.seeds, self.budget)
        if self.tuning and not own and set(self.tuning.seeds) & set(self.seeds):
            raise PlanError("tuning.seeds: must be others than the experiment's, or the same with the same budget.")

    def arm(self, name: str) -> Arm:
        """By its name."""
        return {**ARMS, **self.own_arms}[name]

    @property
    def comparison(self) -> ArmComparison:
        """The part of it that tables are made from."""
        kept = {entry.name: getattr(self, entry.name) for entry in fields(ArmComparison) if entry.name != "lr"}
        return ArmComparison(lr=self.config.lr, **kept)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; the inverse of `from_dict`."""
        return to_dict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Experiment:
        """From a plan file; PlanError for unknown keys and values that cannot be."""
        return from_dict(Experiment, values, "the plan")


def plain_of(experiment: Experiment, arm: str, feed: Feed | DataSet, seed: int) -> nn.Module:
    """Make the net that an arm of the experiment arrives at, with fresh weights."""
    return net_of(experiment, experiment.model, feed, seed, **experiment.arm(arm).model_kwargs)


def net_of(experiment: Experiment, name: str, feed: Feed | DataSet, seed: int, **overrides: Any) -> nn.Module:
    """Make a net of the experiment by its name, with fresh weights."""
    torch.manual_seed(seed)
    return timm.create_model(name, **about_net(experiment, name, feed, **overrides)["kwargs"])


def about_net(experiment: Experiment, name: str, feed: Feed | DataSet, **overrides: Any) -> dict[str, Any]:
    """How to make a net of the experiment again, and its plain form."""
    kwargs = {"num_classes": len(feed.classes), "in_chans": feed.input_size[0], **experiment.model_kwargs, **overrides}
    return {"name": name, "kwargs": kwargs, "plain_name": experiment.model, "plain_kwargs": kwargs}


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
