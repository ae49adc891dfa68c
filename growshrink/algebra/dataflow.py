"""Which operation consumes which output: forward passes observed at operator level.

Module hooks alone do not see `bn(z) + z` or `relu_(y); bn(y)`. Here every aten operator of a pass is seen, so a second
reader of a tensor is found however it is written. Passes, one in eval mode and one in train mode for every input size,
run on the meta device (no arithmetic, no memory), or really, for models that cannot run on meta.
"""

from __future__ import annotations

import gc
import math
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from growshrink.algebra.inputs import InputLike, Inputs, given_inputs
from growshrink.algebra.inputs import InputSize as InputSize
from growshrink.base.copying import copy_net, ties
from growshrink.errors import GrowShrinkError, check_model

_SIZES_TO_TRY = (32, 64, 224, 28, 8)
#: Norms that write the affine map out in operators: whatever reads a tensor while one runs is that norm.
FROZEN_NORMS = (FrozenBatchNormAct2d, FrozenBatchNorm2d)
#: A norm without running statistics refuses one value per channel, in eval mode too.
_IMAGES = 2


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
    """What one forward pass in eval mode showed, and others beside it.

    Attributes:
        inputs: What was passed.
        calls: How often each module ran, by dotted name.
        output_sizes: Spatial size `(H, W)` of the last 4-D output of each module; `(tokens, 1)` per image of a linear.
        readers: Who reads the output of each module, in order. (Views of an `nn.Linear`'s output are that output.)
        read_beside: Modules a parameter of which was read while they did not run.
        input_sizes: Spatial size `(H, W)` of the last 4-D first argument of each module.
        others: The passes in train mode and at further sizes, by what they were.
        rivals: For each batch norm, a module that works on as many channels and ran in no pass, where there is one.
        shared: What `shared_parameters` found.
    """

    inputs: Inputs
    calls: Mapping[str, int]
    output_sizes: Mapping[str, tuple[int, int]]
    readers: Mapping[str, tuple[Reader, ...]]
    input_sizes: Mapping[str, tuple[int, int]]
    read_beside: frozenset[str] = frozenset()
    others: Mapping[str, Flow] = field(default_factory=dict)
    rivals: Mapping[str, str] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()

    @property
    def input_size(self) -> InputSize:
        """`(C, H, W)` of the images that were passed; GrowShrinkError if example inputs were."""
        if self.inputs.size is None:
            raise GrowShrinkError("this needs images of one size: pass input_size=(C, H, W), not example_inputs.")
        return self.inputs.size

    def norm_after(self, name: str) -> tuple[str | None, str]:
        """The batch norm that alone consumes the output of `name` in every pass, or None and why there is none."""
        if self.calls.get(name, 0) != 1:
            return None, f"it runs {self.calls.get(name, 0)} times in a forward pass"
        norm, reason = self._norm_in_pass(name)
        for where, flow in self.others.items() if norm else ():
            if flow.calls.get(name, 0):
                other, reason = flow._norm_in_pass(name)
                if other != norm:
                    return None, f"{where} {reason or f'its output goes into {other}, not into {norm}'}"
        if norm in self.shared:
            return None, f"the batch norm {norm} behind it shares a parameter or a buffer with another module"
        if norm is not None and norm in self.rivals:
            return None, f"{self.rivals[norm]} fits it like {norm}, ran in no pass observed, and may be another reader"
        return norm, reason

    def _norm_in_pass(self, name: str) -> tuple[str | None, str]:
        runs, readers = self.calls[name], self.readers.get(name, ())
        found = ", ".join(dict.fromkeys(map(str, readers))) or "by nothing"
        if len(readers) != runs:
            return None, f"its output is read {len(readers)} times ({found})"
        norm = readers[0].norm
        if norm is None or any(reader.norm != norm for reader in readers):
            return None, f"its output goes to {found}, not into a batch norm"
        if self.calls.get(norm, 0) != runs:
            return None, f"the batch norm {norm} behind it runs {self.calls.get(norm, 0)} times"
        return norm, ""


