"""How fast a device trains (for gpu_check.py; not a program): steps of the nets, seeds side by side, an epoch."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.base.timing import Call
from growshrink.data.batches import Augment
from growshrink.data.datasets import DataSet, Split
from growshrink.data.feed import MemoryFeed
from growshrink.proofs._profile import training_macs
from growshrink.training import TrainConfig, Trainer
from paired import channels_last

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))

from side_by_side import DenseGroups, stack_nets

#: What is compiled, too, which takes up to a minute each.
COMPILED = {"reducenet20": ("plain", "bottleneck"), "resnet18": ("plain",)}

Speed = Callable[[torch.device, bool], Mapping[str, Any]]


def paired(calls: Mapping[str, Call], device: torch.device, tiny: bool) -> dict[str, float]:
    """Seconds of a call, by name: medians of turns that are taken one after another."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(3 if tiny else 23):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(1 if tiny else 5):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= (1 if tiny else 3):  # the first turns warm up
                times[name].append((time.perf_counter() - began) / (1 if tiny else 5))
    return {name: statistics.median(values) for name, values in times.items()}


class Step:
    """A training step on a batch of noise: SGD, bfloat16 autocast where asked for."""

    def __init__(
        self, net: nn.Module, batch: int, side: int, device: torch.device, amp: bool, channels: int = 3
    ) -> None:
        self.net = channels_last(net.to(device)).train()
        self.run: Callable[[Tensor], Tensor] = self.net
        x = torch.randn(batch, channels, side, side, device=device)
        self.x, self.device, self.amp = x.contiguous(memory_format=torch.channels_last), device, amp
        with torch.no_grad():
            classes = len(self.net(self.x[:2]))  # of a stack there are more outputs than images
        self.y = torch.randint(10, (batch * classes // 2,), device=device)
        fused = device.type == "cuda"
        parameters = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True, fused=fused)

    def __call__(self) -> None:
        """One update."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(self.run(self.x).float(), self.y)
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        self.optimizer.step()

    def compiled(self) -> Step:
        """The same by torch.compile."""
        self.run = torch.compile(self.net)
        return self

    def graphed(self) -> Call:
        """The whole update as one CUDA graph."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                self()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self()
        return graph.replay


def _nets(model: str, side: int) -> dict[str, nn.Module]:
    plain = timm.create_model(model, num_classes=10)
    size = (3, side, side)
    merged = gs.grow(plain, "dbb", input_size=size)
    return {
        "plain": plain,
        "bottleneck": gs.grow(plain, ratio=2, input_size=size),
        "dbb": gs.grow(plain, "dbb", input_size=size),
        "dbb merged": gs.collapse_online(merged, choose="always", input_size=size),
    }


def _steps(model: str, side: int, batch: int) -> Speed:
    """Ratios of the steps over the plain net's eager one in bfloat16, and its images/s."""

    def measure(device: torch.device, tiny: bool) -> Mapping[str, Any]:
        size = 8 if tiny else batch
        found: dict[str, Any] = {}
        calls: dict[str, Call] = {"plain float32": Step(_nets(model, side)["plain"], size, side, device, amp=False)}
        for name, net in _nets(model, side).items():
            calls[name] = Step(net, size, side, device, amp=True)
        for name in ("plain", "bottleneck", "dbb merged"):
            if not tiny and name in COMPILED.get(model, ()):
                calls[f"{name}, compiled"] = Step(_nets(model, side)[name], size, side, device, amp=True).compiled()
            if device.type == "cuda":
                calls[f"{name}, CUDA graph"] = Step(_nets(model, side)[name], size, side, device, amp=True).graphed()
        task_net = gs.grow(timm.create_model(model, num_classes=10), ratio=4, input_size=(3, side, side)).to(device)
        batches = Step(task_net, size, side, device, amp=True)
        task = gs.NetAugTask(task_net, verbose=False, input_size=(3, side, side)).attach(batches.optimizer)
        calls["NetAug, lazy, 8 updates"] = lambda: _task_steps(task, batches)
        seconds = paired(calls, device, tiny)
        for name, value in seconds.items():
            turns = task.every if "8 updates" in name else 1
            found[name] = f"{value / turns / seconds['plain']:.2f}"
        return {"images/s of plain": round(size / seconds["plain"]), **found, "peak MiB": _peak(device)}

    return measure


def _task_steps(task: gs.NetAugTask, step: Step) -> None:
    for _ in range(task.every):
        with torch.autocast(step.device.type, torch.bfloat16, enabled=step.amp):
            task.backward(step.x, step.y)
        step.optimizer.step()
        step.optimizer.zero_grad()


def _peak(device: torch.device) -> int | str:
    return torch.cuda.max_memory_allocated(device) >> 20 if device.type == "cuda" else "-"


def seeds_side_by_side(device: torch.device, tiny: bool) -> Mapping[str, Any]:
    """Seed-epochs/s of 50,000 images at 16x16, width 0.25, by the seeds in a stack and the way of its convolutions."""
    found = {}
    for count in (1, 2) if tiny else (1, 4, 12, 32):
        ways: dict[str, AbstractContextManager[object]] = {"": nullcontext()}
        if count > 1:
            ways[", dense"] = DenseGroups(count)
        for name, way in ways.items():
            made = [timm.create_model("reducenet20", num_classes=10, width=0.25) for _ in range(count)]
            net = made[0] if count == 1 else stack_nets(made, (3, 16, 16))
            with way:
                step = Step(net, 128, 16, device, amp=True, channels=3 * count)
                call: Call = step.graphed() if device.type == "cuda" else step
                seconds = paired({"step": call}, device, tiny)["step"]
            found[f"{count} seeds{name}"] = round(count * 128 / 50_000 / seconds, 3)
    return found


def epoch(device: torch.device, tiny: bool) -> Mapping[str, Any]:
    """Seconds of an epoch of our own loop: reducenet20, 50,000 images at 32x32, batch 128; goal 1 s on an H100."""
    count = 1024 if tiny else 50_000
    split = Split(torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8), torch.arange(count) % 10)
    data = DataSet("noise", split, split, split, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)
    feed = MemoryFeed.of(data, batch_size=128, augment=Augment(crop=4, flip=True), device=device)
    found, updates = dict[str, Any](), feed.train.updates_per_epoch
    for name, graphs in (("as ever", False), ("CUDA graphs", True)):
        net = channels_last(timm.create_model("reducenet20", num_classes=10).to(device))
        trainer, one = Trainer(net, TrainConfig(amp=True, graphs=graphs), feed.train), gs.schedules.constant(1.0)
        times = []
        for number in range(1, 3 if tiny else 5):
            run = partial(trainer.train, number * updates, learning_rate=one, lam=one)
            times.append(_seconds(run, device))
        found[f"seconds, {name}"] = statistics.median(times[1:])
    best = min(found.values())
    found["share of the data"] = _seconds(lambda: [feed.train.batch(u) for u in range(updates)], device) / best
    traffic, macs = _traffic(net, (3, 32, 32)), training_macs(net.cpu(), (3, 32, 32))
    bandwidth, rate = _limits(device, tiny)
    bound = count * max(traffic / bandwidth, 2 * macs / rate)
    found |= {"roofline seconds": bound, "over the roofline": best / bound}
    return found | {"GB/s": bandwidth / 1e9, "TFLOP/s bfloat16": rate / 1e12}


