"""Options of programs that train nets with several seeds and compare them."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from growshrink.base.limits import Count, NotAll, Positive, Threads
from growshrink.cli.options import DataOptions, TrainOptions
from growshrink.data.feed import Feed
from growshrink.errors import PlanError
from growshrink.runs.folder import RunFolder


@dataclass(kw_only=True)
class ComparisonOptions(TrainOptions, DataOptions):
    """Data, training, seeds, and where the comparison goes; it runs on the CPU."""

    epochs: Positive = 30.0
    """Of each training."""
    ema_decay: NotAll = 0.0
    """Of the averaged weights, which are then what is compared; 0 for none."""
    seeds: Count = 1
    """How many times to train everything."""
    threads: Threads = 1
    """Of torch."""
    out: Path | None = None
    """Folder of the run; by default runs/DATA-MODEL-PROGRAM, numbered if taken."""
    quiet: bool = False
    """No progress bars."""

    def check(self, *, least_seeds: int = 1) -> None:
        """PlanError unless there are enough seeds, and a net can be trained as asked for."""
        self.train_config()
        if self.seeds < least_seeds:
            raise PlanError(f"--seeds {self.seeds}: must be at least {least_seeds}.")

    def claim(self, program: str) -> RunFolder:
        """The folder of the run."""
        if self.out is not None:
            return RunFolder.claim(self.out)
        name = f"{Path(self.data).resolve().name}-{self.model}-{program}".replace("/", "-")
        return RunFolder.claim_next(Path("runs"), name)

    def seed_feed(self, seed: int) -> Feed:
        """Batches of the data set, for one of the seeds."""
        return self.load_feed(
            batch_size=self.batch_size, seed=seed, device=torch.device("cpu"), progress=not self.quiet
        )

    def updates_of(self, epochs: float, feed: Feed) -> int:
        """Updates in so many epochs."""
        return max(1, round(epochs * feed.train.updates_per_epoch))

    def record(self) -> dict[str, Any]:
        """What a run writes down about itself."""
        options = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        return {"command": shlex.join(["python", *sys.argv]), "options": options}
