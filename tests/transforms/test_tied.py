"""Layers tied through their storage: left alone with the reason, and tied as before in every copy."""

import pytest
import torch
from torch import nn

import growshrink as gs
from growshrink.base.copying import ties
from growshrink.errors import FuseError, GrowError
from growshrink.layers.grown import grown_modules
from nets import images, randomized, rel, untouched
from sampled import sampled

SIZE = (3, 10, 10)
KEYS = ("1", "4", "7")


def net(seed=0):
    """stem, then three conv-norm-tanh; 1 and 4 are to be tied, 7 is free."""
    torch.manual_seed(seed)
    parts = [nn.Conv2d(3, 8, 3, padding=1)]
    for _ in range(3):
        parts += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Tanh()]
    return randomized(nn.Sequential(*parts)).double()


def data(model):
    model[4].weight = nn.Parameter(model[1].weight.data)


def overlap(model):
    whole = torch.randn(864, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
    model[1].weight = nn.Parameter(whole[:576].view(8, 8, 3, 3))
    model[4].weight = nn.Parameter(whole[288:].view(8, 8, 3, 3))


def means(model):
    model[5].running_mean = model[2].running_mean[:]


def one_norms_affine(model):
    model[5].bias = nn.Parameter(model[2].bias.data)


TIES = {"data": data, "slices that overlap": overlap, "running means": means, "a norm's bias": one_norms_affine}
X = images(*SIZE, dtype=torch.float64)


def tied(way):
    model = net()
    TIES[way](model)
    return model.eval()


def names_tied(model):
    return [sorted({name for name, _ in group}) for group in ties(model)]


@torch.no_grad()
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("way", sampled(TIES, ["data", "running means"]))
def test_grow_fuse_fold_and_drop_keep_the_tie_and_the_function(way, inplace):
    model = tied(way)
    before, names = model(X), names_tied(model)
    grown = gs.grow(model, inplace=inplace, input_size=SIZE)
    assert list(grown_modules(grown)) == ["7"] and names_tied(grown) == names and (grown is model) == inplace
    reason = gs.growth_report(model, input_size=SIZE).skipped["4"]
    assert ("shared with another" if way in ("data", "slices that overlap") else "behind it shares a param") in reason
    randomized(grown[7])
    gs.set_lambda(grown, 0.0)
    expected = grown(X)
    dropped = gs.drop(grown)
    assert rel(dropped(X), before) < 1e-14 and names_tied(dropped) == names and rel(before, expected) > 1e-3
    fused = gs.fuse(grown, inplace=inplace, input_size=SIZE)
    assert rel(fused(X), expected) < 1e-12 and names_tied(fused) == names
    folded = gs.fold(fused, inplace=inplace, input_size=SIZE)
    assert rel(folded(X), expected) < 1e-12 and names_tied(folded) == names
    assert isinstance(folded[5], nn.BatchNorm2d) and isinstance(folded[8], nn.Identity)


@pytest.mark.parametrize("way", sampled(TIES, ["data", "running means"]))
def test_what_was_tied_after_growing_is_refused(way):
    grown = randomized(gs.grow(net(), input_size=SIZE), seed=3)
    gs.set_lambda(grown, 0.0)
    TIES[way](grown)
    message = "1 shares parameters" if way in ("data", "slices that overlap") else "1 has no bias of its own.*shares a"
    with untouched(grown), pytest.raises(FuseError, match=message):
        gs.fuse(grown, inplace=True, input_size=SIZE)
    with pytest.raises(GrowError, match="where names '4', which cannot be grown"):
        gs.grow(tied(way), where=["4"], input_size=SIZE)
