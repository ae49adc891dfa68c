"""What must hold on any device (for gpu_check.py; not a program): each check raises, or returns its figures."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.cycle import run_cycle
from growshrink.data.datasets import load_data
from growshrink.data.feed import MemoryFeed
from growshrink.proofs.probes import randomize_norms_
from growshrink.training import TrainConfig, Trainer
from growshrink.training.distil import TeacherNet

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))

from side_by_side import DenseGroups, StackedFeed, stack_nets

Check = Callable[[torch.device, bool], Mapping[str, Any]]
ROOT = Path(__file__).parents[1]
GROW_CYCLE = str(ROOT / "recipes" / "grow_cycle.py")
#: Largest relative differences in float64 and float32.
EXACT, SINGLE = 1e-10, 1e-3


def nets(tiny: bool) -> dict[str, tuple[str, int]]:
    """Name: model and side of its images."""
    small = {"reducenet20": ("reducenet20", 32)}
    return small if tiny else {**small, "resnet18": ("resnet18", 64), "mobilenetv3": ("mobilenetv3_small_050", 64)}


def images(batch: int, side: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise `(batch, 3, side, side)`, the same on every device."""
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def worst(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def hold(name: str, value: float, limit: float) -> float:
    """The value, if it is within the limit."""
    if not value <= limit:
        raise AssertionError(f"{name}: {value:.3g}, at most {limit:.3g} was expected")
    return value


def check_fuse(device: torch.device, tiny: bool) -> Mapping[str, Any]:
    """Fused nets are the grown ones at lam 0, in every dtype; on this device they are those of the CPU."""
    found = {}
    for name, (model, side) in nets(tiny).items():
        torch.manual_seed(0)
        grown = gs.grow(timm.create_model(model, num_classes=10), ratio=2, input_size=(3, side, side))
        randomize_norms_(grown)
        gs.set_lambda(grown, 0.0)
        grown = grown.to(device).eval()
        fused = gs.fuse(grown, input_size=(3, side, side))
        exact = gs.fuse(copy.deepcopy(grown).double(), input_size=(3, side, side))
        there = copy.deepcopy(exact).cpu()
        with torch.inference_mode():
            x = images(8, side, device)
            pair = copy.deepcopy(grown).double(), exact
            found[f"{name} float64"] = hold(f"{name} float64", worst(*(net(x.double()) for net in pair)), EXACT)
            sixths = (nn.Hardswish, nn.Hardsigmoid)  # multiply by a float32 there
            constant = any(isinstance(module, sixths) for module in exact.modules())
            far = worst(pair[1](x.double()).cpu(), there(x.double().cpu()))
            found[f"{name} CPU"] = hold(f"{name} CPU", far, SINGLE if constant else EXACT)
            truth = exact(x.double())
            for label, tf32 in (("float32", False), ("TF32", True), ("bfloat16", False)):
                torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
                with torch.autocast(device.type, torch.bfloat16, enabled=label == "bfloat16"):
                    one, other = grown(x), fused(x)
                limit = 4 * worst(other, truth) + SINGLE  # of what rounding does to the fused net alone
                found[f"{name} {label}"] = hold(f"{name} {label}", worst(one, other), limit)
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    numbers = torch.linspace(-2.9, 2.9, 1001, dtype=torch.float64)
    for sixth in (F.hardswish, F.hardsigmoid):
        found[f"torch's {sixth.__name__} CPU"] = worst(sixth(numbers.to(device)).cpu(), sixth(numbers))
    return found


def check_netaug(device: torch.device, tiny: bool) -> Mapping[str, Any]:
    """Gradients of a step with sampled widths are those of the CPU, in every mode."""
    found = {}
    for mode in ("netaug", "lazy", "sandwich", "suffix"):
        torch.manual_seed(0)
        net = gs.grow(timm.create_model("reducenet20", num_classes=10, width=0.5), ratio=4, input_size=(3, 32, 32))
        gradients = []
        for where in (torch.device("cpu"), device):
            own = copy.deepcopy(net).to(where, torch.float64).train()
            task = gs.NetAugTask(own, mode=mode, seed=0, verbose=False, input_size=(3, 32, 32))
            task.attach(torch.optim.SGD(own.parameters(), lr=0.1))
            task.set_step(0)
            task.backward(images(16, 32, where, torch.float64), torch.arange(16, device=where) % 10)
            gradients.append(torch.cat([p.grad.flatten().cpu() for p in own.parameters() if p.grad is not None]))
        found[mode] = hold(mode, worst(*reversed(gradients)), 1e-8)
    return found


def _digits(device: torch.device, seed: int = 0) -> MemoryFeed:
    return MemoryFeed.of(load_data("digits", seed=seed, progress=False), batch_size=64, seed=seed, device=device)


class _Cut(Exception):
    """The end of a run in the middle of it."""


class _CutFeed:
    """A feed whose run ends at an update, as if the process had died."""

    def __init__(self, feed: MemoryFeed, stop: int) -> None:
        self.feed, self.stop, self.train = feed, stop, self
        self.batch_size, self.updates_per_epoch = feed.train.batch_size, feed.train.updates_per_epoch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.feed, name)

    def batch(self, update: int) -> tuple[Tensor, Tensor]:
        """Batch of an update before the end."""
        if update >= self.stop:
            raise _Cut
        return self.feed.train.batch(update)


