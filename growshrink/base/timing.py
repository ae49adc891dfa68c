"""Timing utilities and machine description."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from growshrink.base.progress import progress_bar

Call = Callable[[], object]

#: A turn lasts about this many seconds (a call is repeated within it): far above the clock's resolution, and shorter
#: than the slices in which a busy system hands out its cores.
TURN = 0.001


def seconds_of(call: Call, calls: int = 1, *, own_thread: bool = False) -> float:
    """Per call; with `own_thread` those in which this thread had a core."""
    clock = time.thread_time if own_thread else time.perf_counter
    began = clock()
    for _ in range(calls):
        call()
    return (clock() - began) / calls


def machine() -> dict[str, Any]:
    """What the times depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return {"processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def interleaved_timings(
    calls: Mapping[str, Call], *, rounds: int = 200, own_thread: bool = False, progress: bool = False
) -> dict[str, float]:
    """Time several calls, interleaved: milliseconds per warm call of each.

    All calls take `rounds` turns, so a slow spell of the machine meets all of them alike. The result is the lowest
    decile over the rounds: other processes only ever add to a time, on a busy machine to most turns. `own_thread`, for
    calls that do all their work in one thread, leaves out the time in which it waited for a core.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):  # warm up: allocator, primitive caches
            call()
        repeats[name] = max(1, round(TURN / max(seconds_of(call, own_thread=own_thread), 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in progress_bar(range(rounds), "latencies", unit="round", show=progress):
        for name, call in calls.items():
            call()  # its weights and code are back in the caches
            times[name].append(1e3 * seconds_of(call, repeats[name], own_thread=own_thread))
    return {name: statistics.quantiles(values, n=10, method="inclusive")[0] for name, values in times.items()}


def seconds_interleaved(
    calls: Mapping[str, Call], *, device: torch.device, rounds: int = 5, at_most: float = 5.0
) -> dict[str, float]:
    """Time long calls, training steps say, to choose the fastest: median seconds of a warm call of each.

    They take turns, so a slow spell of the machine meets all alike. A first call of each is left out (it may compile),
    and no round begins after `at_most` seconds, except the first.
    """

    def timed(call: Call) -> float:
        began = time.perf_counter()
        call()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize(device)
        return time.perf_counter() - began

    began = time.perf_counter()
    for call in calls.values():
        timed(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        if number and time.perf_counter() - began > at_most:
            break
        for name, call in calls.items():
            times[name].append(timed(call))
    return {name: statistics.median(values) for name, values in times.items()}
