"""Paired timings: two things take turns, and each pair of turns gives a ratio (for the tools; not a program)."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from growshrink.base.limits import Positive
from growshrink.base.progress import progress_bar
from growshrink.base.timing import Call, machine, seconds_of
from growshrink.cli.forms import pick
from growshrink.cli.options import RunOptions
from growshrink.data.batches import Batch

Values = Sequence[float]
Images = tuple[int, int] | None

#: A turn lasts at least this many seconds (calls are repeated within it), far above the clock's resolution.
TURN = 0.005
MOST_REPEATS = 400


@dataclass(frozen=True)
class Row:
    """One comparison. `a`, `b` and `ratio` are medians, `q1` and `q3` quartiles of `ratios`, which are pair by pair."""

    section: str
    what: str
    a: float
    b: float
    unit: str
    ratio: float
    q1: float
    q3: float
    repeats: int
    target: str
    verdict: str  # "ok" or "MISSED"; empty without a target
    note: str
    ratios: tuple[float, ...]


@dataclass
class Bench:
    """How much is measured, and what was found."""

    seconds: float = 4.0  # per comparison
    least_repeats: int = 15
    batch_size: int = 64  # of inference and training steps
    num_files: int = 4096  # of the loaders
    round_batch: int = 8
    round_updates: int = 700  # from 625 on LEAST_SETTLE does not change the default shares
    progress: bool = True
    own_thread: bool = False  # see PairOptions.processor_time
    rows: list[Row] = field(default_factory=list)

    def compare(
        self, what: str, a: Call, b: Call, *, at_most: float = math.inf, at_least: float = 0.0, images: Images = None
    ) -> Row:
        """Time `a` and `b` interleaved, for as many pairs as fit into the given time; `what` begins with the section.

        With the numbers of `images` that a call of `a` and one of `b` make, the rates are compared, not the times.
        """
        for _ in range(2):  # warm up: allocator, primitive caches, worker processes
            a(), b()
        seconds = partial(seconds_of, own_thread=self.own_thread)
        first, second = seconds(a), seconds(b)
        calls = max(1, math.ceil(TURN / min(first, second)))
        pairs = int(self.seconds / (calls * (first + second)))
        times_a, times_b = [], []
        for _ in self.bar(min(MOST_REPEATS, max(self.least_repeats, pairs)), what):
            times_a.append(1e3 * seconds(a, calls))
            times_b.append(1e3 * seconds(b, calls))
        unit = "ms" if images is None else "images/s"
        if images is not None:
            times_a, times_b = ([1e3 * n / ms for ms in t] for n, t in zip(images, (times_a, times_b), strict=True))
        return self.add(what, times_a, times_b, unit, at_most=at_most, at_least=at_least)

    def add(
        self, what: str, a: Values, b: Values, unit: str, *, at_most: float, at_least: float = 0.0, note: str = ""
    ) -> Row:
        """Keep a row, from the values pair by pair."""
        ratios = tuple(x / y for x, y in zip(a, b, strict=True))
        q1, ratio, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
        target = f"<= {at_most:.3g}" if at_most < math.inf else f">= {at_least:.3g}" if at_least else ""
        verdict = "" if not target else "ok" if at_least <= ratio <= at_most else "MISSED"
        section, _, what = what.partition(": ")
        medians = statistics.median(a), statistics.median(b)
        row = Row(section, what, *medians, unit, ratio, q1, q3, len(ratios), target, verdict, note, ratios)
        self.rows.append(row)
        return row

    def bar(self, count: int, what: str) -> Iterator[int]:
        """`range(count)` with a progress bar."""
        return iter(progress_bar(range(count), what[:60], unit="pair", show=self.progress))


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """How long is measured."""

    seconds: Positive = 6.0
    """To spend on each comparison, longer if that is needed for enough pairs."""
    quick: bool = False
    """A smoke run: very few repeats, times that mean nothing."""
    strict: bool = False
    """Exit 1 if a target is missed."""
    processor_time: bool = False
    """Time what the processor spends on this thread, not what passes: on a busy machine, with --threads 1."""


@dataclass(frozen=True, kw_only=True)
class TimedArgs:
    """Options of programs with paired timings."""

    pairs: PairOptions = PairOptions()
    running: RunOptions = pick(RunOptions(), "threads", "quiet")

    def bench(self, least_repeats: int = 15, quick: Bench | None = None) -> Bench:
        """As they say; `quick` is that of a smoke run."""
        self.running.set_threads()
        bench = (quick or Bench(0.02, 2)) if self.pairs.quick else Bench(self.pairs.seconds, least_repeats)
        bench.progress = not self.running.quiet
        bench.own_thread = self.pairs.processor_time
        return bench


@dataclass
class OneBatch:
    """The same batch at every update, so that no time goes into making it."""

    value: Batch
    batch_size: int
    updates_per_epoch: int = 1000

    def batch(self, update: int) -> Batch:
        """Whatever the update."""
        return self.value


def channels_last(model: nn.Module) -> nn.Module:
    """In place."""
    return model.to(memory_format=torch.channels_last)


def load() -> float | None:
    """How many processes wanted to run in the last minute, on average; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def conditions(before: float | None) -> str:
    """What times depend on besides the code; `before` is the load that there was at the beginning."""
    about = machine()
    return (
        f"{about['threads']} threads on {about['cores']} cores of {about['processor']}, torch {torch.__version__}, "
        f"timm {timm.__version__}; load average {before} before, {load()} after."
    )


def table(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """All rows in columns, and what is to be said besides."""
    lines = [["section", "A / B", "A", "B", "", "ratio", "quartiles", "repeats", "target", ""]]
    for row in rows:
        a, b = (f"{value:.3f}" if value < 10 else f"{value:,.1f}" for value in (row.a, row.b))
        quartiles = f"{row.q1:.3f} .. {row.q3:.3f}"
        lines.append([row.section, row.what, a, b, row.unit, f"{row.ratio:.3f}", quartiles])
        lines[-1] += [str(row.repeats), row.target, row.verdict]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = (2, 3, 5, 7)
    text = []
    for line in lines:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        text.append("  ".join(cells).rstrip())
    text += [f"{row.section}: {row.note}." for row in rows if row.note]
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    text.append(
        f"{about['threads']} threads on {about['cores']} cores of {about['processor']}; {versions}; load average "
        f"{about['load_before']} before, {about['load_after']} after; {about['seconds']:.0f} s"
    )
    if missed := sum(row.verdict == "MISSED" for row in rows):
        text.append(f"{missed} of {sum(bool(row.target) for row in rows)} targets MISSED.")
    return "\n".join(text)
