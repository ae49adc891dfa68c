"""fuse: every branch merged into its kernel, exactly, or not at all."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from growshrink.algebra.convmap import ConvMap
from growshrink.algebra.dataflow import Flow, trace
from growshrink.algebra.inputs import Arguments, ExampleInputs, InputLike, given_inputs, output_leaves, paired_leaves
from growshrink.base.copying import copy_net
from growshrink.base.reading import reason
from growshrink.base.seeding import own_randomness
from growshrink.branches import Branch
from growshrink.branches.guide import remove_guide
from growshrink.errors import AlgebraError, FuseError, GrowShrinkError, check_model
from growshrink.layers.activations import NEVER_GROWN, vanishing, was_grown
from growshrink.layers.bottleneck import PureBottleneck, geometry_of
from growshrink.layers.grown import Grown, computed_parameter, grown_modules
from growshrink.layers.mapping import Mergeable
from growshrink.layers.swaps import expand_online, mark_left
from growshrink.layers.widths import Width, active_width
from growshrink.models.staged import StagedNet, plain_form
from growshrink.transforms._deploy import lost_in_cast, unguard_hooks, warn_of_rounding, write_map

_Change = Callable[[nn.Module], object]
#: By name of a grown module: its map in float64, and the batch norm that takes the bias where it has none of its own.
_Merges = dict[str, tuple[ConvMap, str | None]]
MODULE_TOLERANCE = 1e-10  # a module's forward against its map, float64
NET_TOLERANCE = 1e-8  # the net against itself fused, float64: rounding grows with depth and with odd BN statistics
MOST_BY_ROUNDING = 1000  # times the change that a few last bits of the input make: nets exist that blow rounding up
FLOAT32_TOLERANCE = 1e-3  # for nets that do not run in float64: catches blunders only


def fuse(
    model: nn.Module,
    *,
    width: Width | None = None,
    inplace: bool = False,
    input_size: InputLike = None,
    example_inputs: ExampleInputs | None = None,
) -> nn.Module:
    """Merge every branch into the layer it is on: back to the plain architecture, the same keys and shapes.

    The result computes what the grown net computes in eval mode at `width`, in whatever mode the model is now; a width
    that it was not trained at needs `calibrate_bn` first. Kernels are merged in float64 and cast at the end (relative
    error of the net about 1e-15 in float64, 1e-6 in float32). The bias of a branch goes into the layer's own, or else
    into the running mean of the batch norm behind it. The plain net is checked against the grown one on a random input;
    a net without branches comes back as it is, with a warning if it never had any.

    Args:
        model: A grown net with every lam exactly 0 (of the branches that `width` does not skip).
        width: A width of the supernet; None is the active one.
        inplace: Work on `model` itself; otherwise on a deep copy. Untouched parameters, and the kernels that
            branches merge into, stay the same objects.
        input_size: `(C, H, W)` for the data flow and the final check, or several, where the model takes another path at
            another size; None takes the model's own.
        example_inputs: In place of a size, a batch; see `grow`.

    Where a bias goes into a batch norm, nothing else may read the layer's output. Readers are seen in eval and train
    mode at every `input_size`; hooks, what keeps an output, and norms that ran in no pass count as readers. Not seen: a
    path that another size, argument or flag takes to no norm, and train mode where it does not run (a warning says so).

    Raises:
        FuseError: A lam is not 0; something in a branch is not affine; a grown module is shared or runs more than
            once; a bias has nowhere to go. Names the module; the model is bit for bit as it was.
        WidthError: `width` is not a width of this model.

    >>> grown = gs.grow(net, "bottleneck", ratio=4)
    >>> _ = gs.set_lambda(grown, 0)
    >>> net.load_state_dict(gs.fuse(grown).state_dict())
    <All keys matched successfully>
    """
    check_model(model)
    model = model if inplace else copy_net(model)
    if width is not None:
        with active_width(model, width):
            return fuse(model, inplace=True, input_size=input_size, example_inputs=example_inputs)
    if grown_modules(model):
        _refuse_alive(model)  # before a pass, which may need a size
        return fuse_along(model, trace(model, given_inputs(input_size, example_inputs)))
    if not was_grown(model):
        warnings.warn(f"nothing to fuse: {NEVER_GROWN}", stacklevel=2)
    return model


def fuse_along(model: nn.Module, flow: Flow) -> nn.Module:
    """`fuse` a grown net in place, along the data flow of a net of this same structure."""
    _refuse_alive(model)
    commit = partial(_commit, merges=_plan(model, flow))
    for inputs in flow.inputs.each():
        check_unchanged(model, commit, inputs)
    built_grown = isinstance(model, StagedNet) and any(isinstance(m, PureBottleneck) for m in model.modules())
    commit(model)
    if built_grown and "architecture" in (cfg := vars(model).get("pretrained_cfg") or {}):
        vars(model)["pretrained_cfg"] = {**cfg, "architecture": plain_form(cfg["architecture"], {}, grown=True)[0]}
    vars(model)["was_grown"] = True
    return model


def _refuse_alive(model: nn.Module) -> None:
    skipped = [f"{name}." for name, module in model.named_modules() if isinstance(module, Branch) and module.skipped]
    alive = [
        f"{name}.{act_name} (lam = {float(act.lam)!r})"
        for name, module in grown_modules(model).items()
        for act_name, act in vanishing(module)
        if act.lam != 0 and not f"{name}.{act_name}".startswith(tuple(skipped))
    ]
    if alive:
        raise FuseError(
            f"{len(alive)} activation(s) have not vanished: {', '.join(alive[:3])}{', ...' * (len(alive) > 3)}. "
            "Train until the schedule of lam reaches exactly 0, or growshrink.set_lambda(model, 0)."
        )


def _plan(model: nn.Module, flow: Flow) -> _Merges:
    merges, lost = _Merges(), dict[str, float]()
    for name, module in grown_modules(model).items():
        if module is model and isinstance(module, PureBottleneck):
            raise FuseError("the model is itself a PureBottleneck, which cannot be replaced: its fuse() gives a conv.")
        if isinstance(module, Grown) and (key := computed_parameter(module)):
            raise FuseError(f"{name}: its {key} is computed by a hook or parametrization, and cannot be written to.")
        if any(f"{owner}.".startswith(f"{name}.") for owner in flow.shared):
            raise FuseError(f"{name} shares parameters, or their memory, with another module, which would change too.")
        if flow.calls.get(name, 0) > 1:
            raise FuseError(f"{name} runs {flow.calls[name]} times in a forward pass: a shared module is not merged.")
        total, norm = _map_of(name, module), None
        owns_bias = isinstance(module, Grown) and module.bias is not None
        if not owns_bias and bool((total.bias != 0).any()):
            norm, reason = flow.norm_after(name)
            if norm is None:
                raise FuseError(f"{name} has no bias of its own, and that of its branches has nowhere to go: {reason}.")
        lost[name] = lost_in_cast(name, module, total, None if norm is None else model.get_submodule(norm))
        merges[name] = total, norm
    warn_of_rounding(lost, model)
    return merges


@torch.no_grad()
def _map_of(name: str, module: Grown | PureBottleneck) -> ConvMap:
    """The module's map in float64 and its own geometry, proven against the module's forward."""
    replica = expand_online(module).cpu().double().eval()  # a merged kernel would be compared with itself
    replica._forward_hooks.clear()  # they run outside the map, before and after the merge
    replica._forward_pre_hooks.clear()
    assert isinstance(replica, Mergeable)
    try:
        total = replica.as_convmap()
        if isinstance(replica, Grown):
            total = total.fit(replica.as_conv())
    except AlgebraError as error:
        raise FuseError(f"{name}.{error}" if error.module else f"{name}: {error}") from error
    if not (total.kernel.isfinite().all() and total.bias.isfinite().all()):
        raise FuseError(f"{name}: its merged kernel has NaN or infinite values.")
    x = probe(total)
    seen, run = (replica.padded(x), replica.on_images) if isinstance(replica, Grown) else (x, replica)
    difference = relative_error(total(seen), run(x.clone()))
    if not difference <= MODULE_TOLERANCE:
        raise FuseError(
            f"{name}: its forward is not the affine map of its parts (relative difference {difference:.1e}). A module "
            "inside computes something else than its class says, perhaps in place."
        )
    return total


def probe(map_: ConvMap) -> Tensor:
    """A random float64 input to tell a map by."""
    # large enough that the kernel moves, and that reflection has something to reflect
    height, width = (extent + 2 + max(1, *sides) for extent, sides in zip(map_.extent, map_.padding, strict=True))
    size = (2, map_.in_channels, height, width)
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check_unchanged(
    model: nn.Module,
    commit: _Change,
    input_size: InputLike,
    *,
    prepare: _Change = nn.Module.eval,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Try `commit` on a copy; FuseError if it then computes something else than another copy after `prepare`.

    In `dtype`, or in the model's own where it does not run in that. Each copy sees the same noise, if it draws any.
    """
    like, inputs = next(model.parameters(), torch.empty(0)), given_inputs(input_size)
    assert inputs is not None
    x = inputs.batch(2)

    def outputs(x: Arguments, change: _Change) -> Any:
        replica = copy_net(model).eval()
        change(replica.double() if dtype == torch.float64 else replica)
        return _outputs(replica, x.to(like.device, dtype))

    try:
        before = outputs(x, prepare)
    except Exception:  # some nets make float32 constants inside
        dtype = like.dtype
        try:
            before = outputs(x, prepare)
        except Exception as error:  # any forward may fail in its own way
            raise FuseError(f"the model does not run on {inputs}: {reason(error)}.") from error
    tolerance = NET_TOLERANCE if dtype == torch.float64 else FLOAT32_TOLERANCE
    try:
        pairs = paired_leaves(outputs(x, commit), before)
    except GrowShrinkError as error:
        raise FuseError(f"the transformed net would differ from the one given: {error}") from error
    if not pairs:
        raise FuseError("the model's output holds no floating point tensor: nothing to check the result by.")
    if like.dtype in (torch.float16, torch.bfloat16):
        _check_finite(model, commit, x.to(like.device, like.dtype), like.dtype)
    errors = {path: relative_error(a, b) for path, (a, b) in pairs.items()}
    wrong = [path for path, error in errors.items() if not error <= tolerance]
    if wrong and tolerance == NET_TOLERANCE:
        tolerance = min(FLOAT32_TOLERANCE, max(tolerance, MOST_BY_ROUNDING * _sensitivity(outputs, x, prepare, before)))
        wrong = [path for path, error in errors.items() if not error <= tolerance]
    if wrong:
        raise FuseError(
            f"the transformed net would differ from the one given by {errors[wrong[0]]:.1e} (relative; at most "
            f"{tolerance:.0e} expected) in its output{wrong[0]} on {inputs}: it is left as it was."
        )


