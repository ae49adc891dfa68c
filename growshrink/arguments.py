"""Checks of the arguments that most public functions take."""

from __future__ import annotations

from torch import nn

from growshrink.errors import GrowShrinkError


def check_model(model: object) -> None:
    """GrowShrinkError unless `model` is a net."""
    if not isinstance(model, nn.Module):
        raise GrowShrinkError(f"a model must be an nn.Module, got {model!r} ({type(model).__name__}).")


def check_size(size: object) -> None:
    """GrowShrinkError unless `size` is `(C, H, W)`, whole numbers above 0."""
    whole = isinstance(size, (tuple, list)) and len(size) == 3 and all(type(n) is int and n > 0 for n in size)
    if not whole:
        raise GrowShrinkError(f"input_size={size!r}: must be (C, H, W), three whole numbers above 0.")
