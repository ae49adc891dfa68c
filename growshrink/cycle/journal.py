"""Progress of a run: rows in log.jsonl and in TensorBoard, and a progress bar."""

import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from growshrink.base.progress import progress_bar
from growshrink.base.ranks import this_rank
from growshrink.base.writing import json_line, write_atomic
from growshrink.cycle.records import RoundRecord, Row
from growshrink.errors import RunError


class Journal:
    """The running record of a run of `total` updates in `folder`; on several ranks that of rank 0, others are mute."""

    def __init__(self, folder: Path, total: int, *, progress: bool, tensorboard: bool) -> None:
        self._mute = this_rank() > 0
        progress, tensorboard = progress and not self._mute, tensorboard and not self._mute
        self._path = folder / "log.jsonl"
        self._writer = _tensorboard_writer(folder) if tensorboard else None
        self._progress = progress
        self._bar = progress_bar(total=total, show=progress, smoothing=0.05, leave=True, delay=0)

    def restart(self, rows: Iterable[Row], update: int) -> None:
        """Continue after `update` updates: `rows` are what has been written so far, later ones are forgotten."""
        if not self._mute:
            write_atomic(self._path, "".join(json_line(asdict(row)) for row in rows).encode())
        if self._progress:
            self._bar.n = self._bar.initial = update  # the rate, and with it the time left, count from here

    def updated(self) -> None:
        """One more update is done."""
        self._bar.update()

    def enter(self, name: str) -> None:
        """Name the phase beside the bar."""
        self._bar.set_description(name, refresh=False)

    def add(self, row: Row) -> None:
        """Write a row."""
        if self._mute:
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json_line(asdict(row)))
        self._bar.set_postfix(loss=f"{row.train_loss:.3f}", val=f"{row.val_top1:.1f}", refresh=False)
        if self._writer is not None:
            for key in ("train_loss", "val_top1", "val_loss", "lr", "images_per_second"):
                self._writer.add_scalar(key, getattr(row, key), row.update)
            self._writer.add_scalar("lam", row.lam or 0.0, row.update)

    def warn(self, text: str) -> None:
        """A line on stderr, asked for or not."""
        if not self._mute:
            self._bar.write(text, file=sys.stderr)

    def end_round(self, record: RoundRecord) -> None:
        """A line above the bar on the round that is over."""
        if not self._progress:
            return
        stages = ("before", "peak", "vanished", "fused", "end")
        parts = [f"{name} {value:.2f}" for name in stages if (value := getattr(record.top1, name)) is not None]
        undone = " (undone)" if record.undone else ""
        self._bar.write(f"round {record.number} ({', '.join(record.branch)}): val top-1 {' -> '.join(parts)}{undone}")

    def close(self) -> None:
        """Remove nothing, close everything."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()


def _tensorboard_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError("TensorBoard is not installed: pip install tensorboard.") from error
    return SummaryWriter(str(folder / "tensorboard"))
