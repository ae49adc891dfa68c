"""How much memory a data set may take."""

from __future__ import annotations

import os
from pathlib import Path

from growshrink.errors import DataError


def available_bytes() -> int | None:
    """Memory in bytes that could be allocated without swapping; None where the system does not tell.

    Linux's own estimate, lowered to what a container (cgroup v2) is allowed; elsewhere all physical memory.
    """
    amounts = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        amounts += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        try:
            amounts.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (AttributeError, OSError, ValueError):
            pass  # Windows: no limit is known
    try:
        cgroup = Path("/sys/fs/cgroup")
        limit, used = ((cgroup / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        amounts.append(max(int(limit) - int(used), 0))
    except (OSError, ValueError):
        pass  # no cgroup, or its limit is "max"
    return min(amounts, default=None)


def check_fits(size: int, what: str) -> None:
    """DataError for `size` bytes (decoded) above half of the available memory; the rest is for copies and training."""
    available = available_bytes()
    if available is not None and size > available / 2:
        raise DataError(
            f"{what}: {size / 2**30:.2f} GiB of decoded images exceed half of the {available / 2**30:.2f} GiB memory "
            "available; give a smaller image_size (--image-size), or read class folders with "
            "growshrink.data.stream_data (--stream)."
        )
