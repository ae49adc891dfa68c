import pytest
import torch
from torch import nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.layers.activations import VanishingReLU
from nets import images, net, randomized


class InplaceBug(VanishingReLU):
    """The activation of the first ReduceNet: both terms of the sum are ReLU at every lam."""

    def forward(self, x):
        return self.lam * F.relu(x, inplace=True) + (1 - self.lam) * x


class BuggyBlock(nn.Module):
    """The same as the article's code had it: no module of its own."""

    def __init__(self, lam=0.0):
        super().__init__()
        self.lam = lam
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.bn = nn.BatchNorm2d(5)
        self.pointwise = nn.Conv2d(5, 4, 1)

    def forward(self, x):
        out = self.bn(self.conv(x))
        out = self.lam * F.relu(out, inplace=True) + (1 - self.lam) * out
        return self.pointwise(out)


def linear_net(name="reducenet20_x2", **kwargs):
    model = randomized(net(name, linear=True, **kwargs))
    gs.set_lambda(model, 0)
    return model


def with_bug(model, at):
    parent, _, child = at.rpartition(".")
    setattr(model.get_submodule(parent), child, InplaceBug(0.0))
    return model


def test_an_affine_net_has_no_defect_and_nobody_to_blame():
    model = linear_net()
    assert gs.depth.affinity_defect(model) < 1e-12
    assert gs.depth.nonaffine_modules(model) == {}


@pytest.mark.parametrize("lam", [1.0, 0.3, 1e-6])
def test_an_activation_alive_is_found(lam):
    model = linear_net()
    name = "stages.1.2.conv.act"
    model.get_submodule(name).lam.fill_(lam)
    assert 1e-2 * lam < gs.depth.affinity_defect(model) < 2
    assert list(gs.depth.nonaffine_modules(model)) == [name]


def test_the_original_inplace_bug_is_caught():
    names = ["stages.0.1.conv.act", "stages.2.0.conv.act"]
    model = with_bug(with_bug(linear_net(), names[1]), names[0])
    assert set(gs.get_lambda(model).values()) == {0.0}  # by its lam it looks linear
    assert gs.depth.affinity_defect(model) > 1e-2
    found = gs.depth.nonaffine_modules(model)
    assert list(found) == names and min(found.values()) > 0.1
    x = images(dtype=torch.float64)
    act = model.get_submodule(names[0]).double()
    assert torch.equal(act(x.clone()), F.relu(x))


def test_without_inplace_the_same_formula_is_affine():
    class Fixed(InplaceBug):
        def forward(self, x):
            return self.lam * F.relu(x) + (1 - self.lam) * x

    model = linear_net()
    model.stages[1][0].conv.act = Fixed(0.0)
    assert gs.depth.affinity_defect(model) < 1e-12 and gs.depth.nonaffine_modules(model) == {}


def test_the_bug_inside_a_forward_is_put_down_to_the_module_that_has_it():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), randomized(BuggyBlock()), nn.Flatten(), nn.Linear(4 * 64, 2))
    assert gs.depth.affinity_defect(model, (3, 8, 8)) > 1e-2
    assert list(gs.depth.nonaffine_modules(model, (3, 8, 8))) == ["1"]


def test_a_part_that_is_not_affine_does_not_matter_where_the_whole_is():
    class Split(nn.Module):
        """relu(x) - relu(-x) = x"""

        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(x) - self.act(-x)

    model = nn.Sequential(Split(), nn.Conv2d(3, 2, 1))
    assert gs.depth.affinity_defect(model, (3, 4, 4)) < 1e-12 and gs.depth.nonaffine_modules(model, (3, 4, 4)) == {}


@pytest.mark.parametrize(
    "part", [nn.MaxPool2d(2), nn.Hardswish(), nn.ReLU6(inplace=True), nn.GELU(), nn.InstanceNorm2d(3)]
)
def test_other_kinds(part):
    model = nn.Sequential(nn.Conv2d(3, 3, 3), part, nn.Conv2d(3, 2, 3))
    assert list(gs.depth.nonaffine_modules(model, (3, 12, 12))) == ["1"]


@pytest.mark.parametrize("part", [nn.ReLU(), nn.Hardtanh(-1e4, 2e4)])
def test_what_the_images_do_not_reach_is_found_too(part):
    model = nn.Sequential(nn.Conv2d(3, 3, 3), part, nn.Conv2d(3, 2, 3))
    nn.init.constant_(model[0].bias, 1e4)
    assert gs.depth.affinity_defect(model, (3, 8, 8)) > 1e-2
    assert list(gs.depth.nonaffine_modules(model, (3, 8, 8))) == ["1"]


def test_the_model_is_left_alone():
    model = linear_net().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gs.depth.affinity_defect(model), gs.depth.nonaffine_modules(model)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float32