def _cycle(device: torch.device, out: Path, stop: int | None = None, **config: Any) -> nn.Module:
    """A short run on digits; with `stop` it ends at that update, and is gone on with."""
    plan = gs.CyclePlan(base_epochs=0.5, rounds=(gs.Round(epochs=4, ratio=2.0),))

    def run(feed: Any, resume: bool = False) -> nn.Module:
        torch.manual_seed(0)
        net = timm.create_model("reducenet20", num_classes=10, in_chans=1, width=0.25)
        trained = TrainConfig(**config)
        return run_cycle(net, feed, plan, out_dir=out, resume=resume, config=trained, device=device, save_every=5).model

    feed = _digits(device)
    if stop is None:
        return run(feed)
    try:
        run(_CutFeed(feed, stop))
    except _Cut:
        pass
    return run(feed, resume=True)


def check_resume(device: torch.device, tiny: bool) -> Mapping[str, Any]:
    """A run that is stopped and gone on with ends with the bytes of one that never was."""
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    found = {}
    try:
        for label, config in (("float32", {}), ("bfloat16", {"amp": True}), ("CUDA graphs", {"graphs": True})):
            with tempfile.TemporaryDirectory() as folder:
                whole = _cycle(device, Path(folder, "whole"), **config)
                resumed = _cycle(device, Path(folder, "resumed"), stop=37, **config)
            equal = all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
            if not equal:
                raise AssertionError(f"{label}: the resumed run ends with other weights")
            found[label] = "same bits"
    finally:
        torch.backends.cudnn.deterministic = deterministic
    return found


def check_graphs(device: torch.device, tiny: bool) -> Mapping[str, Any]:
    """Updates by CUDA graphs have the bits of others: with dropout, a teacher, and while lam falls and nets fuse."""
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    found: dict[str, Any] = {}
    try:
        for label, config in (("float32", {}), ("bfloat16", {"amp": True})):
            pairs = [_taught(device, graphs=graphs, **config) for graphs in (False, True)]
            found[f"dropout and a teacher, {label}"] = _same_bits(*pairs)
            with tempfile.TemporaryDirectory() as folder:
                pairs = [_cycle(device, Path(folder, str(on)), graphs=on, **config) for on in (False, True)]
            found[f"a cycle, {label}"] = _same_bits(*pairs)
        found["waits for the device"] = _refused(device)
    finally:
        torch.backends.cudnn.deterministic = deterministic
    return found


