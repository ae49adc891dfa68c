"""Changes of structure, made on the net in training and on its average at once, and undone."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from growshrink.algebra.dataflow import InputSize, trace
from growshrink.base.copying import copy_net
from growshrink.base.ranks import all_gather, this_rank
from growshrink.cycle.records import Collapsed, Gradients, Grew, Merged, shapes_of
from growshrink.errors import RunError
from growshrink.layers.activations import set_lambda
from growshrink.layers.equilibrium import ImplicitReLU
from growshrink.layers.grown import Grown, grown_modules
from growshrink.layers.swaps import expand_online
from growshrink.layers.widths import get_width
from growshrink.proofs._compare import EXACT_FLOAT64, branch_effect, compare, verify
from growshrink.runs.checkpoints import random_state, set_random_state
from growshrink.training.calibrate import calibrate_bn
from growshrink.training.gradient_maps import GradientMaps
from growshrink.training.trainer import Trainer
from growshrink.transforms import collapse_online, collapse_report, drop
from growshrink.transforms._fuse import fuse_along

#: Batches that batch norm statistics are taken from.
CALIBRATION_BATCHES = 20


def grow_nets(trainer: Trainer, change: Grew, where: str | None, input_size: InputSize) -> Grew:
    """Grow model and average as `change` says, and let the optimizer follow; returns it with `names` and `shapes`.

    `where` is the regular expression on dotted names as for `grow`, `input_size` is `(C, H, W)`.
    """
    model = trainer.model
    change.grow(model, input_size, where)
    change = replace(change, names=list(grown_modules(model)), shapes=shapes_of(model))  # it was plain before
    if trainer.ema is not None:
        change.grow(trainer.ema, input_size)
    trainer.structure_changed()
    return change


def collapse_net(trainer: Trainer, lam: float, number: int) -> Collapsed | None:
    """Merge the model's branches (not the average's) that are linear at `lam` into kernels, for training.

    Not only where it is faster: a run is to be the same on every machine. None where no branch is linear.
    """
    model = trainer.model
    set_lambda(model, lam)
    if not any(row.merged for row in collapse_report(model).rows):
        return None
    begin = trainer.update
    calibrate_bn(model, (trainer.batches.batch(update)[0] for update in range(begin, begin + CALIBRATION_BATCHES)))
    collapse_online(model, choose="always", inplace=True)
    return Collapsed(update=begin, round=number, lam=lam, names=list(collapse_report(model).collapsed))


def fuse_nets(trainer: Trainer, score: Callable[[nn.Module], float], input_size: InputSize) -> Merged:
    """Fuse model and average, every lam at 0, with proof on the net as trained and on a copy with random norms.

    `score` gives a net's top-1 on the val split. FuseError where a net cannot be merged exactly, RunError where the
    averaged net and its fused form differ.
    """
    best = copy_net(trainer.best)
    owns_kernels = all(isinstance(module, Grown) for module in grown_modules(best).values())
    vanished, dropped = score(best), score(drop(best)) if owns_kernels else None
    merge, exact = partial(fuse_along, flow=trace(best, input_size)), copy_net(best).double()
    max_rel = compare(exact, merge(copy_net(exact)), input_size=input_size).max_rel
    effect = trained_effect = 0.0
    if any(get_width(best).values()):  # else every branch is skipped, and nothing is merged
        proof = verify(best, merge, input_size=input_size)
        max_rel, effect = max(max_rel, proof.max_rel), proof.effect
        trained_effect = branch_effect(best, input_size=input_size)
    if not max_rel <= EXACT_FLOAT64:
        raise RunError(f"the fused net differs from the grown one by {max_rel:.1e} in float64.")
    reset = _meaning_changes(trainer.model)
    for net in trainer.nets:  # of these the one in training may be collapsed
        merge(expand_online(net, inplace=True))
    trainer.structure_changed(reset)
    single = compare(best, trainer.best, input_size=input_size, dtype=torch.float32)
    return Merged(
        vanished=vanished,
        dropped=dropped,
        fused=score(trainer.best),
        effect=effect,
        trained_effect=trained_effect,
        max_rel=max_rel,
        max_rel_float32=single.max_rel,
        top1_agreement=single.top1_agreement,
        recurrence=ImplicitReLU.mean_norm(best),
    )


def gradients(trainer: Trainer) -> Gradients:
    """How many of the new parameters the last update had a gradient for, and their share of its norm."""
    grown = shapes_of(trainer.model)
    # Lists, not sets: sums in the order of a set differ in their last bit from process to process.
    new = [name for name in grown if ".branches." in name] or list(grown)  # built grown: all of it is new
    named = trainer.model.named_parameters()
    norms = {name: float(parameter.grad.norm()) for name, parameter in named if parameter.grad is not None}
    total = sum(value**2 for value in norms.values()) ** 0.5
    own = sum(norms.get(name, 0.0) ** 2 for name in new) ** 0.5
    return Gradients(
        new_parameters=len(new),
        with_gradient=sum(norms.get(name, 0.0) > 0 for name in new),
        share_of_norm=own / total if total else 0.0,
    )


def _meaning_changes(model: nn.Module) -> set[str]:
    """Parameters that mean something else after the fuse: kernels (and biases) behind a branch that is not parallel."""
    return {
        f"{name}.{key}"
        for name, module in grown_modules(model).items()
        if isinstance(module, Grown)
        and not all(getattr(branch, "parallel", False) or branch.skipped for branch in module.branches)
        for key in ("weight", "bias")
    }


def values_of(trainer: Trainer) -> dict[str, Any]:
    """Everything about a trainer that changes while its structure stays; every rank has its own random states."""
    values: dict[str, Any] = {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer_state(),
        "random": all_gather(random_state()),
    }
    if trainer.ema is not None:
        values["ema"] = trainer.ema.state_dict()
    if trainer.gradient_maps is not None:
        values["gradients"] = trainer.gradient_maps.state_dict()
    return values


def set_values(trainer: Trainer, values: Mapping[str, Any]) -> None:
    """The inverse of `values_of`, on a trainer without optimizer state; RunError for those of another structure."""
    for net, key in ((trainer.model, "model"), (trainer.ema, "ema")):
        if net is not None:
            load_values(net, values[key])
    trainer.load_optimizer_state(values["optimizer"])
    if "gradients" in values:
        trainer.map_gradients(GradientMaps.from_state_dict(values["gradients"]))
    set_random_state(values["random"][this_rank()])


def load_values(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    """`load_state_dict`, with a RunError that names the first difference."""
    own = net.state_dict()
    for name in [*own, *values]:
        then, now = (tuple(state[name].shape) if name in state else "nothing" for state in (values, own))
        if then != now:
            raise RunError(f"of another model ({name}: {then} then, {now} now).")
    net.load_state_dict(values)


def snapshot(trainer: Trainer) -> dict[str, Any]:
    """A copy of `values_of`, to go back to."""
    return copy.deepcopy(values_of(trainer))
