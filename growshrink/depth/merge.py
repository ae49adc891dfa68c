"""merge_runs: several convolutions in a row as one, exactly, inside a net that otherwise stays as it is."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, cast

import torch
from torch import nn

from growshrink.algebra.convmap import ConvMap
from growshrink.algebra.dataflow import Flow, InputSize, trace
from growshrink.base.copying import copy_net
from growshrink.base.limits import checked
from growshrink.errors import AlgebraError, FuseError, MergeError, did_you_mean
from growshrink.layers.activations import VanishingAct, VanishingReLU
from growshrink.proofs._profile import profile
from growshrink.transforms import fold
from growshrink.transforms._fuse import check_unchanged, replace_module

WhereToMerge = str | Callable[[str, nn.Module], bool] | Iterable[str | Sequence[str]] | None


@dataclass(frozen=True)
class ConvRun:
    """Convolutions that become one, which goes by the last of their names, and their MACs for one image."""

    names: tuple[str, ...]
    kernel_size: tuple[int, int]
    macs_before: int
    macs_after: int


@dataclass(frozen=True)
class MergeReport:
    """What merging does to a net, or would do; `ends`: why a convolution is not merged with the one that feeds it."""

    runs: tuple[ConvRun, ...]
    ends: dict[str, str]
    macs_before: int
    macs_after: int

    def __str__(self) -> str:
        """A line per run and per reason, and the total."""
        lines = [
            f"{' + '.join(run.names)} -> {run.kernel_size[0]}x{run.kernel_size[1]}: "
            f"{run.macs_before:,} -> {run.macs_after:,} MACs ({run.macs_after / run.macs_before:.2f}x)"
            for run in self.runs
        ]
        lines += [f"{name}: not merged with what is before it: {reason}" for name, reason in self.ends.items()]
        return "\n".join([*lines, f"the whole net: {self.macs_before:,} -> {self.macs_after:,} MACs"])


def merge_runs(
    model: nn.Module,
    where: WhereToMerge = None,
    *,
    if_costlier: str = "refuse",
    inplace: bool = False,
    input_size: InputSize | None = None,
) -> nn.Module:
    """Merge runs of convolutions with nothing but affine maps between them: 3x3 after 3x3 becomes 5x5.

    The net is folded first (batch norms, in ReduceNets skips), activations that have vanished are taken out, and
    then each run of convolutions, in which each alone reads the output of the one before, becomes a single one at the
    place of the last. Strides, dilations and groups compose; pointwise convolutions merge into anything. Exact at the
    borders, or not done: build the net with all padding in front (`pad="front"` of a ReduceNet).

    Merging can increase the cost of a net (two 3x3: 18 multiplications, the 5x5: 25); whether it is faster has to be
    measured (`recipes/shrink_depth.py` does).

    Args:
        model: A plain net (fuse a grown one first).
        where: Which convolutions may take part: None (all), a regular expression on dotted names, a callable (name,
            module) -> bool, names, all of which have to become part of a run, or runs, each a list of names in order.
        if_costlier: About runs that cost more MACs merged. "refuse": what is asked for by name is an error, elsewhere
            the cheapest way to cut is taken; "warn": merged, with a warning; "allow": merged.
        inplace: Work on `model` itself; otherwise on a deep copy.
        input_size: `(C, H, W)` for the data flow, the MACs and the final check; None takes the model's own.

    Returns:
        The merged net, in its inference form, checked against the given one on random inputs.

    Raises:
        MergeError: Nothing, or not what was named, can be merged exactly, or it would cost more; nothing has changed.
        FuseError: The net is grown, or cannot be folded.

    >>> gs.depth.merge_runs(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3)), input_size=(3, 8, 8))[1]
    Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    runs, ends, _, size = _plan(model, where, if_costlier, input_size)
    if not runs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(ends.items())[:3])
        raise MergeError(f"there are no two convolutions to merge: {reasons or 'none follows another'}.")
    if if_costlier == "warn" and (costly := _costly(runs)):
        warnings.warn(f"merging increases the cost of {costly}", stacklevel=2)

    def commit(model: nn.Module) -> None:
        _prepare(model, size)
        _merge(model, runs)

    model = model if inplace else copy_net(model)
    try:
        check_unchanged(model, commit, size)
    except (FuseError, AlgebraError) as error:  # the second: what is 0 in the model's dtype need not be in float64
        raise MergeError(str(error)) from error
    commit(model)
    return model


def merge_report(
    model: nn.Module, where: WhereToMerge = None, *, if_costlier: str = "refuse", input_size: InputSize | None = None
) -> MergeReport:
    """What `merge_runs` with the same arguments would merge, what not and why, and the MACs before and after.

    >>> print(gs.depth.merge_report(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3)), input_size=(3, 8, 8)))
    0 + 1 -> 3x3: 5,952 -> 3,888 MACs (0.65x)
    the whole net: 5,952 -> 3,888 MACs
    """
    runs, ends, folded, size = _plan(model, where, if_costlier, input_size)
    _merge(folded, runs)
    return MergeReport(runs, ends, profile(model, size).macs, profile(folded, size).macs)