def _taught(device: torch.device, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {"num_classes": 10, "in_chans": 1, "width": 0.25}
    teacher = timm.create_model("reducenet20", **kwargs).to(device).eval()
    net = timm.create_model("reducenet20", drop_rate=0.3, **kwargs).to(device)
    trainer, one = Trainer(net, TrainConfig(lr=0.05, **config), _digits(device).train), gs.schedules.constant(1.0)
    for stop, taught in ((10, None), (20, TeacherNet(teacher, 0.5, 2.0)), (25, None)):
        trainer.train(stop, learning_rate=one, lam=one, teacher=taught)
    _hold_graph(trainer)
    return trainer.model


def _hold_graph(trainer: Trainer) -> None:
    if trainer.graphed is not None and not trainer.graphed.recorded:
        raise AssertionError(f"no graph was recorded: {trainer.graphed.refused}")


def _same_bits(first: nn.Module, second: nn.Module) -> str:
    if not all(map(torch.equal, first.state_dict().values(), second.state_dict().values())):
        off = max(map(worst, _floats(first.state_dict()), _floats(second.state_dict())))
        raise AssertionError(f"other weights: {off:.3g}")
    return "same bits"


class _Waiting(nn.Module):
    """A layer that reads from the device."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.abs().max() > 0)


def _refused(device: torch.device) -> str:
    ends, trainer = [], None
    for graphs in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(timm.create_model("reducenet20", num_classes=10, in_chans=1, width=0.25), _Waiting())
        trainer, one = Trainer(net.to(device), TrainConfig(graphs=graphs), _digits(device).train), lambda update: 1.0
        trainer.train(8, learning_rate=one, lam=one)
        ends.append(trainer.model)
    _same_bits(*ends)
    if trainer is None or trainer.graphed is None:
        return "-"
    if trainer.graphed.refused is None:
        raise AssertionError("a graph of a net that waits for the device was recorded")
    graphed, batch = trainer.graphed, _digits(device).train.batch(0)
    graphed._record(batch)  # what was missed fails here, and may leave nothing behind
    if graphed.recorded:
        raise AssertionError("a graph of a net that waits for the device was recorded after all")
    _taught(device, graphs=True)  # dropout asks for random numbers
    return graphed.refused or "-"


def check_compile(device: torch.device, tiny: bool) -> Mapping[str, Any]:
    """Compiled grown nets compute what they compute without it; lam and widths change without compiling again."""
    torch.manual_seed(0)
    net = gs.grow(timm.create_model("reducenet20", num_classes=10, width=0.25), ratio=2, input_size=(3, 32, 32))
    randomize_norms_(net)
    net = net.to(device).eval()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled, x = torch.compile(net), images(8, 32, device)
    difference = 0.0
    with torch.no_grad():
        for lam in (1.0, 0.5, 0.25, 0.0):
            gs.set_lambda(net, lam)
            difference = max(difference, worst(compiled(x), net(x)))
    graphs = counters["stats"]["unique_graphs"]
    return {"difference": hold("compiled", difference, SINGLE), "graphs for four lam": graphs}


def check_ddp(device: torch.device, tiny: bool) -> Mapping[str, Any]:
    """The recipe on one process of torchrun (NCCL on CUDA) ends with the scores of one without it."""
    tops = []
    with tempfile.TemporaryDirectory() as folder:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        for number, start in enumerate(([sys.executable], torchrun)):
            out = Path(folder, str(number))
            options = ["--epochs", "12", "--base", "0.1", "--branches", "bottleneck", "--device", device.type]
            options += ["--out", str(out), "--quiet"]
            environment = {**os.environ, "GROWSHRINK_COMPILE": "off"}  # timing it takes minutes
            how: dict[str, Any] = {"env": environment, "timeout": None if tiny else 240}
            done = subprocess.run([*start, GROW_CYCLE, *options], capture_output=True, text=True, **how)
            if done.returncode:
                raise AssertionError(f"exit {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
            tops.append(json.loads((out / "report.json").read_text())["final"]["top1"])
    return {"alone": tops[0], "one rank": tops[1]}


def check_sync_bn(device: torch.device, tiny: bool) -> Mapping[str, Any]:
    """A grown net with synchronised norms fuses to the same kernels."""
    torch.manual_seed(0)
    grown = gs.grow(timm.create_model("reducenet20", num_classes=10), ratio=2, input_size=(3, 32, 32))
    randomize_norms_(grown)
    gs.set_lambda(grown, 0.0)
    grown = grown.to(device, torch.float64).eval()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(grown))
    states = [gs.fuse(net, input_size=(3, 32, 32)).state_dict() for net in (grown, synced)]
    return {"difference": hold("SyncBN", max(worst(a, b) for a, b in zip(*map(_floats, states), strict=True)), EXACT)}


def _floats(state: Mapping[str, Tensor]) -> list[Tensor]:
    return [value for value in state.values() if value.is_floating_point() and value.any()]


def check_merged(device: torch.device, tiny: bool) -> Mapping[str, Any]:
    """Branches merged in every step have the outputs and gradients of branches run one by one."""
    torch.manual_seed(0)
    net = gs.grow(timm.create_model("reducenet20", num_classes=10), "dbb", input_size=(3, 32, 32))
    randomize_norms_(net)
    net = net.to(device, torch.float64).train()
    merged = gs.collapse_online(net, choose="always", input_size=(3, 32, 32))
    apart = gs.expand_online(copy.deepcopy(merged))
    for module in apart.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    merged.eval(), apart.eval()
    x, gradients = images(8, 32, device, torch.float64), []
    for own in (merged, apart):
        own.zero_grad()
        own(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for _, p in sorted(own.named_parameters()) if p.grad is not None]))
    return {"gradients": hold("merged", worst(*gradients), 1e-8)}


def check_stack(device: torch.device, tiny: bool) -> Mapping[str, Any]:
    """Seeds side by side are trained as they would be alone."""
    torch.manual_seed(0)
    single = [timm.create_model("reducenet20", num_classes=10, width=0.25) for _ in range(3)]
    stack = stack_nets(single, (3, 32, 32)).to(device, torch.float64).eval()
    x = images(6, 32, device, torch.float64)
    alone = torch.stack([net.to(device, torch.float64).eval()(x) for net in single], dim=1).flatten(0, 1)
    found = {"outputs": hold("stack", worst(stack(x.repeat(1, 3, 1, 1)), alone), EXACT)}
    with DenseGroups(3):
        found["dense kernels"] = hold("dense", worst(stack(x.repeat(1, 3, 1, 1)), alone), EXACT)
    feeds = [_digits(device, seed) for seed in range(3)]
    together = StackedFeed(feeds).train
    for update in (0, 50):
        apart = [feed.train.batch(update) for feed in feeds]
        joined = torch.cat([own for own, _ in apart], 1), torch.stack([labels for _, labels in apart], 1).flatten()
        if not all(map(torch.equal, together.batch(update), joined)):
            raise AssertionError("the batches of a stack are not those of its seeds")
    return {**found, "batches": "same bits"}


def check_train(device: torch.device, tiny: bool) -> Mapping[str, Any]:
    """Twenty updates in float64 are those of the CPU: order, augmentation, average and optimizer."""
    ends = []
    for where in (torch.device("cpu"), device):
        torch.manual_seed(0)
        net = timm.create_model("reducenet20", num_classes=10, in_chans=1, width=0.25).double().to(where)
        feed = _digits(where)
        batches = _Double(feed.train)
        trainer = Trainer(net, TrainConfig(lr=0.05), batches)
        one = gs.schedules.constant(1.0)
        trainer.train(5 if tiny else 20, learning_rate=one, lam=one)
        ends.append(torch.cat([value.flatten().cpu() for value in _floats(trainer.best.state_dict())]))
    return {"weights": hold("train", worst(*reversed(ends)), 1e-5)}  # images are float32


class _Double:
    """Batches in float64."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.batch_size, self.updates_per_epoch = batches.batch_size, batches.updates_per_epoch

    def batch(self, update: int) -> tuple[Tensor, Tensor]:
        """Batch of an update, in float64."""
        x, y = self.batches.batch(update)
        return x.double(), y


CHECKS: dict[str, Check] = {
    "fuse": check_fuse,
    "train": check_train,
    "netaug": check_netaug,
    "merged": check_merged,
    "stack": check_stack,
    "compile": check_compile,
    "sync_bn": check_sync_bn,
    "resume": check_resume,
    "ddp": check_ddp,
    "graphs": check_graphs,  # the last: one that fails leaves the allocator as while recording
}
