"""Which operation consumes which output: one forward pass observed at operator level.

Module hooks alone do not see `bn(z) + z` or `relu_(y); bn(y)`. Here every aten operator of one pass is seen, so a
second reader of a tensor is found however it is written. The pass runs on the meta device (no arithmetic, no
memory), on a copy, in eval mode; it falls back to a real pass for models that cannot run on meta.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from growshrink.base.copying import copy_net
from growshrink.errors import GrowShrinkError, check_model, check_size

InputSize = tuple[int, int, int]

_SIZES_TO_TRY = (32, 64, 224, 28, 8)
#: A norm without running statistics refuses one value per channel, in eval mode too.
_IMAGES = 2
#: Batch norms that are affine maps written out: their first operator multiplies the input, and none is the norm's own.
FROZEN_NORMS = (FrozenBatchNorm2d, FrozenBatchNormAct2d)


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
        output_sizes: Spatial size `(H, W)` of the last 4-D output of each module; of an `nn.Linear` `(tokens, 1)`, of
            one image.
        readers: Who reads the output of each module, in order. (Views of an `nn.Linear`'s output are that output.)
        read_beside: Modules a parameter of which was read while they did not run.
        input_sizes: Spatial size `(H, W)` of the last 4-D first argument of each module.
    """

    input_size: InputSize
    calls: Mapping[str, int]
    output_sizes: Mapping[str, tuple[int, int]]
    readers: Mapping[str, tuple[Reader, ...]]
    input_sizes: Mapping[str, tuple[int, int]]
    read_beside: frozenset[str] = frozenset()

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
    check_model(model)
    if input_size is not None:
        check_size(input_size)
    sizes = [input_size] if input_size else _candidate_sizes(model)
    last_error: Exception | None = None
    tied = _tied_norms(model)  # of the model itself: a move to another device cuts ties
    for device in ("meta", None):
        replica = copy_net(model).eval()
        for size in sizes:
            try:
                return _observe(replica.to(device) if device else replica, size, tied)
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


def _tied_norms(model: nn.Module) -> set[str]:
    """Norms whose running mean is in the memory of another's."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(mean := getattr(module, "running_mean", None), Tensor):
            owners.setdefault(mean.untyped_storage()._cdata, []).append(name)
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
    return torch.zeros(_IMAGES, *size, device=like.device, dtype=like.dtype)


def _observe(model: nn.Module, size: InputSize, tied: set[str]) -> Flow:
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
    frozen = {names[id(m)] for m in model.modules() if type(m) in FROZEN_NORMS}
    recorder = _Recorder(norm_of, owner_of, frozen, tied)

    def before(module: nn.Module, args: Any) -> None:
        recorder.stack.append(names[id(module)])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        name = recorder.stack.pop()
        calls[name] += 1
        if args and isinstance(args[0], Tensor) and args[0].dim() == 4:
            input_sizes[name] = (args[0].shape[2], args[0].shape[3])
        if isinstance(output, Tensor):
            tokens_last = isinstance(module, nn.Linear)
            recorder.produced(name, output, channels=output.dim() - 1 if tokens_last else None)
            if tokens_last:
                output_sizes[name] = (output.numel() // output.shape[-1] // _IMAGES, 1)
            elif output.dim() == 4:
                output_sizes[name] = (output.shape[2], output.shape[3])

    watched = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    hooks = [module.register_forward_hook(after, prepend=True) for module in watched]
    hooks += [module.register_forward_pre_hook(before, prepend=True) for module in watched]
    try:
        with torch.no_grad(), recorder:
            output = model(_zeros(model, size))
    finally:
        for hook in hooks:
            hook.remove()
    recorder.consumed("the model's output", tree_leaves(output))
    readers = {name: tuple(found) for name, found in recorder.readers.items()}
    return Flow(size, calls, output_sizes, readers, input_sizes, frozenset(recorder.read_beside))


class _Recorder(TorchDispatchMode):
    """Notes every operator that takes a tensor some module produced."""

    def __init__(self, norm_of: dict[int, str], owner_of: dict[int, str], frozen: set[str], tied: set[str]) -> None:
        super().__init__()
        self.norm_of, self.frozen, self.tied = norm_of, frozen, tied
        self.owner_of = owner_of
        self.readers: dict[str, list[Reader]] = {}
        self.stack: list[str] = []  # modules that run, the innermost last
        self.read_beside: set[str] = set()
        self._producers: dict[int, list[str]] = {}
        self._channels: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an id is only good while its tensor lives

    def produced(self, name: str, output: Tensor, channels: int | None) -> None:
        """`channels`: the axis they are, of an output whose views are seen through."""
        self._producers.setdefault(id(output), []).append(name)
        self._alive.append(output)
        self.readers.setdefault(name, [])
        if channels is not None:
            self._channels[id(output)] = channels

    def consumed(self, op: str, leaves: list[Any]) -> None:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        norm = next((self.norm_of[id(t)] for t in tensors if id(t) in self.norm_of), None)
        if self.stack and self.stack[-1] in self.frozen:
            norm = self.stack[-1]
        owners = [self.owner_of[id(t)] for t in tensors if id(t) in self.owner_of]
        owner = norm or next(iter(owners), None)
        self.read_beside.update(name for name in owners if name not in self.stack)
        for tensor_id in {id(t) for t in tensors}:
            other_axis = norm is not None and self._channels.get(tensor_id, 1) != 1
            reader = Reader("a norm over another axis", None, owner) if other_axis else Reader(op, norm, owner)
            if norm in self.tied:
                reader = Reader(f"{norm}, whose running mean is another norm's too", None, owner)
            for name in self._producers.get(tensor_id, ()):
                self.readers[name].append(reader)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = func.overloadpacket.__name__
        source = args[0] if op in _VIEWS and isinstance(args[0], Tensor) else None
        if source is None or id(source) not in self._channels:
            self.consumed(op, tree_leaves((args, kwargs)))
            return func(*args, **(kwargs or {}))
        view = func(*args, **(kwargs or {}))
        channels = _axis_in_view(op, source, args[1:], view, self._channels[id(source)])
        if channels is None:
            self.consumed(op, [source])
        else:
            for name in tuple(self._producers[id(source)]):
                self.produced(name, view, channels)
        return view


#: Operators that show every entry of a tensor once.
_VIEWS = ("view", "_unsafe_view", "transpose", "permute")


def _axis_in_view(op: str, source: Tensor, args: Any, view: Tensor, axis: int) -> int | None:
    """Where `axis` of `source` is in a view of it; None if it is cut up or merged with another."""
    if op == "transpose":
        one, other = (dim % source.dim() for dim in args)
        return other if axis == one else one if axis == other else axis
    if op == "permute":
        return [dim % source.dim() for dim in args[0]].index(axis)
    before = math.prod(source.shape[:axis])
    axes = (k for k, size in enumerate(view.shape) if size == source.shape[axis])
    return next((k for k in axes if math.prod(view.shape[:k]) == before), None)
