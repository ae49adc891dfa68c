"""fold: the inference form, batch norms inside the convolutions."""

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.algebra.convmap import ConvMap
from growshrink.algebra.dataflow import FROZEN_NORMS, Flow, trace
from growshrink.algebra.inputs import ExampleInputs, InputLike, given_inputs
from growshrink.base.copying import copy_net
from growshrink.errors import FuseError
from growshrink.layers.as_conv import WeightLayer, as_conv, write_kernel_
from growshrink.layers.grown import grown_modules
from growshrink.layers.swaps import class_in_table
from growshrink.transforms._fuse import check_unchanged, replace_module

#: Norms that are an affine map in eval mode, with an activation behind it at most: compared exactly.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct, *FROZEN_NORMS)


def fold(
    model: nn.Module,
    *,
    inplace: bool = False,
    input_size: InputLike = None,
    example_inputs: ExampleInputs | None = None,
) -> nn.Module:
    """The inference form of any model: batch norms folded into the convolutions, in ReduceNets the identity skips too.

    A batch norm (synchronised and frozen ones too) is folded where it alone reads the output of a convolution or linear
    layer that can be grown, and both run once; its activation (timm's BatchNormAct2d) stays. Whatever does not fit
    stays as it is (`growshrink.transforms.fold_report` tells why): the result always computes the same. A folded net is
    for inference: it no longer trains well.

    The keys of a folded net are not those of the plain one (convolutions gain a bias, norms are gone): keep the plain
    checkpoint, or load a folded state_dict into a net folded likewise.

    Args:
        model: A plain net (fuse a grown one first).
        inplace: Work on `model` itself; otherwise on a deep copy.
        input_size: `(C, H, W)` for the data flow and the final check; None takes the model's own.
        example_inputs: In place of a size, a batch; see `grow`.

    Raises:
        FuseError: The model is grown, or the folded net would differ (the model is then untouched).

    >>> gs.fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), input_size=(3, 8, 8))[1]
    Identity()
    """
    if grown := grown_modules(model):
        where = next(iter(grown)) or "the model"
        raise FuseError(f"{where} still carries branches: growshrink.fuse comes before growshrink.fold.")
    model = model if inplace else copy_net(model)
    flow = trace(model, given_inputs(input_size, example_inputs))
    commit = partial(fold_norms_, pairs=foldable(model, flow))
    check_unchanged(model, commit, flow.inputs)
    commit(model)
    return model


def fold_report(
    model: nn.Module, *, input_size: InputLike = None, example_inputs: ExampleInputs | None = None
) -> dict[str, str]:
    """The norms of batch statistics that `fold` would leave in `model` (or has left), each with the reason.

    >>> gs.transforms.fold_report(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), input_size=(3, 8, 8))
    {'1': 'it reads the output of no convolution or linear layer'}
    """
    flow = trace(model, given_inputs(input_size, example_inputs))
    pairs, reasons = foldable(model, flow), {}
    for name, norm in model.named_modules():
        if isinstance(norm, (_BatchNorm, *_NORMS)) and name not in pairs.values():
            feeding = [key for key, readers in flow.readers.items() if name in (r.norm for r in readers)]
            layer = next((key for key in feeding if class_in_table(model.get_submodule(key))), None)
            reasons[name] = "it reads the output of no convolution or linear layer"
            if type(norm) not in _NORMS:
                reasons[name] = f"it is a {type(norm).__name__}, whose forward is its own"
            elif getattr(norm, "running_mean", None) is None:
                reasons[name] = "it has no running statistics"
            elif layer is not None:
                why = flow.norm_after(layer)[1] or "its parameters are shared, or computed by a hook"
                reasons[name] = f"it follows {layer}: {why}"
    return reasons


def foldable(model: nn.Module, flow: Flow) -> dict[str, str]:
    """Names of layers and of the norm each can take in."""
    shared = flow.shared
    pairs = {}
    for name, layer in model.named_modules():
        grows = isinstance(layer, WeightLayer) and class_in_table(layer) is not None
        if not grows or name in shared or layer._parameters.get("weight") is None:
            continue  # the last: its weight is computed by a hook (pruning, weight norm) and cannot be written to
        found, _ = flow.norm_after(name)
        norm = None if found is None or found in shared else model.get_submodule(found)
        if found is not None and type(norm) in _NORMS and getattr(norm, "running_mean", None) is not None:
            pairs[name] = found
    return pairs


@torch.no_grad()
def fold_norms_(model: nn.Module, pairs: Mapping[str, str]) -> None:
    """Fold norms into layers, by the names of both, in place."""
    for layer_name, norm_name in pairs.items():
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        total = ConvMap.from_conv2d(as_conv(layer)).then(ConvMap.from_bn(norm))
        write_kernel_(layer, total.kernel)
        weight = cast(nn.Parameter, layer.weight)
        layer.bias = nn.Parameter(total.bias.to(weight), requires_grad=weight.requires_grad)
        parts = [part for name, part in norm.named_children() if name in ("drop", "act")]  # of timm's norms
        after = nn.Sequential(*parts) if parts else nn.Identity()
        replace_module(model, norm_name, after.train(norm.training))
    for module in list(model.modules()):
        if callable(fold_skip := getattr(module, "fold_skip", None)):
            fold_skip()
