"""Convolutions of timm whose forward is their own."""

import copy

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.models import FeatureGraphNet
from torch import nn

import growshrink as gs
from growshrink.branches import Branch, BranchSpec
from growshrink.errors import GrowError
from growshrink.layers.grown import GrownConv2dSame, grown_modules
from growshrink.layers.swaps import attach, to_plain
from nets import ConvNet, images, net, randomized, rel, train_a_bit, with_conv
from sampled import sampled

KINDS = [kind for kind, cls in Branch.kinds.items() if cls.__module__.startswith("growshrink.")]
# of TensorFlow's "SAME": the output has ceil(input / stride) pixels, the odd pixel of padding comes last
GEOMETRIES = [
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 5, "stride": 2, "groups": 8},
    {"kernel_size": 5, "stride": 1, "bias": False},
    {"kernel_size": 3, "stride": 1, "dilation": 2},
    {"kernel_size": (2, 5), "stride": (1, 3)},
]


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tf_same(kind, options):
    torch.manual_seed(0)
    conv = Conv2dSame(8, 8, dtype=torch.float64, **options)
    if Branch.kinds[kind].reason_against(conv):
        return
    weight = conv.weight
    branch = BranchSpec(kind=kind).build(conv, ratio=1.5, init="paper", generator_seed=0)
    grown = randomized(attach(conv, [branch])).eval()
    gs.set_lambda(grown, 0.0)
    fused = grown.fuse()
    assert type(fused) is Conv2dSame and grown is conv and grown.weight is weight
    plain = to_plain(copy.deepcopy(grown))
    for size in ((7, 10), (8, 9), (12, 12)):
        x = images(8, *size, dtype=torch.float64)
        out = grown(x).detach()
        assert out.shape[2:] == tuple(-(-n // s) for n, s in zip(size, conv.stride, strict=True))
        assert rel(fused(x), out) < 1e-12
        assert rel(plain(x), out) > 1e-3
    assert isinstance(grown, GrownConv2dSame) and isinstance(grown, Conv2dSame)
    assert to_plain(grown) is conv and type(conv) is Conv2dSame and not hasattr(conv, "branches")


def tf_net():
    return net("tf_mobilenetv3_small_minimal_100")


@pytest.mark.parametrize("branch", sampled(["bottleneck", "insert", "mobileone", "dbb"], ("insert",)))
def test_a_net_of_them(branch):
    plain = randomized(tf_net()).double().eval()
    size = (3, 64, 64)
    grown = gs.grow(plain, branch, ratio=1.0, input_size=size)
    same = [n for n, m in plain.named_modules() if type(m) is Conv2dSame and n != "conv_stem"]
    assert same and all(isinstance(grown.get_submodule(n), GrownConv2dSame) for n in same)
    x = images(3, 64, 71, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(grown(x), plain(x))
    grown = randomized(grown, seed=2)
    gs.set_lambda(grown, 0.0)
    fused = gs.fuse(grown, input_size=size)
    with torch.no_grad():
        for other in ((64, 71), (65, 64)):  # padded otherwise than at the size it was fused at
            x = images(3, *other, dtype=torch.float64)
            assert rel(fused(x), grown(x)) < 1e-10
    assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]
    timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=10).load_state_dict(fused.state_dict())
    dropped = gs.drop(grown)
    assert [type(m) for m in dropped.modules()] == [type(m) for m in plain.modules()]


def test_they_train_and_stay_modules_of_a_traced_net():
    grown = train_a_bit(gs.grow(tf_net(), "repvgg", input_size=(3, 64, 64)), size=(3, 64, 64)).eval()
    branches = [p for m in grown_modules(grown).values() if isinstance(m, Conv2dSame) for p in m.branches.parameters()]
    assert branches and any(bool(p.grad.abs().max() > 0) for p in branches)
    features = FeatureGraphNet(copy.deepcopy(grown), out_indices=(1,))
    names = {n for n, m in features.named_modules() if isinstance(m, GrownConv2dSame)}
    assert names
    x = images(3, 50, 50)
    expected = grown.forward_intermediates(x, indices=(1,), intermediates_only=True)
    with torch.no_grad():
        assert rel(features(x)[0], expected[0]) < 1e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_they_script():
    conv = Conv2dSame(8, 8, 3, stride=2)
    branch = BranchSpec(kind="pointwise").build(conv, ratio=1.5, init="paper", generator_seed=0)
    grown = attach(conv, [branch]).eval()
    x = images(8, 7, 9)
    assert rel(torch.jit.script(grown)(x), grown(x).detach()) < 1e-6


@pytest.mark.parametrize("cls", [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame])
def test_standardised_kernels_are_left_alone(cls):
    model = with_conv(cls(8, 8, 3, bias=False))
    reason = f"it is a {cls.__name__}: its kernel is standardised"
    assert gs.growth_report(model).skipped["conv"].startswith(reason)
    with pytest.raises(GrowError, match=reason):
        gs.grow(model, where=["conv"])
    with pytest.raises(GrowError, match=f"none of 3 .*{reason}"):
        gs.grow(model)


def test_a_subclass_of_a_class_that_grows_is_left_alone():
    class Louder(Conv2dSame):
        def forward(self, x):
            return 2 * super().forward(x)

    model = ConvNet()
    model.conv = Louder(8, 8, 3)
    assert gs.growth_report(model).skipped["conv"] == "it is a Louder, whose forward is its own"
    assert isinstance(model.conv, nn.Conv2d)
