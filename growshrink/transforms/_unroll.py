"""unroll: equilibria as explicit steps."""

import torch
from torch import nn

from growshrink.base.copying import copy_net
from growshrink.base.limits import Count, checked
from growshrink.errors import EquilibriumError
from growshrink.layers.equilibrium import ConvEquilibrium


@torch.no_grad()
@checked(EquilibriumError, steps=Count)
def unroll(model: nn.Module, steps: int, *, untie: bool = False) -> nn.Module:
    """A copy of `model` whose `ConvEquilibrium` layers run so many explicit steps, K: for ONNX, and for other nets.

    Maps are at most 0.9**K / 0.1 times the first step away from the equilibrium, and usually much nearer
    (tools/equilibria.py). Of `implicit` branches nothing is lost: `fuse` is their exit. `untie` gives each step weights
    of its own, equal at first: a weight-tied net, grown.

    Raises:
        EquilibriumError: The model has no such layer, or `steps` is no whole number above 0.

    >>> gs.unroll(gs.layers.ConvEquilibrium(4), steps=8).steps
    8
    """
    model = copy_net(model)
    found = [module for module in model.modules() if isinstance(module, ConvEquilibrium)]
    if not found:
        raise EquilibriumError("the model has no ConvEquilibrium: there is nothing to unroll.")
    for layer in found:
        weight = layer.kernels(layer.weight) if layer.bounded else layer.weight
        weight = weight.repeat(steps, *[1] * 5) if untie and len(weight) == 1 else weight.clone()
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        layer.steps, layer.bounded = steps, False  # no longer scaled: free to train as explicit steps are
    return model