def _seconds(call: Call, device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _traffic(net: nn.Module, size: tuple[int, int, int]) -> float:
    """Bytes an image moves at least: each convolution's and norm's output, 2 bytes, written and read, both ways."""
    total = 0
    hooks = []
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):

            def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
                nonlocal total
                total += output[0].numel()

            hooks.append(module.register_forward_hook(count))
    device = next(net.parameters()).device
    with torch.no_grad():
        net(torch.zeros(1, *size, device=device))
    for hook in hooks:
        hook.remove()
    return total * 2 * 2 * 3  # written and read; forward, gradient of the input, gradient of the weight


def _limits(device: torch.device, tiny: bool) -> tuple[float, float]:
    """Measured bytes/s of a copy, and FLOP/s of a product in bfloat16."""
    n = 1 << (22 if tiny else 28)
    source = torch.empty(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 256 if tiny else 8192
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    seconds = paired({"copy": lambda: target.copy_(source), "product": lambda: a @ a}, device, tiny)
    return 2 * n / seconds["copy"], 2 * side**3 / seconds["product"]


SPEEDS: dict[str, Speed] = {
    "epoch": epoch,
    "seeds": seeds_side_by_side,
    "reducenet20 32px": _steps("reducenet20", 32, 128),
    "resnet18 64px": _steps("resnet18", 64, 128),
    "mobilenetv2_035 96px": _steps("mobilenetv2_035", 96, 128),
}
