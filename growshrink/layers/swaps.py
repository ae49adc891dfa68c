"""Class swaps: a layer becomes its grown class, that one its online class, and back, in place.

A swap leaves the object what it is to everybody who holds it: parameters, buffers, their names, hooks and the state
that an optimizer keeps. No other file assigns `__class__`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from growshrink.errors import GrowError, check_model
from growshrink.layers.activations import vanishing
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.branch import Branch
from growshrink.layers.grown import Grown, GrownConv2d, GrownConv2dSame
from growshrink.layers.grown_linear import GrownLinear
from growshrink.layers.grown_norm import GrownNorm2d, GrownNormAct2d
from growshrink.layers.online import OnlineBottleneck, OnlineConv2d, OnlineConv2dSame, OnlineModule


class Swap(NamedTuple):
    """The classes that one object goes through."""

    plain: type[nn.Module] | None  # None: it is grown from birth
    grown: type[Grown] | type[PureBottleneck]
    online: type[OnlineModule] | None  # None: it has no merged form


#: Classes are compared exactly: a subclass may compute something else, and is left alone.
TABLE = (
    Swap(nn.Conv2d, GrownConv2d, OnlineConv2d),
    Swap(Conv2dSame, GrownConv2dSame, OnlineConv2dSame),
    Swap(nn.Linear, GrownLinear, None),
    Swap(nn.BatchNorm2d, GrownNorm2d, None),
    Swap(BatchNormAct2d, GrownNormAct2d, None),
    Swap(None, PureBottleneck, OnlineBottleneck),
)
GROWN_CLASSES = {row.plain: row.grown for row in TABLE if row.plain}
ONLINE_CLASSES = {row.grown: row.online for row in TABLE if row.online}
_PLAIN_CLASSES = {grown: plain for plain, grown in GROWN_CLASSES.items()}
_EXPANDED_CLASSES = {online: grown for grown, online in ONLINE_CLASSES.items()}


def attach(layer: nn.Module, branches: Iterable[Branch]) -> Grown:
    """Attach branches to a layer of a class in `GROWN_CLASSES`, or already grown; returns the same object."""
    if isinstance(layer, Grown):
        layer.branches.extend(branches)
    elif type(layer) in GROWN_CLASSES:
        layer.__class__ = GROWN_CLASSES[type(layer)]
        assert isinstance(layer, Grown)
        layer.branches = nn.ModuleList(branches).train(layer.training)
    else:
        known = ", ".join(cls.__name__ for cls in GROWN_CLASSES)
        raise GrowError(f"a {type(layer).__name__} cannot carry branches, only {known}.")
    join = isinstance(layer, GrownConv2d)
    for branch in layer.branches:
        assert isinstance(branch, Branch)
        join &= branch.parallel  # one that reads the output finds in it what came before, and nothing else
        branch.joined = join and branch.per_image
    return layer


def to_plain(layer: Grown) -> nn.Module:
    """Remove the branches of a grown layer, which becomes the class it came from; returns the same object."""
    expand_online(layer, inplace=True)
    del layer.branches
    layer.__class__ = _PLAIN_CLASSES[type(layer)]  # type: ignore[assignment]
    return layer


def go_online(module: nn.Module) -> None:
    """Change the class of a grown module whose linear branches are marked (`branch.merged`), and hold its parts."""
    assert isinstance(module, (GrownConv2d, PureBottleneck))
    module.__class__ = ONLINE_CLASSES[type(module)]  # type: ignore[assignment]
    assert isinstance(module, OnlineModule)
    for part in module.held_parts():
        for _, act in vanishing(part):
            act.held = True
    module.train(module.training)


def expand_online(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Undo `collapse_online`: the branches run one by one again, their norms learn statistics, lam may rise.

    A net that is not collapsed comes back as it is.

    Args:
        model: A grown net.
        inplace: Work on `model` itself; otherwise on a deep copy.
    """
    check_model(model)
    model = model if inplace else copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, OnlineModule):
            for part in module.held_parts():
                part.train(module.training)
                for _, act in vanishing(part):
                    act.held = False
            for branch in getattr(module, "branches", ()):
                branch.merged = False
            module.__dict__.pop("collapsed", None)
            module.__dict__.pop("timing", None)
            module.__class__ = _EXPANDED_CLASSES[type(module)]  # type: ignore[assignment]
    return model
