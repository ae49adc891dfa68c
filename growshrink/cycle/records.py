"""What the record of a round says of the net that has just been grown."""

from __future__ import annotations

from typing import Any

from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.cycle.log import replay
from growshrink.cycle.plan import RoundPlan
from growshrink.layers.grown import grown_modules
from growshrink.proofs._profile import profile, training_macs
from growshrink.transforms import growth_report


def round_record(
    plan: RoundPlan, grown: nn.Module, initial: nn.Module, input_size: InputSize, *, built_grown: bool
) -> dict[str, Any]:
    """Sizes and costs, for report.json.

    Args:
        plan: Of the round.
        grown: With its branches.
        initial: The net the run began with.
        input_size: `(C, H, W)`.
        built_grown: It had its branches before.
    """
    plain = replay(initial, [{"op": "fuse"}], input_size)
    before, after = profile(grown if built_grown else plain, input_size), profile(grown, input_size)
    return {
        "branch": ["born grown"] if built_grown else list(plan.branch),
        "ratio": plan.ratio,
        "augment": plan.augment,
        "distil": plan.distil,
        "num_grown": len(grown_modules(grown)),
        "num_skipped": len(growth_report(grown, input_size=input_size).skipped),
        "params": {"plain": before.params, "grown": after.params},
        "macs": {"plain": before.macs, "grown": after.macs},
        "plain_step_macs": training_macs(plain, input_size),
    }
