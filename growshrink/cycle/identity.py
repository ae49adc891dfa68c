"""What a run is: it is resumed as the same one only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from growshrink.base.ranks import num_ranks
from growshrink.cycle.timeline import Timeline
from growshrink.data.feed import Feed
from growshrink.errors import RunError
from growshrink.runs.folder import difference
from growshrink.training.trainer import TrainConfig


def identity_of(feed: Feed, timeline: Timeline, config: TrainConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the result of a run depends on, as plain values."""
    data = {
        "name": feed.name,
        "batch_size": feed.train.batch_size,
        "input_size": list(feed.input_size),
        "mean": list(feed.mean),
        "std": list(feed.std),
        "val_images": len(feed.val),
        "test_images": len(feed.test),
        "fingerprint": getattr(feed, "fingerprint", None),  # a feed of the user's own need not have one
    }
    return {
        **about,
        "plan": timeline.plan.to_dict(),
        "config": asdict(config),
        "data": data,
        "updates": timeline.total,
        "ranks": num_ranks(),
    }


def check_identity(written: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """RunError unless a checkpoint is of the run with this `identity`, naming the first difference."""
    if found := difference(written, identity):
        raise RunError(f"it is of a run with another {found}.")
