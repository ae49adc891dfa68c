import copy

import pytest
import torch
from torch import nn

from growshrink.training.calibrate import calibrate_bn
from nets import net, randomized


@pytest.mark.parametrize("before", [100.0, 1e300, torch.inf, torch.nan])
def test_statistics_are_the_plain_average_over_the_batches(before):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3)).double()
    batches = [torch.randn(5, 3, 8, 8, dtype=torch.float64) * scale for scale in (1, 2, 4)]
    model[1].running_mean.fill_(before)
    model[1].running_var.fill_(before)
    calibrate_bn(model, batches)
    with torch.no_grad():
        outputs = [model[0](x).transpose(0, 1).flatten(1) for x in batches]
    assert torch.allclose(model[1].running_mean, sum(y.mean(1) for y in outputs) / 3, atol=1e-12)
    assert torch.allclose(model[1].running_var, sum(y.var(1) for y in outputs) / 3, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_nothing_but_the_statistics_changes(training):
    model = randomized(net(drop_rate=0.5)).train(training)
    before = copy.deepcopy(model)
    random = torch.get_rng_state()
    calibrate_bn(model, iter([torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))] * 3))
    assert torch.equal(torch.get_rng_state(), random)
    for (name, a), b in zip(model.named_modules(), before.modules(), strict=True):
        assert a.training == b.training and getattr(a, "momentum", None) == getattr(b, "momentum", None), name
    for name, value in model.state_dict().items():
        statistic = "running" in name or "tracked" in name
        assert torch.equal(value, before.state_dict()[name]) != statistic, name


def test_without_a_batch_nothing_changes():
    model = randomized(net())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate_bn(model, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
