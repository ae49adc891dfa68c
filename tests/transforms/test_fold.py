import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d, freeze_batch_norm_2d
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune
from torchvision.ops import FrozenBatchNorm2d

import growshrink as gs
from growshrink.errors import FuseError
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.transforms import fold_report
from growshrink.transforms._fuse import replace_module
from nets import ConvNet, images, net, randomized, rel, untouched

SIZE = (3, 32, 32)


def norms(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def assert_same(a, b, size=SIZE, tolerance=1e-10):
    x = images(*size, n=3, dtype=next(a.parameters()).dtype)
    assert rel(b.eval()(x), copy.deepcopy(a).eval()(x)) < tolerance


@pytest.mark.parametrize("name", ["reducenet20", "reducenet18", "test_resnet", "test_efficientnet"])
def test_whole_nets_keep_their_function_and_no_norm(name):
    model = randomized(net(name, **({"width": 0.1} if name == "reducenet18" else {}))).double()
    with untouched(model):
        folded = gs.fold(model, input_size=SIZE)
    assert norms(model) and not norms(folded)
    assert_same(model, folded)
    x = images(*SIZE, n=3)
    with torch.no_grad():
        assert rel(folded.float()(x), model.float().eval()(x)) < 1e-5


@pytest.mark.parametrize("linear", [False, True])
def test_reducenets_lose_their_skips_too(linear):
    model = randomized(net("reducenet20", linear=linear)).double()
    folded = gs.fold(model)
    assert sum(b.skip for s in model.stages for b in s) == 7
    assert not any(b.skip for s in folded.stages for b in s)
    assert_same(model, folded)


def test_saving_and_loading_as_the_docstring_says():
    folded = gs.fold(randomized(net()).eval())
    fresh = gs.fold(net(seed=7).eval())
    fresh.load_state_dict(folded.state_dict(), strict=True)
    x = images(*SIZE)
    assert torch.equal(fresh(x), folded(x))
    assert not set(folded.state_dict()) <= set(net().state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"groups": 4},
        {"groups": 8, "kernel_size": 5, "padding": 2},
        {"stride": 2, "kernel_size": (1, 4)},
        {"kernel_size": (3, 1), "dilation": 2},
        {"padding_mode": "reflect"},
        {"padding": "same"},
    ],
    ids=str,
)
def test_geometries(options):
    model = randomized(ConvNet(**options)).double()
    folded = gs.fold(model)
    assert type(folded.bn) is nn.Identity and folded.conv.bias is not None
    assert folded.conv.padding == model.conv.padding
    assert_same(model, folded, (3, 9, 11))


@pytest.mark.parametrize("options", [{"eps": 0.1}, {"affine": False}, {"momentum": None}], ids=str)
def test_norms(options):
    model = ConvNet()
    model.bn = nn.BatchNorm2d(8, **options)
    assert_same(randomized(model).double(), gs.fold(model))


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, None])
def test_norms_with_an_activation_leave_it_behind(act):
    model = ConvNet()
    model.bn = BatchNormAct2d(8, act_layer=act, apply_act=act is not None)
    model = randomized(model).double()
    folded = gs.fold(model)
    assert norms(folded) == []
    assert_same(model, folded)
    assert any(isinstance(m, act or nn.Identity) for m in folded.bn.modules())


class Partly(ConvNet):
    """One conv that can take its norm in, and one for every reason not to."""

    def __init__(self):
        super().__init__()
        for name in ("fine", "read_twice", "relu_between", "twice", "pruned", "batch", "shared_a", "shared_b"):
            setattr(self, name, nn.Conv2d(8, 8, 1, bias=False))
            setattr(self, f"{name}_bn", nn.BatchNorm2d(8))
        self.batch_bn = nn.BatchNorm2d(8, track_running_stats=False)
        self.shared_b.weight = self.shared_a.weight
        self.same_bn_a, self.same_bn_b, self.same_bn = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.instance = nn.Sequential(nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8, affine=True, track_running_stats=True))
        with torch.no_grad():  # torch cannot copy a pruned module whose weight has a graph
            prune.random_unstructured(self.pruned, "weight", 0.5)

    def forward_features(self, x):
        x = self.fine_bn(self.fine(super().forward_features(x)))
        y = self.read_twice(x)
        x = self.read_twice_bn(y) + y
        x = self.relu_between_bn(F.relu_(self.relu_between(x)))
        x = self.twice_bn(self.twice(self.twice(x)))
        x = self.pruned_bn(self.pruned(x))
        x = self.batch_bn(self.batch(x))
        x = self.shared_a_bn(self.shared_a(x)) + self.shared_b_bn(self.shared_b(x))
        x = self.same_bn(self.same_bn_a(x)) + self.same_bn(self.same_bn_b(x))
        return self.instance(x)


def test_what_does_not_fit_stays_as_it_is():
    model = randomized(Partly()).double()
    folded = gs.fold(model)
    assert type(folded.fine_bn) is nn.Identity and type(folded.bn) is nn.Identity
    stay = {f"{n}_bn" for n in ("read_twice", "relu_between", "twice", "pruned", "batch", "shared_a", "shared_b")}
    assert set(norms(folded)) == stay | {"same_bn"}
    assert_same(model, folded)
    for name, tensor in model.state_dict().items():
        if not name.startswith(("fine", "conv", "bn")):
            assert torch.equal(folded.state_dict()[name], tensor), name


@pytest.mark.parametrize("bias", [False, True])
def test_tf_same_convolutions_at_sizes_that_pad_differently(bias):
    model = ConvNet()
    model.conv = Conv2dSame(8, 8, 3, stride=2, bias=bias)
    model = randomized(model).double()
    folded = gs.fold(model)
    assert type(folded.conv) is Conv2dSame and norms(folded) == []
    for size in ((8, 9), (9, 8), (12, 7)):
        assert_same(model, folded, (3, *size))


