"""unroll: equilibria as explicit steps."""

from __future__ import annotations

import copy

from torch import nn

from growshrink.errors import EquilibriumError, check_model
from growshrink.layers.multiscale import ConvEquilibrium


def unroll(model: nn.Module, steps: int, *, untie: bool = False) -> nn.Module:
    r"""A copy of `model` whose equilibria run so many explicit steps: for ONNX, and growth of a weight-tied net.

    With K steps a map is at most :math:`0.9^K / 0.1` times the first step away from the equilibrium, and usually much
    nearer (tools/equilibria.py). An `implicit` branch needs none of this: `fuse` is exact.

    Args:
        model: A net with `ConvEquilibrium` layers, such as `reducenet20_deq`.
        steps: K, at least 1.
        untie: Give each step weights of its own, equal at first. They train apart, no longer scaled to a bound.

    Raises:
        EquilibriumError: The model has no such layer, or `steps` is no whole number above 0.
    """
    check_model(model)
    if type(steps) is not int or steps < 1:
        raise EquilibriumError(f"{steps=!r}: must be a whole number above 0.")
    found = [m for m in model.modules() if isinstance(m, ConvEquilibrium)]
    if not found:
        raise EquilibriumError("the model has no ConvEquilibrium: there is nothing to unroll.")
    return copy.deepcopy(model, {id(module): module.unrolled(steps, untie) for module in found})
