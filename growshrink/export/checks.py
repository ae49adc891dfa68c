"""How far each thing that is exported is from the net it was made from."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from growshrink.base.copying import copy_net
from growshrink.cycle.source import Source
from growshrink.export.artefacts import Function
from growshrink.proofs._compare import (
    EXACT_FLOAT32,
    EXACT_FLOAT64,
    Comparison,
    branch_effect,
    compare,
    net_rounding_float32,
)
from growshrink.proofs.probes import random_images
from growshrink.transforms import fold, fuse

#: At which the batch dimension of exported programs is tried; they were traced at 2.
BATCH_SIZES = (1, 2, 7, 16)


def exactness(source: Source, folded: nn.Module, programs: Mapping[str, Function], seed: int) -> dict[str, Any]:
    """Differences on random images, each with what is allowed.

    In float64 the transforms are judged, in float32 what was written: the weights in files (`folded`), and what other
    files compute (`programs`, by name).

    Returns:
        `checks`, a list of rows (`net`, `against`, `dtype`, `max_abs`, `max_rel`, `allowed`, `ok`); `rounding_float32`
        of the plain net (None where it does not run in float64); and, of a net that was grown, `effect_of_branches`.
    """
    size: dict[str, Any] = {"input_size": source.input_size, "seed": seed}
    exact = _in_float64(source.plain, source, seed)
    rounding = None if exact is None else net_rounding_float32(exact, source.plain, **size)
    allowed = {"float64": EXACT_FLOAT64, "float32": max(EXACT_FLOAT32, 10 * (rounding or 0.0))}
    checks: list[dict[str, Any]] = []

    def add(net: str, against: str, dtype: str, found: Comparison) -> None:
        row = {"net": net, "against": against, "dtype": dtype, "max_abs": found.max_abs, "max_rel": found.max_rel}
        checks.append({**row, "allowed": allowed[dtype], "ok": found.max_rel <= allowed[dtype]})

    result: dict[str, Any] = {"rounding_float32": rounding, "checks": checks}
    if source.grown is not None:
        grown = _in_float64(source.grown, source, seed)
        if grown is not None:
            fused = fuse(grown, input_size=source.input_size)
            add("fused", "grown", "float64", compare(grown, fused, **size))
            result["effect_of_branches"] = branch_effect(grown, **size)
        add("fused", "grown", "float32", compare(source.grown, source.plain, dtype=torch.float32, **size))
    if exact is not None:
        folded_exactly = fold(exact, input_size=source.input_size)
        add("folded", "plain", "float64", compare(exact, folded_exactly, **size))
    add("folded", "plain", "float32", compare(source.plain, folded, dtype=torch.float32, **size))
    for name, program in programs.items():
        dynamic = source.dynamic if name.startswith("dynamic") else None
        for number in BATCH_SIZES:
            x = random_images(source.input_size, number, torch.float32, seed)
            with torch.no_grad():
                found = Comparison.of((dynamic or source.plain)(x), program(x))
            add(f"{name}, batch of {number}", "dynamic" if dynamic else "plain", "float32", found)
    return result


@torch.no_grad()
def _in_float64(net: nn.Module, source: Source, seed: int) -> nn.Module | None:
    """A copy in float64; None where it does not run: some nets make float32 constants inside."""
    double = copy_net(net).double()
    try:
        double(random_images(source.input_size, 2, torch.float64, seed))
    except RuntimeError:
        return None
    return double
