"""A model as a chain of units, so that a pass can start in the middle of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growshrink.algebra.dataflow import InputSize, trace
from growshrink.base.copying import copy_net
from growshrink.errors import WidthError, did_you_mean
from growshrink.layers.widths import Slots, Width
from growshrink.proofs.probes import random_images, randomize_norms_


class UnitChain:
    """The units of a model's `forward_features` in order: `model(x) == forward_head(unit_n(... unit_1(x)))`.

    A unit is a child of the model, or of an `nn.Sequential` in it, however deep. Those that carry branches, at least
    two, are `starts`, by index: an augmented pass may begin there.

    Raises:
        WidthError: The model is no such chain. This is checked by running it on images of `input_size`.
    """

    def __init__(self, model: nn.Module, input_size: InputSize | None = None) -> None:
        if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
            raise WidthError(f"{_REFUSAL} {type(model).__name__} has no forward_features and forward_head.")
        self._head: Any = model.forward_head
        self.input_size = trace(model, input_size).input_size
        units = _units("", model)
        inside = _called_within_features(model, units, self.input_size)
        self._names = [name for name, _ in units if name in inside]
        self._units = [unit for name, unit in units if name in inside]
        self._owner: dict[str, int] = {}
        for slot, _ in Slots(model):
            index = next((i for i, name in enumerate(self._names) if f"{slot}.".startswith(f"{name}.")), None)
            if index is not None:
                self._owner[slot] = index
        self.starts = tuple(sorted(set(self._owner.values())))
        if len(self.starts) < 2:
            raise WidthError(f"{_REFUSAL} {type(model).__name__}: only {len(self.starts)} of its units carry branches.")
        self._prove(model)

    def of_copy(self, model: nn.Module) -> UnitChain:
        """The same chain of a copy of the model."""
        twin = copy.copy(self)
        twin._units = [model.get_submodule(name) for name in self._names]
        twin._head = model.forward_head
        return twin

    def prefix(self, x: Tensor, start: int) -> Tensor:
        """Images `(N, C, H, W)` -> the input of unit number `start`."""
        return self.between(x, 0, start)

    @property
    def length(self) -> int:
        """How many units there are."""
        return len(self._units)

    def end_of(self, name: str) -> int:
        """The number of the unit behind those of this name, or inside it."""
        found = [i for i, unit in enumerate(self._names, 1) if f"{unit}.".startswith(f"{name}.")]
        if not found:
            raise WidthError(f"{name}: no unit of the model is called so{did_you_mean(name, self._names)}")
        return found[-1]

    def keep_units(self, model: nn.Module, start: int, stop: int) -> None:
        """Make identities of the other units of a copy of the model."""
        for name in self._names[:start] + self._names[stop:]:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, nn.Identity())

    def within(self, layers: Sequence[str], start: int, stop: int) -> bool:
        """Whether all of these layers lie in the units from `start` to `stop` (exclusive; the last: or in the head)."""
        units = [next((i for i, n in enumerate(self._names) if f"{la}.".startswith(f"{n}.")), None) for la in layers]
        return all(start <= (self.length if unit is None else unit) < stop + (stop == self.length) for unit in units)

    def between(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The input of unit number `start` -> that of unit number `stop`."""
        for unit in self._units[start:stop]:
            x = unit(x)
        return x

    def suffix(self, x: Tensor, start: int) -> Tensor:
        """The input of unit number `start` -> logits."""
        return self._head(self.between(x, start, self.length))

    def widened_from(self, start: int, width: Width, base: Width) -> dict[str, int]:
        """`width` in unit number `start` and behind it, `base` before."""
        return {name: value if self._owner.get(name, start) >= start else base[name] for name, value in width.items()}

    @torch.no_grad()
    def _prove(self, model: nn.Module) -> None:
        replica = copy_net(model).eval()
        randomize_norms_(replica)
        chain = self.of_copy(replica)
        x = random_images(self.input_size, 2, torch.float32, 0).to(next(replica.parameters()))
        expected, found = replica(x), x
        try:
            for index, unit in enumerate(chain._units):
                given, before = found, found.clone()
                found = unit(given)
                if index in self.starts and not torch.equal(given, before):
                    raise WidthError(f"{_REFUSAL} {self._names[index]} overwrites its input.")
            found = chain._head(found)
        except WidthError:
            raise
        except Exception as error:  # a unit that wants something else than one tensor fails in its own way
            raise WidthError(f"{_REFUSAL} {type(model).__name__}: {str(error).splitlines()[0]}") from error
        if not torch.equal(found, expected):
            raise WidthError(f"{_REFUSAL} {type(model).__name__} computes something else than its units in a row.")


_REFUSAL = "mode='suffix' needs a model that is a list of blocks, one after another; take mode='lazy'."


def _units(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    found = []
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        found += _units(path, child) if type(child) is nn.Sequential else [(path, child)]
    return found


@torch.no_grad()
def _called_within_features(model: nn.Module, units: list[tuple[str, nn.Module]], input_size: InputSize) -> set[str]:
    replica: Any = copy_net(model).eval()
    called: set[str] = set()
    for name, _ in units:
        replica.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: called.add(name))
    replica.forward_features(random_images(input_size, 1, torch.float32, 0).to(next(replica.parameters())))
    return called
