"""grow and drop: branches on, branches off."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from timm.layers import BatchNormAct2d, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from growshrink.algebra.dataflow import Flow, InputSizes, shared_parameters, trace
from growshrink.base.ties import tied_copies
from growshrink.branches import Branch, BranchSpec, check_ratio, format_skipped
from growshrink.branches.guide import Guide, attach_guide, remove_guide
from growshrink.errors import DropError, GrowError, did_you_mean
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.equilibrium import name_equilibria
from growshrink.layers.grown import Grown, grown_modules
from growshrink.layers.grown_linear import TokenConv2d
from growshrink.layers.grown_norm import GrownNorm2d, norm_as_conv
from growshrink.layers.mapping import Mergeable
from growshrink.layers.swaps import GROWN_CLASSES, attach, to_plain
from growshrink.transforms._deploy import guard_hooks, unguard_hooks

WhereToGrow = str | Callable[[str, nn.Module], bool] | Iterable[str] | None
BranchLike = str | BranchSpec | Sequence[str | BranchSpec]
Growable = nn.Conv2d | nn.Linear

INITS = ("silent", "paper")

#: Every filter they compute with has mean 0 (and a given norm): most sums of kernels are none of theirs.
_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


def grow(
    model: nn.Module,
    branch: BranchLike = "bottleneck",
    *,
    ratio: float = 2.0,
    where: WhereToGrow = None,
    init: str = "silent",
    seed: int = 0,
    guide: nn.Module | str | None = None,
    inplace: bool = False,
    input_size: InputSizes | None = None,
) -> nn.Module:
    """Attach branches to the convolutions and linear layers of any model.

    A linear layer is grown as the 1x1 convolution it is on its tokens: batch norms normalise over all of them.

    Args:
        model: A timm model or any `nn.Module`.
        branch: A name, a `BranchSpec`, or a sequence of them, in order. Names are the kinds of branches ("bottleneck",
            "insert", "nest", "implicit", "expandnet", "expandnet_stack", "orepa", "lora", "mixture", "dirac",
            "dirac_kernel", those whose numbers come from data ("se", "asr", "condconv", "dynamic_conv", "dynet",
            "weightnet", "moe", "manidp", "guided", "guided_shift", "guided_kernel"; see `growshrink.penalties`), the
            parts below, your own)
            and the presets that stand for several: "repvgg" (pointwise, identity), "acnet" (vertical, horizontal),
            "dbb" (pointwise, pointwise_conv, pointwise_average), "mobileone" (copy three times, pointwise, identity).
            A layer that one of the kinds does not fit is not grown; of a preset it gets those that fit it.
        ratio: Middle width of a branch over the output channels of its layer.
        where: None for every eligible layer, a regular expression searched in dotted names, a callable
            `(name, module) -> bool` (asked about every convolution, and the linear layers that can be grown), or a list
            of exact names. The first three skip what cannot be grown (see `growth_report`), a list refuses it.
        init: "silent" leaves the function of the net as it is, in train and eval mode, at any lam: the last factor of
            each branch, a gamma where it ends in a norm, starts at 0. "paper" starts the branches as their papers do,
            for training from scratch.
        seed: Branch weights are a function of (seed, dotted name, position) only.
        guide: Of the kinds "guided...": a net that maps images to vectors, or the name of one of timm's, which feeds
            all of them (a copy of it; it runs whenever the model is called, until fuse or drop takes it off). None
            makes DeepMoE's shallow one.
        inplace: Work on `model` itself; otherwise on a deep copy. Parameters of the plain net stay what they were.
        input_size: `(C, H, W)` the data flow is observed with, or several, where the model takes another path at
            another size; None takes the model's own.

    Raises:
        GrowError: Nothing matches `where`, nothing is eligible, or an argument is out of range. The model is untouched.
    """
    check_ratio(ratio)
    specs = branch_specs(branch)
    if init not in INITS:
        raise GrowError(f"{init=}: must be one of {', '.join(INITS)}.")
    if init != "paper" and (loud := next((spec.kind for spec in specs if spec.published), "")):
        raise GrowError(f"{loud!r} with published=True starts as published: give init='paper'.")
    model = model if inplace else copy.deepcopy(model, tied_copies(model))
    eligibility = _Eligibility(model, input_size)
    names = _select(model, where, eligibility, specs)
    layers = _candidates(model)
    attachments: dict[str, list[Branch]] = {}
    for name in names:
        for spec in _fitting(specs, _as_conv(layers[name]))[0]:
            carrier = eligibility.carrier_of(name, spec)
            layer = model.get_submodule(carrier)
            planned = attachments.setdefault(carrier, [])
            position = len(planned) + (len(layer.branches) if isinstance(layer, Grown) else 0)
            branch_seed = _branch_seed(seed, carrier, position)
            planned.append(spec.build(_as_conv(layer), ratio=ratio, init=init, generator_seed=branch_seed))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_branch_seed(seed, "guide", 0))
        attach_guide(model, chain.from_iterable(attachments.values()), guide, eligibility.flow.input_size)
    for name, branches in attachments.items():  # everything is built: nothing below can fail
        attach(model.get_submodule(name), branches)
    name_equilibria(model)
    guard_hooks(model, eligibility.flow)
    return model


def drop(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Remove all branches without merging them: the kernels as they are now, bit for bit.

    Raises:
        DropError: A `PureBottleneck` has no kernel of its own that could remain.
    """
    if pure := [name for name, module in grown_modules(model).items() if isinstance(module, PureBottleneck)]:
        raise DropError(
            f"{pure[0]} (and {len(pure) - 1} more) is a PureBottleneck: it has no kernel that would remain. "
            "Let lam reach 0 and use growshrink.fuse."
        )
    model = model if inplace else copy.deepcopy(model, tied_copies(model))
    for module in grown_modules(model).values():
        assert isinstance(module, Grown)
        to_plain(module)
    unguard_hooks(model)
    remove_guide(model)
    return model


