import copy
import itertools
import random

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import growshrink as gs
from growshrink.branches import Branch, BranchSpec
from growshrink.errors import DropError, GrowError
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.grown import GrownConv2d, grown_modules
from growshrink.transforms import branch_specs
from nets import ConvNet, images, net, randomized, small, train_a_bit, untouched
from sampled import sampled

SIZE = (3, 16, 16)


class SecondKernel(Branch, kind="tests-second-kernel"):
    def __init__(self, conv, ratio):
        super().__init__(conv, ratio)
        like = dict(zip(("kernel_size", "stride", "padding", "dilation"), geometry(conv), strict=True))
        self.conv = nn.Conv2d(conv.in_channels, conv.out_channels, groups=conv.groups, bias=False, **like)
        self.norm = nn.BatchNorm2d(conv.out_channels)

    def forward(self, x, y):
        return self.norm(self.conv(x))

    def as_convmap(self, kernel):
        raise NotImplementedError


def geometry(conv):
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation


KINDS = tuple(Branch.kinds)
FIT_3X3 = [kind for kind in KINDS if not Branch.kinds[kind].reason_against(nn.Conv2d(8, 8, 3, padding=1))]
FEW = ("bottleneck", "insert", "nest", "tests-second-kernel")
NETS = {
    "reducenet20": small,
    "test_resnet": lambda: net("test_resnet"),
    "test_efficientnet": lambda: net("test_efficientnet"),
    "conv with bias, no BN": lambda: ConvNet(bias=True, norm=False),
    "strided, grouped": lambda: ConvNet(stride=2, groups=4),
}


# --- growing changes nothing ---


SMALL = "conv with bias, no BN"


@pytest.mark.parametrize(
    ("name", "kind"),
    sampled(
        [
            ("reducenet20", FIT_3X3),
            *itertools.product(NETS, FEW),
            *((SMALL, kind) for kind in KINDS if kind not in FEW),
        ],
        lambda case: case[0] not in ("test_resnet", "test_efficientnet") or case[1] == "insert",
    ),
)
def test_silent_growth_changes_no_output(name, kind):
    plain = randomized(NETS[name]()).double()
    if kind in ("expandnet_stack", "small_kernel", "stack"):
        plain.conv = nn.Conv2d(8, 8, 5, padding=2).double()
    size = (3, 32, 32)
    grown = gs.grow(plain, kind, input_size=size)
    assert len(grown_modules(grown)) >= 1
    x = images(*size, n=2, dtype=torch.float64)
    for lam in (1.0, 0.3, 0.0):
        gs.set_lambda(grown, lam)
        for train in (False, True):
            a, b = (copy.deepcopy(m).train(train) for m in (plain, grown))
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                expected = a(x)
                torch.manual_seed(0)
                found = b(x)
            assert torch.equal(found, expected), (lam, train)
            for key, value in a.state_dict().items():  # train mode: the same statistics were gathered
                assert torch.equal(b.state_dict()[key], value), key


