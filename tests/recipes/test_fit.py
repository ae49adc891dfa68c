from pathlib import Path

import pytest
import torch

from growshrink.training import TrainConfig
from nets import Batches, net
from program import beside

fit = beside(Path(__file__).parents[2] / "recipes" / "trained.py").fit


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_what_comes_back_can_be_trained_further(ema_decay):
    model = net("reducenet20", width=0.1)
    model.head.fc.bias.requires_grad_(False)
    first = fit(model, Batches(), TrainConfig(lr=0.01, ema_decay=ema_decay), updates=2)
    assert not first.training and (first is model) == (ema_decay == 0)
    before = {name: p.detach().clone() for name, p in first.named_parameters()}
    second = fit(first, Batches(), TrainConfig(lr=0.01, ema_decay=0.0), updates=2)
    same = [name for name, p in second.named_parameters() if torch.equal(p, before[name])]
    assert same == ["head.fc.bias"]
