"""Recomputing grown layers in the backward pass, so that what is inside their branches need not be kept for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

#: Whether this runs inside `recompute`.
RECOMPUTING: ContextVar[bool] = ContextVar("recompute", default=False)


@contextmanager
def recompute(on: bool = True) -> Iterator[None]:
    """Let the forward passes inside keep of every grown layer its input alone; backward runs the layer again.

    The gradients, and the running statistics, are those of a pass that keeps everything, bit by bit: a layer runs again
    with the statistics, widths, lam and random numbers it ran with. It costs the grown layers' forward pass once more.
    Layers that a guide feeds are kept; what is compiled by `torch.compile` chooses for itself what it keeps.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174), one segment a grown layer.

    >>> grown = gs.grow(net, "dbb").train()
    >>> with gs.layers.recompute():
    ...     loss = grown(torch.randn(8, 3, 32, 32)).sum()
    >>> loss.backward()
    """
    token = RECOMPUTING.set(on)
    try:
        yield
    finally:
        RECOMPUTING.reset(token)


class Recomputed(nn.Module):
    """Base of the modules that `recompute` is about."""

    recomputable = True  # of a module inside: False where it reads what is gone by the backward pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module as ever, or keep its input alone."""
        as_ever = torch.compiler.is_compiling() or not RECOMPUTING.get() or not torch.is_grad_enabled()
        if as_ever or not all(getattr(module, "recomputable", True) for module in self.modules()):
            return super().__call__(*args, **kwargs)
        then = [(part, {**vars(part), "_buffers": deepcopy(part._buffers)}) for part in self.modules()]
        call = super().__call__

        def whole(*args: Any, **kwargs: Any) -> Any:
            with recompute(False):  # of a grown layer inside
                return call(*args, **kwargs)

        kwargs |= {"use_reentrant": False, "context_fn": lambda: (nullcontext(), _as_it_was(then))}
        return checkpoint(whole, *args, **kwargs)


@contextmanager
def _as_it_was(then: Sequence[tuple[nn.Module, dict[str, Any]]]) -> Iterator[None]:
    """Give modules the attributes and buffers of `then`; afterwards they have their own again, untouched."""
    now = [(part, vars(part)) for part, _ in then]
    try:
        for part, old in then:
            object.__setattr__(part, "__dict__", {**old, "_buffers": deepcopy(old["_buffers"])})
        yield
    finally:
        for part, own in now:
            object.__setattr__(part, "__dict__", own)
