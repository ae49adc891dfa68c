"""For any training loop: optimizers that follow a net through changes of structure, and lam by the update."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from timm.optim import Adahessian, Adan, Lamb
from timm.optim.kron import Kron
from torch import nn
from torch.optim import LBFGS, Optimizer

from growshrink.base.limits import check_value, checked
from growshrink.errors import GrowShrinkError, check_model
from growshrink.layers.activations import set_lambda
from growshrink.layers.branch import Branch
from growshrink.layers.swaps import left_net
from growshrink.schedules.functions import Schedule

#: They keep state elsewhere than with each parameter.
NOT_PER_PARAMETER = (Adahessian, Adan, Kron, Lamb, LBFGS)


class Synced(NamedTuple):
    """What `sync_optimizer` did: names of the parameters it added, and how many it removed."""

    added: tuple[str, ...]
    removed: int


@checked(GrowShrinkError, optimizer=Any)
def sync_optimizer(optimizer: Optimizer, model: nn.Module, *, group: int | None = None) -> Synced:
    """Make an optimizer train what a net consists of now, after `grow`, `fuse` or `drop` with `inplace=True`.

    Trainable parameters of the net that it does not have are added, those that fuse or drop took out of the net are
    removed with their state, all others keep their state; parameters of anything else stay. Groups keep their number
    and their order, so schedulers of the learning rate run on, and within them parameters come in the net's order, as
    in an optimizer made now. Wrap a net in `DistributedDataParallel` again after growing it.

    Args:
        optimizer: Any that keeps its state parameter by parameter; Accelerate's and Lightning's wrappers too.
        model: The net.
        group: Index of the group that new parameters join; None: a kernel joins that of the nearest kernel, first of
            its own layer's, a bias or a norm's parameter that of the nearest of those (for timm's weight decay).

    Raises:
        GrowShrinkError: The optimizer has none of the net's parameters, or keeps state of another kind.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> net = gs.grow(net, "lora", inplace=True)
    >>> gs.sync_optimizer(optimizer, net).added
    ('1.branches.0.path.down.weight', '1.branches.0.path.up.weight')
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    check_value("optimizer", optimizer, Optimizer, GrowShrinkError)
    if isinstance(optimizer, NOT_PER_PARAMETER):
        kind = type(optimizer).__name__
        raise GrowShrinkError(f"{kind} keeps state that is no single parameter's: make a new one after the change.")
    named = {id(parameter): (name, parameter) for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    known = {id(p) for entry in groups for p in entry["params"]} & named.keys()
    if named and not known:
        raise GrowShrinkError(
            "the optimizer has no parameter of this net: grow, fuse and drop return copies. Use inplace=True, or make "
            "a new optimizer."
        )
    removed = [p for entry in groups for p in entry["params"] if left_net(p) and id(p) not in named]
    for parameter in removed:
        optimizer.state.pop(parameter, None)
    gone, added = set(map(id, removed)), []
    joins: dict[int, list[Any]] = {}
    nearest = _nearest(groups, named)
    for name, parameter in named.values():
        if id(parameter) not in known and parameter.requires_grad:
            keys = [(p, small) for small in (_is_small(name, parameter), True, False) for p in _prefixes(name)]
            index = next(nearest[key] for key in keys if key in nearest) if group is None else group
            joins.setdefault(index, []).append(parameter)
            added.append(name)
    order = {key: place for place, key in enumerate(named)}
    for index, entry in enumerate(groups):
        names = dict(zip(map(id, entry["params"]), entry.get("param_names", ()), strict=False))
        stay = [p for p in entry["params"] if id(p) not in gone] + joins.get(index, [])
        entry["params"] = sorted(stay, key=lambda p: order.get(id(p), len(order)))
        if "param_names" in entry:
            entry["param_names"] = [named[id(p)][0] if id(p) in named else names[id(p)] for p in entry["params"]]
    return Synced(tuple(added), len(removed))


def branch_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a net's branches, for a group of their own.

    >>> net = gs.grow(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), "lora")
    >>> [tuple(parameter.shape) for parameter in gs.branch_parameters(net)]
    [(8, 4, 3, 3), (4, 8, 1, 1)]
    """
    check_model(model)
    found = {id(p): p for branch in model.modules() if isinstance(branch, Branch) for p in branch.parameters()}
    return list(found.values())


def _nearest(
    groups: Sequence[Mapping[str, Any]], named: Mapping[int, tuple[str, nn.Parameter]]
) -> dict[tuple[str, bool], int]:
    """The first group that trains a parameter within a module, by the module's name and whether it is a small one."""
    found: dict[tuple[str, bool], int] = {}
    for index, entry in enumerate(groups):
        for name, parameter in (named[id(p)] for p in entry["params"] if id(p) in named):
            for prefix in _prefixes(name):
                found.setdefault((prefix, _is_small(name, parameter)), index)
    return found


def _prefixes(name: str) -> list[str]:
    """Dotted names of the modules around a parameter, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


def _is_small(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim <= 1 or name.endswith(".bias")  # timm's rule of what has no weight decay


class LambdaScheduler:
    """Sets lam as torch's schedulers set the learning rate: once now, and then with every `step()`.

    Args:
        model: A grown net; what `fuse` or `drop` made of it is passed over.
        schedule: lam by the update (`growshrink.schedules`, or a `ClosedLoop`, whose state is kept too).
        ema: The average of its weights, which has averaged lam too: step after it is updated.

    Raises:
        GrowShrinkError: The net was never grown, or the schedule gives a value outside [0, 1].

    >>> net = gs.grow(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    >>> scheduler = gs.LambdaScheduler(net, gs.schedules.hold_then_vanish(hold=1, vanish=2))
    >>> for update in range(4):
    ...     print(scheduler.lam)  # optimizer.step() goes here
    ...     scheduler.step()
    1.0
    1.0
    0.5
    0.0
    """

    @checked(GrowShrinkError)
    def __init__(self, model: nn.Module, schedule: Schedule, *, ema: nn.Module | None = None) -> None:
        self.nets = [model] if ema is None else [model, ema]
        self.schedule, self.updates, self.lam = schedule, 0, 1.0
        self._set()

    def step(self, updates: int | None = None) -> None:
        """An update was made (or `updates` in all): set lam for the next."""
        self.updates = self.updates + 1 if updates is None else updates
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """Updates made, and the state of a schedule that has one; lam itself is in the state of the net."""
        keeps = getattr(self.schedule, "state_dict", None)
        return {"updates": self.updates, "schedule": None if keeps is None else keeps()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; sets lam."""
        self.updates = state["updates"]
        if state["schedule"] is not None:
            self.schedule.load_state_dict(state["schedule"])  # type: ignore[attr-defined]
        self._set()

    def _set(self) -> None:
        self.lam = self.schedule(self.updates)
        for net in self.nets:
            set_lambda(net, self.lam)
