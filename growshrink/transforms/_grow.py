"""grow and drop: branches on, branches off."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import torch
from timm.layers import BatchNormAct2d, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from growshrink.algebra.dataflow import Flow, trace
from growshrink.algebra.inputs import ExampleInputs, InputLike, given_inputs
from growshrink.base.copying import copy_net
from growshrink.base.limits import Ratio, checked
from growshrink.branches import Branch, BranchSpec, Modulated, format_skipped
from growshrink.branches.guide import Guide, attach_guide, remove_guide
from growshrink.errors import DropError, GrowError, did_you_mean
from growshrink.layers.as_conv import WeightLayer, as_conv
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.equilibrium import name_equilibria
from growshrink.layers.grown import Grown, computed_parameter, grown_modules
from growshrink.layers.grown_linear import GrownNorm2d
from growshrink.layers.mapping import Mergeable
from growshrink.layers.swaps import attach, class_in_table, to_plain
from growshrink.transforms._deploy import guard_hooks, unguard_hooks
from growshrink.transforms._rehearse import rehearse_exit

WhereToGrow = str | Callable[[str, nn.Module], bool] | Iterable[str] | None
BranchLike = str | BranchSpec | Sequence[str | BranchSpec]

_logger = logging.getLogger(__name__)

#: Forwards of layers that have a kernel and no grown class.
_TORCHS = (nn.Conv3d.forward, nn.ConvTranspose1d.forward, nn.ConvTranspose3d.forward)
INITS = ("silent", "paper")

#: Every filter they compute with has mean 0 (and a given norm): most sums of kernels are none of theirs.
_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


@checked(GrowError, ratio=Ratio, init=Literal[INITS])
def grow(
    model: nn.Module,
    branch: BranchLike = "bottleneck",
    *,
    ratio: float = 2.0,
    where: WhereToGrow = None,
    init: str = "silent",
    seed: int = 0,
    trainable: bool | None = True,
    guide: nn.Module | str | None = None,
    inplace: bool = False,
    input_size: InputLike = None,
    example_inputs: ExampleInputs | None = None,
) -> nn.Module:
    """Attach branches to the convolutions and linear layers of any model.

    A linear layer is grown as the 1x1 convolution it is on its tokens: batch norms normalise over all of them. How many
    parameters train is logged, and told by `growth_report`.

    Args:
        model: A timm model or any `nn.Module`.
        branch: A name, a `BranchSpec`, or a sequence of them, in order. Names are the kinds of branches ("bottleneck",
            "insert", "nest", "stack", "small_kernel", "implicit", "expandnet", "expandnet_stack", "orepa", "lora",
            "mixture", "dirac", "dirac_kernel", those whose numbers come from data ("se", "asr", "condconv",
            "dynamic_conv", "dynet", "weightnet", "moe", "manidp", "guided", "guided_kernel"; see
            `growshrink.penalties`), the parts below, your own) and the presets that stand for several: "repvgg"
            (pointwise, identity), "acnet" (vertical, horizontal), "dbb" (pointwise, pointwise_conv, pointwise_average),
            "mobileone" (copy three times, pointwise, identity). A layer that one of the kinds does not fit is not
            grown; of a preset it gets those that fit it.
        ratio: Middle width of a branch over the output channels of its layer.
        where: None for every eligible layer, a regular expression searched in dotted names, a callable
            `(name, module) -> bool` (asked about every convolution, and the linear layers that can be grown), or a list
            of exact names. The first three skip what cannot be grown (see `growth_report`), a list refuses it.
        init: "silent" leaves the function of the net as it is, in train and eval mode, at any lam: the last factor of
            each branch, a gamma where it ends in a norm, starts at 0. "paper" starts the branches as their papers do,
            for training from scratch.
        seed: Branch weights are a function of (seed, dotted name, position) only.
        trainable: Whether the branches train, on a frozen net too; None: each as the kernel it is on.
        guide: For the kinds "guided...": a net that maps images to vectors, or the name of one of timm's, which feeds
            all of them (a copy of it; it runs whenever the model is called, until fuse or drop takes it off). None
            makes DeepMoE's shallow one.
        inplace: Work on `model` itself; otherwise on a deep copy. Parameters of the plain net stay what they were.
        input_size: `(C, H, W)` the data flow is observed with, or several, where the model takes another path at
            another size; None takes the model's own, or guesses.
        example_inputs: In place of a size, for nets that take something else than one batch of images: one batch, as a
            tensor, a tuple of positional or a dict of keyword arguments (whose values, or noise, later checks run on).

    Raises:
        GrowError: Nothing matches `where`, nothing is eligible, an argument is out of range, or `fuse` would refuse the
            result (that is tried on copies). The model is untouched.

    >>> gs.compare(net, gs.grow(net, "bottleneck", ratio=4)).max_rel
    0.0
    """
    specs = branch_specs(branch)
    if init != "paper" and (loud := next((spec.kind for spec in specs if spec.published), "")):
        raise GrowError(f"{loud!r} with published=True starts as published: give init='paper'.")
    model = model if inplace else copy_net(model)
    eligibility = _Eligibility(model, given_inputs(input_size, example_inputs))
    names = _select(model, where, eligibility, specs)
    layers = _candidates(model)
    attachments: dict[str, list[Branch]] = {}
    for name in names:
        for spec in _fitting(specs, as_conv(layers[name]))[0]:
            carrier = eligibility.carrier_of(name, spec)
            layer = model.get_submodule(carrier)
            planned = attachments.setdefault(carrier, [])
            position = len(planned) + (len(layer.branches) if isinstance(layer, Grown) else 0)
            branch_seed = _branch_seed(seed, carrier, position)
            planned.append(spec.build(as_conv(layer), ratio=ratio, init=init, generator_seed=branch_seed))
    rehearse_exit(model, names, eligibility.flow)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_branch_seed(seed, "guide", 0))
        attach_guide(model, chain.from_iterable(attachments.values()), guide, eligibility.flow)
    for name, branches in attachments.items():  # everything is built: nothing below can fail
        for made in () if trainable is None else branches:
            made.requires_grad_(bool(trainable))
        attach(model.get_submodule(name), branches)
    name_equilibria(model)
    guard_hooks(model, eligibility.flow)
    _logger.info("%d layers grown; %d of %d parameters train", len(names), *_count_parameters(model)[::-1])
    return model


def drop(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Remove all branches without merging them: the kernels as they are now, bit for bit.

    Raises:
        DropError: A `PureBottleneck` has no kernel of its own that could remain.

    >>> net.load_state_dict(gs.drop(gs.grow(net)).state_dict())
    <All keys matched successfully>
    """
    if pure := [name for name, module in grown_modules(model).items() if isinstance(module, PureBottleneck)]:
        raise DropError(
            f"{pure[0]} (and {len(pure) - 1} more) is a PureBottleneck: it has no kernel that would remain. "
            "Let lam reach 0 and use growshrink.fuse."
        )
    model = model if inplace else copy_net(model)
    for module in grown_modules(model).values():
        assert isinstance(module, Grown)
        to_plain(module)
    unguard_hooks(model)
    remove_guide(model)
    vars(model)["was_grown"] = True
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
    params: int  # numbers, of the whole net
    trained: int  # of these
    traced: str = ""  # what the data flow was observed on, where that was a guess

    @property
    def grown(self) -> dict[str, tuple[str, ...]]:
        """Kinds of the branches of each grown layer."""
        return {row.name: row.branches for row in self.rows if row.branches}

    @property
    def skipped(self) -> dict[str, str]:
        """Reason of each layer that cannot be grown and carries no branch."""
        return {row.name: row.reason for row in self.rows if row.reason and not row.branches}

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            status = f"grown: {', '.join(row.branches)}" if row.branches else row.reason or "eligible"
            if row.left_out and (row.branches or not row.reason):
                status += f"; {format_skipped(row.left_out)}"
            lines.append(f"{row.name:40s} {row.shape:22s} {status}")
        total = f"{len(self.rows)} layers: {len(self.grown)} grown, {len(self.skipped)} not eligible. "
        total += f"{self.trained:,} of {self.params:,} parameters train."
        return "\n".join([*lines, f"{total} Seen on {self.traced}." if self.traced else total])