def test_paper_growth_changes_the_output():
    plain = net()
    grown = gs.grow(plain, init="paper", input_size=SIZE)
    x = images(*SIZE)
    assert not torch.allclose(grown(x), plain(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["silent", "paper"])
def test_every_new_parameter_learns_by_the_second_update(kind, init):
    # No norm behind the conv: one would take away every constant, and with it the gradient of the branch's last beta.
    plain = ConvNet(bias=True, norm=False, kernel_size=5, padding=2).double()
    old = {id(p) for p in plain.parameters()}
    grown = gs.grow(plain, kind, where=["conv"], init=init, inplace=True)
    train_a_bit(grown, steps=2)
    new = {n: p for n, p in grown.named_parameters() if id(p) not in old}
    for name in ("body.conv.branches.0.norm", "path.inner"):  # of "nest" and of "dbb": a norm follows these
        new.pop(f"conv.branches.0.{name}.bias", None)
    assert new
    for name, parameter in new.items():
        assert float(parameter.grad.abs().max()) > 1e-12, name


@pytest.mark.parametrize("name", ["reducenet20", "test_resnet"])
def test_every_new_parameter_learns_in_whole_nets(name):
    # timm's zero gammas at the end of a residual block would hold up everything before them for one more update
    plain = net(name, **({} if name == "reducenet20" else {"zero_init_last": False}))
    grown = train_a_bit(gs.grow(plain, ["bottleneck", "insert", "nest"], input_size=(3, 32, 32)), size=(3, 32, 32))
    new = {n: p for n, p in grown.named_parameters() if ".branches." in n}
    # the beta of a branch's last norm is a constant that the BN behind the conv subtracts: no gradient, no harm
    last_beta = {f"{n}.norm.bias" for n, m in grown.named_modules() if isinstance(m, Branch)}
    for key, parameter in new.items():
        assert key in last_beta or float(parameter.grad.abs().max()) > 0, key


# --- what is where ---


def test_the_parameters_of_the_plain_net_are_where_and_what_they_were():
    plain = net()
    keys = dict(plain.named_parameters())
    grown = gs.grow(plain, inplace=True)
    assert grown is plain
    now = dict(grown.named_parameters())
    assert all(now[k] is v for k, v in keys.items())
    assert all(".branches." in k for k in now.keys() - keys.keys())
    assert gs.get_lambda(grown) and set(gs.get_lambda(grown).values()) == {1.0}


def test_a_copy_leaves_the_original_and_the_random_streams_alone():
    plain = net().eval()
    random_state = random.getstate()
    with untouched(plain):
        grown = gs.grow(plain, ["nest", "insert"])
    assert random.getstate() == random_state
    assert not grown_modules(plain) and len(grown_modules(grown)) == 9
    assert not {id(p) for p in plain.parameters()} & {id(p) for p in grown.parameters()}


def test_seeds():
    def branches(seed, where=None):
        torch.manual_seed(seed + 100)
        return {k: v for k, v in gs.grow(net(), seed=seed, where=where).state_dict().items() if ".branches." in k}

    a, b, c = branches(0), branches(0), branches(1)
    assert all(torch.equal(a[k], b[k]) for k in a)
    weights = [k for k in a if k.endswith(("conv.weight", "pointwise.weight"))]
    assert weights and not any(torch.equal(a[k], c[k]) for k in weights)
    # a layer's weights do not depend on which others are grown
    some = branches(0, where=["stages.1.1.conv"])
    assert all(torch.equal(a[k], v) for k, v in some.items())
    # nor are two layers or two branches of a layer alike
    assert not torch.equal(
        a["stages.0.0.conv.branches.0.body.conv.weight"], a["stages.0.1.conv.branches.0.body.conv.weight"]
    )
    twice = gs.grow(gs.grow(net(), where=["stages.0.0.conv"]), where=["stages.0.0.conv"])
    one, two = twice.stages[0][0].conv.branches
    assert not torch.equal(one.body.conv.weight, two.body.conv.weight)
    pair = gs.grow(net(), ["bottleneck", "bottleneck"], where=["stages.0.0.conv"]).stages[0][0].conv.branches
    assert torch.equal(pair[1].body.conv.weight, two.body.conv.weight)


def test_branches_inherit():
    plain = net().to(torch.bfloat16).to(memory_format=torch.channels_last)
    plain.stages[0].eval().requires_grad_(False)
    grown = gs.grow(plain, trainable=None)
    assert all(p.requires_grad for p in gs.branch_parameters(gs.grow(plain)))
    assert not any(p.requires_grad for p in gs.branch_parameters(gs.grow(plain, trainable=False)))
    for name, conv in grown_modules(grown).items():
        frozen = name.startswith("stages.0")
        for p in conv.branches.parameters():
            assert p.dtype == torch.bfloat16 and p.requires_grad != frozen
            assert p.dim() < 4 or p.is_contiguous(memory_format=torch.channels_last)
        assert all(m.training != frozen for m in conv.modules())
        assert all(act.lam.dtype == torch.float32 for act in conv.modules() if isinstance(act, gs.layers.VanishingReLU))
    on_meta = gs.grow(net().to("meta"))
    assert all(t.is_meta for t in on_meta.state_dict().values())


def test_order_and_specs():
    specs = ["insert", BranchSpec(kind="bottleneck", ratio=0.5), "nest"]
    grown = gs.grow(net(), specs, ratio=3.0, where=["stages.2.0.conv"])
    branches = grown.stages[2][0].conv.branches
    assert [b.kind for b in branches] == ["insert", "bottleneck", "nest"]
    assert branches[1].body.conv.out_channels == 8 and branches[2].body.conv.out_channels == 48
    assert branch_specs("nest") == [BranchSpec(kind="nest")]
    assert gs.growth_report(grown).grown == {"stages.2.0.conv": ("insert", "bottleneck", "nest")}


# --- where ---

BLOCKS = [f"stages.{s}.{b}.conv" for s in range(3) for b in range(3)]


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (None, BLOCKS),
        (r"stages\.1", BLOCKS[3:6]),
        (r"conv$", BLOCKS),  # matches the stem too, which is skipped
        (lambda n, m: m.in_channels == 4, BLOCKS[:4]),
        (["stages.2.2.conv", "stages.0.1.conv"], ["stages.0.1.conv", "stages.2.2.conv"]),
        (("stages.0.1.conv", "stages.0.1.conv"), ["stages.0.1.conv"]),
        (iter(["stages.0.1.conv"]), ["stages.0.1.conv"]),
    ],
    ids=["None", "regex", "regex that matches what is skipped", "callable", "list", "duplicates", "iterator"],
)
def test_where(where, names):
    grown = gs.grow(net(), where=where)
    assert list(grown_modules(grown)) == names
    assert all(len(m.branches) == 1 for m in grown_modules(grown).values())


