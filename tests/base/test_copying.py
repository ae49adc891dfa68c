"""copy_net on nets that torch's own deepcopy refuses, and the transforms that make copies."""

import copy
import threading

import pytest
import timm
import torch
from torch import nn

import growshrink as gs
from growshrink.base.copying import copy_net
from growshrink.errors import GrowShrinkError
from nets import ConvNet, images, rel

SIZE = (3, 16, 16)


class Keeps(ConvNet):
    """Keeps activations, as they are and inside containers."""

    def __init__(self):
        super().__init__(bias=True)
        self.seen = {"all": [None]}

    def forward(self, x):
        self.last = super().forward(x)
        self.seen["all"][0] = self.last * 2
        return self.last


def kept():
    return Keeps()


def spectral():
    model = Keeps()
    model.stem = nn.utils.spectral_norm(model.stem)
    return model


def weighted():
    model = Keeps()
    with pytest.warns(FutureWarning, match="weight_norm"):
        model.stem = nn.utils.weight_norm(model.stem)
    return model


def locked():
    model = Keeps()
    model.lock, model.conv.reentrant = threading.Lock(), threading.RLock()
    return model


def scripted():
    model = Keeps()
    with pytest.warns(FutureWarning, match="torch.jit.script"):
        model.head, model.function = torch.jit.script(model.head), torch.jit.script(nn.functional.relu)
    return model


@pytest.mark.parametrize("make", [kept, spectral, weighted, locked, scripted])
def test_all_that_copies_does_so(make):
    torch.manual_seed(0)
    model = make()
    x = images(*SIZE)
    model(x).sum().backward()
    with pytest.raises((RuntimeError, TypeError)):
        copy.deepcopy(model)
    grown = gs.grow(model, where=["conv"], input_size=SIZE)
    for parameter, original in zip(copy_net(model).parameters(), model.parameters(), strict=True):
        assert parameter is not original and parameter.requires_grad and parameter.is_leaf
    assert rel(grown.eval()(x), model.eval()(x)) == 0
    gs.set_lambda(grown, 0.0)
    grown.conv.branches[0].norm.bias.data.fill_(0.5)
    model(x), grown(x)  # activations of a graph are kept again
    for done in (gs.fuse(grown, input_size=SIZE), gs.fuse(copy_net(grown), inplace=True, input_size=SIZE)):
        assert rel(done(x), grown(x)) < 1e-6 and rel(done(x), model(x)) > 1e-3
    assert rel(gs.drop(grown)(x), model(x)) == 0
    assert gs.growth_report(grown, input_size=SIZE).grown and gs.profile(grown, SIZE).params
    assert gs.compare(model, gs.drop(grown), input_size=SIZE).max_rel == 0
    gs.grow(model, where=["conv"], inplace=True, input_size=SIZE)


@pytest.mark.exhaustive
def test_levit_after_a_pass_that_filled_its_cache():
    model = timm.create_model("levit_128s").eval()
    model(images(3, 224, 224))
    assert gs.profile(model, (3, 224, 224)).params
    assert gs.growth_report(gs.drop(gs.fuse(gs.grow(model, "lora")))).rows


def test_what_cannot_be_copied_is_named():
    model = ConvNet()
    model.conv.waiting = [(n for n in range(3))]
    message = r"^conv: its attribute 'waiting' \(list\) cannot be copied \(cannot pickle 'generator' object\)"
    for ask in (gs.grow, gs.drop, gs.growth_report, lambda m: gs.profile(m, SIZE), lambda m: gs.grow(m, inplace=True)):
        with pytest.raises(GrowShrinkError, match=message) as caught:
            ask(model)
        assert "\n" not in str(caught.value)
