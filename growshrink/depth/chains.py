"""Convolutions of any net in a row, with nothing but norms and activations between: what the depth knob may merge."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from growshrink.algebra.dataflow import Flow, InputSize, trace
from growshrink.base.copying import copy_net
from growshrink.errors import PlanError
from growshrink.layers.activations import VanishingAct, VanishingReLU
from growshrink.layers.grown import grown_modules
from growshrink.transforms._fuse import replace_module

#: Activations that can vanish, compared exactly: each works on every number alone.
ACTIVATIONS: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish),
    *(VanishingReLU, VanishingAct),
)


@dataclass(frozen=True)
class Link:
    """A convolution of a chain: `acts` and `norm` are between it and the next, `size` is that of the map it reads."""

    conv: str
    acts: tuple[str, ...]
    norm: str | None
    size: tuple[int, int]


@dataclass(frozen=True)
class Chains:
    """The chains of a net of two links or more, in order, and for every other convolution why it ends one."""

    chains: tuple[tuple[Link, ...], ...]
    ends: dict[str, str]


_FOUND: WeakKeyDictionary[nn.Module, Chains] = WeakKeyDictionary()


def chains_of(model: nn.Module, input_size: InputSize | None = None, like: nn.Module | None = None) -> Chains:
    """The chains of a plain net, or of one that is cut as `like` is; those of a net asked about before are kept."""
    if model not in _FOUND:
        _FOUND[model] = _find(model, input_size) if like is None else chains_of(like)
    return _FOUND[model]


class _Mark(nn.Module):
    """Stands for an activation: an operator with a tensor of its own, which the data flow knows it by."""

    def __init__(self, origin: str) -> None:
        super().__init__()
        self.origin = origin
        self.zero: Tensor
        self.register_buffer("zero", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.zero


def _find(model: nn.Module, input_size: InputSize | None) -> Chains:
    if grown := grown_modules(model):
        raise PlanError(f"{next(iter(grown))} carries branches: growshrink.fuse comes before the depth knob.")
    before = trace(model, input_size)
    marked = copy_net(model).eval()
    for name, module in list(marked.named_modules()):
        if type(module) in ACTIVATIONS:
            replace_module(marked, name, _Mark(name))
    norms = {name: before.norm_after(name)[0] for name, m in model.named_modules() if type(m) is nn.Conv2d}
    for norm in filter(None, norms.values()):  # as folding leaves them
        parts = [part for name, part in marked.get_submodule(norm).named_children() if name in ("drop", "act")]
        replace_module(marked, norm, nn.Sequential(*parts))
    flow = trace(marked, before.inputs)
    convs = {name for name, module in marked.named_modules() if _fits(name, module, flow)}
    found = {name: _follow(marked, flow, name, convs) for name in convs}
    follows = {name: after for name, after in found.items() if not isinstance(after, str)}
    chains = []
    for name in sorted(convs - {after for after, _ in follows.values()}, key=list(flow.calls).index):
        links, at = [], name
        while at:
            after, acts = follows.get(at, ("", ()))
            links.append(Link(at, acts, norms[at], flow.input_sizes[at]))
            at = after
        if len(links) > 1:
            chains.append(tuple(links))
    return Chains(tuple(chains), {name: reason for name, reason in found.items() if isinstance(reason, str)})


def _fits(name: str, module: nn.Module, flow: Flow) -> bool:
    if type(module) is not nn.Conv2d or flow.calls.get(name) != 1 or name in flow.shared:
        return False
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _follow(model: nn.Module, flow: Flow, name: str, convs: set[str]) -> tuple[str, tuple[str, ...]] | str:
    """The convolution that alone reads `name`, and the activations between; or why there is none."""
    acts: list[str] = []
    at = name
    while True:
        readers = flow.readers.get(at, ())
        if len(readers) != 1:
            return f"its output is read {len(readers)} times ({', '.join(map(str, readers))})"
        reader = readers[0].module or ""
        if reader in convs:
            return reader, tuple(acts)
        mark = model.get_submodule(reader)
        if not reader or not isinstance(mark, _Mark):
            return f"its output goes to {reader or readers[0]}"
        if flow.calls[reader] != 1:
            return f"{mark.origin} behind it runs {flow.calls[reader]} times"
        acts.append(mark.origin)
        at = reader