def trace(model: nn.Module, input_size: InputLike = None) -> Flow:
    """Observe forward passes of a copy of `model`, in eval mode and in train mode.

    Not seen: paths at other sizes or by other flags, train mode where it does not run (a warning says so), and
    `output.data`. A per-channel module that ran in no pass may read every output with its number of channels.

    Args:
        model: Any module.
        input_size: `(C, H, W)`, several where the model takes another path at another size, or example inputs
            (`given_inputs`); None takes the size of timm's `pretrained_cfg`, with the channels of the first
            convolution, or tries the usual ones: a guess.
    """
    check_model(model, scripted=False)
    inputs, copy = given_inputs(input_size), copy_net(model)
    flow = _first_that_runs(model, copy, _candidates(model) if inputs is None else [inputs])
    others = {f"at {other}": _first_that_runs(model, copy, [other]) for other in flow.inputs.others}
    for given in flow.inputs.each():
        try:
            found = _first_that_runs(model, copy, [given], train=True)
            others[f"in train mode at {replace(given, guessed=False)}"] = found
        except GrowShrinkError as error:
            reason = str(error.__cause__).split("\n")[0][:200]
            warnings.warn(f"the model does not run in train mode, readers there are not seen: {reason}", stacklevel=3)
    ran = {name for seen in (flow, *others.values()) for name, calls in seen.calls.items() if calls}
    shared = frozenset(shared_parameters(model))
    return replace(flow, others=others, rivals=_rivals(model, ran), shared=shared)


def _rivals(model: nn.Module, ran: set[str]) -> dict[str, str]:
    # a branch that is skipped or merged does not run, and reads nothing but its own
    inside = {id(m) for mapped in model.modules() if hasattr(mapped, "as_convmap") for m in mapped.modules()}
    idle: dict[int, str] = {}
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if name not in ran and id(module) not in inside and all(t.dim() <= 1 for t in own):
            fits = {t.numel() for t in own if t.dim()} | {getattr(module, "num_features", 0)}
            idle |= dict.fromkeys(fits - {0}, name)
    means = ((name, getattr(module, "running_mean", None)) for name, module in model.named_modules())
    return {name: idle[len(mean)] for name, mean in means if mean is not None and len(mean) in idle}


def _first_that_runs(model: nn.Module, copy: nn.Module, candidates: Sequence[Inputs], train: bool = False) -> Flow:
    """One pass of `copy`, which goes to the meta device, or else of a further copy that stays where it is."""
    last_error: Exception | None = None
    for device in ("meta", None):
        replica = (copy if device else copy_net(model)).train(train)
        for module in replica.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.eval()  # its statistics would wait for other processes
        for candidate in candidates:
            try:
                return _observe(replica.to(device) if device else replica, candidate)
            except Exception as error:  # any forward may fail in its own way; the last failure is reported
                last_error = error
    raise GrowShrinkError(
        f"the model does not run on {' or '.join(str(replace(c, guessed=False)) for c in candidates)}: {last_error}. "
        "Pass input_size=(C, H, W), or example_inputs=."
    ) from last_error


def shared_parameters(model: nn.Module) -> set[str]:
    """Dotted names of modules that own a tensor in whose memory another module, or another name, has one too."""
    owners = ({name for name, _ in group} for group in ties(model))
    return {name for names in owners if len(names) > 1 for name in names}


def inputs_for(model: nn.Module, input_size: InputLike = None) -> Inputs:
    """What is given, or what the model is found to run on in eval mode."""
    check_model(model, scripted=False)
    return given_inputs(input_size) or _first_that_runs(model, copy_net(model), _candidates(model)).inputs


def _candidates(model: nn.Module) -> list[Inputs]:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else 3
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if cfg.get("input_size"):
        return [Inputs((channels, *cfg["input_size"][1:]))]
    return [Inputs((channels, size, size), guessed=True) for size in _SIZES_TO_TRY]


