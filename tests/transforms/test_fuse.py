import copy
import itertools

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import growshrink as gs
from growshrink.branches import BranchSpec
from growshrink.errors import FuseError
from growshrink.layers.activations import VanishingReLU
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.grown import grown_modules
from growshrink.layers.swaps import attach
from nets import ConvNet, images, net, randomized, rel, small, train_a_bit, untouched
from sampled import exhaustive, sampled

SIZE = (3, 16, 16)
KINDS = ("bottleneck", "insert", "nest")


def linear(model, seed=1):
    """Random norms and lam 0: what a trained net is when it is to be fused."""
    randomized(model, seed)
    gs.set_lambda(model, 0.0)
    return model


def grown_by_hand(model, names=("conv",), kinds=("bottleneck",)):
    """Attach branches without the checks of grow."""
    for index, name in enumerate(names):
        conv = model.get_submodule(name)
        specs = [BranchSpec(kind=kind) for kind in kinds]
        attach(conv, [s.build(conv, ratio=2.0, init="paper", generator_seed=index) for s in specs])
    return linear(model)


@torch.no_grad()
def features(model, x):
    return model.eval().forward_features(x)


# --- exact ---


def assert_exact(model, size, transform=gs.fuse):
    proof = gs.verify(model, transform, input_size=size)
    assert proof.max_rel <= 1e-10 and proof.max_rel_float32 <= 1e-5 and proof.effect >= 0.1 and proof.ok, proof


AT_BIRTH = [f"reducenet{d}_x{x}" for d, x in itertools.product((20, 32, 44, 56, 110), (1, 2, 4, 8))]
AT_BIRTH += [f"reducenet{d}_x{x}" for d, x in itertools.product((18, 34), (1, 2, 4))]


@pytest.mark.parametrize("name", sampled(AT_BIRTH, ("reducenet20_x4", "reducenet18_x1")))
def test_every_reducenet_that_is_grown_at_birth(name):
    photo = name.startswith(("reducenet18", "reducenet34"))
    size, width = ((3, 32, 32), 0.1) if photo else ((3, 11, 12), 0.25)
    fused = []

    def fuse(model):
        fused.append(gs.fuse(model, input_size=size))
        return fused[-1]

    assert_exact(net(name, width=width), size, fuse)
    net(name.split("_")[0], width=width).load_state_dict(fused[-1].state_dict(), strict=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    sampled(
        [
            ("reducenet20", KINDS),
            *itertools.product(["reducenet20", "reducenet18", "test_resnet", "test_efficientnet", "resnet18"], KINDS),
        ],
        lambda case: case in (("reducenet20", KINDS), ("test_efficientnet", "insert")),
    ),
)
def test_every_kind_in_whole_nets(name, kind):
    narrow = {
        "reducenet20": {"depths": (1, 1, 1)},
        "reducenet18": {"width": 0.1},
        "resnet18": {"channels": (8, 16, 24, 32)},
    }
    size = (3, 32, 32)
    assert_exact(gs.grow(net(name, **narrow.get(name, {})), kind, input_size=size), size)


@pytest.mark.parametrize("train", [False, True])
def test_three_rounds_drift(train):
    model = randomized(small()).double()
    x = images(*SIZE, n=4, dtype=torch.float64)
    for index in range(3):
        model = gs.grow(model, ["bottleneck", "insert"], seed=index)
        if train:
            train_a_bit(model, steps=3, lr=0.01)
            gs.set_lambda(model, 0.0)
        else:
            linear(model, seed=index)
        with torch.no_grad():
            before = model.eval()(x)
            model = gs.fuse(model)
            assert rel(model.eval()(x), before) < 1e-9
    assert not grown_modules(model)


