"""The deployed channels of any convolutional net: which of them go together, what they cost, and nets without some.

Source: Fang et al., DepGraph (arXiv:2301.12900), by Torch-Pruning (the optional extra `prune`).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.algebra.dataflow import inputs_for, trace
from growshrink.algebra.inputs import InputLike
from growshrink.analysis._angle import Floats, Index
from growshrink.analysis.layers import LayerCosts
from growshrink.base.copying import copy_net
from growshrink.base.limits import Count, SomeOrAll, checked
from growshrink.branches import RowFactors
from growshrink.errors import AnalysisError, check_model, did_you_mean
from growshrink.layers.grown import Grown, grown_modules
from growshrink.layers.slim import Entries
from growshrink.proofs._profile import profile
from growshrink.transforms._fold import fold_norms_, foldable

#: Importances of Torch-Pruning by the name they have here, with their arguments.
CRITERIA: dict[str, tuple[str, dict[str, Any]]] = {
    "l1": ("GroupMagnitudeImportance", {"p": 1}),
    "l2": ("GroupMagnitudeImportance", {"p": 2}),
    "bn_scale": ("BNScaleImportance", {}),
    "fpgm": ("FPGMImportance", {}),
    "taylor": ("GroupTaylorImportance", {}),
}
Kept = Mapping[str, NDArray[np.intp]]
"""Channels that stay, rising, by name of the group."""


@dataclass(frozen=True, eq=False)
class _Group:
    """Channels that live and die together.

    Attributes:
        units: The channels of the group's first layer that go together: one each, or more (a concatenation of two
            layers, one of which is depthwise behind the other).
        places: Dependency, module name, and the tensor entries of each unit.
    """

    name: str
    units: list[NDArray[np.intp]]
    group: Any
    places: tuple[tuple[Any, str, tuple[NDArray[np.intp], ...]], ...]

    @property
    def channels(self) -> int:
        """How many units there are: what a width counts."""
        return len(self.units)


class ChannelSpace:
    """The widths of a net's groups of coupled channels.

    Args:
        model: Any timm model, or another that Torch-Pruning can trace. Not modified.
        input_size: `(C, H, W)`.
        least: Smallest share of its channels that a group keeps.
        round_to: Widths are multiples of this (the full width is always a choice).

    Attributes:
        choices: Rising widths by name of the group: its first convolution.
        left_alone: Groups that cannot be pruned, with the reason.

    Raises:
        AnalysisError: Torch-Pruning is not there or cannot prune the net.
    """

    @checked(AnalysisError, least=SomeOrAll, round_to=Count)
    def __init__(self, model: nn.Module, input_size: InputLike, *, least: float = 0.1, round_to: int = 1) -> None:
        check_model(model, scripted=False)
        self.model = model
        self.inputs = inputs_for(model, input_size)
        # A copy of its own: the graph belongs to its modules, which are looked up by name in the nets that are cut.
        self._traced = copy_net(model).cpu().eval().requires_grad_(True)
        self._empty = copy_net(model).to("meta").eval()
        self.left_alone: dict[str, str] = {}
        self._groups = {group.name: group for group in self._find()}
        self.choices = {name: _choices(group.channels, least, round_to) for name, group in self._groups.items()}
        self._prove()

    def cost(self, index: Index) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Parameters and MACs of N nets, `(N,)` each; `index` is `(N, groups)`, as of an `AngleTable`."""
        return self._costs.of(np.stack([np.asarray(c)[index[:, i]] for i, c in enumerate(self.choices.values())], 1))

    def cut(self, kept: Kept, model: nn.Module | None = None) -> nn.Module:
        """A copy of the net (or of another `model` of its structure) with only the `kept` channels, in eval mode."""
        net = copy_net(self.model if model is None else model).eval()
        modules = dict(net.named_modules())
        gone: dict[tuple[str, str], tuple[Any, list[NDArray[np.intp]]]] = {}
        for name, group in self._groups.items():
            lost = np.setdiff1d(np.arange(group.channels), kept[name])
            for dependency, module, entries in group.places if len(lost) else ():
                _, places = gone.setdefault((module, dependency.handler.__name__), (dependency, []))
                places.extend(entries[channel] for channel in lost)
        for (module, _), (dependency, places) in gone.items():
            pruner = dependency.handler.__self__
            pruner.pruning_dim = dependency.target.pruning_dim
            gone_here = sorted(map(int, np.unique(np.concatenate(places))))
            dependency.handler(modules[module], gone_here)
            gain = getattr(modules[module], "gain", None)  # of timm's convolutions with standardised kernels
            if isinstance(gain, nn.Parameter) and "out_channels" in dependency.handler.__name__:
                modules[module].gain = nn.Parameter(gain[np.delete(np.arange(len(gain)), gone_here)].detach())
        return net

    def fold(self, net: nn.Module) -> nn.Module:
        """Fold the norms of a net that was cut here, in place: `growshrink.fold` with the data flow of the full net."""
        fold_norms_(net, self._norms)
        return net

    @cached_property
    def _norms(self) -> dict[str, str]:
        return foldable(self.model, trace(self.model, self.inputs))

    def axes(self) -> dict[tuple[str, bool], dict[str, Entries]]:
        """By layer, and whether its output channels: by group the entries of each channel, `(channels, each)`."""
        found: dict[tuple[str, bool], dict[str, Entries]] = {}
        for name, group in self._groups.items():
            for dependency, module, entries in group.places:
                axis = found.setdefault((module, "in_channels" not in dependency.handler.__name__), {})
                axis[name] = np.stack(entries)
        return found

    def importance(self, criterion: str, batch: tuple[Tensor, Tensor] | None = None) -> dict[str, Floats]:
        """How important each channel is, by group, in units of the group's mean; "taylor" needs images and labels."""
        if criterion not in CRITERIA:
            raise AnalysisError(f"{criterion}: no such criterion{did_you_mean(criterion, CRITERIA)}")
        name, kwargs = CRITERIA[criterion]
        if criterion == "taylor":
            if batch is None:
                raise AnalysisError("taylor needs a batch of images and labels.")
            self._traced.zero_grad(set_to_none=True)
            images, labels = (tensor.cpu() for tensor in batch)
            F.cross_entropy(self._traced(images), labels).backward()
        measure = getattr(_torch_pruning().importance, name)(**kwargs)
        found = {name: measure(group.group) for name, group in self._groups.items()}
        return {  # None: no norm in it, for bn_scale
            name: np.array([1.0 if values is None else float(values[unit].mean()) for unit in self._groups[name].units])
            for name, values in found.items()
        }

    def from_modules(self, values: Mapping[str, Floats | Tensor]) -> dict[str, Floats]:
        """How important each channel is, by group, from values of the output channels of modules (`channel_usage`)."""
        found: dict[str, Floats] = {}
        for name, group in self._groups.items():
            known = [
                np.array([values[module][list(entries)].mean() for entries in entries_of_channels])
                for dependency, module, entries_of_channels in group.places
                if module in values and "in_channels" not in dependency.handler.__name__
            ]
            mean = np.mean(known, axis=0) if known else np.ones(group.channels)
            found[name] = mean / max(mean.mean(), 1e-12)
        return found

    def _find(self) -> list[_Group]:
        tp = _torch_pruning()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # parameters of no layer: such groups are left alone below
                batch = self.inputs.batch(1, next(self._traced.parameters()).dtype, seed=None)
                graph = tp.DependencyGraph().build_dependency(self._traced, dict(batch.kwargs) or batch.args)
                last = [m for m in self._traced.modules() if isinstance(m, nn.Linear)][-1:]
                found_groups = list(graph.get_all_groups(ignored_layers=last))
        except Exception as error:  # whatever a forward or the tracer may raise
            net = type(self.model).__name__
            raise AnalysisError(f"{net}: Torch-Pruning cannot trace it on {self.inputs}: {error}") from error
        names = {id(module): name for name, module in self._traced.named_modules()}
        groups = []
        for group in found_groups:
            name = names[id(group[0].dep.target.module)]
            if reason := _why_not(group):
                self.left_alone[name] = reason
                continue
            units, places = _units(graph, group, names)
            if any(len(entries) != len(place[2][0]) for place in places for entries in place[2]):
                self.left_alone[name] = "its channels go together in unequal numbers"
                continue
            groups.append(_Group(name, units, group, places))
        return groups

    def _prove(self) -> None:
        """Leave groups alone without which the net runs at middle widths and costs what was computed."""
        reason = "no channels that could be pruned"
        if self._groups and (reason := self._failure(list(self._groups))):
            for name in list(self._groups):
                if why := self._failure([name]):
                    self.left_alone[name] = why
                    del self._groups[name], self.choices[name]
            reason = self._failure(list(self._groups)) if self._groups else reason
        if reason:
            raise AnalysisError(f"{type(self.model).__name__}: {reason}.")

    def _failure(self, names: Sequence[str]) -> str:
        """Why the net cannot be pruned to middle widths of these groups; empty where it can."""
        self._costs = LayerCosts(self.model, self.inputs, self.axes(), list(self._groups))
        row = [len(choices) // 2 if name in names else len(choices) - 1 for name, choices in self.choices.items()]
        kept = {name: np.arange(choices[i]) for (name, choices), i in zip(self.choices.items(), row, strict=True)}
        try:
            found = profile(self.cut(kept, self._empty), self.inputs)
        except Exception as error:  # whatever a forward may raise
            return f"with fewer channels it does not run ({str(error).splitlines()[0]})"
        params, macs = self.cost(np.array([row]))
        if (found.params, found.macs) == (params[0], macs[0]):
            return ""
        return (
            f"with fewer channels it has {found.params:,} parameters and {found.macs:,} MACs, its graph says "
            f"{params[0]:,} and {macs[0]:,}: it cannot be pruned by the graph"
        )


def channel_usage(grown: nn.Module) -> dict[str, Floats]:
    """Mean factor of each output channel, by name of the layer or norm that carries gates ("guided", "manidp", ...).

    >>> {name: len(means) for name, means in gs.analysis.channel_usage(gs.grow(net, "manidp")).items()}
    {'stages.0.0.bn': 4, 'stages.1.0.bn': 8, 'stages.2.0.bn': 16}
    """
    usage: dict[str, Floats] = {}
    for name, module in grown_modules(grown).items():
        for branch in module.branches if isinstance(module, Grown) else ():
            if isinstance(branch, RowFactors):
                mean = branch.fade.mean if hasattr(branch, "fade") else branch.constant(torch.float32)
                usage[name] = (1 + branch.added(mean.float())).abs().double().detach().cpu().numpy()
    return usage


def _torch_pruning() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_pruning
    except ImportError as error:
        needed = "pruning channels needs Torch-Pruning: pip install torch-pruning."
        raise AnalysisError(needed) from error
    return torch_pruning


def _why_not(group: Any) -> str:
    """Why a group cannot be pruned to any width, or nothing."""
    for dependency, _ in group:
        module = dependency.target.module
        if isinstance(module, nn.Parameter):
            return "a parameter that belongs to no layer takes part"
        if isinstance(module, nn.Conv2d) and 1 < module.groups < module.out_channels:
            return "a grouped convolution takes part"
        if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
            return "a group norm takes part"
    return ""


def _units(graph: Any, group: Any, names: Mapping[int, str]) -> tuple[list[NDArray[np.intp]], Any]:
    """The units of a group, and its places; modules without a name are operations without tensors."""
    root, channels = group[0].dep, len(group[0].idxs)
    items = [item for item in group.items if id(item.dep.target.module) in names]
    counts = [np.bincount(item.root_idxs, minlength=channels) for item in items]
    if all((count == count[0]).all() for count in counts):
        parts, units = [(item, item.root_idxs) for item in items], list(np.arange(channels)[:, None])
    else:  # the group's own lists follow one way to each place only: asked for one channel, all that goes with it come
        parts, units, seen = [], [], set()
        for channel in range(channels):
            if channel not in seen:
                alone = graph.get_pruning_group(root.target.module, root.handler, [channel])
                parts += [(item, [len(units)] * len(item.idxs)) for item in alone.items]
                units.append(np.unique(alone[0].idxs))
                seen.update(units[-1])
    places: dict[tuple[str, str], tuple[Any, str, list[Any]]] = {}
    for item, owners in parts:
        if (module := names.get(id(item.dep.target.module))) is not None:
            entries = places.setdefault((module, item.dep.handler.__name__), (item.dep, module, [[] for _ in units]))[2]
            for owner, entry in zip(owners, item.idxs, strict=True):
                entries[owner].append(entry)
    return units, tuple((dep, module, tuple(np.unique(e) for e in entries)) for dep, module, entries in places.values())


def _choices(channels: int, least: float, round_to: int) -> tuple[int, ...]:
    lowest = max(1, int(np.ceil(least * channels)))
    return (*(width for width in range(lowest, channels) if width % round_to == 0), channels)


def best_channels(importance: Mapping[str, Sequence[float] | Floats], widths: Mapping[str, int]) -> Kept:
    """The `widths` most important channels of each group; of equals the first."""
    return {
        name: np.sort(np.argsort(-np.asarray(importance[name]), kind="stable")[:width])
        for name, width in widths.items()
    }
