"""merge_once beside merging in every pass."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

import growshrink as gs
from growshrink.layers import merge_once, recompute
from growshrink.layers.online import OnlineModule
from nets import images, net, randomized, rel, small


@pytest.fixture
def merges(monkeypatch):
    """The layers that have been merged, in order."""
    found = []
    for cls in (cls for cls in all_subclasses(OnlineModule) if "maps" in vars(cls)):

        def counted(self, *args, maps=cls.maps):
            found.append(self)
            return maps(self, *args)

        monkeypatch.setattr(cls, "maps", counted)
    return found


def all_subclasses(cls):
    return [cls, *(below for child in cls.__subclasses__() for below in all_subclasses(child))]


def collapsed(branches, name="reducenet20"):
    model = small(name)
    grown = randomized(gs.grow(model, branches, ratio=1.5) if branches else model).double()
    gs.set_lambda(grown, 0.0)
    return gs.collapse_online(grown, choose="always").train()


def batch(seed, size=8, n=2):
    return images(3, size, size, n=n, seed=seed, dtype=torch.float64)


def backward(model, x):
    F.cross_entropy(model(x), torch.arange(len(x))).backward()


def gradients(model, once, passes=3, step=backward):
    model.zero_grad(set_to_none=True)
    with merge_once(model) if once else nullcontext():
        for index in range(passes):
            step(model, batch(index))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys() and sum(bool(g.abs().max() > 1e-3) for g in expected.values()) > 10
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * max(float(gradient.abs().max()), 1e-3), name


@pytest.mark.parametrize(
    ("branches", "name", "apart"),
    [
        ("dbb", "reducenet20", True),
        (["orepa", "insert"], "reducenet20", False),
        (["expandnet", "lora"], "reducenet20", True),
        (None, "reducenet20_x2", False),
    ],
    ids=str,
)
def test_gradients_are_those_of_merging_in_every_pass(branches, name, apart, merges):
    model = collapsed(branches, name)
    model(batch(0))  # how many pixels there are
    layers = [m for m in model.modules() if isinstance(m, OnlineModule)]
    assert any(layer.maps(torch.float64, layer.pixels)[1] for layer in layers) == apart
    merges.clear()
    expected = gradients(model, once=False)
    assert merges == 3 * layers
    merges.clear()
    found = gradients(model, once=True)
    assert merges == layers and not any("held" in vars(layer) for layer in layers)
    assert_alike(found, expected)
    one = gradients(model, once=False, passes=1)
    again = gradients(model, once=True, passes=1)
    assert one.keys() == again.keys() and all(torch.equal(again[key], one[key]) for key in one), "the same bits"


def recomputed(model, x):
    with recompute():
        backward(model, x)


def under_autocast(model, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backward(model, x.float())


def without_gradients_between(model, x):
    with torch.no_grad():
        model(x)
    backward(model, x)


@pytest.mark.parametrize("step", [recomputed, under_autocast, without_gradients_between])
@pytest.mark.parametrize("frozen", [False, True])
def test_how_it_runs(step, frozen, merges):
    model = collapsed(["pointwise_conv", "lora"])
    model = model.float() if step is under_autocast else model
    conv = model.stages[0][0].conv
    conv.weight.requires_grad_(not frozen)
    conv.branches.requires_grad_(not frozen)
    step(model, batch(0))
    expected = gradients(model, once=False, step=step)
    merges.clear()
    found = gradients(model, once=True, step=step)
    assert len(merges) == 3 and ("stages.0.0.conv.weight" in found) != frozen
    assert_alike(found, expected, tolerance=1e-2 if step is under_autocast else 1e-12)


def other_size(model, x):
    backward(model, torch.cat([x, x]))


def other_width(model, x):
    with gs.active_width(model, gs.width_space(model, divisor=1).base):
        backward(model, x)


@pytest.mark.parametrize("change", [other_size, other_width])
def test_a_layer_that_changes_merges_on_its_own(change, merges):
    model = collapsed("bottleneck")
    backward(model, batch(0))

    def step(model, x):
        backward(model, x)
        change(model, x)

    expected = gradients(model, once=False, step=step)
    backward(model, batch(0))
    merges.clear()
    found = gradients(model, once=True, step=step)
    assert len(merges) == 3 + 3 * 3
    assert_alike(found, expected)


def test_weights_that_change_inside_are_seen():
    model = collapsed("dbb").eval()
    x = batch(0)
    before = model(x)
    with torch.no_grad(), merge_once(model):
        assert torch.equal(model(x), before)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert torch.equal(model(x), copy.deepcopy(model)(x)) and rel(model(x), before) > 1e-2
    assert torch.equal(model(x), model(x))


def test_a_net_that_is_not_collapsed_and_an_error_inside():
    plain = net()
    with merge_once(plain):
        backward(plain, images(n=2))
    model = collapsed("lora")
    backward(model, batch(0))
    model.zero_grad()
    with pytest.raises(KeyboardInterrupt), merge_once(model):
        backward(model, batch(0))
        raise KeyboardInterrupt
    assert model.stages[0][0].conv.branches[0].path.up.weight.grad is None
    assert not any("held" in vars(module) for module in model.modules())