@checked(GrowError)
def growth_report(
    model: nn.Module,
    branch: BranchLike | None = None,
    *,
    input_size: InputLike = None,
    example_inputs: ExampleInputs | None = None,
) -> GrowthReport:
    """What of `model` is grown, what could be, and what cannot be and why (computed from the model as it is now).

    Args:
        model: A plain or a grown net.
        branch: What it is to be grown with, as for `grow`: reasons against these branches count too. None takes the
            kinds the model carries anywhere, and so tells why some layers lack some of them.
        input_size: `(C, H, W)` the data flow is observed with; None takes the model's own, or guesses.
        example_inputs: In place of a size, a batch; see `grow`.

    >>> gs.growth_report(gs.grow(net)).skipped
    {'stem.conv': 'the stem is left alone', 'head.fc': 'the classifier is left alone'}
    """
    eligibility = _Eligibility(model, given_inputs(input_size, example_inputs))
    specs = branch_specs(branch) if branch is not None else []
    carried = {} if specs else {module.kind: type(module) for module in model.modules() if isinstance(module, Branch)}
    rows = []
    for name, module in _candidates(model).items():
        norm = eligibility.modules.get(eligibility.flow.norm_after(name)[0] or "")
        kinds = tuple(str(b.kind) for carrier in (module, norm) if isinstance(carrier, Grown) for b in carrier.branches)
        reason = eligibility.reason_against(name, module, specs)
        left_out: dict[str, str] = {}
        if not reason:
            conv = as_conv(module)
            asked = {kind: cls.reason_against(conv) for kind, cls in carried.items()}
            for spec in specs:
                asked |= spec.reasons(conv)
            left_out = {kind: why for kind, why in asked.items() if why and kind not in kinds}
            reason = format_skipped(left_out) if len(left_out) == len(asked) else ""
        rows.append(ReportRow(name, _shape(module), kinds, reason, left_out))
    inputs = eligibility.flow.inputs
    return GrowthReport(tuple(rows), *_count_parameters(model), str(inputs) * inputs.guessed)


