"""The implicit branch: an infinitely deep one that is one kernel once its activation has vanished."""

import copy

import pytest
import torch
from torch.nn import functional as F

import growshrink as gs
from growshrink.algebra import ConvMap
from growshrink.branches import BranchSpec
from growshrink.errors import FuseError
from growshrink.evidence.arms import ARMS
from growshrink.layers import ImplicitReLU
from growshrink.layers.widths import get_width
from nets import ConvNet, images, randomized, rel, train_a_bit
from sampled import exhaustive

SIZE = (3, 8, 8)


def grown(lam=0.0, loud=1.0, **kwargs):
    torch.manual_seed(0)
    model = randomized(gs.grow(ConvNet(**kwargs), "implicit", init="paper", input_size=SIZE)).double().eval()
    gs.set_lambda(model, lam)
    with torch.no_grad():
        model.conv.branches[0].body.act.recurrence.weight.mul_(loud)
    return model


@pytest.mark.parametrize("loud", [1.0, 1.8, 100.0])  # A of norm 0.5, 0.9, and beyond what it is scaled to
@pytest.mark.parametrize("groups", [1, 2])
def test_the_kernel_is_the_limit_of_deep_branches(loud, groups):
    branch = grown(loud=loud, groups=groups).conv.branches[0]
    body, act = branch.body, branch.body.act
    x = images(8, 7, 9, dtype=torch.float64)
    with torch.no_grad():
        u = body.bn(F.conv2d(x, body.conv.weight, padding=1, groups=groups))
        kernel = act.kernel(16, torch.float64)
        h, steps = torch.zeros_like(u), []
        for _ in range(400):  # as many layers h <- A h + u
            h = F.conv2d(h, kernel, groups=groups) + u
            steps.append(branch.norm(body.pointwise(h)))
        total = branch.as_convmap(ConvMap.from_conv2d(torch.nn.Conv2d(8, 8, 3, padding=1)))(x)
    assert rel(total, steps[-1]) < 1e-12  # borders included
    assert rel(steps[0], steps[-1]) > 0.05  # depth counts
    assert rel(branch(x, None), steps[-1]) < 1e-12


def test_growing_training_vanishing_and_fusing():
    torch.manual_seed(0)
    plain = ConvNet()
    model = gs.grow(plain, "implicit", input_size=SIZE)
    x = images(*SIZE)
    assert torch.equal(model(x), plain(x))
    (act,) = [m for m in model.modules() if isinstance(m, ImplicitReLU)]
    before = act.recurrence.weight.detach().clone()
    for lam in (1.0, 0.3, 0.0):
        gs.set_lambda(model, lam)
        train_a_bit(model, size=SIZE, steps=5, lr=0.3)
        assert bool(act.recurrence.weight.grad.any())  # through the solver, and through the closed form
    assert rel(act.recurrence.weight, before) > 1e-3
    assert torch.linalg.matrix_norm(act.recurrence.weight[:, :, 0, 0], 2) > 0.1
    gs.calibrate_bn(model, [images(*SIZE, n=16)])
    result = gs.verify(model, input_size=SIZE)
    assert result.ok and result.max_rel <= 1e-10 and result.effect >= 0.1
    fused = gs.fuse(model, input_size=SIZE)
    assert {key: v.shape for key, v in fused.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    assert rel(fused.eval()(x), model.eval()(x)) < 1e-5
    dropped = gs.drop(model)
    assert torch.equal(dropped.conv.weight, model.conv.weight) and type(dropped.conv) is torch.nn.Conv2d
    gs.set_lambda(model, 1e-3)
    with pytest.raises(FuseError, match=r"conv.branches.0.body.act \(lam = 0.001"):
        gs.fuse(model, input_size=SIZE)


def test_gradients_reach_the_recurrence_through_the_merged_kernel():
    model = grown()
    merged = gs.collapse_online(model, choose="always", input_size=SIZE)
    x, found = images(*SIZE, dtype=torch.float64), []
    for net in (model, merged):
        net(x).square().sum().backward()
        found.append(net.conv.branches[0].body.act.recurrence.weight.grad)
    assert rel(found[1], found[0]) < 1e-10


@pytest.mark.parametrize("groups", [exhaustive(1), 2])
def test_every_width_solves_its_own_system_and_fuses(groups):
    model, x = grown(loud=1.8, groups=groups), images(*SIZE, dtype=torch.float64)
    outputs = []
    for width in (4, 8, 16):
        gs.set_width(model, {name: width for name in get_width(model)})
        outputs.append(model(x))
        assert rel(gs.fuse(model, input_size=SIZE)(x), outputs[-1]) < 1e-10
        narrow = copy.deepcopy(model)
        act = narrow.conv.branches[0].body.act
        rows = torch.arange(16).view(groups, -1)[:, : width // groups].flatten()
        with torch.no_grad():
            kept = act.recurrence.weight[rows][:, : width // groups].clone()
            act.recurrence.weight.fill_(torch.nan)  # what lies beyond the width is not read
            for row, values in zip(rows, kept, strict=True):
                act.recurrence.weight[row, : width // groups] = values
        assert torch.equal(narrow(x), outputs[-1])
    assert rel(outputs[0], outputs[2]) > 0.01 and rel(outputs[1], outputs[2]) > 0.01


def test_it_has_no_linear_form_and_an_arm():
    with pytest.raises(gs.errors.GrowError, match="'implicit' has no form that is linear in what it trains"):
        BranchSpec(kind="implicit", norm=None)
    assert ARMS["implicit"].rounds[0].branch == ("implicit",)


def test_half_precision_is_solved_in_float32():
    model = grown(lam=1.0)
    x = images(*SIZE)
    expected = model.float()(x)
    assert rel(model.bfloat16()(x.bfloat16()).float(), expected) < 0.05
