"""Timing utilities and machine description."""

import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from growshrink.base.progress import progress_bar

Call = Callable[[], object]

#: A turn lasts about this many seconds (a call is repeated within it): far above the clock's resolution, and shorter
#: than the slices in which a busy system hands out its cores.
TURN = 0.001
#: Seconds of a call above which it is warm after one, and timed alone.
LONG = 0.05


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
    calls: Mapping[str, Call],
    *,
    rounds: int = 200,
    own_thread: bool = False,
    device: torch.device | None = None,
    at_most: float = math.inf,
    progress: bool = False,
) -> dict[str, float]:
    """Time several calls, interleaved: milliseconds per warm call of each.

    All calls take `rounds` turns, so a slow spell of the machine meets all of them alike; no round begins after
    `at_most` seconds, except the first. The result is the lowest decile over the rounds: other processes only ever add
    to a time, on a busy machine to most turns. `own_thread`, for calls that do all their work in one thread, leaves out
    the time in which it waited for a core; `device` is waited for. A call above `LONG` is warm after one.
    """
    began, repeats = time.perf_counter(), {}
    if device is not None and device.type != "cpu":
        calls = {name: partial(_finish, call, device) for name, call in calls.items()}
    for name, call in calls.items():
        seconds = seconds_of(call, own_thread=own_thread)
        if seconds < LONG:
            for _ in range(2):  # warm up: allocator, primitive caches
                call()
            seconds = seconds_of(call, own_thread=own_thread)
        repeats[name] = max(1, round(TURN / max(seconds, 1e-9))) if seconds < LONG else 0
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in progress_bar(range(rounds), "latencies", unit="round", show=progress):
        if number and time.perf_counter() - began > at_most:
            break
        for name, call in calls.items():
            if repeats[name]:
                call()  # its weights and code are back in the caches
            times[name].append(1e3 * seconds_of(call, repeats[name] or 1, own_thread=own_thread))
    return {name: float(np.quantile(values, 0.1)) for name, values in times.items()}


def _finish(call: Call, device: torch.device) -> None:
    call()
    getattr(torch, device.type).synchronize(device)
