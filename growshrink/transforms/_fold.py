"""fold: the inference form, batch norms inside the convolutions."""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from growshrink.algebra.convmap import ConvMap
from growshrink.algebra.dataflow import Flow, InputSize, shared_parameters, trace
from growshrink.base.copying import copy_net
from growshrink.errors import FuseError
from growshrink.layers.grown import grown_modules
from growshrink.transforms._fuse import check_unchanged, replace_module

#: Classes whose output is their weight, convolved, and their bias, added: compared exactly, a subclass may do more.
_FOLDABLE = (nn.Conv2d, Conv2dSame)


def fold(model: nn.Module, *, inplace: bool = False, input_size: InputSize | None = None) -> nn.Module:
    """The inference form of any model: batch norms folded into the convolutions, in ReduceNets the identity skips too.

    A batch norm is folded where it alone reads the output of a plain `nn.Conv2d`, or of timm's `Conv2dSame`, and both
    run once; its activation (timm's BatchNormAct2d) stays. Whatever does not fit stays as it is: the result always
    computes the same. A folded net is for inference: it no longer trains well.

    The keys of a folded net are not those of the plain one (convolutions gain a bias, norms are gone): keep the plain
    checkpoint, or load a folded state_dict into a net folded likewise.

    Args:
        model: A plain net (fuse a grown one first).
        inplace: Work on `model` itself; otherwise on a deep copy.
        input_size: `(C, H, W)` for the data flow and the final check; None takes the model's own.

    Raises:
        FuseError: The model is grown, or the folded net would differ (the model is then untouched).
    """
    if grown := grown_modules(model):
        raise FuseError(
            f"{next(iter(grown)) or 'the model'} still carries branches: growshrink.fuse comes before growshrink.fold."
        )
    model = model if inplace else copy_net(model)
    flow = trace(model, input_size)
    commit = partial(_commit, pairs=_foldable(model, flow))
    check_unchanged(model, commit, flow.input_size)
    commit(model)
    return model


def _foldable(model: nn.Module, flow: Flow) -> dict[str, str]:
    """Names of convolutions and of the batch norm each can take in."""
    shared = shared_parameters(model)
    pairs = {}
    for name, conv in model.named_modules():
        if type(conv) not in _FOLDABLE or name in shared or conv._parameters.get("weight") is None:
            continue  # the last: its weight is computed by a hook (pruning, weight norm) and cannot be written to
        found, _ = flow.norm_after(name)
        norm = None if found is None or found in shared else model.get_submodule(found)
        if found is not None and (type(norm) is nn.BatchNorm2d or _is_norm_act(norm)):
            pairs[name] = found
    return pairs


def _is_norm_act(norm: nn.Module | None) -> bool:
    return type(norm) is BatchNormAct2d and norm.track_running_stats


@torch.no_grad()
def _commit(model: nn.Module, pairs: dict[str, str]) -> None:
    for conv_name, norm_name in pairs.items():
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        total = ConvMap.from_conv2d(conv).then(ConvMap.from_bn(norm))
        conv.weight.copy_(total.kernel)
        conv.bias = nn.Parameter(total.bias.to(conv.weight), requires_grad=conv.weight.requires_grad)
        after = nn.Sequential(*map(norm.get_submodule, ("drop", "act"))) if _is_norm_act(norm) else nn.Identity()
        replace_module(model, norm_name, after.train(norm.training))
    for module in list(model.modules()):
        if callable(fold_skip := getattr(module, "fold_skip", None)):
            fold_skip()