@checked(MergeError, if_costlier=Literal["refuse", "warn", "allow"])
def _plan(
    model: nn.Module, where: WhereToMerge, if_costlier: str, input_size: InputSize | None
) -> tuple[tuple[ConvRun, ...], dict[str, str], nn.Module, InputSize]:
    """What to merge and why not more, the folded copy it was found out on, and the size of its input."""
    folded = copy_net(model)
    _prepare(folded, input_size)
    flow = trace(folded, input_size)
    chains, ends = _chains(folded, flow)
    named, exact = _named(folded, where)
    runs: list[ConvRun] = []
    if exact is not None:
        runs, ends = [_whole(folded, flow, run, chains, ends) for run in exact], {}
    else:
        for chain in _selected(folded, chains, where, named):
            found, reasons = _cut(folded, flow, chain, cheapest=if_costlier == "refuse" and named is None)
            runs += found
            ends.update(reasons)
        if named is not None and (left := named - {name for run in runs for name in run.names}):
            name = min(left)
            raise MergeError(f"{name} cannot merge with what is before or behind it: {ends.get(name, 'see where')}.")
    if if_costlier == "refuse" and (costly := _costly(runs)):
        raise MergeError(
            f"merging would increase the cost of {costly}. "
            "Pass if_costlier='warn' or 'allow' if latency says otherwise."
        )
    return tuple(runs), ends, folded, flow.input_size


def _chains(model: nn.Module, flow: Flow) -> tuple[list[list[str]], dict[str, str]]:
    """Maximal sequences of convolutions of which each alone reads the one before, and why they end."""
    shared = flow.shared
    convs = [
        name
        for name, conv in model.named_modules()
        if type(conv) is nn.Conv2d and name not in shared and conv._parameters.get("weight") is not None
    ]
    successor: dict[str, str] = {}
    ends: dict[str, str] = {}
    for name in convs:
        readers = flow.readers.get(name, ())
        behind = [reader.module for reader in readers if reader.module in convs and reader.module is not None]
        others = [reader.module or reader.op for reader in readers if reader.module not in behind]
        if not behind:
            continue
        if hooked := [n for n in (name, behind[0]) if _has_hooks(model.get_submodule(n))]:
            ends[behind[0]] = f"{hooked[0]} has a hook, which merging would lose"
        elif others or len(behind) > 1:  # what changes the output in place is one of its readers
            others += behind[1:]
            ends |= dict.fromkeys(behind, f"{', '.join(others)} reads or changes the output of {name} too")
        elif flow.calls[name] != 1 or flow.calls[behind[0]] != 1:
            ends[behind[0]] = "a module that runs more than once is not merged"
        else:
            successor[name] = behind[0]
    chains = []
    for name in convs:
        if name not in successor.values():
            chain = [name]
            while chain[-1] in successor:
                chain.append(successor[chain[-1]])
            chains.append(chain)
    return chains, ends


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _named(model: nn.Module, where: WhereToMerge) -> tuple[set[str] | None, list[tuple[str, ...]] | None]:
    """The names in `where` if it is a list of names, and the runs in it if it is a list of runs."""
    if isinstance(where, str):
        try:
            re.compile(where)
        except re.error as error:
            raise MergeError(f"{where=}: not a regular expression ({error}).") from error
    if where is None or isinstance(where, str) or callable(where):
        return None, None
    entries = list(where)
    exact = [tuple(entry) for entry in entries if not isinstance(entry, str)]
    if exact and len(exact) < len(entries):
        raise MergeError("where holds names and runs: give either a list of names, or a list of lists of names.")
    names = [name for run in exact for name in run] if exact else [entry for entry in entries if isinstance(entry, str)]
    convs = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for name in names:
        if name not in convs:
            raise MergeError(f"{name!r} is no convolution of this net{did_you_mean(name, convs)}")
    if len(set(names)) < len(names):
        raise MergeError(f"where names {max(names, key=names.count)} more than once.")
    if short := [run for run in exact if len(run) < 2]:
        raise MergeError(f"a run has at least two convolutions, got {list(short[0])}.")
    return (None, exact) if exact else (set(names), None)


def _selected(
    model: nn.Module, chains: list[list[str]], where: WhereToMerge, named: set[str] | None
) -> list[list[str]]:
    """The parts of the chains that `where` selects."""

    def takes(name: str) -> bool:
        if named is not None:
            return name in named
        if isinstance(where, str):
            return re.search(where, name) is not None
        return where is None or bool(where(name, model.get_submodule(name)))  # type: ignore[operator]

    parts = [list(part) for chain in chains for taken, part in groupby(chain, takes) if taken]
    return [part for part in parts if len(part) > 1]


