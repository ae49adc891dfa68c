import copy

import pytest
import torch
from torch import nn

import growshrink as gs
from growshrink.errors import GrowShrinkError
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


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, mask=None):
        return self.norm(x)


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) + 2
BATCHES = {
    "images": X,
    "images and labels": (X, torch.arange(6)),
    "list": [X, torch.arange(6)],
    "keyword arguments": {"x": X, "mask": None, "label": torch.arange(6)},
    "dict of other names": {"image": X, "label": torch.arange(6)},
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_as_loaders_give_them(name):
    model = ByName()
    calibrate_bn(model, [BATCHES[name]])
    assert torch.allclose(model.norm.running_mean, X.mean(0)) and torch.allclose(model.norm.running_var, X.var(0))


@pytest.mark.parametrize("batch", [None, 3, {}, {"label": 1}, (), ({"x": X},)], ids=str)
def test_a_batch_of_something_else_is_one_short_line(batch):
    with pytest.raises(GrowShrinkError, match="a batch must be images, ") as caught:
        calibrate_bn(ByName(), [batch])
    assert len(str(caught.value)) < 200 and "tensor(" not in str(caught.value)


def test_a_norm_whose_tracking_was_switched_on_later():
    late, off, none = nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    late.track_running_stats, late.running_mean, late.running_var = True, torch.zeros(3), torch.ones(3)
    off.track_running_stats = False  # an eval pass reads what it gathered before
    none.track_running_stats, none.running_mean, none.running_var = True, None, None
    model = nn.Sequential(late, off, none)
    calibrate_bn(model, [X])
    with torch.no_grad():
        expected = nn.functional.batch_norm(X, None, None, training=True)
    assert torch.allclose(late.running_mean, X.mean(0)) and int(late.num_batches_tracked) == 1
    assert torch.allclose(off.running_var, expected.var(0)) and not off.track_running_stats
    assert none.running_mean is None


@pytest.mark.filterwarnings("ignore")  # lazy modules and TorchScript announce their ends
@pytest.mark.parametrize(
    "function", [gs.grow, gs.fuse, gs.drop, gs.fold, gs.growth_report, gs.profile, gs.verify, gs.random_prune]
)
def test_nets_that_cannot_be_looked_into_are_one_line(function):
    lazy = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyConv2d(4, 3))
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)))
    with pytest.raises(
        GrowShrinkError, match="^1 is lazy, its parameters do not exist yet: run the model once before.$"
    ):
        function(lazy)
    if function not in (gs.fuse, gs.drop, gs.verify):  # there is nothing to do, or nothing in it to prove
        with pytest.raises(
            GrowShrinkError, match="^the model is TorchScript, which cannot be looked into: pass the net"
        ):
            function(scripted, input_size=(3, 5, 5))
    with pytest.raises(GrowShrinkError, match="^a model must be an nn.Module, got a Tensor.$"):
        function(X)
