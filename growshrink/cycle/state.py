"""What a run is made of at any moment, and how it goes to disk and comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from growshrink.errors import RunError
from growshrink.training.checkpoints import find_checkpoints, load_checkpoint, random_state, save_checkpoint
from growshrink.training.trainer import Trainer


@dataclass
class RunState:
    """What a checkpoint holds beside tensors: plain values, all of it written to and read from JSON."""

    log: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    macs_spent: int = 0
    seconds: float = 0.0
    lam: dict[str, Any] = field(default_factory=dict)  # of a LamControl
    teacher_log: int | None = None  # entries of the log that make the teacher's structure; None: no teacher


def save_run(folder: Path, next_segment: int, state: RunState, trainer: Trainer, teacher: nn.Module | None) -> None:
    """Write a checkpoint: everything that the updates still to come depend on."""
    values: dict[str, Any] = {
        "update": trainer.update,
        "next_segment": next_segment,
        "run": asdict(state),
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer_state(),
        "random": random_state(),
    }
    if trainer.ema is not None:
        values["ema"] = trainer.ema.state_dict()
    if teacher is not None:
        values["teacher"] = teacher.state_dict()
    save_checkpoint(folder, trainer.update, values)


def newest_run(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, or None if there is none at all.

    Raises:
        RunError: There are checkpoints, and all of them are damaged.
    """
    found = find_checkpoints(folder)
    for path in found:
        try:
            return path, load_checkpoint(path)
        except RunError as error:
            say(f"{error} Trying the one before.")
    if found:
        raise RunError(f"{folder}: its checkpoints ({len(found)}) are all damaged; choose another folder.")
    return None
