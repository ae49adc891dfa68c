import copy

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.algebra.convmap import ConvMap
from growshrink.branches import Bottleneck, BranchSpec, Insert
from growshrink.errors import AlgebraError
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.grown import GrownConv2d, grown_modules
from growshrink.layers.mapping import convmap_of
from growshrink.layers.swaps import attach, to_plain
from nets import ConvNet, images, net, randomized, rel, small


def grown_conv(kinds=("bottleneck",), lam=0.0, **kwargs):
    torch.manual_seed(0)
    kwargs = {"kernel_size": 3, "padding": 1, **kwargs}
    conv = nn.Conv2d(4, 8, dtype=torch.float64, **kwargs)
    branches = [BranchSpec(kind=k).build(conv, ratio=1.5, init="paper", generator_seed=i) for i, k in enumerate(kinds)]
    grown = randomized(attach(conv, branches)).eval()
    gs.set_lambda(grown, lam)
    return grown


def test_growing_and_back_keeps_the_object_and_its_parameters():
    conv = nn.Conv2d(4, 8, 3)
    weight, bias = conv.weight, conv.bias
    grown = attach(conv, [Insert(conv, 1.0)])
    assert grown is conv and type(conv) is GrownConv2d and len(grown.branches) == 1
    assert conv.weight is weight and conv.bias is bias
    assert list(conv.state_dict())[:2] == ["weight", "bias"]
    attach(conv, [Insert(conv, 1.0), Bottleneck(conv, 1.0)])
    assert [b.kind for b in grown.branches] == ["insert", "insert", "bottleneck"]
    assert to_plain(grown) is conv and type(conv) is nn.Conv2d
    assert list(conv.state_dict()) == ["weight", "bias"] and not hasattr(conv, "branches")


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_forward_adds_branch_after_branch(lam):
    grown = grown_conv(["bottleneck", "insert", "nest"], lam)
    x = images(4, 6, 7, dtype=torch.float64)
    one, two, three = grown.branches
    y = F.conv2d(x, grown.weight, grown.bias, padding=1)
    y = y + one.norm(one.body.pointwise(F.leaky_relu(one.body.bn(one.body.conv(x)), 1 - float(one.body.act.lam))))
    y = y + two.norm(two.pointwise(F.leaky_relu(y, 1 - float(two.act.lam))))
    y = y + three.norm(three.body(x))
    torch.testing.assert_close(grown(x), y, rtol=1e-12, atol=1e-12)


def kernel_by_probing(module, in_channels, size):
    """The map of a module, read off its outputs for one-hot inputs: independent of the algebra."""
    zero = torch.zeros(1, in_channels, size, size, dtype=torch.float64)
    with torch.no_grad():
        offset = module(zero)
        columns = []
        for index in range(zero.numel()):
            x = zero.clone()
            x.view(-1)[index] = 1
            columns.append((module(x) - offset).flatten())
    return torch.stack(columns, 1), offset.flatten()


@pytest.mark.parametrize(
    "kinds", [["bottleneck"], ["insert"], ["nest"], ["bottleneck", "insert", "nest"]], ids="+".join
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "stride": 2},
        {"groups": 2, "dilation": 2, "padding": 2},
        {"kernel_size": (1, 4), "padding": (0, 3)},
        {"groups": 4},
    ],
    ids=str,
)
def test_the_map_against_probing(kinds, options):
    grown = grown_conv(kinds, **options)
    assert_same_matrix(grown, grown.as_convmap(), 4)


def assert_same_matrix(module, total, in_channels):
    matrix, offset = kernel_by_probing(module, in_channels, 6)
    matrix_of_map, offset_of_map = kernel_by_probing(total, in_channels, 6)
    assert rel(matrix_of_map, matrix) < 1e-12 and rel(offset_of_map, offset) < 1e-12


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"kernel_size": 5, "padding": 2, "groups": 2}], ids=str)
def test_pure_bottleneck_against_probing(options):
    torch.manual_seed(0)
    block = randomized(PureBottleneck(4, 12, 6, dtype=torch.float64, **options)).eval()
    gs.set_lambda(block, 0.0)
    assert_same_matrix(block, block.as_convmap(), 4)
    assert_same_matrix(block.fuse(), block.as_convmap(), 4)


def test_pure_bottleneck_is_conv_bn_act_pointwise():
    torch.manual_seed(0)
    block = randomized(PureBottleneck(4, 12, 6, dtype=torch.float64)).eval()
    x = images(4, 5, 5, dtype=torch.float64)
    y = F.conv2d(x, block.conv.weight, padding=1)
    y = F.batch_norm(y, block.bn.running_mean, block.bn.running_var, block.bn.weight, block.bn.bias)
    torch.testing.assert_close(block(x), F.conv2d(y.relu(), block.pointwise.weight), rtol=1e-12, atol=1e-12)


