"""Numbers that fade to their running mean."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

import growshrink as gs
from growshrink.base import ranks
from growshrink.errors import AlgebraError
from growshrink.layers.activations import Fading
from growshrink.training import TrainConfig, Trainer, calibrate_bn
from nets import Batches, ConvNet, images


def test_the_formula_and_the_running_mean():
    fade = Fading(3, start=0.5).double()
    g, mean = torch.randn(7, 3, dtype=torch.float64), torch.full((3,), 0.5)
    for lam in (1.0, 0.4, 0.1, 0.0, 0.0):
        gs.set_lambda(fade, lam)
        if lam:
            mean = mean + 0.1 * (g.float().mean(0) - mean)
        c = fade(g)
        assert torch.allclose(fade.mean, mean, atol=1e-7), "it rests at lam = 0"
        assert torch.allclose(c, fade.mean.double() + fade.lam.double() * (g - fade.mean.double()), atol=1e-14)
    assert torch.equal(c, fade.mean.double().expand(7, 3)) and torch.equal(fade.constant(torch.float32), fade.mean)
    gs.set_lambda(fade, 1.0)
    assert torch.equal(fade.eval()(g), g)
    before = fade.mean.clone()
    assert torch.equal(fade.mean, before)
    with pytest.raises(AlgebraError, match=r"lam is 1.0, not 0"):
        fade.constant(torch.float32)
    half = copy.deepcopy(fade).half()
    assert half.mean.dtype == half.lam.dtype == torch.float32 and half(g.half()).dtype == torch.float16


def test_what_goes_through_all_activations_goes_through_these():
    grown = gs.grow(ConvNet(), ["condconv", "se", "bottleneck"], where=["conv"])
    assert gs.set_lambda(grown, 0.25) == 3 and set(gs.get_lambda(grown).values()) == {0.25}
    ema = ModelEmaV3(grown, decay=0.5)
    grown(images(n=4))
    ema.update(grown)
    own, average = (net.bn.branches[0].fade for net in (grown, ema.module))
    assert not torch.equal(own.mean, torch.full_like(own.mean, 0.5))
    assert torch.allclose(average.mean, (own.mean + 0.5) / 2)


def test_calibration_of_norms_leaves_the_means():
    grown = gs.grow(ConvNet(), ["se", "moe"], where=["conv"])
    means = {k: v.clone() for k, v in grown.state_dict().items() if k.endswith("fade.mean")}
    norm = grown.bn.running_mean.clone()
    calibrate_bn(grown, [images(n=4)])
    assert not torch.equal(grown.bn.running_mean, norm)
    assert len(means) == 2 and all(torch.equal(grown.state_dict()[k], v) for k, v in means.items())


def test_ranks_average_the_means(monkeypatch):
    """The mean is linear in the batch's, so the average over ranks is that of all their images."""
    grown = gs.grow(ConvNet(), "condconv", where=["conv"])
    averaged = []
    monkeypatch.setattr(ranks, "num_ranks", lambda: 2)
    monkeypatch.setattr(ranks, "average_", lambda tensors: averaged.extend(map(id, tensors)))
    ranks.average_update_(grown, torch.zeros(()))
    assert id(grown.conv.branches[0].fade.mean) in averaged and id(grown.bn.running_mean) in averaged
    halves, both = (Fading(3), Fading(3)), Fading(3)
    g = torch.randn(8, 3)
    for fade, part in zip((*halves, both), (g[:4], g[4:], g), strict=True):
        fade(part)
    assert torch.allclose((halves[0].mean + halves[1].mean) / 2, both.mean, atol=1e-7)


def test_no_graph_for_each_value_of_lam():
    grown = gs.grow(ConvNet(), ["condconv", "se", "manidp"], where=["conv"])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(grown, backend=backend, fullgraph=True)
    twin = copy.deepcopy(grown)
    for lam in (1.0, 0.7, 0.2, 0.0):
        for net in (grown, twin):
            gs.set_lambda(net, lam)
        assert torch.allclose(compiled(images(n=4)), twin(images(n=4)), atol=1e-5)
        gs.penalties(grown, torch.arange(4)), gs.penalties(twin, torch.arange(4))
    assert len(graphs) == 1
    assert torch.allclose(grown.bn.branches[0].fade.mean, twin.bn.branches[0].fade.mean, atol=1e-6)


def test_the_trainer_adds_what_gates_lose(monkeypatch):
    """And only where there are gates."""
    losses = {}
    for weight in (0.0, 100.0):
        net = gs.grow(ConvNet(), ["moe"], ratio=4.0, where=["conv"])
        type(net.conv.branches[0]).BALANCE, before = weight, type(net.conv.branches[0]).BALANCE
        try:
            trainer = Trainer(net, TrainConfig(lr=0.1, ema_decay=0.9), Batches())
            one = gs.schedules.constant(1.0)
            torch.manual_seed(1)
            losses[weight] = float(trainer.train(3, learning_rate=one, lam=one))
        finally:
            type(net.conv.branches[0]).BALANCE = before
    assert losses[100.0] > losses[0.0] + 0.1
    assert not Trainer(nn.Sequential(nn.Conv2d(3, 3, 1)), TrainConfig(lr=0.1), Batches())._gated