def _compose(model: nn.Module, names: Sequence[str]) -> ConvMap:
    """The map of convolutions in a row; AlgebraError, with the name, where they are not one convolution."""
    first, *maps = (ConvMap.from_conv2d(cast(nn.Conv2d, model.get_submodule(name))) for name in names)
    try:
        for name, following in zip(names[1:], maps, strict=True):  # noqa: B007 - the name is for the error
            first = first.then(following)
        if maps:  # alone, a convolution may be padded as it likes
            first.to_conv2d()  # refuses lopsided padding
    except AlgebraError as error:
        raise AlgebraError(str(error), module=name) from error
    return first


def _run(model: nn.Module, flow: Flow, names: Sequence[str]) -> ConvRun:
    total = _compose(model, names)
    positions = {name: math.prod(flow.output_sizes[name]) for name in names}
    before = sum(model.get_parameter(f"{name}.weight").numel() * number for name, number in positions.items())
    kh, kw = total.kernel.shape[2:]
    return ConvRun(tuple(names), (kh, kw), before, total.kernel.numel() * positions[names[-1]])


def _whole(
    model: nn.Module, flow: Flow, names: tuple[str, ...], chains: list[list[str]], ends: dict[str, str]
) -> ConvRun:
    """A run that was asked for, name by name."""
    follows = {pair for chain in chains for pair in zip(chain, chain[1:], strict=False)}
    for first, second in zip(names, names[1:], strict=False):
        if (first, second) not in follows:
            reason = ends.get(second, "something that is not affine, or another reader, is between them")
            raise MergeError(f"{second} does not follow {first} directly: {reason}.")
    try:
        return _run(model, flow, names)
    except AlgebraError as error:
        raise MergeError(f"{error.module}: {error}") from error


def _cut(model: nn.Module, flow: Flow, chain: list[str], *, cheapest: bool) -> tuple[list[ConvRun], dict[str, str]]:
    """Cut a chain into runs: the longest there are from the front, or those that cost the fewest MACs in all."""
    reasons: dict[str, str] = {}
    runs: dict[tuple[int, int], ConvRun] = {}
    for start in range(len(chain)):
        for stop in range(start + 1, len(chain) + 1):
            try:
                runs[start, stop] = _run(model, flow, chain[start:stop])
            except AlgebraError as error:
                reasons.setdefault(error.module, str(error))
                break
    # best[i]: MACs of the first i convolutions, and the cuts that lead there
    best: dict[int, tuple[int, list[ConvRun]]] = {0: (0, [])}
    for stop in range(1, len(chain) + 1):
        ways = [(best[b][0] + run.macs_after, best[b][1] + [run]) for (b, s), run in runs.items() if s == stop]
        best[stop] = min(ways, key=lambda way: (way[0], len(way[1])))
    found = best[len(chain)][1]
    if not cheapest:
        found, start = [], 0
        while start < len(chain):
            found.append(runs[start, max(s for b, s in runs if b == start)])
            start += len(found[-1].names)
    for run in found[1:]:
        reasons.setdefault(run.names[0], "it would cost more MACs")
    cuts = {run.names[0] for run in found}
    return [run for run in found if len(run.names) > 1], {n: r for n, r in reasons.items() if n in cuts}


def _prepare(model: nn.Module, input_size: InputSize | None) -> None:
    """Fold, and take out activations that have vanished, in place."""
    fold(model, inplace=True, input_size=input_size)
    for name, module in list(model.named_modules()):
        if type(module) in (VanishingReLU, VanishingAct) and float(module.lam) == 0:
            replace_module(model, name, nn.Identity().train(module.training))


@torch.no_grad()
def _merge(model: nn.Module, runs: tuple[ConvRun, ...]) -> None:
    for run in runs:
        total = _compose(model, run.names)
        like = model.get_submodule(run.names[-1])
        assert isinstance(like, nn.Conv2d)
        conv = total.to_conv2d(dtype=like.weight.dtype)
        if like.weight.is_contiguous(memory_format=torch.channels_last) and not like.weight.is_contiguous():
            conv = conv.to(memory_format=torch.channels_last)
        for name in run.names[:-1]:
            replace_module(model, name, nn.Identity().train(like.training))
        replace_module(model, run.names[-1], conv.train(like.training).requires_grad_(like.weight.requires_grad))
    for name, module in list(model.named_modules()):
        if callable(is_identity := getattr(module, "is_identity", None)) and is_identity() and not _has_hooks(module):
            replace_module(model, name, nn.Identity().train(module.training))


def _costly(runs: Iterable[ConvRun]) -> str:
    return ", ".join(
        f"{run.names[0]} .. {run.names[-1]} ({run.macs_before:,} -> {run.macs_after:,} MACs)"
        for run in runs
        if run.macs_after > run.macs_before
    )
