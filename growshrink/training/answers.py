"""The logits a teacher has given, kept to be used again."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from growshrink.errors import RunError

#: Bytes that are kept in memory (the teacher's device); more go to a file.
MOST_IN_MEMORY = 1 << 30


class Answers:
    """Logits by number of the batch: in memory, or in a file that is mapped into it where they would not fit.

    The file has no name once it is mapped: whatever ends the process, its room on the disk is free again.

    Args:
        number: How many batches there will be, from 0.
        path: The file; None keeps all in memory.
    """

    def __init__(self, number: int, path: Path | None = None) -> None:
        self._number, self._path = number, path
        self._table: Tensor | None = None
        self._kept: dict[int, Tensor] = {}

    def __contains__(self, index: int) -> bool:
        """Whether batch number `index` has been answered."""
        return index in self._kept

    def __getitem__(self, index: int) -> Tensor:
        """The logits `(N, K)` of a batch, where they are kept."""
        return self._kept[index]

    def __setitem__(self, index: int, logits_NK: Tensor) -> None:
        """Keep those of a batch; all have the same shape. RunError where the disk is too full."""
        if self._path is not None and not self._kept and self._number * logits_NK.nbytes > MOST_IN_MEMORY:
            self._table = _mapped(self._path, (self._number, *logits_NK.shape), logits_NK.dtype)
        self._kept[index] = logits_NK if self._table is None else self._table[index].copy_(logits_NK)


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape in a file."""
    size = torch.Size(shape).numel()
    free, needed = shutil.disk_usage(path.parent).free, size * dtype.itemsize
    if free < needed:  # writing to a mapped file on a full disk ends the process
        raise RunError(f"{path.parent}: {needed:,} bytes are needed for the teacher's answers, {free:,} are free.")
    table = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
    with suppress(OSError):  # where a file in use has to keep its name
        path.unlink()
    return table