@dataclass(frozen=True)
class ReportRow:
    """One layer in a growth report."""

    name: str
    shape: str
    branches: tuple[str, ...]
    reason: str  # why it cannot be grown; empty where it can
    left_out: Mapping[str, str] = field(default_factory=dict)  # kinds that do not fit it, and why


@dataclass(frozen=True)
class GrowthReport:
    """Every convolution and linear layer of a model: grown, eligible, or left alone and why. Print it."""

    rows: tuple[ReportRow, ...]

    @property
    def grown(self) -> dict[str, tuple[str, ...]]:
        """Kinds of the branches of each grown layer."""
        return {row.name: row.branches for row in self.rows if row.branches}

    @property
    def skipped(self) -> dict[str, str]:
        """Reason of each layer that cannot be grown and carries no branch."""
        return {row.name: row.reason for row in self.rows if row.reason and not row.branches}

    def __str__(self) -> str:
        def status(row: ReportRow) -> str:
            if row.reason and not row.branches:
                return row.reason
            parts = [f"grown: {', '.join(row.branches)}" if row.branches else "eligible"]
            return "; ".join(parts + [format_skipped(row.left_out)] * bool(row.left_out))

        lines = [f"{row.name:40s} {row.shape:22s} {status(row)}" for row in self.rows]
        total = f"{len(self.rows)} layers: {len(self.grown)} grown, {len(self.skipped)} not eligible."
        return "\n".join([*lines, total])


