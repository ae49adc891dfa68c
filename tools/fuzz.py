"""What breaks it? Random nets grown and fused, and damaged files read, by the thousand; every case has a number.

    python tools/fuzz.py architectures --count 5000        nets of every geometry and wiring: grown, trained, fused
    python tools/fuzz.py architectures --seed 351 --count 1  one of them again
    python tools/fuzz.py real                              nets with hooks, flags, ties, norms of all kinds, dtypes
    python tools/fuzz.py files --count 10000               every kind of file that is read, damaged in every way
    python tools/fuzz.py files --count 50 --commands       files given to the programs, as a user gives them

A net is wrong if growing or fusing breaks a promise (see tests/fuzzing/architectures.py: equal outputs, equal
keys, refusals whose reason is true, in float64 and against a convolution done by hand). A file is wrong if its reader
does anything but read it or say in one line what it is about: another exception, more than 10 seconds, or more than
256 MiB. Exit code 1 if anything was wrong.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from fuzzing.architectures import Outcome, check_architecture
from fuzzing.commands import check_command
from fuzzing.files import check_file
from fuzzing.real import COUNT, check_real, counts
from growshrink.base.limits import Count
from growshrink.base.progress import progress_bar
from growshrink.cli.forms import pick
from growshrink.cli.options import RunOptions
from growshrink.cli.program import run_program


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Cases, which are numbered from --seed on."""

    count: Count = 5000
    """How many cases."""
    running: RunOptions = pick(RunOptions(), "seed", "quiet")

    def numbers(self, unit: str) -> Any:
        """Their numbers, with a progress bar."""
        first = self.running.seed
        return progress_bar(range(first, first + self.count), unit=unit, show=not self.running.quiet)


@dataclass(frozen=True, kw_only=True)
class Architectures(Cases):
    """Grow, train and fuse random nets."""


@dataclass(frozen=True, kw_only=True)
class Files(Cases):
    """Give damaged files to their readers."""

    commands: bool = False
    """Through the programs, each in a process of its own (seconds a file), not through the package's readers."""


@dataclass(frozen=True, kw_only=True)
class Real(Cases):
    """Nets as people have them: hooks, flags, sizes, ties, norms of all kinds, dtypes."""

    count: Count = COUNT


Which = Architectures | Files | Real


def main(args: Which) -> int:
    """Run the cases, print what was found; 1 if any was wrong."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's, about even kernels with padding="same"
    run = {Architectures: run_architectures, Files: run_files, Real: run_real}[type(args)]
    wrong = run(args)  # type: ignore[operator]
    return min(1, wrong)


def run_architectures(args: Architectures) -> int:
    """Nets number `seed` to `seed + count - 1`."""
    began = time.perf_counter()
    wrong, crashed, outcomes = 0, 0, []
    bar = args.numbers("net")
    for number in bar:
        torch.manual_seed(number)
        try:
            outcome = check_architecture(Random(number))
        except Exception as error:  # of any kind: that is what is looked for
            crashed += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome = Outcome(wrong=[f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"])
        outcomes.append(outcome)
        if outcome.wrong:
            wrong += 1
            bar.write(f"WRONG --seed {number}: {'; '.join(outcome.wrong)}", file=sys.stdout)
            bar.set_postfix(wrong=wrong)
    print(summary_of_nets(outcomes))
    print(f"{wrong} wrong ({crashed} of them crashed), {time.perf_counter() - began:.0f} s")
    return wrong


def summary_of_nets(outcomes: list[Outcome]) -> str:
    """How many were grown, what spoke against the others, and how close the fused nets are."""
    grown = [outcome for outcome in outcomes if outcome.grown]
    proven = [outcome for outcome in grown if outcome.effect > 1e-6]
    convs, eligible = sum(o.convs for o in outcomes), sum(o.eligible for o in outcomes)
    causes: Counter[str] = sum((o.causes for o in outcomes), Counter())
    kinds: Counter[str] = sum((o.kinds for o in outcomes), Counter())
    lines = [
        f"{len(outcomes)} nets with {convs} convolutions: {len(grown)} nets grown and fused "
        f"({len(grown) / len(outcomes):.0%}), {eligible} convolutions eligible ({eligible / max(1, convs):.0%})",
        f"largest difference of grown and fused in float64: {max((o.max_rel for o in grown), default=0.0):.1e}; "
        f"the branches were at work in {len(proven)} of {len(grown)}",
        "left alone: " + ", ".join(f"{count} {cause}" for cause, count in causes.most_common()),
        "nets grown with: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
    ]
    return "\n".join(lines)


def run_real(args: Real) -> int:
    """Nets number `seed` to `seed + count - 1` of the decks."""
    outcomes = []
    for number in (bar := args.numbers("net")):
        outcomes.append(outcome := check_real(number))
        if outcome.verdict not in ("fused", "left alone"):
            chosen = ", ".join(f"{axis} {choice}" for axis, choice in outcome.choices.items())
            bar.write(f"{outcome.verdict.upper()} --seed {number}: {outcome.words} ({chosen})", file=sys.stdout)
    print(counts(outcomes))
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    proven = sum(outcome.verdict == "fused" and outcome.effect > 1e-6 for outcome in outcomes)
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()) + f"; {proven} with an effect")
    return len(outcomes) - verdicts["fused"] - verdicts["left alone"]


def run_files(args: Files) -> int:
    """Files number `seed` to `seed + count - 1`."""
    logging.disable()  # timm's, a line for each image that it skips
    began = time.perf_counter()
    found: Counter[tuple[str, str]] = Counter()
    bar = args.numbers("file")
    with keep_quiet():
        for number in bar:
            case = check_command(number) if args.commands else check_file(number)
            found[case.target, case.outcome] += 1
            if case.outcome == "wrong":
                bar.write(f"WRONG --seed {number}: {case.target}, {case.words}", file=sys.stdout)
    print(f"{'kind of file':40s} {'files':>6s} {'read':>6s} {'refused':>8s} {'wrong':>6s}")
    for target in dict.fromkeys(name for name, _ in sorted(found)):
        read, refused, wrong = (found[target, outcome] for outcome in ("read", "refused", "wrong"))
        print(f"{target:40s} {read + refused + wrong:6d} {read:6d} {refused:8d} {wrong:6d}")
    num_wrong = sum(count for (_, outcome), count in found.items() if outcome == "wrong")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{args.count} files, {num_wrong} wrong, {time.perf_counter() - began:.0f} s, at most {most:.0f} MiB")
    return num_wrong


@contextmanager
def keep_quiet() -> Iterator[None]:
    """Without the interpreter's notes on files that timm's reader leaves open."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda note: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


if __name__ == "__main__":
    run_program(main, Which, __doc__)  # type: ignore[arg-type]
