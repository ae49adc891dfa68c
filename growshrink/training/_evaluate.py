"""How good a net is on a split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from growshrink.data.feed import ScoringBatches


@dataclass(frozen=True)
class Score:
    """top1: percent of images classified right. loss: mean cross-entropy in nats."""

    top1: float
    loss: float


@torch.no_grad()
def evaluate(model: nn.Module, batches: ScoringBatches) -> Score:
    """Score `model` in eval mode on every image of a split, each once; the model's mode is restored."""
    was_training = model.training
    model.eval()
    right: list[torch.Tensor] = []
    loss: list[torch.Tensor] = []
    for images_NCHW, labels_N in batches:
        logits = model(images_NCHW)  # never in bfloat16: a net and its fused form are to score the same
        right.append((logits.argmax(1) == labels_N).sum())
        loss.append(F.cross_entropy(logits.float(), labels_N, reduction="sum"))
    model.train(was_training)
    return Score(100.0 * float(sum(right)) / len(batches), float(sum(loss)) / len(batches))