def growth_report(
    model: nn.Module, branch: BranchLike | None = None, *, input_size: InputSizes | None = None
) -> GrowthReport:
    """What of `model` is grown, what could be, and what cannot be and why (computed from the model as it is now).

    Args:
        model: A plain or a grown net.
        branch: What it is to be grown with, as for `grow`: reasons against these branches count too. None takes the
            kinds the model carries anywhere, and so tells why some layers lack some of them.
        input_size: `(C, H, W)` the data flow is observed with; None takes the model's own.
    """
    eligibility = _Eligibility(model, input_size)
    specs = branch_specs(branch) if branch is not None else []
    carried = {} if specs else {module.kind: type(module) for module in model.modules() if isinstance(module, Branch)}
    rows = []
    for name, module in _candidates(model).items():
        norm = eligibility.modules.get(eligibility.flow.norm_after(name)[0] or "")
        kinds = tuple(str(b.kind) for carrier in (module, norm) if isinstance(carrier, Grown) for b in carrier.branches)
        reason = eligibility.reason_against(name, module, specs)
        left_out: dict[str, str] = {}
        if not reason:
            conv = _as_conv(module)
            asked = {kind: cls.reason_against(conv) for kind, cls in carried.items()}
            for spec in specs:
                asked |= spec.reasons(conv)
            left_out = {kind: why for kind, why in asked.items() if why and kind not in kinds}
            reason = format_skipped(left_out) if len(left_out) == len(asked) else ""
        rows.append(ReportRow(name, _shape(module), kinds, reason, left_out))
    return GrowthReport(tuple(rows))


def branch_specs(branch: BranchLike) -> list[BranchSpec]:
    """The `branch` argument of grow as a list of specs; GrowError for unknown kinds or an empty sequence."""
    parts = [branch] if isinstance(branch, (str, BranchSpec)) else list(branch)
    if not parts:
        raise GrowError("branch=[]: name at least one branch.")
    return [part if isinstance(part, BranchSpec) else BranchSpec(kind=part) for part in parts]


def _fitting(specs: Sequence[BranchSpec], conv: nn.Conv2d) -> tuple[list[BranchSpec], str]:
    """One spec for each branch that `conv` gets; an empty list and the reason where it cannot carry all of `specs`."""
    fitting: list[BranchSpec] = []
    for spec in specs:
        parts, reason = spec.fitting(conv)
        if not parts:
            return [], reason
        fitting += parts
    return fitting, ""


class _Eligibility:
    """Answers why a layer cannot be grown exactly."""

    def __init__(self, model: nn.Module, input_size: InputSizes | None) -> None:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        self.flow: Flow = trace(model, input_size)
        self.shared = shared_parameters(model)
        self.modules = dict(model.named_modules())
        layers = _candidates(model)
        first = next((n for n, layer in layers.items() if isinstance(layer, nn.Conv2d)), next(iter(layers), None))
        self.stem = _as_tuple(cfg.get("first_conv")) or _as_tuple(first)
        self.classifier = _as_tuple(cfg.get("classifier"))

    def carrier_of(self, name: str, spec: BranchSpec) -> str:
        """What carries the branch of a layer: the layer, or the norm behind it, for a branch that acts there."""
        norm = self.flow.norm_after(name)[0] if spec.branch_class.behind_norm else None
        found = self.modules[norm] if norm is not None and norm not in self.shared else None
        fits = isinstance(found, GrownNorm2d) or type(found) in (nn.BatchNorm2d, BatchNormAct2d)
        return str(norm) if fits and found is not None and found.weight is not None else name

    def reason_against(self, name: str, layer: Growable, specs: Sequence[BranchSpec]) -> str:
        """Empty if `layer` can be grown (with `specs`, where any are given), else the reason why not."""
        calls = self.flow.calls.get(name, 0)
        if name in self.stem:
            return "the stem is left alone"
        if name in self.classifier:
            return "the classifier is left alone"
        if isinstance(layer, _STANDARDISED):
            return f"it is a {type(layer).__name__}: its kernel is standardised, and a merged one could not be"
        if type(layer) not in GROWN_CLASSES and not isinstance(layer, Grown):
            return f"it is a {type(layer).__name__}, whose forward is its own"
        if not isinstance(layer._parameters.get("weight"), nn.Parameter):
            return "its weight is computed by a hook, not a parameter"
        if name in self.shared:
            return "its parameters are shared with another module"
        if name in self.flow.read_beside:
            return "something else than its own forward reads its parameters"
        if calls != 1:
            return f"it runs {calls} times in a forward pass"
        if self.flow.output_sizes.get(name, (1, 1)) == (1, 1):
            seen = "one token" if isinstance(layer, nn.Linear) else "1x1 maps"
            return f"it is seen on {seen}, which a batch norm cannot be trained on"
        parts, reason = _fitting(specs, _as_conv(layer))
        if reason:
            return reason
        later = parts if isinstance(layer, Grown) else parts[1:]
        if any(part.published and not part.branch_class.parallel for part in later):
            return "a published block begins with the norm or scale of the kernel, and other branches come before it"
        biased = not specs or any(part.norm and part.branch_class.biased for part in parts)
        if any(part.kind == "own_norm" for part in parts) and (norm := self.flow.norm_after(name)[0]):
            return f"{norm} would norm the published block's sum again: growshrink.fold comes first"
        if layer.bias is None and biased:
            norm, reason = self.flow.norm_after(name)
            if norm is None:
                return f"it has no bias, and the bias of a branch finds no batch norm to go to: {reason}"
        return ""


