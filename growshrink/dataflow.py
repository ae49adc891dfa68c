"""Which operation consumes which output: one forward pass observed at operator level.

Module hooks alone do not see `bn(z) + z` or `relu_(y); bn(y)`. Here every aten operator of one pass is seen, so a
second reader of a tensor is found however it is written. The pass runs on the meta device (no arithmetic, no
memory), on a copy, in eval mode; it falls back to a real pass for models that cannot run on meta.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from growshrink.errors import GrowShrinkError

InputSize = tuple[int, int, int]

_SIZES_TO_TRY = (32, 64, 224, 28, 8)


@dataclass(frozen=True)
class Reader:
    """One use of an output: the operator, and the module it belongs to, where that module owns a tensor it reads too.

    `norm` is that module again if it is a batch norm.
    """

    op: str
    norm: str | None = None
    module: str | None = None

    def __str__(self) -> str:
        return self.norm or self.op


@dataclass(frozen=True)
class Flow:
    """What one forward pass showed.

    Attributes:
        input_size: `(C, H, W)` of the image that was passed.
        calls: How often each module ran, by dotted name.
        output_sizes: Spatial size `(H, W)` of the last 4-D output of each module.
        readers: Who reads the output of each module, in order.
        input_sizes: Spatial size `(H, W)` of the last 4-D first argument of each module.
    """

    input_size: InputSize
    calls: Mapping[str, int]
    output_sizes: Mapping[str, tuple[int, int]]
    readers: Mapping[str, tuple[Reader, ...]]
    input_sizes: Mapping[str, tuple[int, int]]

    def norm_after(self, name: str) -> tuple[str | None, str]:
        """The batch norm that alone consumes the output of `name`, or None with the reason why there is none."""
        if self.calls.get(name, 0) != 1:
            return None, f"it runs {self.calls.get(name, 0)} times in a forward pass"
        readers = self.readers.get(name, ())
        if len(readers) != 1:
            return None, f"its output is read {len(readers)} times ({', '.join(map(str, readers)) or 'by nothing'})"
        norm = readers[0].norm
        if norm is None:
            return None, f"its output goes to {readers[0].op}, not into a batch norm"
        if self.calls.get(norm, 0) != 1:
            return None, f"the batch norm {norm} behind it runs {self.calls.get(norm, 0)} times"
        return norm, ""


def trace(model: nn.Module, input_size: InputSize | None = None) -> Flow:
    """Observe one forward pass of a copy of `model` in eval mode.

    Args:
        model: Any module that takes one image batch.
        input_size: `(C, H, W)`; None takes that of timm's `pretrained_cfg`, with the channels of the first convolution,
            or tries the usual ones.
    """
    sizes = [input_size] if input_size else _candidate_sizes(model)
    last_error: Exception | None = None
    for device in ("meta", None):
        replica = copy.deepcopy(model).eval()
        if device:
            replica = replica.to(device)
        for size in sizes:
            try:
                return _observe(replica, size)
            except Exception as error:  # any forward may fail in its own way; the last failure is reported
                last_error = error
    raise GrowShrinkError(
        f"the model does not run on an input of size {' or '.join(map(str, sizes))}: {last_error}. "
        "Pass input_size=(C, H, W)."
    ) from last_error


def shared_parameters(model: nn.Module) -> set[str]:
    """Dotted names of modules that own a parameter which another module, or another name, owns too."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _candidate_sizes(model: nn.Module) -> list[InputSize]:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else 3
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if cfg.get("input_size"):
        return [(channels, *cfg["input_size"][1:])]
    return [(channels, size, size) for size in _SIZES_TO_TRY]


def _zeros(model: nn.Module, size: InputSize) -> Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *size, device=like.device, dtype=like.dtype)


def _observe(model: nn.Module, size: InputSize) -> Flow:
    names = {id(module): name for name, module in model.named_modules()}
    norm_of = {
        id(m.running_mean): names[id(m)] for m in model.modules() if getattr(m, "running_mean", None) is not None
    }
    owner_of = {
        id(tensor): names[id(m)]
        for m in model.modules()
        for tensor in (*m.parameters(recurse=False), *m.buffers(recurse=False))
    }
    calls: Counter[str] = Counter()
    input_sizes: dict[str, tuple[int, int]] = {}
    output_sizes: dict[str, tuple[int, int]] = {}
    recorder = _Recorder(norm_of, owner_of)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        name = names[id(module)]
        calls[name] += 1
        if args and isinstance(args[0], Tensor) and args[0].dim() == 4:
            input_sizes[name] = (args[0].shape[2], args[0].shape[3])
        if isinstance(output, Tensor):
            recorder.produced(name, output)
            if output.dim() == 4:
                output_sizes[name] = (output.shape[2], output.shape[3])

    hooks = [module.register_forward_hook(after) for module in model.modules()]
    try:
        with torch.no_grad(), recorder:
            output = model(_zeros(model, size))
    finally:
        for hook in hooks:
            hook.remove()
    recorder.consumed("the model's output", tree_leaves(output))
    readers = {name: tuple(found) for name, found in recorder.readers.items()}
    return Flow(size, calls, output_sizes, readers, input_sizes)


class _Recorder(TorchDispatchMode):
    """Notes every operator that takes a tensor some module produced."""

    def __init__(self, norm_of: dict[int, str], owner_of: dict[int, str]) -> None:
        super().__init__()
        self.norm_of = norm_of
        self.owner_of = owner_of
        self.readers: dict[str, list[Reader]] = {}
        self._producers: dict[int, list[str]] = {}
        self._alive: list[Tensor] = []  # an id is only good while its tensor lives

    def produced(self, name: str, output: Tensor) -> None:
        self._producers.setdefault(id(output), []).append(name)
        self._alive.append(output)
        self.readers.setdefault(name, [])

    def consumed(self, op: str, leaves: list[Any]) -> None:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        norm = next((self.norm_of[id(t)] for t in tensors if id(t) in self.norm_of), None)
        owner = norm or next((self.owner_of[id(t)] for t in tensors if id(t) in self.owner_of), None)
        for tensor_id in {id(t) for t in tensors}:
            for name in self._producers.get(tensor_id, ()):
                self.readers[name].append(Reader(op, norm, owner))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.consumed(func.overloadpacket.__name__, tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))
