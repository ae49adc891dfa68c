"""Keeping weights still that an update did not train."""

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from growshrink.errors import WidthError
from growshrink.layers.widths import Slots, Width
from growshrink.supernet.middle import Axis, slot_axes


class FrozenSlices:
    """Hooks on an optimizer: what no pass of an update has run does not move in that update's step.

    Branches that were skipped lose their gradient, so the optimizer passes over them. Of the others, the channels
    beyond the widest pass are saved before the step and put back after it, with their state; a state that the step
    has just made is put to what the optimizer makes for a weight of 0 with a gradient of 0.

    Raises:
        WidthError: State of the optimizer is neither of its parameter's shape nor a single number.
    """

    def __init__(self, slots: Slots, optimizer: torch.optim.Optimizer, after_step: Callable[[], None]) -> None:
        self._slots, self._after_step = slots, after_step
        self._widest: dict[str, int] = {}
        #: Where it lies, the width it lies beyond, the parameter, its state's key (None: the parameter itself), values.
        self._kept: list[tuple[Axis, int, Tensor, str | None, Tensor]] = []
        self._fresh = _fresh_state(optimizer)
        self._axes = slot_axes(slots)
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a task is attached to no optimizer."""

    def ran(self, width: Width) -> None:
        """A pass at `width` has contributed to the gradient of the coming step."""
        for name, value in width.items():
            self._widest[name] = max(value, self._widest.get(name, 0))

    def forget(self) -> None:
        """No pass has contributed yet."""
        self._widest = {}

    def detach(self) -> None:
        """Take the hooks off the optimizer."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found: list[tuple[Axis, int, Tensor, str | None, Tensor]] = []
        for name, slot in self._slots:
            width = self._widest.get(name, slot.full)  # of a gradient that is not ours, nothing is kept
            if width == 0:
                assert slot.branch is not None
                for parameter in slot.branch.parameters():
                    parameter.grad = None
            elif width < slot.full:
                for axis in self._axes[name]:
                    tensor = axis.tensor
                    if tensor is None or tensor.grad is None:  # a buffer, or frozen
                        continue
                    for key, value in ((None, tensor), *_per_entry(tensor, optimizer)):
                        found.append((axis, width, tensor, key, axis.beyond(value, width)))
        self._kept = [(*where, torch.empty_like(live)) for *where, live in found]  # type: ignore[misc]
        if found:
            torch._foreach_copy_([value for *_, value in self._kept], [live for *_, live in found])

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        live = [
            axis.beyond(tensor if key is None else optimizer.state[tensor][key], width)
            for axis, width, tensor, key, _ in self._kept
        ]
        if live:
            torch._foreach_copy_(live, [value for *_, value in self._kept])
        had = {(id(tensor), key) for _, _, tensor, key, _ in self._kept}
        for axis, width, tensor, key, _ in self._kept:
            if key is None:
                for name, value in _per_entry(tensor, optimizer):
                    if (id(tensor), name) not in had and name in self._fresh:
                        axis.beyond(value, width).fill_(self._fresh[name])
        self._kept = []
        self.forget()
        self._after_step()


def _per_entry(parameter: Tensor, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """What the optimizer's state of a parameter has for each entry of it, by key."""
    state = optimizer.state.get(parameter, {}).items()
    return [(key, v) for key, v in state if isinstance(v, Tensor) and v.shape == parameter.shape]


def _fresh_state(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What the optimizer's first step makes of the state of a weight of 0 whose gradient is 0, by key.

    Found by trying it, on a twin; WidthError if it keeps state that belongs to no single entry.
    """
    kind = type(optimizer).__name__
    if not getattr(type(optimizer).step, "hooked", False):
        raise WidthError(f"{kind} does not call the hooks of torch's optimizers, so it cannot be attached.")
    twin = copy.copy(optimizer)  # without its hooks
    twin.state = defaultdict(dict)
    twin.param_groups = []
    for group in optimizer.param_groups:
        device = next((p.device for p in group["params"] if not p.is_meta), torch.device("cpu"))
        parameter = nn.Parameter(torch.zeros(32, 32, 3, 3, device=device))  # large enough for what factors its state
        parameter.grad = torch.zeros_like(parameter)
        twin.param_groups.append({**group, "params": [parameter]})
    try:
        twin.step()
    except Exception as error:  # it may want anything
        raise WidthError(f"{kind} cannot be attached: a first step of it, tried on zeros, fails ({error}).") from error
    fresh = {}
    for tried, state in twin.state.items():
        for key, value in state.items():
            parts = [part for part in tree_leaves(value) if isinstance(part, Tensor) and part.numel() > 1]
            if any(part.shape != tried.shape for part in parts):
                raise WidthError(
                    f"{kind} keeps {key!r} in another shape than the weight's, so single channels cannot be kept "
                    "still. Take sgd, adamw, lion, ..., or do not attach it."
                )
            if parts:
                fresh[key] = float(parts[0].flatten()[0])
    return fresh