def _check_finite(model: nn.Module, commit: _Change, x: Arguments, dtype: torch.dtype) -> None:
    """FuseError if the net gives inf or NaN in its own dtype where it gave none before."""
    replica = copy_net(model).eval()
    try:
        finite = all(bool(out.isfinite().all()) for out in output_leaves(x.run(replica)).values())
    except RuntimeError:  # some operators have no such dtype on the CPU
        return
    commit(replica)
    if finite and not all(bool(out.isfinite().all()) for out in output_leaves(x.run(replica)).values()):
        raise FuseError(f"in {dtype} the merged net would give inf or NaN: fuse in float32, then cast.")


def _sensitivity(outputs: Callable[[Arguments, _Change], Any], x: Arguments, prepare: _Change, before: Any) -> float:
    """Relative change of the outputs when every pixel moves by a few of its last bits."""
    random = torch.Generator().manual_seed(1)

    def moved(t: Tensor) -> Tensor:
        signs = torch.randint(2, t.shape, generator=random).to(t) * 2 - 1
        return t * (1 + 4 * torch.finfo(t.dtype).eps * signs)

    after = output_leaves(outputs(x.map(moved), prepare))
    return max(relative_error(after[path], b) for path, b in output_leaves(before).items() if path in after)


def _outputs(model: nn.Module, x: Arguments) -> Any:
    """The output; where all tensors in it are empty (no box was found), those of the modules inside."""
    inner: dict[str, list[Tensor]] = {}

    def observe(name: str, module: nn.Module, args: object, output: object) -> None:
        inner.setdefault(name, []).extend(t for t in output_leaves(output).values() if t.numel())

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with own_randomness(0, device):
        output = x.run(model)
    found = output_leaves(output).values()
    if not found or any(tensor.numel() for tensor in found):
        return output
    hooks: list[RemovableHandle] = []
    skipped = tuple(f"{name}." for name in grown_modules(model))
    for name, module in model.named_modules():  # what a convolution gives may change, with the norm behind it
        if not isinstance(module, (nn.Conv2d, nn.Linear, Mergeable)) and not name.startswith(skipped):
            hooks.append(module.register_forward_hook(partial(observe, name)))
    with own_randomness(0, device):
        x.run(model)
    for hook in hooks:
        hook.remove()
    depth = min((name.count(".") for name in inner if inner[name]), default=0)
    return [tensor for name in inner if name.count(".") == depth for tensor in inner[name]] or output


