"""A training that a killed process loses at most a minute of (not a program)."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from growshrink.base.stopping import finishing
from growshrink.cycle.surgery import set_values, values_of
from growshrink.runs.checkpoints import newest_checkpoint, save_checkpoint
from growshrink.schedules.closed_loop import ClosedLoop
from growshrink.training import Trainer

#: Seconds between two checkpoints.
CHECKPOINT_EVERY = 60.0


def train_kept(folder: Path, trainer: Trainer, stop: int, **how: Any) -> Tensor:
    """Do `trainer.train(stop, **how)`, from the newest checkpoint in `folder`; the result is the same, bit for bit.

    There is one every `CHECKPOINT_EVERY` seconds and on the first SIGTERM or Ctrl-C; at the end the folder is removed.
    """
    lam, advance = how["lam"], how.get("after_update")
    if found := newest_checkpoint(folder, lambda text: print(text, file=sys.stderr)):
        kept = found[1]
        set_values(trainer, kept["trainer"])
        trainer.update, trainer.cut_short = kept["update"], (kept["first"], kept["total"])
        if isinstance(lam, ClosedLoop):
            lam.load_state_dict(kept["lam"])
        if advance is not None:
            advance(kept["update"])  # of a progress bar
    with finishing() as came:
        while True:
            mean = trainer.train(stop, stop_early=partial(_due, came, time.monotonic()), **how)
            if trainer.cut_short is None:
                break
            (first, total), state = trainer.cut_short, lam.state_dict() if isinstance(lam, ClosedLoop) else None
            folder.mkdir(parents=True, exist_ok=True)
            values = {"update": trainer.update, "first": first, "total": total, "lam": state}
            save_checkpoint(folder, trainer.update, {**values, "trainer": values_of(trainer)})
            if came() is not None:
                break  # `finishing` raises
    shutil.rmtree(folder, ignore_errors=True)
    return mean


def _due(came: Callable[[], int | None], since: float) -> bool:
    return came() is not None or time.monotonic() - since > CHECKPOINT_EVERY