def test_pure_bottleneck_reset():
    block = randomized(PureBottleneck(4, 12, 6))
    gs.set_lambda(block, 0.5)
    before = block.conv.weight.clone()
    block.reset_parameters()
    assert gs.get_lambda(block) == {"act": 1.0}
    assert not torch.equal(block.conv.weight, before)
    assert torch.equal(block.bn.running_var, torch.ones(12)) and torch.equal(block.bn.weight, torch.ones(12))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kernel_size": 4, "padding": "same"}, {"groups": 4}], ids=str
)
def test_fuse_of_one_module(options):
    grown = grown_conv(**options)
    grown.weight.requires_grad_(False)
    rng = torch.get_rng_state()
    plain = grown.fuse()
    assert torch.equal(torch.get_rng_state(), rng)
    assert type(plain) is nn.Conv2d and type(grown) is GrownConv2d and plain.bias is not None
    assert not plain.weight.requires_grad and not plain.training
    x = images(4, 7, 8, dtype=torch.float64)
    assert rel(plain(x), grown(x).detach()) < 1e-12


def test_fuse_of_one_module_adds_no_bias_it_does_not_need():
    grown = grown_conv(bias=False)
    grown.branches[0].silence_()
    assert grown.fuse().bias is None


@pytest.mark.parametrize("name", ["reducenet20_x2", "reducenet20", "test_resnet"])
def test_reparameterize_model_of_timm(name):
    model = small(name) if name.startswith("reducenet") else net(name)
    if not name.endswith("_x2"):
        model = gs.grow(model, ["bottleneck", "insert"], input_size=(3, 32, 32))
    model = randomized(model).double().eval()
    gs.set_lambda(model, 0.0)
    x = images(3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        fused = reparameterize_model(model)
        assert not grown_modules(fused) and grown_modules(model)
        assert rel(fused(x), expected) < 1e-10


def test_grown_modules_are_the_outermost_ones():
    model = gs.grow(ConvNet(), "nest", input_size=(3, 16, 16))
    assert list(grown_modules(model)) == ["conv"]
    assert sum(isinstance(m, GrownConv2d) for m in model.modules()) == 2
    assert list(grown_modules(grown_conv())) == [""]
    assert grown_modules(ConvNet()) == {}
    assert len(grown_modules(net("reducenet20_x1"))) == 9


def test_deepcopy_and_state_dict():
    grown = grown_conv(["bottleneck", "nest"], lam=0.25)
    copied = copy.deepcopy(grown)
    x = images(4, 5, 5, dtype=torch.float64)
    assert type(copied) is GrownConv2d and torch.equal(copied(x), grown(x))
    assert copied.weight is not grown.weight
    other = grown_conv(["bottleneck", "nest"], lam=1.0)
    nn.init.zeros_(other.weight)
    other.load_state_dict(grown.state_dict())
    assert torch.equal(other(x), grown(x))


class LoudReLU(gs.layers.VanishingReLU):
    pass


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.ReLU(), "^act: ReLU is not known to be affine"),
        (nn.ReLU(inplace=True), "^act: ReLU is not known"),
        (LoudReLU(0.0), "^act: LoudReLU is not known"),
        (gs.layers.VanishingReLU(1e-9), "^act: lam is .*, not 0"),
        (nn.BatchNorm2d(3, track_running_stats=False), "^act: a batch norm without running statistics"),
        (nn.InstanceNorm2d(3), "^act: InstanceNorm2d is not known"),
        (timm.layers.BatchNormAct2d(3), "^act: BatchNormAct2d is not known"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_is_not_affine_is_named(module, message):
    with pytest.raises(AlgebraError, match=message) as caught:
        convmap_of(module, "act", 3)
    assert caught.value.module == "act"


@pytest.mark.parametrize(
    "module", [nn.Identity(), gs.layers.VanishingReLU(0.0), nn.BatchNorm2d(3).eval(), nn.Conv2d(3, 3, 1)]
)
def test_what_is_affine(module):
    module = module.double()
    x = images(3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(convmap_of(module, "m", 3)(x), module(x))


def test_the_name_in_an_error_is_the_whole_path():
    grown = grown_conv(["bottleneck", "nest"])
    grown.branches[1].body.conv.branches[0].body.act.lam.fill_(0.5)
    with pytest.raises(AlgebraError, match=r"^branches\.1\.body\.conv\.branches\.0\.body\.act: lam is 0\.5, not 0"):
        grown.as_convmap()
    grown.branches[0].norm = nn.BatchNorm2d(3, dtype=torch.float64)
    with pytest.raises(AlgebraError, match=r"^branches\.0: cannot compose: 8 channels come out, 3 go in"):
        grown.as_convmap()


def test_a_conv_without_branches_is_its_own_map():
    grown = grown_conv([])
    assert torch.equal(grown.as_convmap().kernel, ConvMap.from_conv2d(grown).kernel)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["bottleneck", "insert", "nest"])
def test_grown_nets_script(kind):
    grown = gs.grow(small(), kind, init="paper").eval()
    x = images(3, 16, 16)
    with torch.no_grad():
        assert rel(torch.jit.script(grown)(x), grown(x)) < 1e-6
