"""What fuse and fold do where the net's own dtype cannot hold the result."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

import growshrink as gs
from growshrink.errors import FuseError
from nets import images, randomized, rel, untouched
from sampled import sampled

SIZE = (3, 10, 10)


def grown(kind="lora", delta=1.0, bias=False):
    """conv - norm, with a branch that changes the kernel by about `delta` of itself."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.Tanh()]
    model = randomized(gs.grow(nn.Sequential(*parts), kind, where=["1"], input_size=SIZE)).eval()
    gs.set_lambda(model, 0.0)
    branch = model[1].branches[0]
    with torch.no_grad():
        branch.get_parameter(branch.outermost).mul_(delta)
        if kind == "bottleneck":
            branch.norm.bias.mul_(delta)
    return model


@torch.no_grad()
@pytest.mark.parametrize("dtype", sampled([torch.bfloat16, torch.float16, torch.float32], [torch.bfloat16]))
@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_rounding_that_takes_the_branches_is_told(dtype, kind):
    model = grown(kind, delta=torch.finfo(dtype).eps / 30).to(dtype)
    with pytest.warns(
        UserWarning,
        match=r"^1: rounding to \w+ takes \d+% of what its branches add: they .*; fuse model\.(float|double)",
    ):
        fused = gs.fuse(model, input_size=SIZE)
    assert fused[1].weight.dtype == dtype
    x = images(*SIZE, dtype=torch.float64)
    exact = gs.fuse(model.double(), input_size=SIZE)
    silent = gs.drop(model)
    effect = rel(exact(x), silent(x))
    assert rel(fused.double()(x), exact(x)) > 0.1 * effect > 0  # what the warning says
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gs.fuse(grown(kind).to(dtype), input_size=SIZE)  # a branch of the kernel's size is not lost
        gs.fuse(grown(kind, delta=0.0).to(dtype), input_size=SIZE)  # nor is one that adds nothing


def test_many_layers_are_one_warning():
    convs = [nn.Conv2d(3, 8, 3), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))]
    model = gs.grow(nn.Sequential(*convs), "lora", where=["1", "2", "3"], input_size=SIZE, init="paper")
    gs.set_lambda(model, 0.0)
    with torch.no_grad():
        for layer in model[1:]:
            nn.init.ones_(layer.branches[0].get_parameter(layer.branches[0].outermost))
            branch = layer.branches[0]
            branch.get_parameter(branch.outermost).mul_(1e-9)
    with pytest.warns(UserWarning) as told:
        gs.fuse(model, input_size=SIZE)
    assert len(told) == 1 and "and over 10% in 2 more: " in str(told[0].message)


@torch.no_grad()
def test_the_advice_holds():
    """Fused in float32 and then cast, a net in bfloat16 is as near as rounding lets it be."""
    model = grown("bottleneck", delta=0.02)
    x = images(*SIZE, dtype=torch.float64)
    fused = gs.fuse(model, input_size=SIZE).bfloat16()
    assert rel(fused.double()(x), model.double()(x)) < 0.01


@pytest.mark.parametrize(("mean", "gamma", "spread"), [(-6e4, 9.0, 1.0), (0.0, 6e4, 1e-3)], ids=["bias", "kernel"])
def test_what_overflows_is_refused_by_name(mean, gamma, spread):
    model = grown("bottleneck").half()
    norm = model[1].branches[0].norm
    with torch.no_grad():
        norm.running_mean.fill_(mean)
        norm.running_var.fill_(spread)
        norm.weight.fill_(gamma)
    with untouched(model), pytest.raises(FuseError, match="1: what its branches merge into is too large for float16"):
        gs.fuse(model, inplace=True, input_size=SIZE)
    with pytest.raises(FuseError, match="too large for float16"):
        gs.fuse(model, input_size=SIZE)


def test_a_net_that_gives_inf_once_it_is_folded_is_refused():
    torch.manual_seed(0)
    net = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh())).half().eval()
    with torch.no_grad():  # the norm is small enough, the kernel it scales is not
        net[0].weight.fill_(100.0)
        net[1].running_var.fill_(1e-4)
        net[1].weight.fill_(1e3)
        net[1].running_mean.copy_(net[0](torch.zeros(1, 3, 3, 3).half()).flatten())
    with untouched(net), pytest.raises(FuseError, match="in torch.float16 the merged net would give inf or NaN"):
        gs.fold(net, inplace=True, input_size=SIZE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_verify_tells_the_error_in_the_nets_own_dtype(dtype):
    result = gs.verify(grown("bottleneck").to(dtype), input_size=SIZE)
    assert result.ok and result.max_rel < 1e-12
    if dtype == torch.bfloat16:
        assert 1e-4 < result.max_rel_own < 0.1
        assert not dataclasses.replace(result, max_rel_own=float("inf")).ok
    else:
        assert result.max_rel_own is None
