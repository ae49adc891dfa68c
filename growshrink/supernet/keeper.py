"""Keeping weights still that an update did not train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from growshrink.errors import WidthError
from growshrink.supernet.middle import Axis, axes
from growshrink.widths import Slots, Width


class Keeper:
    """Hooks on an optimizer: what no pass of an update has run does not move in that update's step.

    Branches that were skipped lose their gradient, so the optimizer passes over them. Of the others, the channels
    beyond the widest pass are saved before the step and put back after it, with their state; a state that the step
    has just made is put to what the optimizer makes for a weight of 0 with a gradient of 0.

    Args:
        slots: Widths of the model.
        optimizer: Its state must be per parameter: of the parameter's shape, or a single number.
        after_step: Called after every step.
    """

    def __init__(self, slots: Slots, optimizer: torch.optim.Optimizer, after_step: Callable[[], None]) -> None:
        self._slots = slots
        self._after_step = after_step
        self._widest: dict[str, int] = {}
        self._kept: list[tuple[Axis, int, Tensor, Tensor, dict[str, Tensor]]] = []
        self._fresh = _fresh_state(optimizer)
        self._axes = {name: list(axes(slot.body)) if slot.body is not None else [] for name, slot in slots}
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

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
        self._kept = []
        if not self._widest:  # a gradient that is not ours
            return
        for name, slot in self._slots:
            width = self._widest[name]
            if width == 0:
                assert slot.branch is not None
                for parameter in slot.branch.parameters():
                    parameter.grad = None
            elif width < slot.full:
                for axis in self._axes[name]:
                    tensor = axis.tensor
                    if tensor is None or tensor.grad is None:  # a buffer, or frozen
                        continue
                    state = optimizer.state.get(tensor, {})
                    kept = {key: axis.beyond(value, width).clone() for key, value in _per_entry(tensor, state, name)}
                    self._kept.append((axis, width, tensor, axis.beyond(tensor, width).clone(), kept))

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        live: list[Tensor] = []
        saved: list[Tensor] = []
        for axis, width, tensor, value, kept in self._kept:
            live.append(axis.beyond(tensor, width))
            saved.append(value)
            for key, entry in _per_entry(tensor, optimizer.state.get(tensor, {}), axis.name):
                beyond = axis.beyond(entry, width)
                if key in kept:
                    live.append(beyond)
                    saved.append(kept[key])
                elif key in self._fresh:
                    beyond.fill_(self._fresh[key])
        if live:
            torch._foreach_copy_(live, saved)
        self._kept = []
        self.forget()
        self._after_step()


def _per_entry(tensor: Tensor, state: dict[str, Any], name: str) -> list[tuple[str, Tensor]]:
    """The entries of an optimizer's state that have one value for each of the parameter's."""
    found = []
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1:
            if value.shape != tensor.shape:
                raise WidthError(
                    f"{name}: the optimizer keeps {key!r} in another shape than the weight's, so single channels "
                    "cannot be kept still. Take sgd, adamw, lion, ..., or do not attach it."
                )
            found.append((key, value))
    return found


def _fresh_state(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What this kind of optimizer's first step makes of the state of a weight of 0 whose gradient is 0, by key."""
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.zeros(2, 2)
    try:
        twin = type(optimizer)([parameter], **optimizer.defaults)
        twin.step()
    except Exception:  # a constructor or a step with demands of its own: its state is left as the step makes it
        return {}
    values = twin.state[parameter].items()
    return {key: float(v.flatten()[0]) for key, v in values if isinstance(v, Tensor) and v.shape == parameter.shape}
