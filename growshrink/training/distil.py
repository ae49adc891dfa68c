"""Learning from the logits of another net."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.training.answers import Answers


@dataclass(frozen=True)
class TeacherNet:
    """A finished net to learn from: loss = (1 - weight) CE(labels) + weight T^2 KL(teacher || student).

    Attributes:
        model: In eval mode.
        weight: Weight of its loss.
        temperature: Temperature of both softmaxes.
        repeat: Update from which it teaches, and number of updates after which the same batches come again, to be
            learnt from by the answers it has given; None asks it about new batches for ever.
        path: File for answers that do not fit into memory; see `Answers`.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (arXiv:1503.02531).
    """

    model: nn.Module
    weight: float
    temperature: float
    repeat: tuple[int, int] | None = None
    path: Path | None = None
    _answers: Answers = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_answers", Answers(self.repeat[1] if self.repeat else 0, self.path))

    def question(self, update: int) -> int:
        """The update whose batch is to be learnt from in this one."""
        if self.repeat is None:
            return update
        start, period = self.repeat
        return start + (update - start) % period

    @torch.no_grad()
    def answer(self, question: int, images_NCHW: Tensor) -> Tensor:
        """Its logits `(N, K)` for the batch of an update, given for the first time or once more."""
        if self.repeat is None:
            return self.model(images_NCHW)
        index = question - self.repeat[0]
        if index not in self._answers:
            self._answers[index] = self.model(images_NCHW)
        return self._answers[index].to(images_NCHW.device)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    r"""How far a net is from its teacher, 0-dim.

    .. math:: T^2 \cdot \mathrm{KL}(\mathrm{softmax}(teacher / T) \,\|\, \mathrm{softmax}(logits / T))

    averaged over the images; the factor keeps the size of its gradient whatever the temperature.

    Args:
        logits: `(N, K)`.
        teacher_logits: `(N, K)`; no gradient flows into it if it has none.
        temperature: T > 0.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (arXiv:1503.02531, section 2).
    """
    student_log = F.log_softmax(logits / temperature, dim=1)
    teacher_log = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
