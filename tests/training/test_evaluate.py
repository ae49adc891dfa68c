import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from growshrink.training import evaluate
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