GEOMETRIES = [
    {},
    {"bias": True},
    {"stride": 2},
    {"stride": (3, 1)},
    {"kernel_size": 1, "padding": 0},
    {"kernel_size": (1, 5), "padding": (0, 2)},
    {"kernel_size": (3, 1), "dilation": 2, "padding": (2, 0)},
    {"kernel_size": 1, "padding": 0, "dilation": 3},
    {"kernel_size": 4},
    {"kernel_size": (2, 3), "padding": (0, 3)},
    {"kernel_size": 3, "padding": 0},
    {"kernel_size": 3, "padding": 4},
    {"dilation": 3, "padding": 3},
    {"groups": 2},
    {"groups": 8},
    {"groups": 8, "out_channels": 16, "kernel_size": 5, "padding": 2, "stride": 2},
    {"out_channels": 6},
    {"padding": "same", "kernel_size": 5},
    {"padding": "same", "dilation": 2, "groups": 4},
    {"padding": "same", "kernel_size": (2, 4)},
    {"padding": "valid"},
    {"padding_mode": "reflect"},
    {"padding_mode": "circular", "padding": 3},
    {"padding_mode": "replicate", "stride": 2, "bias": True},
    {"padding_mode": "reflect", "padding": 6, "kernel_size": 1},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_geometries_pixel_by_pixel(options):
    grown = gs.grow(ConvNet(**options).double(), KINDS, where=["conv"])
    fused = gs.fuse(linear(grown))
    for height, width in ((9, 12), (10, 8), (7, 7)):
        x = images(3, height, width, dtype=torch.float64)
        expected, found = features(grown, x), features(fused, x)
        error = ((found - expected).abs() / expected.abs().max()).amax((0, 1))
        assert error.shape[0] > 1 and float(error.max()) < 1e-11
        ring = torch.cat([error[0], error[-1], error[:, 0], error[:, -1]])  # wrong padding would show here
        assert float(ring.max()) < 1e-11
    assert [(k, v.shape) for k, v in fused.state_dict().items()] == [
        (k, v.shape) for k, v in ConvNet(**options).state_dict().items()
    ]


NORMS = {
    "odd eps": lambda c: nn.BatchNorm2d(c, eps=0.1),
    "tiny eps": lambda c: nn.BatchNorm2d(c, eps=1e-12),
    "affine=False": lambda c: nn.BatchNorm2d(c, affine=False),
    "momentum=None": lambda c: nn.BatchNorm2d(c, momentum=None),
    "with an activation": lambda c: timm.layers.BatchNormAct2d(c, act_layer=nn.SiLU),
    "SyncBatchNorm": nn.SyncBatchNorm,
}


@pytest.mark.parametrize("behind", NORMS)
@pytest.mark.parametrize("inside", [n for n in NORMS if n not in ("with an activation", "SyncBatchNorm")])
def test_norms(behind, inside):
    model = ConvNet()
    model.bn = NORMS[behind](8)
    grown = gs.grow(model, where=["conv"])
    grown.conv.branches[0].norm = NORMS[inside](8)
    grown.conv.branches[0].body.bn = NORMS[inside](16)
    grown = linear(grown).double()
    fused = gs.fuse(grown)
    x = images(*SIZE, dtype=torch.float64)
    assert rel(features(fused, x), features(grown, x)) < 1e-10
    assert type(fused.bn) is type(grown.bn)
    for name in (
        "weight",
        "bias",
        "running_var",
        "num_batches_tracked",
    ):  # the bias went into the mean and nowhere else
        a, b = getattr(fused.bn, name), getattr(grown.bn, name)
        assert a is b is None or torch.equal(a, b)
    assert not torch.equal(fused.bn.running_mean, grown.bn.running_mean)


def test_ill_conditioned_statistics():
    grown = linear(gs.grow(net().double()))
    for module in grown.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.mul_(torch.logspace(-6, 6, module.num_features, dtype=torch.float64))
    x = images(*SIZE, dtype=torch.float64)
    assert rel(gs.fuse(grown).eval()(x).detach(), grown.eval()(x).detach()) < 1e-9


# --- what fuse keeps ---


def test_train_mode_gives_the_net_of_eval_mode():
    grown = linear(gs.grow(small(), KINDS))
    a, b = gs.fuse(grown.train()), gs.fuse(copy.deepcopy(grown).eval())
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert all(m.training for m in a.modules()) and not any(m.training for m in b.modules())


@pytest.mark.parametrize("name", ["reducenet20", "reducenet20_x2", exhaustive("test_resnet")])
def test_a_copy_leaves_the_original_alone_and_gives_the_plain_net(name):
    make = small if name.startswith("reducenet") else net
    plain = make(name.split("_x")[0])
    model = make(name) if "_x" in name else gs.grow(plain, KINDS)
    linear(model)
    with untouched(model):
        fused = gs.fuse(model)
    assert [(k, v.shape, v.dtype) for k, v in fused.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in plain.state_dict().items()
    ]
    assert [(n, type(m)) for n, m in fused.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    fresh = make(name.split("_x")[0], seed=5)
    fresh.load_state_dict(fused.state_dict(), strict=True)
    x = images(3, 32, 32)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), fused.eval()(x))
        assert rel(fused(x), model.eval()(x)) < 1e-5
    assert not {id(p) for p in model.parameters()} & {id(p) for p in fused.parameters()}


