"""Merging functions that read `weight` and know of no branches: refused, or told; everything else reads in silence."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import growshrink as gs
from growshrink.errors import FuseError
from growshrink.layers.grown import grown_modules
from nets import ConvNet, images, randomized, rel, untouched

SIZE = (3, 10, 10)
MESSAGE = "the weight of a grown layer is its kernel without the branches: growshrink.fuse comes first"


class Wrapper(nn.Module):
    """A user's wrapper, made after growing, that merges on its own."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def merge_norm(self):
        net = self.net
        scale = net.bn.weight / torch.sqrt(net.bn.running_var + net.bn.eps)
        merged = nn.Conv2d(8, 8, 3, padding=1).double()
        merged.weight.data = net.conv.weight * scale[:, None, None, None]
        merged.bias.data = net.bn.bias - net.bn.running_mean * scale
        net.conv, net.bn = merged, nn.Identity()
        return self


def grown(kind="bottleneck"):
    torch.manual_seed(0)
    model = randomized(gs.grow(ConvNet(head=False), kind, where=["conv"], input_size=SIZE)).double().eval()
    gs.set_lambda(model, 0.0)
    return model


@torch.no_grad()
def test_torchs_fusion_is_refused_and_exact_behind_fuse():
    model = grown()
    with untouched(model), pytest.raises(FuseError, match=MESSAGE):
        fuse_conv_bn_eval(model.conv, model.bn)
    x = images(*SIZE, dtype=torch.float64)
    fused = gs.fuse(model, input_size=SIZE)
    merged = copy.deepcopy(fused)
    merged.conv, merged.bn = fuse_conv_bn_eval(fused.conv, fused.bn), nn.Identity()
    assert rel(merged(x), model(x)) < 1e-12 and rel(gs.drop(model)(x), model(x)) > 0.01


def test_linear_layers_too():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()).eval()
    model = gs.grow(layers, "lora", where=["2"], input_size=(1, 2, 4))
    with pytest.raises(FuseError, match=MESSAGE):
        fuse_linear_bn_eval(model[2], nn.BatchNorm1d(4).eval())


@torch.no_grad()
def test_a_wrappers_own_fuse_is_told_and_is_right_behind_fuse():
    wrapper = Wrapper(grown())
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        copy.deepcopy(wrapper).merge_norm()
    assert caught[0].filename == __file__
    x = images(*SIZE, dtype=torch.float64)
    expected = wrapper(x)
    assert rel(gs.fuse(wrapper, input_size=SIZE).merge_norm()(x), expected) < 1e-12


@torch.no_grad()
def test_whoever_is_no_merging_function_hears_nothing():
    model = grown()
    layer = next(iter(grown_modules(model).values()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images(*SIZE, dtype=torch.float64))
        gs.verify(model, input_size=SIZE)
        gs.fuse(gs.grow(model, "lora", where=["conv"], input_size=SIZE), input_size=SIZE)
        copy.deepcopy(model).load_state_dict(model.state_dict(), assign=True)
        torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()
        assert layer.weight is layer._parameters["weight"]  # in train mode: penalties, statistics, anything
        model.eval()
        pruned = prune.identity(copy.deepcopy(layer), "weight")
        assert torch.equal(pruned.weight, layer._parameters["weight"])
        assert isinstance(prune.remove(pruned, "weight")._parameters["weight"], nn.Parameter)
        del pruned.weight
        assert not hasattr(pruned, "weight")
