"""Learning from the logits of another net."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


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
