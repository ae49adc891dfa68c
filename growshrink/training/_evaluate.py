"""How good a net is on a split."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.data.batches import Batch
from growshrink.data.feed import ScoringBatches

Loss = Callable[[nn.Module, Batch], Tensor]
"""Loss of a net on a batch, 0-dim: the mean over its images."""


@dataclass(frozen=True)
class Score:
    """How good a net is on a split.

    Attributes:
        top1: Percent of images classified right; with a loss of the caller's, minus that loss.
        loss: Mean cross-entropy in nats, or that loss.
        balanced: Mean of the classes' recalls in percent, each class counting alike.
        macro_f1: Mean of the classes' F1 in percent.
    """

    top1: float
    loss: float
    balanced: float = 0.0
    macro_f1: float = 0.0


@dataclass(frozen=True, eq=False)
class Judgement:
    """A score, and what is behind it.

    Attributes:
        confusion: Number of images by class (row) and by what the net takes them for (column), int64 (K, K).
        worst: The images with the highest losses, (N, C, H, W) normalised, with their `labels` and what the net has
            `taken_for` them, int64 (N,).
    """

    score: Score
    confusion: Tensor
    worst: Tensor
    labels: Tensor
    taken_for: Tensor


def evaluate(model: nn.Module, batches: ScoringBatches, loss: Loss | None = None) -> Score:
    """Score `model` in eval mode on every image of a split, each once; the model's mode is restored.

    With `loss` it need not classify: its score is minus the mean of that.
    """
    return judge(model, batches, 0, loss).score


@torch.no_grad()
def judge(model: nn.Module, batches: ScoringBatches, num_worst: int = 12, own: Loss | None = None) -> Judgement:
    """See `evaluate`; the `num_worst` images with the highest losses are kept, with a loss of one's `own` none."""
    was_training = model.training
    model.eval()
    if own is not None:
        mean = sum(float(own(model, batch)) * len(batch[0]) for batch in batches) / len(batches)
        model.train(was_training)
        return Judgement(Score(top1=-mean, loss=mean), *[torch.empty(0)] * 4)
    loss, confusion, kept = list[Tensor](), list[Tensor](), list[list[Tensor]]()
    for images_NCHW, labels_N in batches:
        logits = model(images_NCHW)  # never in bfloat16: a net and its fused form are to score the same
        guess, classes = logits.argmax(1), logits.shape[1]
        confusion.append((labels_N * classes + guess).bincount(minlength=classes * classes).view(classes, classes))
        losses = F.cross_entropy(logits.float(), labels_N, reduction="none")
        loss.append(losses.sum())
        if num_worst:
            top = losses.topk(min(num_worst, len(losses))).indices
            found = [row[top] for row in (losses, images_NCHW, labels_N, guess)]
            found = [torch.cat(pair) for pair in zip(*kept, found, strict=True)]
            order = found[0].argsort(descending=True)[:num_worst]
            kept = [[row[order] for row in found]]
    model.train(was_training)
    table = torch.stack(confusion).sum(0).cpu()
    hits, there, taken = table.diag().double(), table.sum(1).double(), table.sum(0).double()
    some = there > 0
    score = Score(
        top1=100.0 * int(hits.sum()) / len(batches),
        loss=float(sum(loss)) / len(batches),
        balanced=100.0 * float((hits[some] / there[some]).mean()),
        macro_f1=100.0 * float((2 * hits[some] / (there[some] + taken[some])).mean()),
    )
    _, *worst = kept[0] if kept else [torch.empty(0)] * 4
    return Judgement(score, table, *(each.cpu() for each in worst))
