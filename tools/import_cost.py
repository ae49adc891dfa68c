"""What `import growshrink` costs beside `import timm`: fresh processes, interleaved, the median of the pairs' ratios.

    python tools/import_cost.py        exit code 1 above AT_MOST

What each module costs: python -X importtime -c "import timm; import growshrink".
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

PAIRS = 9
AT_MOST = 1.15


def seconds(module: str) -> float:
    """Wall time of a fresh process that imports a module."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - began


def main() -> int:
    """Print the ratio; 1 if it is too high."""
    modules = ("timm", "growshrink")
    for module in modules:  # the first time, files are compiled and read from the disk
        seconds(module)
    ratios = []
    for number in range(PAIRS):
        taken = {module: seconds(module) for module in modules[:: (-1) ** number]}
        ratios.append(taken["growshrink"] / taken["timm"])
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    print(f"import growshrink: {ratio:.2f} times import timm ({PAIRS} pairs, quartiles {low:.2f} to {high:.2f})")
    return int(ratio > AT_MOST)


if __name__ == "__main__":
    sys.exit(main())
