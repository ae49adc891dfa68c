"""Copies of nets, whatever they keep (activations, computed weights, locks), and tensors that share memory."""

import copy
import threading
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from growshrink.errors import GrowShrinkError, check_model


def ties(model: nn.Module) -> list[list[tuple[str, Tensor]]]:
    """Groups of two and more tensors, each with the name of the module that owns it, whose spans of memory overlap.

    Parameters, buffers and plain attributes; one tensor under two names is a group too.
    """
    spans: list[tuple[str, int, int, str, Tensor]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.jit.ScriptModule):  # whose parameters are not Python's
            continue
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor) and not is_lazy(tensor) and tensor.layout == torch.strided and tensor.numel():
                base, where = _memory(tensor)
                start = base + int(tensor.storage_offset()) * tensor.itemsize
                taps = sum((n - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
                spans.append((where, start, start + (taps + 1) * tensor.itemsize, name, tensor))
    groups: list[list[tuple[str, Tensor]]] = []
    end = ("", 0)
    for where, start, stop, name, tensor in sorted(spans, key=lambda span: span[:3]):
        if not groups or (where, start) >= end:
            groups.append([])
            end = (where, 0)
        groups[-1].append((name, tensor))
        end = max(end, (where, stop))
    return [group for group in groups if len(group) > 1]


def tied_copies(model: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy`, which otherwise cuts every tie between two parameters: copies that are tied alike."""
    check_model(model)
    memo: dict[int, Any] = {}
    for group in ties(model):
        tied = {id(tensor): tensor for _, tensor in group if tensor.is_leaf}
        storages: dict[Any, Any] = {}
        for key, tensor in tied.items() if len(tied) > 1 else ():
            storage = storages.setdefault(_memory(tensor), tensor.untyped_storage().clone())
            copied = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            copied = copied.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[key] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
    return memo


def _memory(tensor: Tensor) -> tuple[int, str]:
    """Address of the storage and what it is an address in; the meta device has none, so each storage is its own."""
    storage = tensor.untyped_storage()
    base = storage.data_ptr()
    return base, str(tensor.device) if base else f"{tensor.device} {storage._cdata}"


T = TypeVar("T", bound=nn.Module)

#: What has no copies and needs none.
_SHARED = (torch.jit.ScriptFunction, type(threading.Lock()), type(threading.RLock()))


def copy_net(model: T) -> T:
    """A deep copy, tied alike; tensors of a graph (a kept activation, a computed weight) become values without one.

    Raises:
        GrowShrinkError: An attribute of a module cannot be copied; names both.
    """
    if not isinstance(model, nn.Module):
        return copy.deepcopy(model)  # the caller refuses what is no net
    memo = tied_copies(model)
    for value in (value for module in model.modules() for value in vars(module).values()):
        if type(value) is OrderedDict and not value:  # of hooks: ten a module, nearly half of the time
            memo[id(value)] = OrderedDict()
        elif type(value) in _SHARED:  # isinstance takes a tenth of a copy's time
            memo[id(value)] = value
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
                what = f"{name or 'the model'}: its attribute {key!r} ({type(value).__name__})"
                return f"{what} cannot be copied ({reason}): take it out."
    return f"the model cannot be copied: {reason}."