def test_inplace_keeps_the_objects():
    plain = net()
    objects = dict([*plain.named_parameters(), *plain.named_buffers()])
    modules = dict(plain.named_modules())
    values = {k: v.detach().clone() for k, v in objects.items()}
    grown = linear(gs.grow(plain, inplace=True))
    assert gs.fuse(grown, inplace=True) is plain
    now = dict([*plain.named_parameters(), *plain.named_buffers()])
    assert now.keys() == objects.keys() and all(now[k] is v for k, v in objects.items())
    assert all(module is modules[name] for name, module in plain.named_modules())
    kernels = [k for k in values if k.startswith("stages") and k.endswith("conv.weight")]
    assert len(kernels) == 9 and not any(torch.equal(now[k], values[k]) for k in kernels)
    assert torch.equal(now["stem.conv.weight"], values["stem.conv.weight"])


def test_idempotent():
    fused = gs.fuse(linear(gs.grow(small(), KINDS)))
    again = gs.fuse(fused)
    assert again is not fused and gs.fuse(fused, inplace=True) is fused
    assert all(torch.equal(v, fused.state_dict()[k]) for k, v in again.state_dict().items())


def test_silent_branches_change_nothing_but_rounding():
    plain = randomized(net())
    grown = gs.grow(plain)
    gs.set_lambda(grown, 0.0)
    fused = gs.fuse(grown)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in fused.state_dict().items())


@pytest.mark.parametrize("name", ["reducenet20", "reducenet20_x2"])
def test_what_the_fused_net_inherits(name):
    model = (gs.grow(net(name)) if name == "reducenet20" else net(name)).to(torch.bfloat16)
    model = linear(model.to(memory_format=torch.channels_last))
    model.stages[0].eval().requires_grad_(False)
    fused = gs.fuse(model)
    for index, stage in enumerate(fused.stages):
        for module in stage.modules():
            assert module.training == (index > 0)
            if isinstance(module, nn.Conv2d):
                assert module.weight.dtype == torch.bfloat16 and module.weight.requires_grad == (index > 0)
                assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_nets_that_do_not_run_in_float64():
    class Float32Inside(ConvNet):
        def forward(self, x):
            return F.linear(super().forward(x), torch.eye(10))

    grown = linear(gs.grow(Float32Inside(), where=["conv"]))
    x = images(*SIZE)
    assert rel(gs.fuse(grown).eval()(x).detach(), grown.eval()(x).detach()) < 1e-5


def test_outputs_that_are_no_single_tensor():
    class Many(ConvNet):
        def forward(self, x):
            y = self.forward_features(x)
            return {"map": y, "all": [y.mean((2, 3)), y.argmax(1)]}

    grown = linear(gs.grow(Many(head=False), where=["conv"]).double())
    x = images(*SIZE, dtype=torch.float64)
    assert rel(gs.fuse(grown).eval()(x)["map"].detach(), grown.eval()(x)["map"].detach()) < 1e-10
    backbone = linear(gs.grow(timm.create_model("test_resnet", features_only=True)))
    assert not grown_modules(gs.fuse(backbone))


def test_inputs_that_the_net_overwrites():
    class Normalises(ConvNet):
        def forward(self, x):
            return super().forward(x.sub_(0.5).mul_(3.0))

    assert not grown_modules(gs.fuse(linear(gs.grow(Normalises(), where=["conv"]))))


# --- refusals ---


