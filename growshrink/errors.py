"""The errors a user can cause.

All are `ValueError` subclasses, so `except ValueError` catches every one of them; each message says what was
wrong, where (the module's dotted name), and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import nn

#: Characters of a message at most: what it quotes may come from a file, and be of any length.
LONGEST = 1000


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`"; did you mean ...?"`, or the list of what there is, to end a message about an unknown name."""
    names = sorted(known)
    close = difflib.get_close_matches(str(word)[:100], names, n=4, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else f"; there are {', '.join(names[:12])}."


class GrowShrinkError(ValueError):
    """Base of every error that growshrink raises for something its user did; a long message loses its middle."""

    def __init__(self, message: str = "") -> None:
        if len(message) > LONGEST:
            message = f"{message[: LONGEST * 2 // 3]} ... {message[-LONGEST // 4 :]}"
        super().__init__(message)


class AlgebraError(GrowShrinkError):
    """Two operators have no exact composition or sum as one convolution.

    `module` is the name the message starts with, empty while no module is known.
    """

    def __init__(self, message: str, *, module: str = "") -> None:
        super().__init__(message)
        self.module = module


class GrowError(GrowShrinkError):
    """A module that was asked for by name cannot be grown exactly, or nothing was selected."""


class FuseError(GrowShrinkError):
    """A grown net cannot be merged exactly into its plain architecture."""


class DropError(GrowShrinkError):
    """A grown module has nothing left once its branches are dropped."""


class GradientError(GrowShrinkError):
    """Training the branches of a grown net is no fixed linear map on the gradient, or not with that optimizer."""


class CollapseError(GrowShrinkError):
    """No branch of a grown net can run as part of its convolution's kernel, or not those that were asked for."""


class MergeError(GrowShrinkError):
    """Convolutions that were asked for cannot be merged exactly, or merging them would increase the cost of the net."""


class NotLinearError(GrowShrinkError):
    """A net that is to become one layer is not an affine map of its input."""


class WidthError(GrowShrinkError):
    """A width, or a space of widths, that a model cannot have."""


class EquivalenceError(GrowShrinkError):
    """Two nets that were claimed equal are not, or the check was not sensitive enough."""


class DataError(GrowShrinkError):
    """A data set is missing, damaged, or does not have the shape that was asked for."""


class PlanError(GrowShrinkError):
    """A plan of rounds, or an option of it, asks for something impossible."""


class RunError(GrowShrinkError):
    """A training run cannot start, continue, or be resumed."""


class DivergedError(RunError):
    """A run whose loss or weights are no longer finite."""


class EquilibriumError(GrowShrinkError):
    """An equilibrium has no finite solution, or there is none to unroll."""


class AnalysisError(GrowShrinkError):
    """A ranking, a pruning or a statistic is asked of data that cannot answer it."""


def describe(value: object) -> str:
    """A value in a message: as it prints and its type, or its type alone where that is long or has tensors in it."""
    kind, text = type(value).__name__, "" if hasattr(value, "shape") else repr(value)
    return f"{text} ({kind})" if 0 < len(text) <= 200 and "tensor(" not in text else f"a {kind}"


def check_model(model: object, *, scripted: bool = True) -> None:
    """GrowShrinkError unless `model` is a net whose parameters exist, and not TorchScript itself unless `scripted`."""
    if not isinstance(model, nn.Module):
        raise GrowShrinkError(f"a model must be an nn.Module, got {describe(model)}.")
    for name, module in model.named_modules():
        where = name or "the model"
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise GrowShrinkError(f"{where} is lazy, its parameters do not exist yet: run the model once before.")
        if not (scripted or name) and isinstance(module, torch.jit.ScriptModule):
            raise GrowShrinkError(f"{where} is TorchScript, which cannot be looked into: pass the net it was made of.")


def check_size(size: object) -> None:
    """GrowShrinkError unless `size` is `(C, H, W)`, whole numbers above 0."""
    whole = isinstance(size, (tuple, list)) and len(size) == 3 and all(type(n) is int and n > 0 for n in size)
    if not whole:
        raise GrowShrinkError(f"input_size={describe(size)}: must be (C, H, W), three whole numbers above 0.")
