"""The clock: what a machine is, how long a call takes, and several calls timed in turns."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

Call = Callable[[], object]

#: A turn lasts at least this many seconds (a call is repeated within it), far above the clock's resolution.
TURN = 0.005


def seconds_of(call: Call, calls: int = 1) -> float:
    """Per call."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def machine() -> dict[str, Any]:
    """What the times depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return {"processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def in_turns(calls: Mapping[str, Call], *, rounds: int = 40, progress: bool = False) -> dict[str, float]:
    """Milliseconds per call of each, timed in turns.

    All calls take turns, round after round, warm. A slow spell of the machine slows the whole round, so each time is
    taken as a share of its round: the result is the median share times the median duration of a round.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):  # warm up: allocator, primitive caches
            call()
        repeats[name] = max(1, round(TURN / max(seconds_of(call), 1e-9)))

    def turn(name: str) -> float:
        calls[name]()  # its weights and code are back in the caches
        return 1e3 * seconds_of(calls[name], repeats[name])

    bar = tqdm(range(rounds), "latencies", unit="round", leave=False, disable=not progress, ncols=110)
    table = [{name: turn(name) for name in calls} for _ in bar]
    typical = statistics.median(sum(row.values()) for row in table)
    return {name: typical * statistics.median(row[name] / sum(row.values()) for row in table) for name in calls}
