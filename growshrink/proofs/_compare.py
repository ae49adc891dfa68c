"""Proofs about nets: are two equal, does a transform keep the function, what does a net cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.algebra.dataflow import inputs_for, trace
from growshrink.algebra.inputs import Arguments, ExampleInputs, InputLike, given_inputs, paired_leaves
from growshrink.base.copying import copy_net
from growshrink.base.limits import Count, checked
from growshrink.base.seeding import own_randomness
from growshrink.errors import EquivalenceError, GrowShrinkError, check_model
from growshrink.layers.activations import follow_lambda
from growshrink.layers.grown import Grown, grown_modules
from growshrink.layers.swaps import to_plain
from growshrink.proofs.probes import randomize_norms_
from growshrink.transforms import fold, fuse
from growshrink.transforms._fuse import fuse_along, relative_error

#: float64 relative error above which two nets are not "exactly" equal (DESIGN: rules of exactness, 2).
EXACT_FLOAT64 = 1e-10
#: The same for one net-wide fuse in float32.
EXACT_FLOAT32 = 1e-5
#: A verification whose branches change the output by less than this proves nothing.
LEAST_EFFECT = 1e-3


@dataclass(frozen=True)
class Comparison:
    """How far two nets are apart on the same random inputs.

    `max_abs` is the largest absolute difference of any output, `max_rel` the same over the largest absolute output of
    the first net, `top1_agreement` the share of inputs on which both have the same largest output, in [0, 1]. Of
    outputs that hold several tensors (lists, dicts, dataclasses) all three are those of the worst, `leaf`, by
    `max_rel`; empty ones are equal.
    """

    max_abs: float
    max_rel: float
    top1_agreement: float
    leaf: str = ""

    @staticmethod
    def of(a: Any, b: Any) -> Comparison:
        """Compare the outputs of two nets leaf by leaf; EquivalenceError unless they hold tensors of equal shapes."""
        try:
            pairs = paired_leaves(a, b)
        except GrowShrinkError as error:
            raise EquivalenceError(str(error)) from error
        if not pairs:
            raise EquivalenceError("the outputs hold no floating point tensor: nothing to compare.")
        found = [Comparison._of_leaf(path, *pair) for path, pair in pairs.items()]
        return max(found, key=lambda one: float("inf") if one.max_rel != one.max_rel else one.max_rel)

    @staticmethod
    def _of_leaf(path: str, a: Tensor, b: Tensor) -> Comparison:
        if not a.numel():
            return Comparison(0.0, 0.0, 1.0, path)
        max_abs, scale = float((a - b).abs().max()), float(a.abs().max())
        tops = [t.reshape(len(t) if t.dim() > 1 else 1, -1).argmax(1) for t in (a, b)]
        max_rel = max_abs / scale if scale > 0 else float("inf") if max_abs else 0.0
        return Comparison(max_abs, max_rel, float((tops[0] == tops[1]).float().mean()), path)


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify`.

    Attributes:
        max_rel: Relative error of the transformed net in float64.
        max_rel_float32: The same with both nets in float32 (transformed in float32).
        rounding_float32: `net_rounding_float32` of the net as it was.
        effect: Relative change of the output when what the transform merges is silenced.
        top1_agreement: As in `Comparison`, in float64.
        max_rel_own: Relative error in the net's own dtype, where that is neither float64 nor float32; else None.
    """

    max_rel: float
    max_rel_float32: float
    rounding_float32: float
    effect: float
    top1_agreement: float
    max_rel_own: float | None = None

    @property
    def ok(self) -> bool:
        """Exact in float64, within 1e-5 or 10 times the net's rounding in float32, finite, with a sensitive check."""
        allowed_float32 = max(EXACT_FLOAT32, 10 * self.rounding_float32)
        exact = self.max_rel <= EXACT_FLOAT64 and self.max_rel_float32 <= allowed_float32
        return exact and math.isfinite(self.max_rel_own or 0.0) and self.effect >= LEAST_EFFECT


