import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from growshrink.training import evaluate
from growshrink.training._evaluate import judge
from nets import net, randomized


class Batches:
    """A split of random images in batches of given sizes."""

    def __init__(self, *sizes):
        random = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(n, 3, 8, 8, generator=random), torch.randint(10, (n,), generator=random)) for n in sizes
        ]

    def __len__(self):
        return sum(len(labels) for _, labels in self.batches)

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("sizes", [(12,), (5, 5, 2), (1,) * 12], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_score_is_the_mean_over_images_whatever_the_batches(sizes, training):
    model = randomized(net()).train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = Batches(*sizes)
    score = evaluate(model, batches)
    model.eval()
    right, loss = 0, 0.0
    with torch.no_grad():
        for images, labels in batches:
            for image, label in zip(images, labels, strict=True):
                logits = model(image[None])
                right += int(logits.argmax() == label)
                loss += float(F.cross_entropy(logits, label[None]))
    assert score.top1 == pytest.approx(100 * right / 12)
    assert score.loss == pytest.approx(loss / 12, rel=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_no_graph_is_kept(training):
    class Probe(nn.Module):
        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            return x.flatten(1)[:, :10]

    model = Probe().train(training)
    evaluate(model, Batches(4))
    assert model.training == training


def test_nan_is_reported_as_nan():
    model = net()
    nn.init.constant_(model.get_classifier().bias, math.nan)
    assert math.isnan(evaluate(model, Batches(4)).loss)


def test_what_is_behind_a_score():
    sklearn = pytest.importorskip("sklearn.metrics")
    model, batches = randomized(net()).eval(), Batches(20, 20, 7)
    judged = judge(model, batches, 5)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = model(images).detach()
    guess, losses = logits.argmax(1), F.cross_entropy(logits, labels, reduction="none")
    assert judged.confusion.tolist() == sklearn.confusion_matrix(labels, guess, labels=range(10)).tolist()
    assert judged.score == evaluate(model, batches)
    assert judged.score.balanced == pytest.approx(100 * sklearn.balanced_accuracy_score(labels, guess))
    there = sorted(set(labels.tolist()))
    macro = sklearn.f1_score(labels, guess, labels=there, average="macro", zero_division=0.0)
    assert judged.score.macro_f1 == pytest.approx(100 * macro)
    worst = losses.argsort(descending=True)[:5]
    assert torch.equal(judged.worst, images[worst]) and judged.labels.tolist() == labels[worst].tolist()
    assert judged.taken_for.tolist() == guess[worst].tolist()
