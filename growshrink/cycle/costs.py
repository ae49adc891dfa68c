"""What the nets of a plan cost, before anything is trained; the phases make a sum of it (`Phases.macs`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.copying import copy_net
from growshrink.base.seeding import generator
from growshrink.cycle.plan import CyclePlan
from growshrink.cycle.records import plain_net
from growshrink.cycle.running import NetCost
from growshrink.cycle.source import Recipe, read_source
from growshrink.cycle.teaching import Teacher
from growshrink.data.feed import Feed, UpdateBatches, check_model_fits
from growshrink.errors import GrowShrinkError, PlanError
from growshrink.layers.activations import set_lambda
from growshrink.layers.grown import grown_modules
from growshrink.proofs._profile import training_macs
from growshrink.transforms import collapse_online, collapse_report


def teacher_nets(
    plan: CyclePlan, feed: Feed, model_about: Mapping[str, Any], given: Mapping[int, nn.Module] | None = None
) -> dict[int, nn.Module]:
    """The other nets that teach, by number of the round, as they are before any training; no random stream is moved.

    The plan's seed is the weights'; "plain_name" and "plain_kwargs" of `model_about` make the teacher "wider", `given`
    stand in place of nets that the plan names. PlanError where there is no such net, or it does not fit the data.
    """
    rounds, given = dict(enumerate(plan.rounds, start=1)), given or {}
    others = {number: entry.teacher for number, entry in rounds.items() if entry.teacher and entry.teacher.is_net}
    if unknown := given.keys() - others.keys():
        raise PlanError(f"teachers: no other net teaches in round {min(unknown)} of the plan.")
    found = {}
    for number, teacher in others.items():
        try:
            with torch.random.fork_rng([]):
                torch.manual_seed(generator("teacher", plan.seed, number).initial_seed())
                net = copy_net(given[number]) if number in given else _made(teacher, feed, model_about)
            check_model_fits(net, feed)
        except GrowShrinkError as error:
            raise PlanError(f"the teacher of round {number}, {teacher.of}: {error}") from error
        found[number] = net.requires_grad_(True)
    return found


def fingerprints(plan: CyclePlan, nets: Mapping[int, nn.Module]) -> dict[str, str]:
    """Digests of the nets of `teacher_nets` that are not trained first: a run depends on their weights."""
    finished = {n: net for n, net in nets.items() if not getattr(plan.rounds[n - 1].teacher, "share", 0)}
    states = {n: {key: v.cpu().contiguous() for key, v in net.state_dict().items()} for n, net in finished.items()}
    return {str(n): hashlib.blake2b(save(state), digest_size=8).hexdigest() for n, state in states.items()}


def _made(teacher: Teacher, feed: Feed, model_about: Mapping[str, Any]) -> nn.Module:
    name, kwargs = teacher.of, dict(teacher.kwargs)
    if name == "given":
        raise PlanError("no net was handed to run_cycle, as teachers={ROUND: net}.")
    if name == "wider":
        if "plain_name" not in model_about:
            raise PlanError("it is not known how to make the run's net; name a model, and its kwargs.")
        own = model_about["plain_kwargs"]
        width = own.get("width", 1) * kwargs.get("width", 2)
        name, kwargs = model_about["plain_name"], {**own, **kwargs, "width": width}
    if teacher.is_file or "checkpoint_path" in kwargs:
        path = name if teacher.is_file else kwargs.pop("checkpoint_path")
        source = read_source(Path(path).expanduser(), Recipe(name=name, kwargs=kwargs))
        if source.classes and source.classes != feed.classes:
            raise PlanError(f"was trained on other classes than those of {feed.name}.")
        return _renormalised(source.plain, feed, source.mean, source.std)
    if teacher.share or not kwargs.get("pretrained"):  # else it comes with the classes it was trained on
        kwargs = {"num_classes": len(feed.classes), **kwargs}
    try:
        net = timm.create_model(name, **{"in_chans": feed.input_size[0], **kwargs})
    except Exception as error:  # models check their arguments in their own ways
        raise PlanError(f"{name} with {kwargs}: {type(error).__name__}: {error}") from error
    cfg: Any = net.pretrained_cfg if kwargs.get("pretrained") else {"mean": (), "std": ()}
    return _renormalised(net, feed, cfg["mean"], cfg["std"])


def _renormalised(net: nn.Module, feed: Feed, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """A net that was trained on images normalised by `mean` and `std`, for those of the feed."""
    if not mean:
        return net  # else in the same structure whatever the difference: seeds side by side need that
    own_mean, own_std, mean_C, std_C = (torch.tensor(values) for values in (mean, std, feed.mean, feed.std))
    change = nn.Conv2d(len(mean), len(mean), 1, groups=len(mean))
    change.load_state_dict({"weight": (std_C / own_std).view(-1, 1, 1, 1), "bias": (mean_C - own_mean) / own_std})
    return nn.Sequential(change, net)


class Costs:
    """The nets of a run and their costs, made once; layouts of any length are then counted at once.

    Arguments as for `run_cycle`; `teachers` are those of `teacher_nets`. `first` is the net the run begins with,
    `plain` the plain net, `grown` has that of each round.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: CyclePlan,
        batches: UpdateBatches,
        input_size: InputSize,
        teachers: Mapping[int, nn.Module] | None = None,
    ) -> None:
        self.input_size = input_size
        self.batch_size = batches.batch_size
        plain = plain_net(model, input_size)
        cost_of = partial(NetCost.of, input_size=input_size, batch_size=self.batch_size)
        self.first, self.plain = cost_of(model), cost_of(plain)
        made: dict[tuple[object, ...], NetCost] = {}
        self.grown: list[NetCost] = []
        for number, entry in enumerate(plan.rounds):
            key = (number == 0 and bool(grown_modules(model)), entry.branch, entry.ratio, entry.where, entry.guide)
            if key not in made:
                made[key] = self.first
                if not entry.branch:
                    made[key] = self.plain
                elif not key[0]:
                    made[key] = cost_of(entry.grown(plain, input_size))
            self.grown.append(made[key])
        self.teachers = {number: cost_of(net) for number, net in (teachers or {}).items()}

    def online(self, grown: NetCost, lam: float) -> int:
        """MACs of an image in an update in which the branches that are linear at `lam` run merged."""
        net = copy_net(grown.net)
        set_lambda(net, lam)
        if any(row.merged for row in collapse_report(net).rows):
            collapse_online(net, choose="always", inplace=True)
        return training_macs(net, self.input_size, self.batch_size)
