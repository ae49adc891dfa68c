"""collapse_online: choose which branches run as part of their convolution's kernel while they train."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.algebra.convmap import ConvMap
from growshrink.algebra.dataflow import trace
from growshrink.algebra.inputs import ExampleInputs, InputLike, given_inputs
from growshrink.base.copying import copy_net
from growshrink.base.progress import progress_bar
from growshrink.base.timing import interleaved_timings
from growshrink.branches import Branch
from growshrink.errors import AlgebraError, CollapseError, check_model, did_you_mean
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.grown import Grown, grown_modules
from growshrink.layers.online import OnlineModule
from growshrink.layers.swaps import ONLINE_CLASSES, base_class, expand_online, go_online
from growshrink.transforms._fuse import MODULE_TOLERANCE, probe, relative_error

CollapseChoice = str | Iterable[str]

WAYS = ("measured", "always")


def collapse_online(
    model: nn.Module,
    *,
    choose: CollapseChoice = "measured",
    freeze: bool = True,
    batch_size: int = 128,
    input_size: InputLike = None,
    example_inputs: ExampleInputs | None = None,
    rounds: int = 5,
    inplace: bool = False,
    progress: bool = False,
) -> nn.Module:
    """Train linear branches cheaply: merge them into one kernel in every step, and run one layer.

    A branch is linear once every lam in it is 0, or from the start where it has no activation. What each convolution
    then computes, and the gradient of every parameter, are those of the branches run one by one with their norms in
    eval mode, to rounding; the kernel is merged in float32 at least, under autocast too. Branches with a live
    activation still run beside the kernel, until this is called again with their lam at 0. Names and values of the
    state_dict stay, `fuse`, `drop`, `grow`, copies and widths work as before; `expand_online` is the way back.

    The norms inside linear branches, merged or not, keep their running statistics, in train mode too (so each is a
    scale and a shift, which still learn). Fresh norms know nothing of the data: `calibrate_bn` comes first.

    Args:
        model: A grown net.
        choose: Which convolutions run their merged kernel, the others branch by branch: "measured" those where a step
            (forward and backward, on maps of the size they have in the net) is no slower that way; "always" all; or
            names. Measure as you train: on that device, in that memory format, under that autocast.
        freeze: False leaves branches with norms as they are, and collapses those without.
        batch_size: Images per step, for measuring.
        input_size: `(C, H, W)`, for measuring; None takes the model's own.
        example_inputs: In place of a size, a batch; see `grow`.
        rounds: Number of interleaved measurements.
        inplace: Work on `model` itself; otherwise on a deep copy.
        progress: Show a progress bar of the measurements.

    Raises:
        CollapseError: No branch is linear, a name is not that of such a convolution, or a branch computes something
            else than its map. The model is then as it was. (`collapse_report` tells what was merged.)

    >>> online = gs.collapse_online(gs.grow(net, "repvgg"), choose="always")
    """
    check_model(model)
    if not isinstance(choose, Iterable):
        raise CollapseError(f"{choose=!r}: must be one of {', '.join(WAYS)}, or names.")
    names: list[str] | None = None if isinstance(choose, str) else list(choose)
    if names is None and choose not in WAYS:
        raise CollapseError(f"{choose=}: no such way to choose{did_you_mean(str(choose), WAYS)}")
    for key, value in (("batch_size", batch_size), ("rounds", rounds)):
        if type(value) is not int or value < 2:
            raise CollapseError(f"{key}={value!r}: must be a whole number, at least 2.")
    expanded = expand_online(model)
    reasons = {name: _reasons(module, freeze) for name, module in grown_modules(expanded).items()}
    online = {name: why for name, why in reasons.items() if not all(why)}
    if not reasons:
        raise CollapseError("the model carries no branches: growshrink.grow comes first.")
    if not online:
        name, why = next(iter(reasons.items()))
        found = f"{name}: {why[0] if why else 'it has none'}"
        raise CollapseError(f"no branch of the {len(reasons)} grown modules can be merged ({found}).")
    if unknown := [name for name in names or () if name not in online]:
        known = did_you_mean(unknown[0], online)
        raise CollapseError(f"choose names {unknown[0]!r}: no convolution with a linear branch{known}")
    for name, why in online.items():
        _prove(name, _online_copy(expanded, name, why))
    timings: dict[str, tuple[float, float]] = {}
    if choose == "measured":
        sizes = trace(expanded, given_inputs(input_size, example_inputs)).input_sizes
        of_key: dict[Hashable, tuple[float, float]] = {}
        # of a linear layer the trace tells no number of tokens
        seen = [name for name in online if name in sizes and not isinstance(expanded.get_submodule(name), nn.Linear)]
        for name in progress_bar(seen, "measuring", show=progress):
            module = _online_copy(expanded, name, online[name])
            alike = _key(module, sizes[name])
            if alike not in of_key:
                of_key[alike] = _measure(module, sizes[name], batch_size, rounds)
            timings[name] = of_key[alike]
    model = expand_online(model, inplace=True) if inplace else expanded
    for name, why in online.items():
        module = _go_online(model.get_submodule(name), why)
        module.timing = timings.get(name)
        if names is not None:
            module.collapsed = name in names
        elif module.timing is not None:
            module.collapsed = module.timing[1] <= module.timing[0]
    return model


@dataclass(frozen=True)
class CollapseRow:
    """One grown convolution in a collapse report."""

    name: str
    merged: tuple[str, ...]  # kinds of the branches that are linear and held so
    left: Mapping[str, str]  # branches that are not, by index and kind, and why
    collapsed: bool
    timing: tuple[float, float] | None  # milliseconds of a step, branch by branch and merged


@dataclass(frozen=True)
class CollapseReport:
    """Every grown convolution of a model: what of it is linear, what its step costs either way. Print it."""

    rows: tuple[CollapseRow, ...]

    @property
    def collapsed(self) -> list[str]:
        """Names of the convolutions that run their merged kernel."""
        return [row.name for row in self.rows if row.collapsed]

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            way = "one kernel" if row.collapsed else "branch by branch"
            times = f"{row.timing[0]:9.3f} ms -> {row.timing[1]:9.3f} ms" if row.timing else f"{'':27s}"
            left = "".join(f"; {branch}: {reason}" for branch, reason in row.left.items())
            lines.append(f"{row.name:40s} {times}  {way}: {', '.join(row.merged) or 'nothing'}{left}")
        lines.append(f"{len(self.rows)} grown convolutions: {len(self.collapsed)} run as one kernel.")
        if timed := [(row.timing[0], row.timing[row.collapsed]) for row in self.rows if row.timing]:
            branches, chosen = map(sum, zip(*timed, strict=True))
            lines.append(f"A step of those measured: {branches:.1f} ms branch by branch, {chosen:.1f} ms as chosen.")
        return "\n".join(lines)


def collapse_report(model: nn.Module) -> CollapseReport:
    """What `collapse_online` made of a net, or, of one that is not collapsed, which of its branches are linear.

    >>> gs.transforms.collapse_report(gs.grow(net, "repvgg")).rows[0].merged
    ('pointwise', 'identity')
    """
    rows = []
    for name, module in grown_modules(model).items():
        online = isinstance(module, OnlineModule)
        merged, left = [], {}
        reasons = _reasons(expand_online(module), freeze=True)
        for index, (part, why) in enumerate(zip(_parts(module), reasons, strict=True)):
            kind = str(part.kind) if isinstance(part, Branch) else type(part).__name__
            if part.merged if online and isinstance(part, Branch) else not why:
                merged.append(kind)
            else:
                left[f"branches.{index} ({kind})"] = why or "left as it is"
        collapsed, timing = (module.collapsed, module.timing) if isinstance(module, OnlineModule) else (False, None)
        rows.append(CollapseRow(name, tuple(merged), left, collapsed, timing))
    return CollapseReport(tuple(rows))


# ---- which branches


@torch.no_grad()
def _reasons(module: nn.Module, freeze: bool) -> list[str]:
    """Why each branch (of a PureBottleneck: it itself) cannot be part of the kernel; empty where it can."""
    if base_class(module) not in ONLINE_CLASSES:
        return [f"it is part of a {type(module).__name__}, whose forward is its own"] * len(_parts(module))
    if isinstance(module, PureBottleneck):
        return [_reason(module, None, freeze)]
    assert isinstance(module, Grown)
    conv = module.as_conv()
    reasons: list[str] = []
    output_read = False  # by a branch that stays, which must find in the output what it finds there now
    for branch in module.branches:
        why = ""
        if output_read:
            why = "a branch before it, which is not linear, reads the output without it"
        elif not branch.parallel and any(reasons):
            why = "it reads the output of a branch that is not linear"
        reasons.append(why or _reason(branch, conv, freeze))
        output_read |= bool(reasons[-1]) and not branch.parallel
    return reasons


def _reason(part: Branch | PureBottleneck, conv: nn.Conv2d | None, freeze: bool) -> str:
    if not freeze and any(isinstance(m, _BatchNorm) for m in part.modules()):
        return "it has norms, and freeze=False"
    try:
        if isinstance(part, PureBottleneck):
            part.as_convmap()
        else:
            assert conv is not None
            own = ConvMap.from_conv2d(conv)
            (own + part.as_convmap(own)).fit(conv)
    except AlgebraError as error:
        return str(error)
    return ""


def _parts(module: nn.Module) -> list[nn.Module]:
    return list(module.branches) if isinstance(module, Grown) else [module]


# ---- one module


def _online_copy(model: nn.Module, name: str, reasons: list[str]) -> OnlineModule:
    return _go_online(copy_net(model.get_submodule(name)), reasons)


def _go_online(module: nn.Module, reasons: list[str]) -> OnlineModule:
    if isinstance(module, Grown):
        for branch, why in zip(module.branches, reasons, strict=True):
            branch.merged = not why
    go_online(module)
    assert isinstance(module, OnlineModule)
    return module


@torch.no_grad()
def _prove(name: str, module: OnlineModule) -> None:
    """CollapseError unless the merged kernel computes in float64 what the branches do; changes `module`."""
    module.cpu().double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():  # of a silent branch nothing could be told
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    for part in module.modules():
        if isinstance(part, Branch):
            part.skipped = False
    x = probe(ConvMap.from_conv2d(_conv_of(module)))
    call = module.on_images if isinstance(module, Grown) else module
    once = call(x.clone())
    module.collapsed = False
    difference = relative_error(once, call(x))
    if not difference <= MODULE_TOLERANCE:
        raise CollapseError(
            f"{name}: a branch computes something else than its map (relative difference {difference:.1e}). A module "
            "inside does not do what its class says, perhaps in place."
        )


def _conv_of(module: nn.Module) -> nn.Conv2d:
    conv = module.as_conv() if isinstance(module, Grown) else module.conv
    assert isinstance(conv, nn.Conv2d)
    return conv


# ---- the clock


def _key(module: nn.Module, size: tuple[int, int]) -> Hashable:
    """Equal for modules whose step takes the same time."""
    flags = [tuple(getattr(m, key, None) for key in ("merged", "skipped", "width")) for m in module.modules()]
    return str(module), size, tuple(flags)


def _measure(module: OnlineModule, size: tuple[int, int], batch_size: int, rounds: int) -> tuple[float, float]:
    """Milliseconds of forward and backward in train mode, branch by branch and merged."""
    conv = _conv_of(module.train())
    x = torch.randn(batch_size, conv.in_channels, *size, generator=torch.Generator().manual_seed(0)).to(conv.weight)
    if conv.weight.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]

    def call(collapsed: bool) -> None:
        module.collapsed = collapsed
        y = module(x)
        torch.autograd.grad(y, inputs, torch.ones_like(y), allow_unused=True)  # of skipped branches

    ways = {"branches": partial(call, False), "merged": partial(call, True)}
    times = interleaved_timings(ways, rounds=rounds, device=x.device)
    return times["branches"], times["merged"]
