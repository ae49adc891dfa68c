"""Try everything that touches a device, and measure it: one script of at most 8 minutes for a machine lent for 10.

    python tools/gpu_check.py --out runs/gpu                    checks, then speeds, then the plan until --minutes
    python tools/gpu_check.py --device cpu --tiny --out runs/t  plumbing alone, a minute on a CPU
    python tools/gpu_check.py --only fuse resume ddp            some of the checks

A check that fails is written down with its error, and the next one runs. gpu_check.json has every figure, gpu_check.md
the tables: the checks, images/s and ratios of training steps (eager, compiled, CUDA graph), seeds side by side, an
epoch of reducenet20 on CIFAR-10's shape and its distance from the roofline, and each line of the package that is for
CUDA only, as run or not run: on a CPU none is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from gpu_checks import CHECKS
from gpu_speeds import SPEEDS
from gpu_witness import Witness
from growshrink.base.environment import versions
from growshrink.base.limits import InFile, OneOf, Positive
from growshrink.base.progress import progress_bar
from growshrink.base.timing import machine
from growshrink.base.writing import write_atomic, write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import DataOptions, RunOptions
from growshrink.cli.program import run_program
from growshrink.errors import RunError

ROOT = Path(__file__).parents[1]
#: Share of --minutes after which the experiment begins, whatever has not been measured.
MEASURING = 0.6
#: Seconds before the end at which the experiment is stopped; its finished runs are kept.
MARGIN = 20.0

Figures = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of gpu_check."""

    only: tuple[Annotated[str, OneOf("no such check", (*CHECKS, *SPEEDS))], ...] = ()
    """Some of the checks and speeds; all without it."""
    minutes: Positive = 8.0
    """For everything; what is left of them is spent on the plan."""
    plan: InFile | None = None
    """What recipes/compare.py is to run at the end; nothing without it."""
    tiny: bool = False
    """Small nets, few repeats: shows that the script works, not how fast anything is."""
    data: DataOptions = pick(DataOptions(), "data_dir")
    running: RunOptions = pick(RunOptions(device="cuda", out=Path("runs/gpu_check")), "device", "out", "quiet")


def main(args: Args) -> int:
    """Check, measure, write; exit status 1 if a check failed."""
    device, began = args.running.torch_device(), time.monotonic()
    out = args.running.out or Path("runs/gpu_check")
    if (out / "gpu_check.json").exists():
        raise RunError(f"--out {out}: holds a report already; choose another folder. Nothing is overwritten.")
    out.mkdir(parents=True, exist_ok=True)
    wanted = args.only or (*CHECKS, *SPEEDS)
    about = {"device": str(device), "versions": versions(), **machine(), "tiny": args.tiny}
    if device.type == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(device), "memory": torch.cuda.mem_get_info(device)[1]}
    checks: dict[str, Figures] = {}
    speeds: dict[str, Figures] = {}
    witness = Witness(ROOT / "growshrink")

    def write() -> None:
        found = {**about, "seconds": time.monotonic() - began, "checks": checks, "speeds": speeds}
        write_json(out / "gpu_check.json", {**found, "lines": witness.lines()})
        write_atomic(out / "gpu_check.md", report(about, checks, speeds, witness.lines()).encode())

    for name in progress_bar([name for name in CHECKS if name in wanted], "checks", show=not args.running.quiet):
        with witness:
            checks[name] = attempt(CHECKS[name], device, args.tiny)
        write()
    for name in progress_bar([name for name in SPEEDS if name in wanted], "speeds", show=not args.running.quiet):
        late = time.monotonic() - began > 60 * args.minutes * MEASURING
        speeds[name] = {"error": "left out: the time was up"} if late else attempt(SPEEDS[name], device, args.tiny)
        write()
    if args.plan is not None:
        left = 60 * args.minutes - (time.monotonic() - began) - MARGIN
        experiment(args, out, left)
    print(f"Read {out / 'gpu_check.md'}")
    return int(any("error" in figures for figures in checks.values()))


def attempt(call: Callable[[torch.device, bool], Figures], device: torch.device, tiny: bool) -> Figures:
    """What it found, or its error; with the seconds it took."""
    began = time.monotonic()
    try:
        found = dict(call(device, tiny))
    except Exception as error:  # whatever it is: the others are to be tried, and the machine is not lent again
        found = {"error": f"{type(error).__name__}: {error}"}
    return {**found, "seconds": round(time.monotonic() - began, 2)}


def experiment(args: Args, out: Path, seconds: float) -> None:
    """Run the plan for so long; runs that are finished by then are in OUT/plan/runs.jsonl."""
    command = [sys.executable, str(ROOT / "recipes" / "compare.py"), str(args.plan), "--out", str(out / "plan")]
    command += ["--device", args.running.device, "--quiet"]
    command += ["--data-dir", str(args.data.data_dir)] if args.data.data_dir else []
    try:
        subprocess.run(command, timeout=max(1.0, seconds), check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    except subprocess.TimeoutExpired:
        print(f"{args.plan}: stopped after {seconds:.0f} s; finished runs are in {out / 'plan'}.")


def report(about: Figures, checks: Figures, speeds: Figures, lines: Mapping[str, bool]) -> str:
    """The tables, as Markdown."""
    text = [f"# {about.get('gpu', about['processor'])}", ""]
    text += ["Made with `--tiny`: no figure means anything.", ""] if about["tiny"] else []
    text += [", ".join(f"{name} {value}" for name, value in about["versions"].items()), ""]
    for title, found in (("Checks", checks), ("Speeds", speeds)):
        text += [f"## {title}", "", "| what | outcome | s |", "|---|---|---|"]
        for name, figures in found.items():
            words = ", ".join(f"{key} {_number(value)}" for key, value in figures.items() if key != "seconds")
            text.append(f"| {name} | {words} | {figures['seconds'] if 'seconds' in figures else '-'} |")
        text.append("")
    done = sum(lines.values())
    text += ["## Lines for CUDA only", "", f"{done} of {len(lines)} were run.", ""]
    text += [f"- {'run' if ran else '**not run**'}: `{line}`" for line, ran in lines.items()]
    return "\n".join(text) + "\n"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_program(main, Args, __doc__)
