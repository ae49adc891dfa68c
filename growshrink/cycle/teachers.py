"""Teachers that are other nets than the run's: made, read, and checked against the data."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from growshrink.base.seeding import generator
from growshrink.cycle.plan import CyclePlan
from growshrink.cycle.source import Recipe, Source, read_source
from growshrink.cycle.teaching import Teacher
from growshrink.data.feed import Feed, check_model_fits
from growshrink.errors import GrowShrinkError, PlanError


class Renormalised(nn.Module):
    """A net, fed with images that were normalised otherwise than those it was trained on.

    Args:
        net: The net.
        mean: Per channel, of the images that come; `std` likewise.
        own_mean: Per channel, of the images `net` expects; `own_std` likewise.
    """

    def __init__(
        self,
        net: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        own_mean: tuple[float, ...],
        own_std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.net = net
        then, now, m, s = (
            torch.tensor(values).view(-1, 1, 1) for values in (own_mean, mean, own_std, std)
        )  # (C, 1, 1)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", s / m)
        self.register_buffer("shift", (now - then) / m)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` -> what the net makes of it."""
        logits: Tensor = self.net(x * self.scale + self.shift)
        return logits


def teacher_nets(
    plan: CyclePlan, feed: Feed, model_about: Mapping[str, Any], given: Mapping[int, nn.Module] | None = None
) -> dict[int, nn.Module]:
    """The other nets that teach, by number of the round, on the CPU and as they are before they are trained.

    No random stream is moved: weights depend on the plan's seed and the round.

    Args:
        plan: The plan.
        feed: What they are to learn from.
        model_about: "plain_name" and "plain_kwargs" of the run's net, for the teacher "wider".
        given: Nets in place of those that the plan names.

    Raises:
        PlanError: There is no such net, or it does not fit the data.
    """
    found, given = dict[int, nn.Module](), given or {}
    for number, entry in enumerate(plan.rounds, start=1):
        if entry.teacher is None or not entry.teacher.is_net:
            continue
        try:
            net = given.get(number)
            if net is None:
                with torch.random.fork_rng([]):
                    torch.manual_seed(generator("teacher", plan.seed, number).initial_seed())
                    net = _made(entry.teacher, feed, model_about, number)
            check_model_fits(net, feed)
        except GrowShrinkError as error:
            raise PlanError(f"the teacher of round {number}, {entry.teacher.of}: {error}") from error
        found[number] = copy.deepcopy(net).requires_grad_(entry.trains_teacher)
    if unknown := given.keys() - found.keys():
        raise PlanError(f"teachers: no other net teaches in round {min(unknown)} of the plan.")
    return found


def _made(teacher: Teacher, feed: Feed, model_about: Mapping[str, Any], number: int) -> nn.Module:
    name, kwargs = teacher.of, dict(teacher.kwargs)
    if name == "given":
        raise PlanError(f"hand the net to run_cycle, teachers={{{number}: net}}.")
    if name == "wider":
        if "plain_name" not in model_about:
            raise PlanError("it is not known how to make the run's net; name a model, and its kwargs.")
        own = model_about["plain_kwargs"]
        name, kwargs = (
            model_about["plain_name"],
            {**own, **kwargs, "width": own.get("width", 1) * kwargs.get("width", 2)},
        )
    if teacher.is_file:
        return _adapted(read_source(Path(name).expanduser()), feed)
    if "checkpoint_path" in kwargs:
        return _adapted(read_source(Path(kwargs.pop("checkpoint_path")), Recipe(name=name, kwargs=kwargs)), feed)
    if teacher.share or not kwargs.get("pretrained"):  # else it comes with the classes it was trained on
        kwargs = {"num_classes": len(feed.classes), **kwargs}
    try:
        net = timm.create_model(name, **{"in_chans": feed.input_size[0], **kwargs})
    except Exception as error:  # models check their arguments in their own ways
        raise PlanError(f"{name} with {kwargs}: {type(error).__name__}: {error}") from error
    if not kwargs.get("pretrained"):
        return net
    cfg: Any = net.pretrained_cfg
    return _renormalised(net, feed, tuple(cfg["mean"]), tuple(cfg["std"]))


def _adapted(source: Source, feed: Feed) -> nn.Module:
    if source.classes and source.classes != feed.classes:
        raise PlanError(f"{source.path}: was trained on other classes than those of {feed.name}.")
    return _renormalised(source.plain, feed, source.mean, source.std)


def _renormalised(net: nn.Module, feed: Feed, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
    same = (mean, std) == (tuple(feed.mean), tuple(feed.std))
    return net if same or not mean else Renormalised(net, tuple(feed.mean), tuple(feed.std), mean, std)


def fingerprint(net: nn.Module) -> str:
    """Digest of the weights of a net, whose answers a run depends on."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
