"""What grow accepts, fuse accepts after training, and gives the right net; the rest is refused before."""

import copy
import os
import random

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import growshrink as gs
from growshrink.errors import GrowError
from growshrink.layers.grown import grown_modules
from growshrink.transforms import _rehearse
from nets import ConvNet, images, randomized, rel, untouched
from sampled import exhaustive

SIZE = (3, 16, 16)


class Ends(ConvNet):
    """A ConvNet whose output is a function of the logits."""

    def __init__(self, end, **kwargs):
        super().__init__(**kwargs)
        self.end = end

    def forward(self, x):
        return self.end(super().forward(x))


class OwnNoise(ConvNet):
    """Noise of a generator of its own, and a count of its calls."""

    def __init__(self):
        super().__init__()
        self.random = torch.Generator()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        y = super().forward(x)
        return y * self.calls if y.is_meta else y * self.calls + torch.rand(y.shape, generator=self.random)


class TwoNorms(ConvNet):
    def __init__(self, **kwargs):
        super().__init__(bias=True)
        self.second, self.norm = nn.Conv2d(8, 8, 1, **kwargs), nn.BatchNorm2d(8)

    def forward_features(self, x):
        return self.norm(self.second(super().forward_features(x)))


def hooked(*where, forward=True, **kwargs):
    model = ConvNet(**kwargs)
    for name in where:
        module = model.get_submodule(name)
        if forward:
            module.register_forward_hook(lambda module, args, output: 3 * output)
        else:
            module.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    return model


def shares_a_mean():
    model = TwoNorms(bias=False)
    model.norm.running_mean = model.bn.running_mean
    return model