def _observe(model: nn.Module, inputs: Inputs) -> Flow:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    batch = inputs.batch(_IMAGES, seed=None).to(like.device, like.dtype)
    num_images = inputs.num_images(_IMAGES)
    named = list(model.named_modules())
    names = {id(m): name for name, m in named}
    norm_of = {id(m.running_mean): name for name, m in named if getattr(m, "running_mean", None) is not None}
    owner_of = {id(t): name for name, m in named for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}
    heard = {id(m) for _, m in named if m._forward_hooks or m._forward_pre_hooks}
    told = {id(m) for _, m in named if m._forward_hooks}
    calls: Counter[str] = Counter()
    input_sizes: dict[str, tuple[int, int]] = {}
    output_sizes: dict[str, tuple[int, int]] = {}
    recorder = _Recorder(norm_of, owner_of, {name for name, m in named if isinstance(m, FROZEN_NORMS)})

    def before(module: nn.Module, args: Any) -> None:
        name = names[id(module)]
        recorder.stack.append(name)
        if id(module) in heard:
            recorder.consumed(f"a hook on {name}", tree_leaves(args))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = recorder.stack.pop()
        calls[name] += 1
        first = next(iter((*args, *kwargs.values())), None)
        if isinstance(first, Tensor) and first.dim() == 4:
            input_sizes[name] = (first.shape[2], first.shape[3])
        if isinstance(output, Tensor):
            tokens_last = isinstance(module, nn.Linear)
            recorder.produced(name, output, channels=output.dim() - 1 if tokens_last else None)
            if tokens_last:
                output_sizes[name] = (output.numel() // output.shape[-1] // num_images, 1)
            elif output.dim() == 4 or isinstance(module, nn.Conv1d) and output.dim() == 3:
                output_sizes[name] = (output.shape[2] if output.dim() == 4 else 1, output.shape[-1])
        if id(module) in told:
            recorder.consumed(f"a hook on {name}", tree_leaves(output))

    # before the hooks that are there, which may read the output
    watched = [module for _, module in named if not isinstance(module, torch.jit.ScriptModule)]
    hooks = [module.register_forward_hook(after, prepend=True, with_kwargs=True) for module in watched]
    hooks += [module.register_forward_pre_hook(before, prepend=True) for module in watched]
    drawn = {p.device.index for p in model.parameters() if p.is_cuda}  # by dropout and its like
    try:
        with torch.no_grad(), torch.random.fork_rng(drawn), recorder:
            output = batch.run(model)
    finally:
        for hook in hooks:
            hook.remove()
    leaves = tree_leaves(output)
    recorder.consumed("the model's output", leaves)
    recorder.keepers({id(leaf) for leaf in leaves})
    readers = {name: tuple(found) for name, found in recorder.readers.items()}
    return Flow(inputs, calls, output_sizes, readers, input_sizes, frozenset(recorder.read_beside))


class _Recorder(TorchDispatchMode):
    """Notes every operator that takes a tensor some module produced."""

    def __init__(self, norm_of: dict[int, str], owner_of: dict[int, str], frozen: set[str]) -> None:
        super().__init__()
        self.norm_of, self.frozen = norm_of, frozen
        self.owner_of = owner_of
        self.readers: dict[str, list[Reader]] = {}
        self.stack: list[str] = []  # modules that run, the innermost last
        self.read_beside: set[str] = set()
        self._producers: dict[int, list[str]] = {}
        self._channels: dict[int, int] = {}
        self._alive: dict[int, Tensor] = {}  # an id is only good while its tensor lives

    def produced(self, name: str, output: Tensor, channels: int | None) -> None:
        """`channels`: the axis they are, of an output whose views are seen through."""
        self._producers.setdefault(id(output), []).append(name)
        self._alive[id(output)] = output
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
            for name in self._producers.get(tensor_id, ()):
                self.readers[name].append(reader)

    def keepers(self, known: set[int]) -> None:
        """Note as read what a batch norm reads and something still holds after the pass: an attribute, an object."""
        self._alive[0] = torch.empty(0)  # held by nothing else
        normed = {key for key, names in self._producers.items() if any(r.norm for n in names for r in self.readers[n])}

        def held() -> set[int]:
            views = Counter(id(tensor._base) for tensor in self._alive.values() if tensor._is_view())
            references = {key: sys.getrefcount(tensor) - views[key] for key, tensor in self._alive.items()}
            return {key for key in normed - known if references[key] > references[0]}

        if held():
            gc.collect(1)  # frames of this pass, in cycles
        for name in (name for key in held() for name in self._producers[key]):
            self.readers[name].append(Reader("something that keeps it after the pass"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = func.overloadpacket.__name__
        source = args[0] if op in _VIEWS and isinstance(args[0], Tensor) else None
        if source is None or id(source) not in self._channels:
            self.consumed(op, tree_leaves((args, kwargs)))
            return run_operator(func, *args, **(kwargs or {}))
        view = func(*args, **(kwargs or {}))
        channels = _axis_in_view(op, source, args[1:], view, self._channels[id(source)])
        if channels is None:
            self.consumed(op, [source])
        else:
            for name in tuple(self._producers[id(source)]):
                self.produced(name, view, channels)
        return view


_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm_backward")


def run_operator(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an operator; of some on the meta device give the shapes alone: torch decomposes them there, slowly."""
    op = func.overloadpacket.__name__
    if op not in (*_NORMS, "_prelu_kernel") or not args[0].is_meta:
        return func(*args, **kwargs)
    like = torch.empty_like(args[0])
    return (like, *like.new_empty(2, like.shape[1]).unbind()) if op in _NORMS else like


class MetaNorms(TorchDispatchMode):
    """Inside it norms on the meta device take no time; see `run_operator`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_operator(func, *args, **(kwargs or {}))


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
