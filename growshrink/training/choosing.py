"""Choices that depend on the machine, by the time of a few training steps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.copying import copy_net
from growshrink.base.timing import interleaved_timings
from growshrink.layers.regions import compile_regions
from growshrink.training.graphed import FIRST, GraphedBackward

#: How much faster a step has to be: bfloat16 costs digits, compiling takes a minute, and a measurement is uncertain.
WORTHWHILE = {"amp": 1.2, "graphs": 1.1, "compile": 1.1}


def training_step(
    model: nn.Module,
    input_size: InputSize,
    batch_size: int,
    device: torch.device,
    *,
    amp: bool = False,
    graphs: bool = False,
    compile: bool = False,
) -> Callable[[], object]:
    """A forward and backward pass of a copy of `model` on a blank batch, to be timed."""
    replica = copy_net(model).to(device).to(memory_format=torch.channels_last).train()
    if compile:
        compile_regions(replica)
    images = torch.zeros(max(2, batch_size), *input_size, device=device).to(memory_format=torch.channels_last)

    def loss(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            return replica(images).float().square().mean()

    graphed = GraphedBackward(replica) if graphs else None
    if graphed is not None:
        graphed.use(loss)

    def step() -> None:
        replica.zero_grad(set_to_none=True)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if graphed is None:
                loss(images).backward()
            else:
                graphed(images)

    for _ in range(FIRST if graphs else 0):
        step()
    return step


def choose_speed(
    model: nn.Module, input_size: InputSize, batch_size: int, device: torch.device, what: str, **fixed: bool
) -> tuple[bool, str]:
    """Whether "amp", "graphs" or "compile" makes a training step worthwhile faster on this device, with a sentence.

    No CPU is tried with "compile": compiling takes minutes, and plain steps were as fast (docs/measured/costs.md).
    """
    if what == "compile" and device.type == "cpu":
        return False, "off, as it takes minutes and gains nothing on a CPU (--compile on decides it)"
    ways = {"as ever": fixed, what: {**fixed, what: True}}
    calls = {way: training_step(model, input_size, batch_size, device, **flags) for way, flags in ways.items()}
    times = interleaved_timings(calls, rounds=5, device=device, at_most=5.0)
    ratio = times["as ever"] / times[what]
    on = ratio >= WORTHWHILE[what]
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    how = {"amp": "in bfloat16", "graphs": "as a CUDA graph", "compile": "compiled"}[what]
    chosen = "on" if on else f"off, as it is below {WORTHWHILE[what]:g}"
    return on, f"a step {how} is {ratio:.2f} times as fast on {here}: {chosen} (--{what} on, --{what} off decide it)"
