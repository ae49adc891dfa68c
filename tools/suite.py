"""Every ratio of speed and memory that the docs give: sections of benchmark.py that take minutes, and other programs.

For `benchmark.py --suite`; not a program.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.base.copying import copy_net
from growshrink.base.timing import seconds_of
from growshrink.layers.regions import compile_regions
from paired import Bench, channels_last

TOOLS = Path(__file__).parent
#: A program that ends with a table of ratios and quartiles, its options, and those of a smoke run.
PROGRAMS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "merged training and memory": (
        "online_cost.py",
        ("--threads", "1", "--processor-time"),
        ("--nets", "reducenet20@8", "--branches", "dbb", "--batch-size", "2", "--quick"),
    ),
    "sampled widths": ("step_cost.py", ("--threads", "1"), ("--pixels", "8", "--batch-size", "2", "--quick")),
    "branches, and layers that run once more for memory": (
        "step_cost.py",
        ("reducenet20", "resnet18", "--branches", "bottleneck", "dbb", "--ratio", "4", "--batch-size", "32")
        + ("--pixels", "64", "--threads", "1", "--recompute"),
        ("reducenet20", "--pixels", "8", "--batch-size", "2", "--branches", "dbb", "--recompute", "--quick"),
    ),
    "pruned subnets beside Torch-Pruning": (
        "pruned_speed.py",
        ("--threads", "1", "--subnets", "20"),
        ("reducenet20", "--pixels", "8", "--subnets", "2", "--images", "64", "--statistics", "1", "--threads", "1"),
    ),
    "subnets by angle": ("angle_speed.py", ("--threads", "1"), ("--model", "reducenet20_x2", "--quick")),
    "import": ("import_cost.py", (), ()),
}
#: Nets at once in an analysis, and the seconds its ranking may take.
RANKED, RANKED_WITHIN = 6561, 10.0


def measure_rank(bench: Bench) -> None:
    """Seconds of a ranking with its bootstrap, over those that it may take."""
    count = RANKED if bench.least_repeats > 3 else 81
    rng = np.random.default_rng(0)
    truth = rng.normal(size=count)
    scores = {name: truth + rng.normal(size=count) for name in ("angle", "params", "macs", "null")}
    times = [seconds_of(partial(gs.rank, scores, truth)) for _ in bench.bar(3, "rank")]
    what = f"rank: gs.rank of {count} nets, 1,000 resamples / {RANKED_WITHIN:g} s"
    bench.add(what, times, [RANKED_WITHIN] * len(times), "s", at_most=1.0)


def measure_compile(bench: Bench) -> None:
    """Updates compiled part by part, as `TrainConfig.compile` has them, over eager ones; compiling takes minutes."""
    batch_size = bench.batch_size
    images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,))
    plain = channels_last(timm.create_model("reducenet20", num_classes=10))
    grown = gs.grow(plain, ratio=2, input_size=(3, 32, 32))
    backend = "inductor" if bench.least_repeats > 3 else "eager"

    def step(net: nn.Module) -> None:
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()

    for name, net in (("plain", plain), ("bottlenecks of ratio 2", grown)):
        compiled, eager = copy_net(net).train(), copy_net(net).train()
        compile_regions(compiled, backend=backend)
        seconds = seconds_of(partial(step, compiled))
        what = f"compile: eager / compiled step, reducenet20, {name}, batch {batch_size}"
        row = bench.compare(what, partial(step, eager), partial(step, compiled))
        print(f"{row.what}: compiling took {seconds:.0f} s", file=sys.stderr)


def run_programs(authors: Path | None, quick: bool) -> list[str]:
    """Run them one after another, each with a heading; returns the names of those that failed or missed a target."""
    failed = []
    for name, (program, options, smoke) in PROGRAMS.items():
        words = list(smoke if quick else options)
        if program == "online_cost.py" and authors is not None:
            words += ["--authors", str(authors)]
        command = [sys.executable, str(TOOLS / program), *words]
        print(f"\n## {name}\n\n`python tools/{program} {' '.join(words)}`\n", flush=True)
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        if done.returncode:
            failed.append(name)
    return failed
