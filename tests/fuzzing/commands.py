"""Damaged files given to the programs as a user gives them: a process each, its exit code, what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzzing.files import (
    Case,
    Target,
    cifar_files,
    idx_files,
    image_files,
    plan_files,
    supernet_files,
    weight_files,
    write_damaged,
)

#: Top of the checkout: programs are no part of the package.
TOP = Path(__file__).resolve().parents[2]
SECONDS = 120.0
_LITTLE = "--epochs 0.2 --rounds 0 --quiet --ema-decay 0 --batch-size 2"


@dataclass(frozen=True)
class Command:
    """A program and what it is given.

    Attributes:
        kind: What `damage` takes the files for.
        files: Whole ones.
        line: The command line; the files lie in the folder it is run in.
    """

    kind: str
    files: Callable[[], Mapping[str, bytes]]
    line: str


def _plan_of_one_update() -> dict[str, bytes]:
    return {"plan.json": b'{"base_epochs": 0.05, "rounds": [], "rewarm": 2, "seed": 0}'}


def _modes() -> dict[str, bytes]:
    numbers = dict.fromkeys(("top1", "loss", "cost", "updates", "seconds"), 1)
    return {"out.jsonl": json.dumps({"arm": "single", "seed": 0, **numbers, "settings": {}}).encode() + b"\n"}


def _idx() -> dict[str, bytes]:
    return idx_files(packed=True)


def _cifar() -> dict[str, bytes]:
    return cifar_files(10)


_MODES = "tools/netaug_modes.py --file out.jsonl --modes plain-x1 --epochs 0.02 --quiet"
_GROW = "recipes/grow_cycle.py --out out"
_ANGLE = "tools/angle_rank.py --untrained supernet.safetensors --trained supernet.safetensors --out out --quiet"
_PRUNE = "tools/random_prune.py --model-kwargs width=0.25 --trained net.safetensors --subnets 2 --out out"

COMMANDS: dict[str, Command] = {
    "grow_cycle --plan": Command("json", _plan_of_one_update, f"{_GROW} --plan plan.json --quiet"),
    "grow_cycle --plan, two rounds": Command("json", plan_files, f"{_GROW} --plan plan.json --data none"),
    "grow_cycle --data FOLDER": Command("images", image_files, f"{_GROW} --data . {_LITTLE}"),
    "grow_cycle, idx": Command("idx", _idx, f"{_GROW} --data fashion-mnist --data-dir . {_LITTLE}"),
    "grow_cycle, CIFAR": Command("bytes", _cifar, f"{_GROW} --data cifar10 --data-dir . {_LITTLE}"),
    "angle_rank --untrained": Command("safetensors", supernet_files, _ANGLE),
    "random_prune --trained": Command("safetensors", weight_files, _PRUNE),
    "netaug_modes --file": Command("jsonl", _modes, _MODES),
}


def check_command(number: int) -> Case:
    """One damaged file and the program that reads it: exit code 0, or 2 with one line on stderr; else it is wrong."""
    random = Random(number)
    name = random.choice(list(COMMANDS))
    command = COMMANDS[name]
    with tempfile.TemporaryDirectory(prefix="growshrink-fuzz-") as folder:
        root = Path(folder)
        victim = write_damaged(random, Target(command.kind, lambda: dict(command.files()), lambda path: None), root)
        program, *options = command.line.split()
        return run_command(name, victim, [str(TOP / program), *options], root)


def run_command(name: str, victim: str, command: list[str], folder: Path) -> Case:
    """Run a program in `folder` and judge its end; `victim` is what was damaged, for the words."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOP)}
    try:
        run = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Case(name, "wrong", f"{victim}: more than {SECONDS:g} s")
    said = run.stderr.strip()
    if run.returncode == 0:
        return Case(name, "read", said)
    if run.returncode == 2 and said and "\n" not in said:
        return Case(name, "refused", said)
    return Case(name, "wrong", f"{victim}: exit code {run.returncode}: {said[-400:]}")