ACCEPTED = {
    "noise": lambda: Ends(lambda y: y + 0.1 * torch.randn_like(y)),
    "dropout left on": lambda: Ends(F.dropout),
    "noise of Python and numpy": lambda: Ends(lambda y: y * (1 + random.random()) * (1 + np.random.rand())),
    "noise of its own": OwnNoise,
    "hook on the layer": lambda: hooked("conv", bias=True),
    "hook before the layer": lambda: hooked("conv", forward=False),
    "frozen norms": lambda: freeze_batch_norm_2d(ConvNet()),
    "frozen norms behind a bias": lambda: freeze_batch_norm_2d(ConvNet(bias=True)),
    "frozen norms with an activation": lambda: freeze_batch_norm_2d(timm.create_model("test_byobnet", num_classes=10)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_is_fused_right(name):
    torch.manual_seed(0)
    model = ACCEPTED[name]()
    with untouched(model):
        grown = gs.grow(model, input_size=SIZE)
    gs.set_lambda(randomized(grown.double()).eval(), 0.0)
    x = images(*SIZE, dtype=torch.float64)

    def out(net):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(1)
        return copy.deepcopy(net)(x)

    fused = gs.fuse(grown, input_size=SIZE)
    assert rel(out(fused), out(grown)) < 1e-12
    assert rel(out(gs.drop(grown)), out(grown)) > 0.01
    assert set(fused.state_dict()) == set(model.state_dict())


def rescale(conv, args):
    conv.weight.data.div_(conv.weight.data.norm())


def only_without_values(y):
    if not y.is_meta:
        raise OSError("no such\nvalues")
    return y


def rescaled():
    model = ConvNet(bias=True)
    model.conv.register_forward_pre_hook(rescale)
    return model


def pruned(key):
    model = TwoNorms()
    prune.random_unstructured(model.conv, key, 0.5)
    return model


def patched():
    model = TwoNorms()
    model.conv.forward = lambda x, forward=model.conv.forward: 3 * forward(x)
    return model


LEFT_ALONE = {
    "pruned bias": (lambda: pruned("bias"), "its bias is computed by a hook"),
    "pruned kernel": (lambda: pruned("weight"), "its weight is computed by a hook"),
    "replaced forward": (patched, "its forward was replaced"),
    "a mean that norms share": (shares_a_mean, "norm behind it shares a parameter or a buffer with another module"),
    "hook on the layer": (lambda: hooked("conv"), "a hook on conv"),
    "hook before the norm": (lambda: hooked("bn", forward=False), "a hook on bn"),
    "hooks around the norm": (lambda: hooked("bn", "act"), "a hook on bn"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_alone_has_its_reason(name):
    make, reason = LEFT_ALONE[name]
    model = make()
    report = gs.growth_report(model, input_size=SIZE)
    assert [row.name for row in report.rows if reason in row.reason] == ["second" if "share" in name else "conv"]
    eligible = [row.name for row in report.rows if not row.reason]
    if eligible:
        assert list(grown_modules(gs.grow(model, input_size=SIZE))) == eligible
    else:
        with pytest.raises(GrowError, match="none of 3 layers"):
            gs.grow(model, input_size=SIZE)


NOTHING = "output holds no floating point tensor: nothing to check the result by"
REFUSED = {
    "opaque output": (lambda: Ends(lambda y: lambda: y), NOTHING),
    "whole numbers only": (lambda: Ends(lambda y: y.argmax(1)), NOTHING),
    "noise of the system": (lambda: Ends(lambda y: y * os.urandom(4)[0]), "would differ from the one given by"),
    "NaN": (lambda: Ends(torch.sqrt), "would differ from the one given by nan"),
    "values it refuses": (lambda: Ends(only_without_values), "does not run on 3x16x16"),
    "kernel rescaled at each call": (rescaled, "would differ from the one given by"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fuse_would_refuse_is_refused_before_training(name):
    torch.manual_seed(0)
    make, message = REFUSED[name]
    model = make()
    for inplace in (False, True):
        with pytest.raises(GrowError, match=f"^growshrink.fuse would refuse the trained net .*{message}") as caught:
            gs.grow(model, inplace=inplace, input_size=SIZE)
        assert not grown_modules(model) and "\n" not in str(caught.value)


def test_the_layer_it_is_about_is_named():
    model = TwoNorms()
    model.second.register_forward_pre_hook(rescale)
    with pytest.raises(GrowError, match=r"^second: growshrink.fuse would .*: leave it out with where=, or change it"):
        gs.grow(model, input_size=SIZE)
    assert set(grown_modules(gs.grow(model, where=["conv"], input_size=SIZE))) == {"conv"}


def test_growing_again_with_branches_alive_and_without_memory():
    model = randomized(gs.grow(TwoNorms(), input_size=SIZE))
    assert len(gs.grow(model, "insert", input_size=SIZE).conv.branches) == 2
    assert grown_modules(gs.grow(TwoNorms().to("meta"), input_size=SIZE))


def test_the_check_compares_with_what_it_should(monkeypatch):
    """The trial has an effect: merged differently, it is refused."""
    monkeypatch.setattr(_rehearse._Trial, "merge", lambda self, model, layer: layer.weight.mul_(1.01))
    with pytest.raises(GrowError, match="would differ"):
        gs.grow(ConvNet(), input_size=SIZE)


# --- a loop that continues after the exit, or was never grown ---


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel], ids=["net", "wrapped"])
def test_lam_is_set_where_there_was_growth_and_nowhere_else(wrap):
    plain = ConvNet()
    with pytest.raises(gs.errors.GrowShrinkError, match=r"never grown.*grow returns a copy.*inplace=True"):
        gs.set_lambda(wrap(plain), 0.5)
    with pytest.warns(UserWarning, match=r"nothing to fuse: .*never grown.*grow returns a copy") as caught:
        assert not grown_modules(gs.fuse(plain))
    assert caught[0].filename == __file__
    grown, linear = gs.grow(plain, input_size=SIZE), gs.grow(plain, "lora", input_size=SIZE)
    assert gs.set_lambda(wrap(grown), 0.0) == 1 and gs.set_lambda(wrap(linear), 0.5) == 0
    for done in (gs.fuse(grown), gs.drop(grown), gs.fuse(gs.fuse(linear)), copy.deepcopy(gs.fuse(grown))):
        assert gs.set_lambda(wrap(done), 0.5) == 0 and not grown_modules(gs.fuse(done))


# --- detectors ---


class ReadsTheKernel(ConvNet):
    def forward_features(self, x):
        return super().forward_features(x) * (1 + self.conv.weight.mean())


class Detector(nn.Module):
    """A backbone, and boxes where it sees something: perhaps nowhere."""

    def __init__(self, threshold):
        super().__init__()
        self.backbone, self.threshold = ConvNet(bias=False), threshold

    def forward(self, x):
        scores = self.backbone(x)
        return [{"boxes": s[s > self.threshold].repeat(4, 1).T, "scores": s[s > self.threshold]} for s in scores]


@torch.no_grad()
@pytest.mark.parametrize("threshold", [-100.0, 100.0])
def test_detectors_with_and_without_boxes(threshold):
    torch.manual_seed(0)
    grown = gs.grow(Detector(threshold), input_size=SIZE)
    gs.set_lambda(randomized(grown.double()).eval(), 0.0)
    assert bool(len(grown(images(*SIZE, dtype=torch.float64))[0]["boxes"])) == (threshold < 0)
    fused, x = gs.fuse(grown, input_size=SIZE), images(*SIZE, dtype=torch.float64)
    assert rel(fused.backbone(x), grown.backbone(x)) < 1e-12
    assert rel(gs.drop(grown).backbone(x), grown.backbone(x)) > 0.01
    grown.backbone.__class__ = ReadsTheKernel
    with pytest.raises(gs.errors.FuseError, match="would differ"):  # what holds values tells it: the features
        gs.fuse(grown, input_size=SIZE)


class Nothing(nn.Module):
    def forward(self, x):
        return x[:, :0]


def test_empty_outputs_of_one_shape_are_equal():
    empty = nn.Sequential(nn.Flatten(), Nothing())
    assert gs.compare(empty, empty, input_size=SIZE).max_rel == 0.0


DETECTORS = ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:the model does not run in train mode")
@pytest.mark.parametrize("name", [exhaustive(name) for name in DETECTORS])
def test_detectors_of_torchvision(name):
    torch.manual_seed(0)
    model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, num_classes=3)
    grown = gs.grow(model, "lora", where="backbone", input_size=(3, 64, 64)).eval()
    gs.set_lambda(randomized(grown), 0.0)
    fused, x = gs.fuse(grown, input_size=(3, 64, 64)), images(3, 64, 64)
    for a, b in zip(fused.backbone(x).values(), grown.backbone(x).values(), strict=True):
        assert rel(a, b) < 1e-4
