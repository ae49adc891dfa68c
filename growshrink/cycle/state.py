"""What a trainer holds at any moment, and how a run goes to disk and comes back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from growshrink.base.config import to_dict
from growshrink.base.ranks import all_gather, this_rank
from growshrink.cycle.records import RunState
from growshrink.errors import RunError
from growshrink.runs.checkpoints import (
    find_checkpoints,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from growshrink.training.gradient_maps import GradientMaps
from growshrink.training.trainer import Trainer


def values_of(trainer: Trainer) -> dict[str, Any]:
    """Everything about a trainer that changes while its structure stays: weights, average, optimizer, random states.

    Every rank is to call this, as each has random states of its own; all else they have in common.
    """
    values: dict[str, Any] = {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer_state(),
        "random": all_gather(random_state()),
    }
    if trainer.ema is not None:
        values["ema"] = trainer.ema.state_dict()
    if trainer.gradient_maps is not None:
        values["gradients"] = trainer.gradient_maps.state_dict()
    return values


def set_values(trainer: Trainer, values: Mapping[str, Any]) -> None:
    """The inverse of `values_of`, on a trainer of the same structure whose optimizer has no state yet.

    Raises:
        RunError: They are of another structure; the message names the first difference.
    """
    for net, key in ((trainer.model, "model"), (trainer.ema, "ema")):
        if net is not None:
            load_values(net, values[key])
    trainer.load_optimizer_state(values["optimizer"])
    if "gradients" in values:
        trainer.map_gradients(GradientMaps.from_state_dict(values["gradients"]))
    set_random_state(values["random"][this_rank()])


def load_values(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    """`load_state_dict`, with a RunError that names the first difference."""
    own = net.state_dict()
    for name in [*own, *values]:
        then, now = (tuple(state[name].shape) if name in state else "nothing" for state in (values, own))
        if then != now:
            raise RunError(f"of another model ({name}: {then} then, {now} now).")
    net.load_state_dict(values)


def snapshot(trainer: Trainer) -> dict[str, Any]:
    """A copy of `values_of`, to go back to."""
    return copy.deepcopy(values_of(trainer))


def undo(trainer: Trainer, before: Mapping[str, Any]) -> None:
    """Put back, bit for bit, what `snapshot` has copied before a net of this same structure was grown and fused."""
    trainer.structure_changed(reset=dict(trainer.model.named_parameters()))  # an optimizer without any state
    set_values(trainer, before)


def save_run(
    folder: Path,
    next_phase: int,
    state: RunState,
    trainer: Trainer,
    *,
    identity: Mapping[str, Any],
    teacher: nn.Module | None,
    before: Mapping[str, Any] | None,
    keep: int,
) -> Path | None:
    """Write a checkpoint: everything that the updates still to come depend on. Rank 0 writes, and has its path.

    Args:
        folder: Of the run.
        next_phase: The number of the phase that the next update belongs to.
        state: Plain values.
        trainer: What is trained.
        identity: What the run is: a checkpoint is loaded into the same one only.
        teacher: Learnt from, or None.
        before: A `snapshot` that the round may have to go back to, or None.
        keep: How many checkpoints are kept.
    """
    values: dict[str, Any] = {
        "update": trainer.update,
        "next_phase": next_phase,
        "run": to_dict(state),
        "identity": identity,
        **values_of(trainer),
    }
    if trainer.cut_short is not None:
        values["cut_short"] = list(trainer.cut_short)
    if teacher is not None:
        values["teacher"] = teacher.state_dict()
    if before is not None:
        values["before"] = before
    return save_checkpoint(folder, trainer.update, values, keep) if this_rank() == 0 else None


def newest_run(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, or None if there is none at all.

    Raises:
        RunError: There are checkpoints, and all of them are damaged.
    """
    found = find_checkpoints(folder)
    for path in found:
        try:
            return path, load_checkpoint(path)
        except RunError as error:
            warn(f"{error} Trying the one before.")
    if found:
        raise RunError(f"{folder}: its checkpoints ({len(found)}) are all damaged; choose another folder.")
    return None