NO_BIAS_NO_NORM = "it has no bias, and the bias of a branch finds no batch norm to go to"
WRONG = {
    "regex": ({"where": "stages.("}, "where='stages.*': not a regular expression"),
    "regex without match": ({"where": "stagess"}, "matches no convolution and no linear layer; "),
    "regex of the stem": ({"where": "^stem"}, r"none of 1 layers can be grown exactly \(stem.conv: the stem"),
    "callable that takes none": ({"where": lambda n, m: False}, "chose none of 10 layers"),
    "empty list": ({"where": []}, r"where=\[\]"),
    "unknown name": (
        {"where": ["stages.0.0.con"]},
        "'stages.0.0.con': no such convolution or linear layer; did you mean .*stages.0.0.conv",
    ),
    "name of no conv": ({"where": ["stages.0.0.bn"]}, "no such convolution"),
    "name that is skipped": (
        {"where": ["stages.0.0.conv", "stem.conv"]},
        "'stem.conv', which cannot be grown: the stem",
    ),
    "kind": ({"branch": "bottelneck"}, "no such branch; did you mean bottleneck?"),
    "second kind": ({"branch": ["nest", "inset"]}, "did you mean insert"),
    "no kind": ({"branch": []}, "at least one branch"),
    "ratio 0": ({"ratio": 0}, "ratio=0"),
    "ratio -1": ({"ratio": -1.0}, "ratio=-1.0"),
    "ratio NaN": ({"ratio": float("nan")}, "ratio=nan"),
    "ratio inf": ({"ratio": float("inf")}, "ratio=inf"),
    "init": ({"init": "loud"}, "init='loud' .*no such choice; there are paper, silent"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_grow_refuses(name):
    options, message = WRONG[name]
    model = net()
    with untouched(model), pytest.raises(GrowError, match=message) as caught:
        gs.grow(model, inplace=True, **options)
    assert "\n" not in str(caught.value)


def test_a_branch_that_cannot_be_built_leaves_the_model_alone():
    class Broken(Branch, kind="tests-broken"):
        def __init__(self, conv, ratio):
            if conv.out_channels == 16:
                raise RuntimeError("no memory")
            super().__init__(conv, ratio)
            self.norm = nn.BatchNorm2d(conv.out_channels)

        def forward(self, x, y):
            return y

        def as_convmap(self, kernel):
            return kernel

    try:
        model = net()
        with untouched(model), pytest.raises(RuntimeError, match="no memory"):
            gs.grow(model, ["nest", "tests-broken"], inplace=True)
    finally:
        del Branch.kinds["tests-broken"]


# --- what is not eligible, and why ---


class Odd(ConvNet):
    """Every reason not to be grown, under a name each."""

    def __init__(self):
        super().__init__()

        def conv(**kwargs):
            return nn.Conv2d(8, 8, 1, **kwargs)

        self.shared_a, self.shared_b = conv(), conv()
        self.shared_b.weight = self.shared_a.weight
        self.registered_twice = conv()
        self.alias = self.registered_twice
        self.twice, self.never = conv(), conv()
        with torch.no_grad():  # torch cannot copy a pruned module whose weight has a graph
            self.pruned = prune.random_unstructured(conv(), "weight", 0.5)
        self.parametrized = conv()
        parametrize.register_parametrization(self.parametrized, "weight", nn.Identity())
        self.subclass = type("OwnConv", (nn.Conv2d,), {"forward": lambda self, x: nn.Conv2d.forward(self, x)})(8, 8, 1)
        self.no_norm = conv(bias=False)
        self.read_twice, self.read_twice_bn = conv(bias=False), nn.BatchNorm2d(8)
        self.behind_pool = conv()
        self.biased = conv()

    def forward_features(self, x):
        x = self.shared_b(self.shared_a(super().forward_features(x)))
        x = self.alias(self.registered_twice(x))
        x = self.twice(self.twice(x))
        x = self.no_norm(self.subclass(self.parametrized(self.pruned(x))))
        y = self.read_twice(torch.tanh(x))
        x = torch.relu(self.read_twice_bn(y) + y)
        return self.behind_pool(self.biased(x).mean((2, 3), keepdim=True))


REASONS = {
    "stem": "the stem is left alone",
    "conv": "",
    "shared_a": "its parameters are shared",
    "shared_b": "its parameters are shared",
    "registered_twice": "its parameters are shared",
    "twice": "it runs 2 times",
    "never": "it runs 0 times",
    "pruned": "its weight is computed by a hook",
    "parametrized": "its weight is computed by a hook",
    "subclass": "it is a OwnConv, whose forward is its own",
    "no_norm": NO_BIAS_NO_NORM,
    "read_twice": f"{NO_BIAS_NO_NORM}: its output is read 2 times (read_twice_bn, add)",
    "behind_pool": "it is seen on 1x1 maps",
    "biased": "",
    "head": "it is seen on one token",
}


@pytest.fixture(scope="module")
def odd():
    torch.manual_seed(0)
    return Odd()


def test_report_gives_every_reason(odd):
    with untouched(odd):
        report = gs.growth_report(odd)
    assert {row.name for row in report.rows} == set(REASONS)
    for row in report.rows:
        assert row.reason.startswith(REASONS[row.name]) and bool(row.reason) == bool(REASONS[row.name]), row
    assert set(report.skipped) == {name for name, reason in REASONS.items() if reason}
    trained = sum(p.numel() for p in odd.parameters())
    assert f"15 layers: 0 grown, 13 not eligible. {trained:,} of {trained:,} parameters train." in str(report)


@pytest.mark.parametrize("name", [n for n, r in REASONS.items() if r])
def test_an_exact_name_that_cannot_be_grown_is_refused(odd, name):
    with untouched(odd), pytest.raises(GrowError, match=f"where names '{name}', which cannot be grown: ") as caught:
        gs.grow(odd, where=["conv", name], inplace=True)
    assert REASONS[name] in str(caught.value) and "\n" not in str(caught.value)


def test_the_others_skip_what_cannot_be_grown(odd):
    grown = gs.grow(odd)
    assert list(grown_modules(grown)) == ["conv", "biased"]
    report = gs.growth_report(grown)
    assert set(report.grown) == {"conv", "biased"} and "grown: bottleneck" in str(report)
    x = images(*SIZE)
    assert torch.equal(grown.eval()(x), odd.eval()(x))


def test_the_classifier_is_left_alone():
    model = ConvNet(bias=True, norm=False, head=False)
    model.pretrained_cfg = {"first_conv": "stem", "classifier": "conv"}
    assert gs.growth_report(model).skipped == {"stem": "the stem is left alone", "conv": "the classifier is left alone"}
    with pytest.raises(GrowError, match="none of 2 layers"):
        gs.grow(model)


def test_a_model_without_layers():
    with pytest.raises(GrowError, match="none of 0 layers can be grown exactly .the model has none"):
        gs.grow(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * 8 * 8)), input_size=(3, 8, 8))