@checked(EquivalenceError, num_inputs=Count)
def compare(
    a: nn.Module,
    b: nn.Module,
    *,
    input_size: InputLike = None,
    example_inputs: ExampleInputs | None = None,
    num_inputs: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Comparison:
    """Run both nets, as they are but in eval mode, on the same random inputs.

    Works on copies: modes, statistics and random streams of `a` and `b` are untouched. `max_rel` refers to `a`. The
    inputs are `num_inputs` images of `input_size` (None takes that of `a`) or the batch `example_inputs`, see `grow`.

    >>> gs.compare(net, gs.grow(net)).max_rel
    0.0
    """
    batch = (given_inputs(input_size, example_inputs) or inputs_for(a)).batch(num_inputs, dtype, seed=seed)
    return Comparison.of(_run(a, batch, dtype), _run(b, batch, dtype))


@checked(EquivalenceError)
def assert_equivalent(
    a: nn.Module,
    b: nn.Module,
    *,
    input_size: InputLike = None,
    example_inputs: ExampleInputs | None = None,
    tolerance: float = EXACT_FLOAT64,
    num_inputs: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Comparison:
    """`compare`, and EquivalenceError if `max_rel` is above `tolerance` or NaN.

    The message names the first layer to differ and the worst one, among the layers both nets have under the same name
    and as the same class (convolutions: both with a bias or both without; a bias may have moved into the norm behind).

    >>> gs.assert_equivalent(net, gs.fold(net), tolerance=1e-5).top1_agreement
    1.0
    """
    inputs = given_inputs(input_size, example_inputs) or inputs_for(a)
    result = compare(a, b, input_size=inputs, num_inputs=num_inputs, dtype=dtype, seed=seed)
    if not result.max_rel <= tolerance:
        x = inputs.batch(num_inputs, dtype, seed=seed)
        raise EquivalenceError(
            f"the nets differ by {result.max_rel:.1e} (relative; {tolerance:.0e} allowed)"
            f"{f' in output{result.leaf}' if result.leaf else ''}, "
            f"top-1 agreement {result.top1_agreement:.0%}. {_blame(a, b, x, dtype, tolerance)}"
        )
    return result


@checked(EquivalenceError)
def verify(
    model: nn.Module,
    transform: Callable[[nn.Module], nn.Module] = fuse,
    *,
    input_size: InputLike = None,
    example_inputs: ExampleInputs | None = None,
    randomize_norms: bool = True,
    seed: int = 0,
) -> Verification:
    """Prove on a copy of `model` that `transform` keeps the function, and that the proof could have failed.

    The copy gets random norm parameters and statistics (a fresh batch norm hides most mistakes; timm's zero gammas
    hide all of them; `randomize_norms=False` keeps a trained net as it is) and lam 0, in float64 and again in float32.
    Inputs are those of `compare`.

    Returns:
        The errors, and the effect: how much the output changes when the branches are silenced (in a net without
        branches, when the norms are left out).

    Raises:
        EquivalenceError: The effect is about 0, so nothing was proven. A large error is reported, not raised.

    >>> found = gs.verify(gs.grow(net))
    >>> found.ok, found.max_rel < 1e-12, found.effect > 0.1
    (True, True, True)
    """
    inputs = given_inputs(input_size, example_inputs) or inputs_for(model)
    model = copy_net(model).eval()
    follow_lambda(model, 0.0)
    if transform is fuse and grown_modules(model):
        transform = partial(fuse_along, flow=trace(model, inputs))
    elif transform in (fuse, fold):
        transform = partial(transform, input_size=inputs)
    if randomize_norms:
        randomize_norms_(model, seed)
    exact, rounded = copy_net(model).double(), copy_net(model).float()
    double, single = (
        compare(net, transform(copy_net(net)), input_size=inputs, dtype=dtype, seed=seed)
        for net, dtype in ((exact, torch.float64), (rounded, torch.float32))
    )
    dtype = next((p.dtype for p in model.parameters()), torch.float64)
    own = None
    if dtype not in (torch.float64, torch.float32):
        own = compare(model, transform(copy_net(model)), input_size=inputs, dtype=dtype, seed=seed).max_rel
    rounding = net_rounding_float32(exact, rounded, input_size=inputs, seed=seed)
    effect = branch_effect(exact, input_size=inputs, seed=seed)
    if not effect >= LEAST_EFFECT:
        raise EquivalenceError(
            f"silencing what is merged changes the output by only {effect:.1e}: this verification proves nothing. "
            "Are the branches attached where the output depends on them? Use randomize_norms=True."
        )
    return Verification(double.max_rel, single.max_rel, rounding, effect, double.top1_agreement, own)


def net_rounding_float32(exact: nn.Module, single: nn.Module, *, input_size: InputLike, seed: int = 0) -> float:
    """Relative difference between a net in float32 and the same net in float64: its rounding error."""
    inputs = inputs_for(exact, input_size)
    dtypes = {torch.float32: single, torch.float64: exact}
    outputs = (_run(net, inputs.batch(8, dtype, seed=seed), dtype) for dtype, net in dtypes.items())
    return max(relative_error(a.double(), b) for a, b in paired_leaves(*outputs).values())


def branch_effect(model: nn.Module, *, input_size: InputLike, seed: int = 0) -> float:
    """Relative change of the output when every branch adds nothing (no branches: when every norm is left out)."""
    silent = copy_net(model)
    branches = grown_modules(silent).values()
    for module in branches:
        if isinstance(module, Grown):
            to_plain(module)
        else:
            module.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
    for norm in [] if branches else [m for m in silent.modules() if isinstance(m, _BatchNorm)]:
        norm.register_forward_hook(lambda _, args, output: args[0])
    try:
        return compare(model, silent, input_size=input_size, seed=seed).max_rel
    except EquivalenceError:  # other shapes: a detector that finds other boxes
        return float("inf")


@torch.no_grad()
def _run(model: nn.Module, x: Arguments, dtype: torch.dtype, observe: Callable[..., None] | None = None) -> Any:
    """Output of a copy in eval mode and `dtype`; `observe` is a hook on all modules and gets their names."""
    check_model(model)
    replica = copy_net(model).to(dtype=dtype).eval()
    device = next((p.device for p in replica.parameters()), torch.device("cpu"))
    if observe is not None:
        for name, module in replica.named_modules():
            module.register_forward_hook(partial(observe, name))
    with own_randomness(0, device):
        return x.to(device, dtype).run(replica)


def _blame(a: nn.Module, b: nn.Module, x: Arguments, dtype: torch.dtype, tolerance: float) -> str:
    outputs_a, outputs_b = _layer_outputs(a, x, dtype), _layer_outputs(b, x, dtype)
    errors = {}
    for name, (kind, out) in outputs_a.items():
        if name and name in outputs_b and outputs_b[name][0] == kind and outputs_b[name][1].shape == out.shape:
            errors[name] = relative_error(outputs_b[name][1], out)
    beyond = [name for name, error in errors.items() if not error <= tolerance]
    if not beyond:
        return "No layer that both nets have differs: the difference arises in modules of different classes."
    worst = max(beyond, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    return f"First layer to differ: {beyond[0]} ({errors[beyond[0]]:.1e}); worst layer: {worst} ({errors[worst]:.1e})."


def _layer_outputs(model: nn.Module, x: Arguments, dtype: torch.dtype) -> dict[str, tuple[object, Tensor]]:
    """Kind and output of every module by name, in the order they finish."""
    outputs: dict[str, tuple[object, Tensor]] = {}

    def record(name: str, module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            outputs[name] = ((type(module), getattr(module, "bias", None) is None), output.clone().cpu())

    _run(model, x, dtype, record)
    return outputs
