"""Grow, train, vanish and fuse, again and again: is memory constant, and does what is exact stay exact?

    python tools/soak.py                                        50 rounds of a ReduceNet in float64, about a minute
    python tools/soak.py --rounds 500 --model mobilenetv3_small_050 --file runs/soak.jsonl

Every round grows branches of other kinds silently, trains for a few updates while lam falls to 0, gives the norms
random values, and fuses. Four differences are measured on fixed inputs, relatively: plain to grown, grown to fused, and
both again through the keys of a fresh plain net; `drift` is the sum over all rounds so far. Memory is that of the
process (RSS) and the number of live tensors and modules, counted after the branches of the round are gone; weak
references tell whether they are. Exit code 1 if the drift reaches 1e-9, a branch outlives its round, tensors or modules
become more, or the RSS of the last half of the rounds grows by more than --most-growth.
"""

from __future__ import annotations

import gc
import json
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.base.limits import Count, Positive
from growshrink.base.progress import progress_bar
from growshrink.cli.forms import pick
from growshrink.cli.options import GrowOptions, ModelOptions, RunOptions
from growshrink.cli.program import run_program
from growshrink.errors import RunError
from growshrink.layers.grown import grown_modules
from growshrink.proofs.probes import randomize_norms_
from inputs import FileOptions, NetOptions

MOST_DRIFT = 1e-9
#: What the rounds grow, in turn.
BRANCHES = ("bottleneck", "insert", "nest", "dbb", "repvgg", "acnet", "expandnet", "orepa", "lora", "mixture")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of soak; the model is a plain one, the file, which must be new, gets a line of JSON per round."""

    updates: Count = 5
    """Updates of training in each round."""
    most_growth: Positive = 16.0
    """MiB that the process may grow by over the second half of the rounds: allocators keep some."""
    grow: GrowOptions = pick(GrowOptions(rounds=50), "rounds")
    model: ModelOptions = pick(ModelOptions(), "model")
    nets: NetOptions = pick(NetOptions(pixels=16), "pixels")
    output: FileOptions = FileOptions()
    running: RunOptions = pick(RunOptions(), "seed", "quiet")


@dataclass(frozen=True)
class Round:
    """What one round came to."""

    number: int
    branch: str
    grown: int
    effect: float
    difference: float
    drift: float
    rss_mib: float
    tensors: int
    modules: int
    outlived: int


def main(args: Args) -> int:
    """Print the rounds and the verdict; 1 if it is not as it must be."""
    if args.grow.rounds < 2 or args.nets.pixels < 8:
        raise RunError("needs at least 2 --rounds, and --pixels 8.")
    if (file := args.output.file) is not None and file.exists():
        raise RunError(f"--file {file}: exists; choose another name or remove it.")
    began = time.perf_counter()
    rounds: list[Round] = []
    for entry in progress_bar(soak(args), total=args.grow.rounds, unit="round", show=not args.running.quiet):
        rounds.append(entry)
        if file is not None:
            write_line(file, entry)
    print(table(rounds))
    problems = judge(rounds, args.most_growth)
    print(f"{len(rounds)} rounds, {time.perf_counter() - began:.0f} s: {'; '.join(problems) or 'all as it must be'}")
    return int(bool(problems))


def write_line(path: Path, entry: Round) -> None:
    """Add a round to the log."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")
    except OSError as error:
        raise RunError(f"--file {path}: cannot be written ({error.strerror}).") from error


