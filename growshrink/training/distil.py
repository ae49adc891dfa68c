"""Learning from the logits of another net."""

import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.errors import RunError

#: Bytes of answers that are kept in memory (on the teacher's device); more go to a file.
MOST_IN_MEMORY = 1 << 30


@dataclass(frozen=True)
class TeacherNet:
    """A finished net to learn from: loss = (1 - weight) CE(labels) + weight T^2 KL(teacher || student).

    Attributes:
        model: In eval mode.
        weight: Weight of its loss.
        temperature: Temperature of both softmaxes.
        repeat: Update from which it teaches, and number of updates after which the same batches come again, to be
            learnt from by the answers it has given; None asks it about new batches for ever.
        path: File for answers that do not fit into memory; it has no name once it is mapped.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (arXiv:1503.02531).
    """

    model: nn.Module
    weight: float
    temperature: float
    repeat: tuple[int, int] | None = None
    path: Path | None = None
    _answers: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def question(self, update: int) -> int:
        """The update whose batch is to be learnt from in this one."""
        if self.repeat is None:
            return update
        start, period = self.repeat
        return start + (update - start) % period

    @torch.no_grad()
    def answer(self, question: int, images_NCHW: Tensor) -> Tensor:
        """Its logits `(N, K)` for the batch of an update, computed or read back."""
        if self.repeat is None:
            return self.model(images_NCHW)
        if question not in self._answers:
            logits_NK = self.model(images_NCHW)
            if not self._answers and self.path and self.repeat[1] * logits_NK.nbytes > MOST_IN_MEMORY:
                table = _mapped(self.path, (self.repeat[1], *logits_NK.shape), logits_NK.dtype)
                self._answers.update({-1 - index: row for index, row in enumerate(table)})  # not yet answered
            room = self._answers.pop(self.repeat[0] - question - 1, None)
            self._answers[question] = logits_NK if room is None else room.copy_(logits_NK)
        return self._answers[question].to(images_NCHW.device)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    r"""How far a net's logits `(N, K)` are from its teacher's, 0-dim, mean over the images.

    .. math:: T^2 \cdot \mathrm{KL}(\mathrm{softmax}(teacher / T) \,\|\, \mathrm{softmax}(logits / T))

    The factor keeps the size of its gradient whatever the temperature T > 0.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (arXiv:1503.02531, section 2).
    """
    student_log = F.log_softmax(logits / temperature, dim=1)
    teacher_log = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file, whose room on the disk is free again whatever ends the process; RunError without room."""
    size = torch.Size(shape).numel()
    free, needed = shutil.disk_usage(path.parent).free, size * dtype.itemsize
    if free < needed:  # writing to a mapped file on a full disk ends the process
        raise RunError(f"{path.parent}: {needed:,} bytes are needed for the teacher's answers, {free:,} are free.")
    table = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
    with suppress(OSError):  # where a file in use has to keep its name
        path.unlink()
    return table
