"""Optimizers of timm's, for nets whose structure changes."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from timm.optim import (
    Adahessian,
    Adan,
    Lamb,
    Muon,
    create_optimizer_v2,
    get_optimizer_class,
    list_optimizers,
    param_groups_weight_decay,
)
from timm.optim.kron import Kron
from torch import nn

from growshrink.base.limits import OneOf
from growshrink.errors import PlanError

#: Optimizers that keep state (a step count, a random stream) elsewhere than with each parameter: after a
#: change of structure it would be wrong for the old parameters or for the new ones.
NOT_PER_PARAMETER = (Adahessian, Adan, Kron, Lamb)

OptimizerName = Annotated[str, OneOf("timm knows no such optimizer", list_optimizers)]


def make_optimizer(
    model: nn.Module, name: str, *, lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """An optimizer of timm's, for a net that may grow or fuse.

    Norms and biases do not decay. Muon's family (muon, nmuon, adamuon, nadamuon) orthogonalizes the updates of what is
    between the first layer and the last; these two get its fallback, AdamW or NAdamW, as its author advises, and so
    does every vector. Its decay is decoupled, and its learning rates are about a tenth of SGD's.

    Args:
        model: What is trained.
        name: Of timm's.
        lr: Learning rate.
        weight_decay: Weight decay.
        momentum: Momentum, where the optimizer has one.

    Raises:
        PlanError: timm cannot make it, or it keeps state that does not belong to single parameters.

    Source: Jordan et al., Muon (https://kellerjordan.github.io/posts/muon/).

    >>> groups = make_optimizer(nn.Linear(2, 2), "nmuon", lr=0.01, weight_decay=0.1, momentum=0.9).param_groups
    >>> [(len(group["params"]), group["weight_decay"], group.get("use_fallback", False)) for group in groups]
    [(1, 0.0, True), (1, 0.1, True)]
    """
    try:
        kind = get_optimizer_class(name, bind_defaults=False)
        if isinstance(kind, type) and issubclass(kind, NOT_PER_PARAMETER):
            raise PlanError(
                f"optimizer={name!r}: keeps state that does not belong to single parameters, and "
                "cannot follow a change of structure. Take sgd, adamw, nadamw, lion, muon, ..."
            )
        values: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        if isinstance(kind, type) and issubclass(kind, Muon):
            values["param_group_fn"] = lambda net: _muon_groups(net, weight_decay)
        return create_optimizer_v2(model, opt=name, **values)
    except PlanError:
        raise
    except (ValueError, RuntimeError, AssertionError) as error:
        raise PlanError(f"optimizer={name!r}: {error}") from error


def _muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The groups of timm, those of the first and the last layer apart."""
    layers = list[str]()
    for name, module in model.named_modules():
        within = layers and name.startswith(f"{layers[-1]}.")  # a layer's branches belong to it
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not within:
            layers.append(name)
    ends = {id(p) for name in {*layers[:1], *layers[-1:]} for p in model.get_submodule(name).parameters()}
    found = []
    for group in param_groups_weight_decay(model, weight_decay):
        for fallback in (False, True):
            if chosen := [p for p in group["params"] if (id(p) in ends) == fallback]:
                found.append({**group, "params": chosen, **({"use_fallback": True} if fallback else {})})
    return found
