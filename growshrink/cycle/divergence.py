"""A training that has gone off: noticed before it is saved, and told with what to try."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from growshrink.cycle.timeline import Segment
from growshrink.errors import DivergedError
from growshrink.runs.checkpoints import find_checkpoints
from growshrink.training.trainer import Trainer

#: What to try, by phase.
ADVICE = {
    "base": "a lower lr, or clip_grad=1",
    "hold": "a lower lr, clip_grad=1, a smaller ratio, or more updates of rewarm after the growth",
    "vanish": "a longer vanish, a lower lr, or clip_grad=1",
    "settle": "a longer vanish, a lower lr, or clip_grad=1",
    "tail": "a lower lr, clip_grad=1, or more updates of rewarm after the fuse",
}


def check_finite(trainer: Trainer, loss: float, *, segment: Segment, start: int, folder: Path) -> None:
    """RunError if the loss of the updates since `start`, or a weight after them, is not finite.

    To be called before every checkpoint, so that all of them are of a sound net. Waits for the device.
    """
    found = not_finite(trainer) if math.isfinite(loss) else f"the loss is {loss}"
    if found is None:
        return
    kept = find_checkpoints(folder)
    raise DivergedError(
        f"{found} in round {segment.round}, phase {segment.phase}, between updates {start} and {trainer.update}. "
        f"{f'{kept[0]} is kept' if kept else 'There is no checkpoint yet'}. The same run would end here again: start "
        f"another, with {ADVICE[segment.phase]}{', or without amp' if trainer.config.amp else ''}."
    )


def not_finite(trainer: Trainer) -> str | None:
    """Says which tensor of the nets or the optimizer has a NaN or an infinity in it; None if none has.

    Buffers may be infinite (masks are), parameters and what the optimizer keeps may not.
    """
    named: dict[str, Tensor] = dict(trainer.model.named_parameters())
    average = trainer.ema or nn.Module()
    named |= {f"{name} of the average": parameter for name, parameter in average.named_parameters()}
    for name, values in trainer.optimizer_state().items():
        named |= {f"the optimizer's {key} of {name}": v for key, v in values.items() if isinstance(v, Tensor)}
    named = {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}
    device = next(trainer.model.parameters()).device
    finite = torch.stack([torch.isfinite(tensor.detach()).all().to(device) for tensor in named.values()])
    return None if finite.all() else f"{[*named][int(finite.int().argmin())]} is not finite"
