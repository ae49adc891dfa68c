"""Copies of nets, whatever they keep: activations, weights that a hook computes, locks."""

import copy
import threading
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from growshrink.base.ties import tied_copies
from growshrink.errors import GrowShrinkError

T = TypeVar("T", bound=nn.Module)

#: What has no copies and needs none.
_SHARED = (torch.jit.ScriptFunction, type(threading.Lock()), type(threading.RLock()))


def copy_net(model: T) -> T:
    """A deep copy, tied alike; tensors of a graph (a kept activation, a computed weight) become values without one.

    Raises:
        GrowShrinkError: An attribute of a module cannot be copied; names both.
    """
    if not isinstance(model, nn.Module):
        return copy.deepcopy(model)  # what is no net is refused by whoever asked for the copy
    memo = tied_copies(model)
    memo |= {id(v): v for m in model.modules() for v in vars(m).values() if isinstance(v, _SHARED)}
    try:
        with _WithoutGraph(), torch.no_grad():  # or the parameters of scripted parts would get a graph
            copied = copy.deepcopy(model, memo)
    except Exception as error:  # every object fails to be copied in its own way
        raise GrowShrinkError(_culprit(model, error)) from error
    for parameter, original in zip(copied.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return copied


class _WithoutGraph(TorchFunctionMode):
    """Lets deepcopy copy tensors that are no leaves, which torch refuses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), tensor.detach().clone())


def _culprit(model: nn.Module, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules") or isinstance(value, _SHARED):
                continue
            try:
                with _WithoutGraph():
                    copy.deepcopy(value)
            except Exception:
                kind = type(value).__name__
                return (
                    f"{name or 'the model'}: its attribute {key!r} ({kind}) cannot be copied ({reason}): take it out."
                )
    return f"the model cannot be copied: {reason}."
