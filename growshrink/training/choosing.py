"""Choices that depend on the machine, by the time of a few training steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.copying import copy_net
from growshrink.base.timing import seconds_interleaved

#: How much faster bfloat16 has to be: it costs digits, and a measurement is uncertain.
WORTHWHILE = 1.2


def training_step(
    model: nn.Module, input_size: InputSize, batch_size: int, device: torch.device, *, amp: bool = False
) -> Callable[[], object]:
    """A forward and backward pass of a copy of `model` on a blank batch, to be timed."""
    replica = copy_net(model).to(device).to(memory_format=torch.channels_last).train()
    images = torch.zeros(max(2, batch_size), *input_size, device=device).to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
                outputs = replica(images)
            outputs.float().square().mean().backward()

    return step


def choose_amp(model: nn.Module, input_size: InputSize, batch_size: int, device: torch.device) -> tuple[bool, str]:
    """Whether bfloat16 autocast makes a training step worthwhile faster on this device, and a sentence on it."""
    calls = {
        name: training_step(model, input_size, batch_size, device, amp=name == "bfloat16")
        for name in ("float32", "bfloat16")
    }
    seconds = seconds_interleaved(calls, device=device)
    ratio = seconds["float32"] / seconds["bfloat16"]
    on = ratio >= WORTHWHILE
    what = f"{ratio:.1f} times faster" if ratio >= 1 else f"{1 / ratio:.1f} times slower"
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    return on, f"a step in bfloat16 is {what} on {here}: {'on' if on else 'off'} (--amp on, --amp off decide it)"