def soak(args: Args) -> Iterator[Round]:
    """The rounds, one by one."""
    name, seed, pixels = args.model.name, args.running.seed, args.nets.pixels
    torch.manual_seed(seed)
    plain = timm.create_model(name, num_classes=10).double().eval()
    stem = next(module for module in plain.modules() if isinstance(module, nn.Conv2d))
    size = (stem.in_channels, pixels, pixels)
    del stem
    x = torch.randn(4, *size, dtype=torch.float64)
    drift = 0.0
    for number in range(args.grow.rounds):
        branch = BRANCHES[number % len(BRANCHES)]
        before = outputs(plain, x)
        net = gs.grow(plain, branch, ratio=1.0, seed=seed + number, input_size=size)
        watched = [weakref.ref(m) for m in net.modules() if isinstance(m, gs.Branch)]
        difference = relative(before, outputs(net, x))
        train(net, size, args.updates, seed=seed + number)
        for module in net.modules():
            if isinstance(module, gs.Branch):
                module.silence_()  # the few updates leave a factor next to 0 where there is no norm: it is drawn again
        randomize_norms_(net, seed + number)
        gs.set_lambda(net.eval(), 0.0)
        grown, silenced = outputs(net, x), outputs(gs.drop(net), x)
        num_grown = len(grown_modules(net))
        plain = gs.fuse(net, input_size=size)
        fused = outputs(plain, x)
        fresh = timm.create_model(name, num_classes=10).double().eval()
        fresh.load_state_dict(plain.state_dict(), strict=True)
        difference += relative(grown, fused) + relative(fused, outputs(fresh, x))
        drift += difference
        plain = fresh
        del net, fresh
        gc.collect()
        outlived = sum(ref() is not None for ref in watched)
        tensors, modules = live()
        yield Round(
            number + 1,
            branch,
            num_grown,
            relative(grown, silenced),
            difference,
            drift,
            rss(),
            tensors,
            modules,
            outlived,
        )


def train(net: nn.Module, size: tuple[int, int, int], updates: int, seed: int) -> None:
    """A few updates while lam falls from 1 to 0."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.01, momentum=0.9)
    lam = gs.schedules.linear(1.0, 0.0, steps=updates)
    for update in range(updates):
        gs.set_lambda(net, lam(update))
        images = torch.randn(8, *size, dtype=torch.float64, generator=generator)
        loss = F.cross_entropy(net(images), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def outputs(net: nn.Module, x: Tensor) -> Tensor:
    """In eval mode."""
    return net.eval()(x.clone())


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a - b).abs().max() / a.abs().max())


def live() -> tuple[int, int]:
    """Tensors and modules that Python knows of."""
    objects = gc.get_objects()
    return sum(issubclass(type(o), Tensor) for o in objects), sum(issubclass(type(o), nn.Module) for o in objects)


def rss() -> float:
    """MiB that the process has in memory now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return pages * 4096 / 2**20


def judge(rounds: list[Round], most_growth: float) -> list[str]:
    """What is not as it must be."""
    problems = []
    half = rounds[len(rounds) // 2 :]
    if not rounds[-1].drift < MOST_DRIFT:
        problems.append(f"a drift of {rounds[-1].drift:.1e}")
    if outlived := sum(entry.outlived for entry in rounds):
        problems.append(f"{outlived} branches outlived their round")
    for name in ("tensors", "modules"):
        counts = {getattr(entry, name) for entry in half}
        if len(counts) > 1:
            problems.append(f"{min(counts)} to {max(counts)} live {name}")
    if (growth := max(entry.rss_mib for entry in half) - half[0].rss_mib) > most_growth:
        problems.append(f"{growth:.0f} MiB more over the second half of the rounds")
    if weak := [entry.branch for entry in rounds if not entry.effect > 1e-3]:
        problems.append(f"{weak[0]} branches were not at work: nothing is proven")
    return problems


def table(rounds: list[Round]) -> str:
    """Some of the rounds, the last one among them."""
    titles = ("effect", "drift", "RSS MiB", "tensors", "modules")
    lines = [f"round {'branch':12s} grown " + " ".join(f"{title:>8s}" for title in titles)]
    step = max(1, len(rounds) // 10)
    for entry in rounds[step - 1 :: step]:
        lines.append(
            f"{entry.number:5d} {entry.branch:12s} {entry.grown:5d} {entry.effect:8.2f} {entry.drift:8.1e} "
            f"{entry.rss_mib:8.1f} {entry.tensors:8d} {entry.modules:8d}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, Args, __doc__)