def _candidates(model: nn.Module) -> dict[str, Growable]:
    """Every convolution and linear layer that is not itself part of a branch or of a PureBottleneck."""
    inside = {
        id(m)
        for grown in model.modules()
        if isinstance(grown, (Mergeable, Guide))
        for m in grown.modules()
        if m is not grown
    }
    return {n: m for n, m in model.named_modules() if isinstance(m, Growable) and id(m) not in inside}


def _as_conv(layer: nn.Module) -> nn.Conv2d:
    """What branches are built for."""
    if isinstance(layer, nn.BatchNorm2d):
        return norm_as_conv(layer)
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    return TokenConv2d.of(layer) if isinstance(layer, nn.Linear) else layer


def _shape(layer: Growable) -> str:
    if isinstance(layer, nn.Linear):
        return f"{layer.in_features}->{layer.out_features} linear"
    shape = f"{layer.in_channels}->{layer.out_channels} {layer.kernel_size[0]}x{layer.kernel_size[1]}"
    return shape + f" s{layer.stride[0]}" * (layer.stride[0] > 1) + f" g{layer.groups}" * (layer.groups > 1)


def _select(model: nn.Module, where: WhereToGrow, eligibility: _Eligibility, specs: Sequence[BranchSpec]) -> list[str]:
    candidates = _candidates(model)
    reasons = {name: eligibility.reason_against(name, layer, specs) for name, layer in candidates.items()}
    if isinstance(where, str):
        try:
            chosen = [name for name in candidates if re.search(where, name)]
        except re.error as error:
            raise GrowError(f"{where=}: not a regular expression ({error}).") from error
        if not chosen:
            raise GrowError(f"{where=}: matches no convolution and no linear layer{did_you_mean(where, candidates)}")
    elif where is None:
        chosen = list(candidates)
    elif callable(where):
        # not about classifiers and the like: a callable written for convolutions also works in nets with other layers
        asked = {n: m for n, m in candidates.items() if isinstance(m, nn.Conv2d) or not reasons[n]}
        chosen = [name for name, layer in asked.items() if where(name, layer)]
        if not chosen:
            raise GrowError(f"the callable given as where chose none of {len(asked)} layers.")
    else:  # a log of growth has the names of norms, which stand for their layers
        behind = any(Branch.kinds[kind].behind_norm for spec in specs for kind in spec.kinds)
        before = {norm: name for name in candidates if behind and (norm := eligibility.flow.norm_after(name)[0])}
        chosen = list(dict.fromkeys(before.get(name, name) for name in where))
        for name in chosen:
            if name not in candidates:
                known = did_you_mean(name, candidates)
                raise GrowError(f"where names {name!r}: no such convolution or linear layer{known}")
            if reasons[name]:
                raise GrowError(f"where names {name!r}, which cannot be grown: {reasons[name]}.")
        if not chosen:
            raise GrowError("where=[]: names no layer.")
        return chosen
    eligible = [name for name in chosen if not reasons[name]]
    if not eligible:
        ends = (*eligibility.stem, *eligibility.classifier)
        first = next((name for name in chosen if name not in ends), chosen[0] if chosen else "")
        found = f"{first}: {reasons[first]}" if chosen else "the model has none"
        raise GrowError(f"none of {len(chosen)} layers can be grown exactly ({found}). See growshrink.growth_report.")
    return eligible


def _branch_seed(seed: int, name: str, position: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{position}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _as_tuple(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)