def test_a_whole_net_of_tf_same_convolutions():
    model = randomized(net("tf_mobilenetv3_small_minimal_100")).double()
    folded = gs.fold(model, input_size=SIZE)
    assert norms(model) and not norms(folded)
    for size in ((32, 32), (33, 50)):
        assert_same(model, folded, (3, *size))


def own_forward(cls):
    return type("Own", (cls,), {"forward": lambda self, x: cls.forward(self, x) * 2})


def test_what_has_a_forward_of_its_own_is_not_folded():
    model = randomized(ConvNet())
    for conv in (own_forward(nn.Conv2d)(8, 8, 3, padding=1), own_forward(Conv2dSame)(8, 8, 3)):
        model.conv = conv
        assert norms(gs.fold(model)) == ["bn"]
    model = randomized(ConvNet())
    model.conv = type("Same", (nn.Conv2d,), {})(8, 8, 3, padding=1)
    assert norms(gs.fold(model)) == []
    model.bn = own_forward(nn.BatchNorm2d)(8)
    assert norms(gs.fold(model)) == ["bn"]
    assert fold_report(model) == {"bn": "it is a Own, whose forward is its own"}


FROZEN = {
    "synchronised": nn.SyncBatchNorm.convert_sync_batchnorm,
    "timm": lambda model: freeze_batch_norm_2d(model),
    "torchvision": lambda model: frozen_like_torchvision(model),
}


def frozen_like_torchvision(model):
    for name, norm in list(model.named_modules()):
        if type(norm) is nn.BatchNorm2d:
            frozen = FrozenBatchNorm2d(norm.num_features)
            frozen.load_state_dict(norm.state_dict())
            replace_module(model, name, frozen)
    return model


@pytest.mark.parametrize("way", FROZEN)
@pytest.mark.parametrize("make", [lambda: net("test_resnet"), ConvNet], ids=["test_resnet", "ConvNet"])
def test_synchronised_and_frozen_norms(make, way):
    plain = randomized(make()).double()
    model = FROZEN[way](copy.deepcopy(plain)).double()
    folded = gs.fold(model, input_size=SIZE)
    assert_same(plain, folded, SIZE)
    assert not any(isinstance(m, (_BatchNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d)) for m in folded.modules())
    assert fold_report(folded, input_size=SIZE) == {}


def test_the_report_names_what_is_left_and_why():
    class Odd(ConvNet):
        def __init__(self):
            super().__init__()
            self.first, self.batch = nn.BatchNorm2d(3), nn.BatchNorm2d(8, track_running_stats=False)

        def forward_features(self, x):
            y = self.conv(self.stem(self.first(x)))
            return self.batch(self.bn(y) + y)

    assert fold_report(Odd()) == {
        "bn": "it follows conv: its output is read 2 times (bn, add)",
        "first": "it reads the output of no convolution or linear layer",
        "batch": "it has no running statistics",
    }
    assert fold_report(ConvNet()) == {}  # all of them would go


@pytest.mark.parametrize("grown", [lambda: gs.grow(net()), lambda: net("reducenet20_x1")], ids=["grown", "built grown"])
def test_a_grown_net_is_refused(grown):
    model = grown()
    with untouched(model), pytest.raises(FuseError, match=r"^stages\.0\.0\.conv .*growshrink.fuse comes before"):
        gs.fold(model, inplace=True)


def test_a_model_that_is_itself_a_grown_module_is_refused():
    with pytest.raises(FuseError, match="the model still carries branches"):
        gs.fold(PureBottleneck(3, 8, 4))


def test_a_net_that_would_change_is_refused_and_untouched():
    class ReadsTheKernel(ConvNet):
        def forward_features(self, x):
            return super().forward_features(x) + self.conv.weight.mean()

    model = randomized(ReadsTheKernel())
    with untouched(model), pytest.raises(FuseError, match="left as it was"):
        gs.fold(model, inplace=True)


def test_grow_fuse_fold():
    grown = randomized(gs.grow(net(), ["bottleneck", "insert"])).double()
    gs.set_lambda(grown, 0.0)
    assert_same(grown, gs.fold(gs.fuse(grown)))


def test_inplace_modes_and_dtypes():
    model = randomized(net()).to(torch.bfloat16).train()
    weight = model.stages[0][0].conv.weight.requires_grad_(False)
    assert gs.fold(model, inplace=True) is model
    conv = model.stages[0][0].conv
    assert conv.weight is weight and conv.bias.dtype == torch.bfloat16 and not conv.bias.requires_grad
    assert model.stages[0][1].conv.bias.requires_grad
    assert all(m.training for m in model.modules())


def test_folding_twice_and_a_net_without_norms():
    folded = gs.fold(randomized(net()))
    again = gs.fold(folded)
    assert all(torch.equal(v, folded.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_net_without_parameters_stays_as_it_is():
    model = nn.Sequential(nn.ReLU(), nn.Flatten())
    x = images(3, 4, 4)
    assert torch.equal(gs.fold(model, input_size=(3, 4, 4))(x), model(x))


def test_a_feature_extractor_and_a_net_of_float32():
    backbone = randomized(timm.create_model("test_resnet", features_only=True))
    assert norms(gs.fold(backbone, input_size=SIZE)) == []

    class Float32Inside(ConvNet):
        def forward(self, x):
            return F.linear(super().forward(x), torch.eye(10))

    model = randomized(Float32Inside())
    assert_same(model, gs.fold(model), tolerance=1e-5)
