import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.algebra.convmap import ConvMap
from growshrink.errors import NotLinearError
from growshrink.models.staged import Block
from nets import images, net, randomized, rel, untouched
from sampled import sampled

NAMES = sorted(timm.list_models("reducenet*", exclude_filters="*_deq"))


def linear_net(name="reducenet20", **kwargs):
    model = randomized(net(name, linear=True, dtype=torch.float64, **kwargs)).eval()
    if "_x" in name:
        gs.set_lambda(model, 0)
    return model


@torch.no_grad()
def by_operators(model, size):
    """The matrix by composing the operators of the parts, from their parameters alone: no forward, no autograd."""
    num_pixels = size[0] * size[1] * size[2]
    columns = torch.cat([torch.zeros(1, num_pixels, dtype=torch.float64), torch.eye(num_pixels, dtype=torch.float64)])
    x = columns.reshape(-1, *size)  # the image of 0, then of every unit vector
    x = ConvMap.from_conv2d(model.stem.conv).then(ConvMap.from_bn(model.stem.bn))(x)
    for block in (m for m in model.modules() if isinstance(m, Block)):
        conv = block.conv.as_convmap() if hasattr(block.conv, "as_convmap") else ConvMap.from_conv2d(block.conv)
        total = conv.then(ConvMap.from_bn(block.bn))
        if block.skip:
            margin = total.padding[0][0] - 1
            shift = F.pad(x, [margin] * 4)
            x = total(x) + shift
        else:
            x = total(x)
    x = x.mean((2, 3)) @ model.head.fc.weight.T + model.head.fc.bias
    return (x[1:] - x[0]).T, x[0]


def by_vjps(model, size):
    """The matrix by one vector-Jacobian product per class, at a random image."""
    image = images(*size, n=1, dtype=torch.float64, seed=5).requires_grad_()
    logits = model(image)[0]
    rows = [torch.autograd.grad(logit, image, retain_graph=True)[0].flatten() for logit in logits]
    weight = torch.stack(rows).detach()
    return weight, (logits - weight @ image.flatten()).detach()


def check(model, size):
    flat = gs.collapse(model, size)
    assert [type(layer) for layer in flat] == [nn.Flatten, nn.Linear]
    assert flat[1].weight.shape == (10, size[0] * size[1] * size[2])
    own_weight, own_bias = flat[1].weight.detach(), flat[1].bias.detach()
    for weight, bias in (by_operators(model, size), by_vjps(model, size)):
        assert rel(own_weight, weight) < 1e-10 and rel(own_bias, bias) < 1e-10
    x = images(*size, n=4, dtype=torch.float64)
    with torch.no_grad():
        assert rel(flat(x), model(x)) < 1e-10
    assert own_weight.abs().max() > 1e-8  # it does look at the image


@pytest.mark.parametrize("name", sampled(NAMES, ("reducenet20_x4", "reducenet34")))
def test_three_ways_agree_for_every_reducenet(name):
    photo = name.startswith(("reducenet18", "reducenet34"))
    channels = {0: 3, 1: 1}[NAMES.index(name) % 2]
    size = (channels, 33, 20) if photo else (channels, 9, 8)
    check(linear_net(name, width=0.04 if photo else 0.15, in_chans=channels), size)


@pytest.mark.parametrize("size", [(3, 8, 8), (1, 7, 7), (3, 9, 6), (1, 1, 1), (3, 2, 5)])
@pytest.mark.parametrize("pad", ["each", "front"])
def test_sizes_channels_and_pads(size, pad):
    check(linear_net("reducenet20", pad=pad, in_chans=size[0]), size)


@torch.no_grad()
def test_many_outputs_and_the_models_dtype():
    model = timm.create_model("reducenet20", width=0.1, linear=True, num_classes=130).train()
    flat = gs.collapse(model, (3, 4, 4))
    assert flat[1].weight.dtype == torch.float32 and not flat.training
    x = images(3, 4, 4)
    assert rel(flat(x), model.eval()(x)) < 1e-5
    features = timm.create_model("reducenet20", width=0.1, linear=True, num_classes=0)
    assert gs.collapse(features, (3, 4, 4))[1].out_features == features.num_features


@torch.no_grad()
def test_any_affine_net_will_do():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    flat = gs.collapse(model.double(), (2, 8, 8))
    x = images(2, 8, 8, dtype=torch.float64)
    assert rel(flat(x), model(x)) < 1e-12


def test_a_net_with_activations_is_refused_by_the_name_of_the_first():
    with pytest.raises(NotLinearError, match=r"^stem\.act \(ReLU\) is not affine \(and 9 more\).*linear=True"):
        gs.collapse(net("reducenet20"), (3, 8, 8))


def test_lam_above_0_is_refused():
    model = linear_net("reducenet20_x1")
    for lam in (1e-8, 1e-20):  # alive, the second though no output shows it
        model.stages[1][1].conv.act.lam.fill_(lam)
        with untouched(model), pytest.raises(NotLinearError, match=rf"^stages\.1\.1\.conv\.act .*its lam is {lam:g}"):
            gs.collapse(model, (3, 8, 8))


def test_an_activation_held_on_one_side_by_a_bias_is_refused():
    model = linear_net()
    model.stages[1][1].act = nn.ReLU()
    model.stages[1][1].bn.bias.data.fill_(1e4)
    with pytest.raises(NotLinearError, match=r"^stages\.1\.1\.act \(ReLU\) is not affine"):
        gs.collapse(model, (3, 8, 8))


def test_a_net_that_gives_0_is_affine():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)
    assert not gs.collapse(model, (3, 2, 2))(images(3, 2, 2)).any()


def test_outputs_that_are_no_matrix_are_refused():
    with pytest.raises(gs.errors.GrowShrinkError, match=r"\(N, K\)"):
        gs.collapse(nn.Conv2d(3, 2, 1), (3, 4, 4))
