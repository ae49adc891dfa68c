"""Proofs about nets: are two equal, does a transform keep the function, what does a net cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.algebra.dataflow import InputSize
from growshrink.base.copying import copy_net
from growshrink.base.seeding import same_noise
from growshrink.errors import EquivalenceError, check_model
from growshrink.layers.activations import set_lambda, was_grown
from growshrink.layers.grown import Grown, grown_modules
from growshrink.layers.swaps import to_plain
from growshrink.proofs.probes import random_images, randomize_norms_
from growshrink.transforms import fold, fuse

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
    the first net, `top1_agreement` the share of inputs on which both have the same largest output, in [0, 1].
    """

    max_abs: float
    max_rel: float
    top1_agreement: float

    @staticmethod
    def of(a: Tensor, b: Tensor) -> Comparison:
        """Compare outputs `(N, ...)` of two nets."""
        if not a.numel():  # a detector that finds nothing
            return Comparison(0.0, 0.0, 1.0)
        max_abs, scale = float((a - b).abs().max()), float(a.abs().max())
        agreement = float((a.flatten(1).argmax(1) == b.flatten(1).argmax(1)).float().mean())
        return Comparison(max_abs, max_abs / scale if scale > 0 else float("inf") if max_abs else 0.0, agreement)


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify`.

    Attributes:
        max_rel: Relative error of the transformed net in float64.
        max_rel_float32: The same with both nets in float32 (transformed in float32).
        rounding_float32: `net_rounding_float32` of the net as it was.
        effect: Relative change of the output when what the transform merges is silenced.
        top1_agreement: As in `Comparison`, in float64.
    """

    max_rel: float
    max_rel_float32: float
    rounding_float32: float
    effect: float
    top1_agreement: float

    @property
    def ok(self) -> bool:
        """Exact in float64, within 1e-5 or 10 times the net's rounding in float32, with a sensitive check."""
        allowed_float32 = max(EXACT_FLOAT32, 10 * self.rounding_float32)
        exact = self.max_rel <= EXACT_FLOAT64 and self.max_rel_float32 <= allowed_float32
        return exact and self.effect >= LEAST_EFFECT


def compare(
    a: nn.Module,
    b: nn.Module,
    *,
    input_size: InputSize,
    num_inputs: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Comparison:
    """Run both nets, as they are but in eval mode, on the same random inputs.

    Works on copies: modes, statistics and random streams of `a` and `b` are untouched. `max_rel` refers to `a`.
    """
    x = random_images(input_size, num_inputs, dtype, seed)
    out_a, out_b = _run(a, x), _run(b, x)
    if out_a.shape != out_b.shape:
        raise EquivalenceError(f"outputs of shape {tuple(out_a.shape)} and {tuple(out_b.shape)} cannot be compared.")
    return Comparison.of(out_a, out_b)


def assert_equivalent(
    a: nn.Module,
    b: nn.Module,
    *,
    input_size: InputSize,
    tolerance: float = EXACT_FLOAT64,
    num_inputs: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Comparison:
    """`compare`, and EquivalenceError if `max_rel` is above `tolerance` or NaN.

    The message names the first layer to differ and the worst one, among the layers both nets have under the same name
    and as the same class (convolutions: both with a bias or both without; a bias may have moved into the norm behind).
    """
    result = compare(a, b, input_size=input_size, num_inputs=num_inputs, dtype=dtype, seed=seed)
    if not result.max_rel <= tolerance:
        x = random_images(input_size, num_inputs, dtype, seed)
        raise EquivalenceError(
            f"the nets differ by {result.max_rel:.1e} (relative; {tolerance:.0e} allowed), "
            f"top-1 agreement {result.top1_agreement:.0%}. {_blame(a, b, x, tolerance)}"
        )
    return result


def verify(
    model: nn.Module,
    transform: Callable[[nn.Module], nn.Module] = fuse,
    *,
    input_size: InputSize,
    randomize_norms: bool = True,
    seed: int = 0,
) -> Verification:
    """Prove on a copy of `model` that `transform` keeps the function, and that the proof could have failed.

    The copy gets random norm parameters and statistics (a fresh batch norm hides most mistakes; timm's zero gammas
    hide all of them; `randomize_norms=False` keeps a trained net as it is) and lam 0, in float64 and again in float32.

    Returns:
        The errors, and the effect: how much the output changes when the branches are silenced (in a net without
        branches, when the norms are left out).

    Raises:
        EquivalenceError: The effect is about 0, so nothing was proven. A large error is reported, not raised.
    """
    transform = partial(transform, input_size=input_size) if transform in (fuse, fold) else transform
    check_model(model)
    model = copy_net(model).eval()
    if was_grown(model):
        set_lambda(model, 0.0)
    if randomize_norms:
        randomize_norms_(model, seed)
    exact, rounded = copy_net(model).double(), copy_net(model).float()
    double, single = (
        compare(net, transform(copy_net(net)), input_size=input_size, dtype=dtype, seed=seed)
        for net, dtype in ((exact, torch.float64), (rounded, torch.float32))
    )
    rounding = net_rounding_float32(exact, rounded, input_size=input_size, seed=seed)
    effect = branch_effect(exact, input_size=input_size, seed=seed)
    if not effect >= LEAST_EFFECT:
        raise EquivalenceError(
            f"silencing what is merged changes the output by only {effect:.1e}: this verification proves nothing. "
            "Are the branches attached where the output depends on them? Use randomize_norms=True."
        )
    return Verification(double.max_rel, single.max_rel, rounding, effect, double.top1_agreement)


def net_rounding_float32(exact: nn.Module, single: nn.Module, *, input_size: InputSize, seed: int = 0) -> float:
    """Relative difference between a net in float32 and the same net in float64: its rounding error."""
    reference = _run(exact, random_images(input_size, 8, torch.float64, seed))
    rounded = _run(single, random_images(input_size, 8, torch.float32, seed)).double()
    return float((rounded - reference).abs().max() / reference.abs().max())


def branch_effect(model: nn.Module, *, input_size: InputSize, seed: int = 0) -> float:
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
    return compare(model, silent, input_size=input_size, seed=seed).max_rel


@torch.no_grad()
def _run(model: nn.Module, x: Tensor, observe: Callable[..., None] | None = None) -> Tensor:
    """Output of a copy in eval mode and the dtype of `x`; `observe` is a hook on all modules and gets their names."""
    check_model(model)
    replica = copy_net(model).to(dtype=x.dtype).eval()
    device = next((p.device for p in replica.parameters()), x.device)
    if observe is not None:
        for name, module in replica.named_modules():
            module.register_forward_hook(partial(observe, name))
    with same_noise(device):
        return replica(x.to(device)).cpu()


def _blame(a: nn.Module, b: nn.Module, x: Tensor, tolerance: float) -> str:
    outputs_a, outputs_b = _layer_outputs(a, x), _layer_outputs(b, x)
    errors = {}
    for name, (kind, out) in outputs_a.items():
        if name and name in outputs_b and outputs_b[name][0] == kind and outputs_b[name][1].shape == out.shape:
            difference = (out - outputs_b[name][1]).abs().max()
            errors[name] = float(difference / out.abs().max().clamp_min(torch.finfo(out.dtype).tiny))
    beyond = [name for name, error in errors.items() if not error <= tolerance]
    if not beyond:
        return "No layer that both nets have differs: the difference arises in modules of different classes."
    worst = max(beyond, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    return f"First layer to differ: {beyond[0]} ({errors[beyond[0]]:.1e}); worst layer: {worst} ({errors[worst]:.1e})."


def _layer_outputs(model: nn.Module, x: Tensor) -> dict[str, tuple[object, Tensor]]:
    """Kind and output of every module by name, in the order they finish."""
    outputs: dict[str, tuple[object, Tensor]] = {}

    def record(name: str, module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            outputs[name] = ((type(module), getattr(module, "bias", None) is None), output.clone().cpu())

    _run(model, x, record)
    return outputs