def test_grown_at_birth_has_only_its_stem_and_its_classifier_left():
    report = gs.growth_report(net("reducenet20_x2"))
    assert set(report.skipped) == {"stem.conv", "head.fc"} and len(report.rows) == 2
    with pytest.raises(GrowError, match="stem.conv"):
        gs.grow(net("reducenet20_x2"))


def test_input_size_decides_what_is_seen_on_1x1_maps():
    small, large = (gs.growth_report(net("resnet18"), input_size=(3, s, s)) for s in (32, 64))
    assert sum("1x1 maps" in r for r in small.skipped.values()) > sum("1x1 maps" in r for r in large.skipped.values())


# --- drop ---


@pytest.mark.parametrize("inplace", [False, True])
def test_drop_leaves_the_kernels_bit_for_bit(inplace):
    plain = randomized(net())
    before = copy.deepcopy(plain)
    grown = train_a_bit(gs.grow(plain, ["bottleneck", "insert", "nest"]))
    kernels = {k: v.clone() for k, v in grown.state_dict().items() if ".branches." not in k}
    dropped = gs.drop(grown, inplace=inplace)
    assert (dropped is grown) == inplace and bool(grown_modules(grown)) != inplace
    assert list(dropped.state_dict()) == list(before.state_dict())
    assert all(torch.equal(v, kernels[k]) for k, v in dropped.state_dict().items())
    assert [type(m) for m in dropped.modules()] == [type(m) for m in before.modules()]


def test_grow_then_drop_is_nothing():
    plain = net().eval()
    dropped = gs.drop(gs.grow(plain, "nest"))
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in dropped.state_dict().items())
    assert gs.drop(plain) is not plain and gs.drop(plain, inplace=True) is plain


def test_drop_refuses_what_has_no_kernel():
    model = nn.Sequential(gs.grow(net()), net("reducenet20_x1"))
    with untouched(model), pytest.raises(DropError, match=r"1\.stages\.0\.0\.conv .* PureBottleneck") as caught:
        gs.drop(model, inplace=True)
    assert "growshrink.fuse" in str(caught.value)
    assert any(isinstance(m, PureBottleneck) for m in model.modules())
    assert any(isinstance(m, GrownConv2d) for m in model.modules())