def _count_parameters(model: nn.Module) -> tuple[int, int]:
    """All, and those that train."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@checked(GrowError)
def branch_specs(branch: BranchLike) -> list[BranchSpec]:
    """The `branch` argument of grow as a list of specs; GrowError for unknown kinds or an empty sequence.

    >>> [spec.kind for spec in gs.transforms.branch_specs(["bottleneck", "repvgg"])]
    ['bottleneck', 'repvgg']
    """
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

    def __init__(self, model: nn.Module, input_size: InputLike) -> None:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        self.flow: Flow = trace(model, input_size)
        self.modules = dict(model.named_modules())
        layers = _candidates(model)
        convs = (n for n, layer in layers.items() if not isinstance(layer, nn.Linear))
        first = next(convs, next(iter(layers), None))
        self.stem = _as_tuple(cfg.get("first_conv")) or _as_tuple(first)
        self.classifier = _as_tuple(cfg.get("classifier"))

    def carrier_of(self, name: str, spec: BranchSpec) -> str:
        """What carries the branch of a layer: the layer, or the norm behind it, for a branch that acts there."""
        norm = self.flow.norm_after(name)[0] if spec.branch_class.behind_norm else None
        found = self.modules[norm] if norm is not None and norm not in self.flow.shared else None
        fits = isinstance(found, GrownNorm2d) or type(found) in (nn.BatchNorm2d, BatchNormAct2d)
        return str(norm) if fits and found is not None and found.weight is not None else name

    def reason_against(self, name: str, layer: WeightLayer, specs: Sequence[BranchSpec]) -> str:
        """Empty if `layer` can be grown (with `specs`, where any are given), else the reason why not."""
        calls = self.flow.calls.get(name, 0)
        if name in self.stem:
            return "the stem is left alone"
        if name in self.classifier:
            return "the classifier is left alone"
        if isinstance(layer, _STANDARDISED):
            return f"it is a {type(layer).__name__}: its kernel is standardised, and a merged one could not be"
        if not isinstance(layer, Grown) and class_in_table(layer) is None:
            own = "which cannot carry branches" if type(layer).forward in _TORCHS else "whose forward is its own"
            return f"it is a {type(layer).__name__}, {own}"
        if key := computed_parameter(layer):
            return f"its {key} is computed by a hook, not a parameter"
        if own := next((key for key in ("forward", "_conv_forward") if key in vars(layer)), ""):
            return f"its {own} was replaced, and would pass branches by"
        if name in self.flow.shared:
            return "its parameters are shared with another module"
        if name in self.flow.read_beside:
            return "something else than its own forward reads its parameters"
        if calls != 1:
            return f"it runs {calls} times in a forward pass"
        small = self.flow.output_sizes.get(name, (1, 1)) == (1, 1)
        if small and not isinstance(layer, nn.Linear):
            return "it is seen on 1x1 maps, which a batch norm cannot be trained on"
        parts, reason = _fitting(specs, as_conv(layer))
        if reason:
            return reason
        if small and any(issubclass(part.branch_class, Modulated) for part in parts):
            return "it is seen on one token, and its numbers would be of the batch, not of an image"
        later = parts if isinstance(layer, Grown) else parts[1:]
        if any(part.published and not part.branch_class.parallel for part in later):
            return "a published block begins with the norm or scale of the kernel, and other branches come before it"
        biased = not specs or any(part.norm and part.branch_class.biased for part in parts)
        norm, reason = self.flow.norm_after(name)
        if norm is not None and any(part.kind == "own_norm" for part in parts):
            return f"{norm} would norm the published block's sum again: growshrink.fold comes first"
        if biased and norm is None:
            if small:
                return "it is seen on one token, which a batch norm cannot be trained on"
            if layer.bias is None:
                return f"it has no bias, and the bias of a branch finds no batch norm to go to: {reason}"
        return ""


def _candidates(model: nn.Module) -> dict[str, WeightLayer]:
    """Every convolution and linear layer that is not itself part of a branch or of a PureBottleneck."""
    inside = {
        id(m)
        for grown in model.modules()
        if isinstance(grown, (Mergeable, Guide))
        for m in grown.modules()
        if m is not grown
    }
    return {n: m for n, m in model.named_modules() if isinstance(m, WeightLayer) and id(m) not in inside}


def _shape(layer: WeightLayer) -> str:
    if isinstance(layer, nn.Linear):
        return f"{layer.in_features}->{layer.out_features} linear"
    shape = f"{layer.in_channels}->{layer.out_channels} {'x'.join(map(str, layer.kernel_size))}"
    shape += " transposed" * layer.transposed
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
        raise GrowError(
            f"none of {len(chosen)} layers can be grown exactly ({found}; seen on {eligibility.flow.inputs}). "
            "See growshrink.growth_report."
        )
    return eligible


def _branch_seed(seed: int, name: str, position: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{position}".encode()).digest()[:8], "little") >> 1


def _as_tuple(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())