def in_place_mixture(self, x):
    # ReduceNet's own code of May 2023: relu_ overwrites the x of the second term, so lam = 0 is a ReLU
    return self.lam * F.relu_(x) + (1 - self.lam) * x


class InPlaceMixture(VanishingReLU):
    forward = in_place_mixture


def alive(model):
    model.conv.branches[0].body.act.lam.fill_(1e-9)


def alive_nan(model):
    model.conv.branches[0].body.act.lam.fill_(float("nan"))


def alive_in_a_nest(model):
    nest = BranchSpec(kind="nest").build(model.conv, ratio=1.0, init="paper", generator_seed=0)
    gs.set_lambda(nest, 0.0)
    nest.body.conv.branches[0].body.act.lam.fill_(0.5)
    attach(model.conv, [nest])


def relu_in_a_branch(model):
    model.conv.branches[0].body.act = nn.ReLU(inplace=True)


def subclass_with_the_old_bug(model):
    model.conv.branches[0].body.act = InPlaceMixture(0.0)


def patched_with_the_old_bug(model):
    act = model.conv.branches[0].body.act
    act.forward = in_place_mixture.__get__(act)


def patched_class_with_the_old_bug(model):
    body = model.conv.branches[0].body
    body.act.register_forward_hook(lambda module, args, output: F.relu_(output))


def norm_of_the_batch(model):
    model.conv.branches[0].norm = nn.BatchNorm2d(8, track_running_stats=False)


def not_finite(model):
    with torch.no_grad():
        model.conv.branches[0].body.conv.weight[0, 0, 0, 0] = float("inf")


def shared_weight(model):
    model.stem2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    model.stem2.weight = model.conv.weight


def shared_inside_a_branch(model):
    model.other = model.conv.branches[0].body.pointwise


def registered_twice(model):
    model.alias = model.conv


def no_norm(model):
    model.bn = nn.Identity()


def parametrized(model):
    parametrize.register_parametrization(model.conv, "weight", nn.Identity())


DAMAGES = {
    alive: r"conv\.branches\.0\.body\.act \(lam = 9\.99.*e-10\).*set_lambda",
    alive_nan: r"conv\.branches\.0\.body\.act \(lam = nan\)",
    alive_in_a_nest: r"1 activation.*conv\.branches\.1\.body\.conv\.branches\.0\.body\.act \(lam = 0\.5\)",
    relu_in_a_branch: r"conv\.branches\.0\.body\.act: ReLU is not known to be affine",
    subclass_with_the_old_bug: r"conv\.branches\.0\.body\.act: InPlaceMixture is not known to be affine",
    patched_with_the_old_bug: r"^conv: its forward is not the affine map of its parts .* in place",
    patched_class_with_the_old_bug: r"^conv: its forward is not the affine map of its parts",
    norm_of_the_batch: r"conv\.branches\.0\.norm: a batch norm without running statistics",
    not_finite: r"^conv: its merged kernel has NaN or infinite values",
    shared_weight: r"^conv shares parameters",
    shared_inside_a_branch: r"^conv shares parameters",
    registered_twice: r"^conv shares parameters",
    no_norm: r"^conv has no bias of its own.* not into a batch norm",
    parametrized: r"^conv: its weight is computed by a hook or parametrization",
}


def refuse(model, message, **kwargs):
    for inplace in (False, True):
        with untouched(model), pytest.raises(FuseError, match=message) as caught:
            gs.fuse(model, inplace=inplace, **kwargs)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_refusals(damage, train):
    model = grown_by_hand(ConvNet()).train(train)
    damage(model)
    refuse(model, DAMAGES[damage])


def test_the_old_bug_in_a_net_grown_at_birth():
    model = linear(net("reducenet20_x2"))
    model.stages[1][2].conv.act.forward = in_place_mixture.__get__(model.stages[1][2].conv.act)
    refuse(model, r"^stages\.1\.2\.conv: its forward is not the affine map")
    model = linear(net("reducenet20_x2"))
    model.stages[1][2].conv.act = InPlaceMixture(0.0)
    refuse(model, r"^stages\.1\.2\.conv\.act: InPlaceMixture")


