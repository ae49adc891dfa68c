"""The passes of one update, run one after another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.layers.widths import Slots, Width
from growshrink.supernet.chain import UnitChain
from growshrink.supernet.passes import Passes


class Supernet:
    """A model, its widths, its chain where a pass is to start in the middle, and its batch norms, looked up once."""

    def __init__(self, model: nn.Module, slots: Slots, chain: UnitChain | None) -> None:
        self.model, self.slots, self.chain = model, slots, chain
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]

    @contextmanager
    def at(self, width: Width, then: Width) -> Iterator[None]:
        """Run at `width`, then set `then`, also after an exception."""
        self.slots.set(width)
        try:
            yield
        finally:
            self.slots.set(then)

    @contextmanager
    def preserving_bn(self, width: Width, then: Width, device: torch.device) -> Iterator[None]:
        """Run at `width` without a trace: `at`, with batch norm statistics and random streams as before afterwards.

        Batch norms normalise by the batch as ever. Their statistics are put back, not kept from moving: so the graph
        that runs (and that is compiled) is the same in all passes. Through `.data`: autograd has saved these buffers,
        and would call it an illegal change. Later passes see the dropout masks they would see without this one.
        """
        live = [b.data for m in self._norms for b in m.buffers(recurse=False)]
        saved = [torch.empty_like(b) for b in live]
        with torch.no_grad():
            torch._foreach_copy_(saved, live)
        with self.at(width, then), torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                yield
            finally:
                with torch.no_grad():
                    torch._foreach_copy_(live, saved)

    def touch_untrained(self, width: Width) -> Tensor | float:
        """0, as a function of what a pass at `width` skips: DDP waits for the gradient of every parameter."""
        branches = [slot.branch for name, slot in self.slots if width[name] == 0 and slot.branch is not None]
        untouched = [p for branch in branches for p in branch.parameters() if p.requires_grad]
        return 0.0 * torch.stack([p.sum() for p in untouched]).sum() if untouched else 0.0


@dataclass
class StepRun:
    """One update on one batch of images `(N, C, H, W)`.

    Attributes:
        loss_of: (logits, logits to learn from or None) -> loss, 0-dim.
        weight: Weight of the loss of each augmented pass; `share` is that of the base pass.
        backward: Differentiates the loss of an augmented pass, at its width; None leaves the sum of all to the caller.
        inplace_teacher: Logits of the first augmented net, from which the passes after it learn.
        augmented: Losses of the augmented passes, weighted.
    """

    net: Supernet
    passes: Passes
    x: Tensor
    loss_of: Callable[[Tensor, Tensor | None], Tensor]
    weight: float
    share: float
    backward: Callable[[Tensor], None] | None
    inplace_teacher: Tensor | None = None
    augmented: list[Tensor] = field(default_factory=list)

    def ask(self) -> None:
        """Get logits to learn from out of a net that is not trained in this update."""
        if self.passes.asked is not None:
            with torch.no_grad(), self.net.preserving_bn(self.passes.asked, self.passes.width, self.x.device):
                self.inplace_teacher = self.net.model(self.x)

    def run_augmented(self, forward: Callable[[], Tensor]) -> None:
        """All augmented passes; `forward` gives the logits at the active width."""
        for width in self.passes.augmented:
            with self.net.preserving_bn(width, self.passes.width, self.x.device):
                logits = forward()
                loss = self.weight * self.loss_of(logits, self.inplace_teacher)
                if self.backward is not None:
                    self.backward(loss)  # here: checkpointed blocks run again in it
            self.augmented.append(loss if self.backward is None else loss.detach())
            if self.inplace_teacher is None:
                self.inplace_teacher = logits.detach()

    def run_base(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Run the pass that is always there, and the augmented ones where they share its beginning.

        Returns logits, weighted loss, and the output of a shared beginning with the gradient of the augmented ones.
        """
        start = self.passes.start
        if start is None:
            logits, shared, leaf = self.net.model(self.x), None, None
        else:
            chain = self.net.chain
            assert chain is not None
            shared = chain.prefix(self.x, start)
            leaf = shared if self.backward is None else shared.detach().requires_grad_()
            self.run_augmented(lambda: chain.suffix(leaf, start))
            logits = chain.suffix(shared, start)
        loss = self.share * self.loss_of(logits, self.inplace_teacher)
        if shared is None or leaf is shared or not shared.requires_grad:
            return logits, loss, None, None
        assert leaf is not None
        return logits, loss, shared, leaf.grad


class AnyForward(nn.Module):
    """What DDP wraps: any function of the model, so that all passes of an update can be one forward of DDP's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`."""
        return function(*args)


def at_least_float32(logits: Tensor) -> Tensor:
    """Losses are taken in float32 at least."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