@torch.no_grad()
def _commit(model: nn.Module, merges: _Merges) -> None:
    unguard_hooks(model)
    remove_guide(model)
    for name, (total, _) in merges.items():
        module = model.get_submodule(name)
        if isinstance(module, Grown):
            write_map(module, total)
        elif isinstance(module, PureBottleneck):
            mark_left(module)
            replace_module(model, name, _conv_for(module, total))
    for total, norm in merges.values():  # when norms are merged, which took their statistics as they were
        if norm is not None:
            running_mean = model.get_buffer(f"{norm}.running_mean")
            running_mean.copy_(running_mean.double() - total.bias.to(running_mean.device))


def _conv_for(module: PureBottleneck, total: ConvMap) -> nn.Conv2d:
    """The plain convolution a PureBottleneck becomes, in its geometry, dtype, memory format, mode and trainability."""
    like = module.conv
    options = {"bias": False, "device": like.weight.device, "dtype": like.weight.dtype, **geometry_of(like)}
    conv = nn.utils.skip_init(nn.Conv2d, like.in_channels, module.out_channels, **options)
    if like.weight.is_contiguous(memory_format=torch.channels_last) and not like.weight.is_contiguous():
        conv = conv.to(memory_format=torch.channels_last)
    conv.weight.copy_(total.fit(conv).kernel)
    return conv.train(module.training).requires_grad_(like.weight.requires_grad)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest value of `b`; NaN or inf if either has any, inf for two shapes."""
    if a.shape != b.shape or not a.numel():
        return 0.0 if a.shape == b.shape else float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))