class Ways(ConvNet):
    """A ConvNet whose forward is given as a function of the conv's output."""

    def __init__(self, way):
        super().__init__(head=False)
        self.way = way
        self.bn2, self.wide = nn.BatchNorm2d(8), nn.BatchNorm2d(16)

    def forward(self, x):
        return self.way(self, self.conv(torch.tanh(self.stem(x))))


def relu_in_place_before(m, y):
    F.relu_(y)
    return m.bn(y)


SECOND_READERS = {
    "functional add": (lambda m, y: m.bn(y) + y, r"^conv .* read 2 times \(bn, add\)"),
    "relu_ before the norm": (relu_in_place_before, r"^conv .* read 2 times \(relu_, bn\)"),
    "output of the model": (lambda m, y: (m.bn(y), y), r"^conv .* read 2 times \(bn, the model's output\)"),
    "cat": (lambda m, y: m.wide(torch.cat([y, y * 2], 1)), r"^conv .* read 2 times \(mul, cat\)"),
    "two norms": (lambda m, y: m.bn(y) + m.bn2(y), r"^conv .* read 2 times \(bn, bn2\)"),
    "one norm twice": (lambda m, y: m.bn(m.bn(y)), r"^conv .* the batch norm bn behind it runs 2 times"),
    "no norm": (lambda m, y: m.act(y), r"^conv .* goes to relu, not into a batch norm"),
    "layer norm": (lambda m, y: F.layer_norm(y, y.shape[1:]), r"^conv .* not into a batch norm"),
    "batch statistics": (lambda m, y: F.batch_norm(y, None, None, training=True), r"^conv .* not into a batch norm"),
    "the conv twice": (lambda m, y: m.bn(m.conv(y)), "^conv runs 2 times in a forward pass"),
}


@pytest.mark.parametrize("way", SECOND_READERS)
def test_a_bias_with_nowhere_to_go(way):
    function, message = SECOND_READERS[way]
    refuse(grown_by_hand(Ways(function)), message)


@pytest.mark.parametrize("way", [w for w in SECOND_READERS if w != "the conv twice"])
def test_the_same_with_a_bias_of_its_own_is_exact(way):
    function, _ = SECOND_READERS[way]
    model = Ways(function)
    model.conv = nn.Conv2d(8, 8, 3, padding=1)
    grown = grown_by_hand(model).double().eval()
    x = images(*SIZE, dtype=torch.float64)
    expected, found = grown(x), gs.fuse(grown)(x)
    for a, b in zip(found, expected, strict=True):
        assert rel(a.detach(), b.detach()) < 1e-10


def test_a_second_use_of_the_kernel_is_found_by_the_final_check():
    class ReadsTheKernel(ConvNet):
        def forward_features(self, x):
            return super().forward_features(x) + self.conv.weight.mean()

    refuse(grown_by_hand(ReadsTheKernel()), "would differ from the one given by .* left as it was")


def test_one_bad_module_among_many_leaves_all_of_them_alone():
    model = linear(gs.grow(small(), KINDS))
    model.stages[2][0].conv.branches[1].act = nn.GELU()
    refuse(model, r"^stages\.2\.0\.conv\.branches\.1\.act: GELU")


def test_a_wrong_input_size_is_refused():
    model = linear(gs.grow(net()))
    with untouched(model), pytest.raises(gs.errors.GrowShrinkError, match=r"5x8x8.*input_size"):
        gs.fuse(model, inplace=True, input_size=(5, 8, 8))


def test_pure_bottleneck_without_a_norm_behind():
    model = ConvNet(norm=False)
    model.conv = PureBottleneck(8, 16, 8)
    refuse(linear(model), "^conv has no bias of its own")
    # with nothing to carry it needs none
    with torch.no_grad():
        model.conv.bn.bias.zero_()
        model.conv.bn.running_mean.zero_()
    assert type(gs.fuse(model).conv) is nn.Conv2d


def test_a_model_that_is_itself_a_grown_module():
    conv = gs.grow(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "insert")[1]
    assert type(gs.fuse(linear(conv), input_size=(4, 8, 8))) is nn.Conv2d
    refuse(linear(PureBottleneck(4, 8, 4)), r"the model is itself a PureBottleneck.* fuse\(\)")
