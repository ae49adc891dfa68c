import copy
import re

import pytest
import torch
from timm.layers import Conv2dSame
from timm.models import FeatureGraphNet
from torch import nn

import growshrink as gs
from growshrink.branches import Branch, BranchSpec
from growshrink.errors import CollapseError, FuseError
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.grown import GrownConv2d, grown_modules
from growshrink.layers.online import OnlineBottleneck, OnlineConv2d, OnlineLinear
from growshrink.layers.swaps import ONLINE_CLASSES, attach
from growshrink.transforms import _online
from nets import ConvNet, images, net, randomized, rel, small, train_a_bit, untouched
from sampled import sampled

KINDS = [kind for kind, cls in Branch.kinds.items() if cls.__module__.startswith("growshrink.")]
GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": 5, "padding": 2, "groups": 2},
    {"kernel_size": 5, "padding": 2, "groups": 8, "bias": False, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 5, "padding": 0, "out_channels": 16},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": (3, 5), "padding": "same"},
    {"kernel_size": (2, 3), "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "stride": 2, "same": True},
    {"kernel_size": 5, "stride": 2, "groups": 8, "same": True},
]


def grown_conv(kinds, seed=0, same=False, out_channels=8, **options):
    torch.manual_seed(seed)
    conv = (Conv2dSame if same else nn.Conv2d)(8, out_channels, dtype=torch.float64, **options)
    kinds = [kind for kind in kinds if not Branch.kinds[kind].reason_against(conv)]
    built = [BranchSpec(kind=k).build(conv, ratio=1.5, init="paper", generator_seed=i) for i, k in enumerate(kinds)]
    grown = randomized(attach(conv, built))
    gs.set_lambda(grown, 0.0)
    return grown.train()


def frozen(model):
    """In train mode, but for the norms in the branches: what a collapsed net computes, branch by branch."""
    model.train()
    for module in model.modules():
        if isinstance(module, (Branch, PureBottleneck)):
            module.eval()
    return model


def gradients(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    inputs = {"input": x, **dict(module.named_parameters())}
    found = torch.autograd.grad((y * weights).sum(), list(inputs.values()), allow_unused=True)
    return y.detach(), dict(zip(inputs, found, strict=True))


def assert_same_gradients(a, b, x, tolerance=1e-10):
    """Output, and gradients of the input and of every parameter."""
    (y, found), (expected_y, expected) = gradients(a, x), gradients(b, x)
    assert rel(y, expected_y) < tolerance
    assert found.keys() == expected.keys() and len(found) > 1
    scales = {name: float(gradient.abs().max()) for name, gradient in expected.items() if gradient is not None}
    for name, gradient in found.items():
        if gradient is None:  # of a gate: 0 at lam = 0
            assert scales.get(name, 0.0) == 0.0, name
        else:  # 1e-3: a bias that a norm takes out again has rounding for a gradient
            assert float((gradient - expected[name]).abs().max()) < tolerance * max(scales[name], 1e-3), name
    assert sum(scale > 1e-3 for scale in scales.values()) > 0.2 * len(expected), "there is next to nothing to compare"


# --- the same function, the same gradients ---


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_output_and_gradients_are_those_of_the_branches(options):
    x = images(8, 11, 14, dtype=torch.float64)
    for kinds in ([], *([kind] for kind in KINDS), KINDS):
        grown = grown_conv(kinds, **options)
        if not len(grown.branches):
            continue
        online = gs.collapse_online(grown, choose="always")
        assert isinstance(online, OnlineConv2d) and online.collapsed
        assert all(branch.merged for branch in online.branches)
        assert_same_gradients(online, frozen(grown), x)
        assert_same_gradients(online.eval(), grown.eval(), x)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "groups": 2}, {"kernel_size": 5, "padding": 2}], ids=str)
def test_a_bottleneck_without_a_kernel_of_its_own(options):
    torch.manual_seed(0)
    block = randomized(PureBottleneck(4, 12, 6, dtype=torch.float64, **options))
    gs.set_lambda(block, 0.0)
    x = images(4, 9, 8, dtype=torch.float64)
    online = gs.collapse_online(block, choose="always")
    assert isinstance(online, OnlineBottleneck)
    assert_same_gradients(online, block.eval(), x)
    block.width = online.width = 6
    (y, found), (expected_y, expected) = gradients(online, x), gradients(block, x)
    assert rel(y, expected_y) < 1e-12 and rel(y, gradients(gs.expand_online(online).eval(), x)[0]) < 1e-12
    assert all(rel(found[name], expected[name]) < 1e-10 for name in found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kinds", "apart"),
    [
        (["pointwise", "pointwise_conv", "pointwise_average"], 3),
        (["orepa", "expandnet", "identity", "bottleneck"], 5),
        (["orepa", "insert"], 0),  # which reads an output that is whole
    ],
    ids=str,
)
def test_on_few_pixels_branches_stay_beside_the_kernel(kinds, apart, dtype):
    online = gs.collapse_online(grown_conv(kinds, kernel_size=3, padding=1, stride=1), choose="always")
    twin = copy.deepcopy(online)
    twin.collapsed = False
    x = images(8, 2, 2, dtype=dtype, n=1)
    assert len(online.maps(torch.float64, pixels=4)[1]) == apart and not online.maps(torch.float64)[1]
    if dtype == torch.float64:
        assert_same_gradients(online, twin, x)
    for model in (online, twin):
        model.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        out, expected = online(x), twin(x)
    assert out.dtype == (dtype if dtype == torch.float64 else torch.bfloat16)
    assert rel(out, expected) < (1e-12 if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize(
    ("kind", "groups", "pixels", "apart"),  # 24 a number of kernel or image, beside the MACs of a matrix
    [
        *(("pointwise", 1, pixels, (64 + 24 * 8) * pixels < 24 * 576) for pixels in (1, 53, 55, 1000)),
        *(("identity", 1, pixels, 24 * 8 * pixels < 24 * 576) for pixels in (71, 73)),
        *(("pointwise", 8, pixels, 2 * 24 * 8 * pixels < 24 * 72) for pixels in (4, 5)),
        *(("pointwise_conv", 1, pixels, (640 + 384) * pixels < 24 * 576 + 8 * 576) for pixels in (17, 19)),
    ],
)
def test_a_branch_is_added_to_the_kernel_where_that_takes_less_time(kind, groups, pixels, apart):
    online = gs.collapse_online(grown_conv([kind], kernel_size=3, padding=1, groups=groups), choose="always")
    assert len(online.maps(torch.float64, pixels)[1]) == apart


@pytest.mark.parametrize("shape", [(5, 6), (2, 40, 6), (2, 3, 4, 6), (0, 6)], ids=str)
def test_linear_layers(shape):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=index != 2) for index in range(4))).double()
    tokens = torch.randn(4, 5, 6, dtype=torch.float64)
    kinds = ["lora", "pointwise", "identity", "pointwise_conv", "bottleneck", "insert"]
    grown = gs.grow(model, kinds, where="1", ratio=1.5, example_inputs=tokens)
    gs.grow(grown, ["lora", "expandnet"], where="2", example_inputs=tokens, inplace=True)
    gs.set_lambda(randomized(grown), 0.0)
    online = gs.collapse_online(grown, batch_size=2, rounds=2, example_inputs=tokens)
    assert all(isinstance(layer, OnlineLinear) and layer.collapsed for layer in online[1:3])
    x = torch.randn(shape, dtype=torch.float64)
    if x.numel() == 0:
        assert online(x).shape == grown(x).shape
        return
    assert_same_gradients(online, frozen(grown), x)
    assert rel(gs.fuse(online, example_inputs=x)(x), grown.eval()(x)) < 1e-10


def nets(branch="dbb", **kwargs):
    """A net to train, collapsed and branch by branch."""
    grown = randomized(gs.grow(small(**kwargs), branch, ratio=1.5)).double()
    gs.set_lambda(grown, 0.0)
    return gs.collapse_online(grown, choose="always"), frozen(grown)


class Frozen(nn.Module):
    """Keeps the norms of the branches in eval mode while `train_a_bit` trains."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def train(self, mode=True):
        frozen(self.model)
        return self

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("branch", ["dbb", "expandnet", "mobileone", ["bottleneck", "insert", "orepa"]], ids=str)
def test_training_goes_the_same_way(branch):
    online, twin = nets(branch)
    before = copy.deepcopy(online.state_dict())
    train_a_bit(online, steps=4, lr=0.02)
    train_a_bit(Frozen(twin), steps=4, lr=0.02)
    states = online.state_dict(), twin.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[1].items():
        assert (states[0][name] - value).abs().max() < 1e-9, name
        if ".branches." in name and name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(states[0][name], before[name]), "the norms of the branches are frozen"
        elif name.endswith("running_mean"):
            assert not torch.equal(states[0][name], before[name]), "the net's own norms are not"
        elif name.endswith("weight"):
            assert not torch.equal(states[0][name], before[name]), f"{name} learns"
    x = images(dtype=torch.float64)
    fused = gs.fuse(online).eval()
    assert rel(fused(x), online.eval()(x)) < 1e-10
    assert rel(gs.fuse(gs.expand_online(online)).eval()(x), fused(x)) < 1e-12
    small().load_state_dict(fused.state_dict(), strict=True)


# --- what is linear, and what is not ---


def lam_of(conv, **lams):
    for index, lam in lams.items():
        for module in conv.branches[int(index[1:])].modules():
            if isinstance(module, gs.layers.VanishingReLU):
                module.lam.fill_(lam)
    return conv


@pytest.mark.parametrize(
    ("kinds", "alive", "merged", "why"),
    [
        (["pointwise", "bottleneck", "lora"], [1], ["pointwise", "lora"], {1: "body.act: lam is 0.5, not 0"}),
        (["pointwise", "insert"], [1], ["pointwise"], {1: "act: lam is 0.5"}),
        (
            ["pointwise", "insert", "lora", "insert"],
            [1],
            ["pointwise"],
            {1: "act: lam", 2: "a branch before it, which is not linear, reads", 3: "a branch before it"},
        ),
        (["bottleneck", "insert", "lora"], [0], [], {0: "lam is", 1: "reads the output of a branch", 2: "before it"}),
        (
            ["insert", "nest", "insert"],
            [1],
            ["insert"],
            {1: "lam is", 2: "it reads the output of a branch that is not"},
        ),
    ],
    ids=str,
)
def test_linear_branches_go_and_the_others_stay(kinds, alive, merged, why):
    grown = lam_of(grown_conv(kinds, kernel_size=3, padding=1), **{f"b{index}": 0.5 for index in alive})
    model = nn.ModuleDict({"conv": grown})
    (row,) = gs.transforms.collapse_report(model).rows
    assert list(row.merged) == merged and not row.collapsed
    assert [f"branches.{index} ({kinds[index]})" for index in why] == list(row.left)
    assert all(words in reason for words, reason in zip(why.values(), row.left.values(), strict=True))
    if not merged:
        with untouched(model), pytest.raises(CollapseError, match=r"no branch of the 1 .* \(conv: .*lam is 0\.5"):
            gs.collapse_online(model, choose="always", inplace=True)
        return
    online = gs.collapse_online(model, choose="always")["conv"]
    assert [branch.kind for branch in online.branches if branch.merged] == merged
    x = images(8, 7, 8, dtype=torch.float64)
    for part, own in zip(grown.train().branches, online.branches, strict=True):
        part.train(not own.merged)
    assert_same_gradients(online, grown, x)


def test_without_freezing_branches_with_norms_stay():
    model = nn.ModuleDict({"conv": grown_conv(["pointwise", "lora", "orepa"], kernel_size=3, padding=1)})
    online = gs.collapse_online(model, choose="always", freeze=False)
    assert [branch.merged for branch in online["conv"].branches] == [False, True, True]
    assert online["conv"].branches[0].path.norm.training
    (row,) = gs.transforms.collapse_report(online).rows
    assert row.left == {"branches.0 (pointwise)": "left as it is"} and row.merged == ("lora", "orepa")
    before = online["conv"].branches[0].path.norm.running_mean.clone()
    x = images(8, 7, 8, dtype=torch.float64)
    assert rel(online["conv"](x), model["conv"](x)) < 1e-12
    assert not torch.equal(online["conv"].branches[0].path.norm.running_mean, before)
    with pytest.raises(CollapseError, match="it has norms, and freeze=False"):
        gs.collapse_online(gs.grow(small(), "dbb"), freeze=False)


class Liar(Branch, kind=""):
    """Computes something else than its map says."""

    kind = "liar"

    def __init__(self, conv, ratio):
        super().__init__(conv, ratio)
        self.conv = copy.deepcopy(conv)
        self.gamma = nn.Parameter(torch.zeros((), dtype=torch.float64))  # silent: at first nothing is to be seen

    def forward(self, x, y):
        return self.gamma * self.conv(x.relu())

    def as_convmap(self, kernel):
        return gs.algebra.ConvMap.from_conv2d(self.conv, kernel.kernel.dtype).scale(self.gamma)


class Old(Liar, kind=""):
    """Written before there was a dtype to compute in."""

    kind = "old"

    def forward(self, x, y):
        return self.conv(x)

    def as_convmap(self, kernel):
        return gs.algebra.ConvMap.from_conv2d(self.conv)


def test_a_branch_is_taken_at_its_word_only_if_it_keeps_it():
    conv = nn.Conv2d(8, 8, 3, padding=1, dtype=torch.float64)
    model = nn.ModuleDict({"conv": attach(conv, [Liar(nn.Conv2d(8, 8, 3, padding=1).double(), 1.0)])})
    with untouched(model), pytest.raises(CollapseError, match="^conv: a branch computes something else than its map"):
        gs.collapse_online(model, choose="always", inplace=True)
    online = gs.collapse_online(
        nn.ModuleDict({"conv": grown_conv(["lora"], kernel_size=3, padding=1)}), choose="always"
    )
    # and fuse compares it with the branches, not with itself
    online = nn.Sequential(online["conv"])
    online[0].branches[0].path.forward = lambda x: x.relu()[:, :8]
    with pytest.raises(FuseError, match="0: its forward is not the affine map"):
        gs.fuse(online, input_size=(8, 5, 5))


def test_a_branch_that_knows_only_float64():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    grown = attach(conv, [Old(nn.Conv2d(8, 8, 3, padding=1), 1.0)])
    online = gs.collapse_online(grown, choose="always")
    x = images(8, 5, 5)
    assert online(x).dtype == torch.float32 and rel(online(x), grown(x)) < 1e-6


def test_lam_stays_0_for_as_long_as_it_must():
    grown = gs.grow(small(), ["bottleneck", "dbb"])
    gs.set_lambda(grown, 0.0)
    online = gs.collapse_online(grown, choose="always")
    gs.set_lambda(online, 0.0)
    with untouched(online), pytest.raises(ValueError, match=r"lam=0.5: stages\.0\.0\.conv\.branches\.0\.body\.act is"):
        gs.set_lambda(online, 0.5)
    assert gs.set_lambda(gs.expand_online(online), 0.5) == 3
    state = online.state_dict()
    online.load_state_dict({name: value + 0.5 if name.endswith(".lam") else value for name, value in state.items()})
    with pytest.raises(gs.errors.AlgebraError, match="lam is 0.5, not 0"):
        online(images())


# --- there and back ---


def test_the_net_stays_what_it_is():
    grown = randomized(gs.grow(small(), ["dbb", "expandnet"]))
    keys, parameters = list(grown.state_dict()), dict(grown.named_parameters())
    with untouched(grown):
        online = gs.collapse_online(grown, batch_size=2, input_size=(3, 16, 16), rounds=2)
        collapsed = gs.collapse_online(online, choose="always")  # again, from the start
    assert list(online.state_dict()) == list(collapsed.state_dict()) == keys
    assert len(gs.transforms.collapse_report(collapsed).collapsed) == len(grown_modules(grown)) == 3
    assert not any(isinstance(m, tuple(ONLINE_CLASSES.values())) for m in grown.modules())
    twin = copy.deepcopy(collapsed)
    x = images()
    assert torch.equal(twin.eval()(x), collapsed.eval()(x)) and rel(twin(x), grown.eval()(x)) < 1e-5

    same = gs.collapse_online(grown, choose="always", inplace=True)
    assert same is grown and dict(same.named_parameters()).keys() == parameters.keys()
    assert all(same.get_parameter(name) is parameter for name, parameter in parameters.items())
    same.train()
    assert same.stages[0][0].bn.training
    assert not any(m.training for branch in same.stages[0][0].conv.branches for m in branch.modules())
    assert gs.expand_online(same, inplace=True) is grown
    conv = grown.stages[0][0].conv
    assert type(conv) is GrownConv2d and all(m.training for m in grown.modules())
    assert not any(branch.merged for branch in conv.branches) and "collapsed" not in conv.__dict__
    plain = small()
    assert gs.expand_online(plain, inplace=True) is plain

    dropped = gs.drop(online)
    assert type(dropped.stages[0][0].conv) is nn.Conv2d and list(dropped.state_dict()) == list(plain.state_dict())
    assert set(vars(dropped.stages[0][0].conv)) == set(vars(plain.stages[0][0].conv))


@pytest.mark.parametrize(
    "name",
    sampled(["reducenet20", "reducenet20_x2", "tf_mobilenetv3_small_minimal_100"], ("reducenet20", "reducenet20_x2")),
)
def test_growing_fusing_and_proving_go_on(name):
    model = randomized(small(name) if name.startswith("reducenet") else net(name)).double()
    where = r"blocks\.2\.0" if name.startswith("tf") else None
    model = model if name.endswith("_x2") else gs.grow(model, ["dbb", "insert"], ratio=1.0, where=where)
    gs.set_lambda(randomized(model), 0.0)
    size = (3, 32, 32)
    online = gs.collapse_online(model, choose="always", input_size=size)
    assert any(isinstance(m, tuple(ONLINE_CLASSES.values())) for m in online.modules())
    x = images(*size, dtype=torch.float64)
    expected = model.eval()(x)
    assert rel(online.eval()(x), expected) < 1e-10
    fused = gs.fuse(online, input_size=size)
    assert rel(fused(x), expected) < 1e-10 and rel(gs.fuse(model, input_size=size)(x), fused(x)) < 1e-12
    assert gs.verify(online, input_size=size).ok
    assert not any("Online" in type(m).__name__ for m in fused.modules())
    assert str(gs.growth_report(online, input_size=size)) == str(gs.growth_report(model, input_size=size))
    if name == "reducenet20":
        more = gs.grow(online, "lora")
        assert [b.merged for b in more.stages[0][0].conv.branches] == [True] * 4 + [False]
        more = randomized(more).eval()
        gs.set_lambda(more, 0.0)
        assert rel(more(x), gs.expand_online(more)(x)) < 1e-10 and rel(more(x), expected) > 1e-3


def test_widths():
    grown = randomized(gs.grow(small(), ["pointwise", "bottleneck", "insert"], ratio=4.0)).double().eval()
    gs.set_lambda(grown, 0.0)
    online = gs.collapse_online(grown, choose="always")
    x = images(dtype=torch.float64)
    space = gs.width_space(online, divisor=1)
    assert space == gs.width_space(grown, divisor=1)
    outputs = []
    for width in (space.base, space.sample(0, 0), space.sample(0, 1), space.full):
        with gs.active_width(online, width), gs.active_width(grown, width):
            assert_same_gradients(online, grown, x)
            outputs.append(online(x).detach())
            assert rel(gs.fuse(online)(x), outputs[-1]) < 1e-10
    assert all(rel(outputs[i], outputs[i + 1]) > 1e-3 for i in range(3))


def test_a_step_with_sampled_widths():
    grown = randomized(gs.grow(small(), ratio=4.0)).double()
    gs.set_lambda(grown, 0.0)
    twin = frozen(copy.deepcopy(grown))
    online = gs.collapse_online(grown, choose="always").train()
    found = []
    for model in (online, twin):
        task = gs.NetAugTask(model, mode="netaug", verbose=False)
        task.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        task.backward(images(n=8, dtype=torch.float64), torch.arange(8))
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert any(gradient is not None and ".branches." in name for name, gradient in found[1].items())
    for name, gradient in found[1].items():
        if gradient is not None:
            assert (found[0][name] - gradient).abs().max() < 1e-10 * gradient.abs().max().clamp_min(1e-3), name


# --- how it runs ---


@pytest.mark.parametrize("branch", ["dbb", ["expandnet", "bottleneck"]], ids=str)
def test_kernels_are_merged_in_float32_under_autocast(branch):
    grown = randomized(gs.grow(small(), branch, ratio=2.0))
    gs.set_lambda(grown, 0.0)
    online = gs.collapse_online(grown, choose="always").eval()
    conv = online.stages[1][0].conv
    seen = []
    conv._conv_forward = lambda x, kernel, bias: seen.append(kernel) or nn.Conv2d._conv_forward(conv, x, kernel, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = online(images(n=16))
    assert out.dtype == torch.bfloat16 and seen[0].dtype == torch.float32
    exact = grown.stages[1][0].conv.double().as_convmap().kernel
    assert rel(seen[0].double(), exact) < 1e-6
    half = copy.deepcopy(conv).bfloat16()
    seen.clear()
    half._conv_forward = lambda x, kernel, bias: seen.append(kernel) or x
    half(images(conv.in_channels, 5, 5, n=64, dtype=torch.bfloat16))
    rounded = half.double().maps(torch.float64)[0].kernel
    assert seen[0].dtype == torch.bfloat16 and rel(seen[0].double(), rounded) < 2**-8


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_memory_formats(memory_format):
    online, twin = (model.float().to(memory_format=memory_format) for model in nets(["dbb", "expandnet"]))
    train_a_bit(online, steps=1)
    for name, parameter in online.named_parameters():
        assert parameter.grad.is_contiguous(memory_format=memory_format) == parameter.is_contiguous(
            memory_format=memory_format
        ), name


@pytest.mark.filterwarnings("ignore")
def test_one_graph_for_training_and_no_other_when_values_change():
    grown = randomized(gs.grow(ConvNet(), ["pointwise_conv", "bottleneck"], ratio=1.0))
    gs.set_lambda(grown, 0.0)
    online = gs.collapse_online(grown, choose="always").train()
    torch._dynamo.reset()
    compiled = torch.compile(online, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            x = images(n=8, seed=step)
            out = compiled(x)
            out.square().mean().backward()
            assert rel(out, copy.deepcopy(online)(x)) < 1e-4
            with torch.no_grad():
                for parameter in online.parameters():
                    parameter.sub_(0.05 * parameter.grad)
                    parameter.grad = None
            gs.set_lambda(online, 0.0)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_feature_extraction_and_script():
    online = nets(["dbb", "insert"])[0].float().eval()
    x = images()
    with torch.no_grad():
        expected = online(x)
        assert rel(torch.jit.trace(online, x)(x), expected) < 1e-5
        assert rel(FeatureGraphNet(online, out_indices=(2,))(x)[0], online.forward_intermediates(x)[1][-1]) < 1e-6
    with untouched(online), pytest.raises(CollapseError, match="growshrink.expand_online comes before TorchScript"):
        torch.jit.script(online)


# --- chosen by cost ---


def clock(cheap):
    """interleaved_timings, but merging is said to be cheaper where `cheap(channels)`."""
    log = []

    def times(calls, *, rounds, device):
        assert list(calls) == ["branches", "merged"]
        for call in calls.values():
            call()
        log.append(rounds)
        return {"branches": 2.0, "merged": 1.0 if cheap(len(log)) else 3.0}

    return times, log


def test_each_convolution_runs_as_is_faster(monkeypatch):
    grown = randomized(gs.grow(net(), ["dbb", "lora"])).double()
    grown.stages[0][1].conv.weight.requires_grad_(False)
    times, log = clock(lambda number: number != 1)
    monkeypatch.setattr(_online, "interleaved_timings", times)
    with untouched(grown):
        online = gs.collapse_online(grown, batch_size=2, rounds=3)
    assert log == [3] * 5  # convolutions that are alike are timed once
    report = gs.transforms.collapse_report(online)
    slow = [name for name in grown_modules(grown) if name.startswith("stages.0.")]
    assert [row.name for row in report.rows if not row.collapsed] == slow and len(slow) == 3
    assert {row.timing for row in report.rows} == {(2.0, 1.0), (2.0, 3.0)}
    words = str(report).splitlines()
    assert "branch by branch: pointwise, pointwise_conv, pointwise_average, lora" in words[0] and "2.000 ms" in words[0]
    assert words[-2:] == [
        "9 grown convolutions: 6 run as one kernel.",
        "A step of those measured: 18.0 ms branch by branch, 12.0 ms as chosen.",
    ]
    x = images(dtype=torch.float64, n=4)
    for name in slow:  # frozen all the same: the choice changes the time and nothing else
        branches = online.train().get_submodule(name).branches
        assert not any(m.training for branch in branches for m in branch.modules())
    grown.requires_grad_(True), online.requires_grad_(True)
    assert_same_gradients(online, frozen(grown), x, tolerance=1e-9)
    again = gs.collapse_online(grown, choose=report.collapsed)
    assert gs.transforms.collapse_report(again).collapsed == report.collapsed
    assert all(row.timing is None for row in gs.transforms.collapse_report(again).rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"choose": "mesured"}, "choose='mesured': no such way to choose; did you mean measured"),
        ({"choose": ["stages.0.0.con"]}, "choose names 'stages.0.0.con': .*; did you mean stages.0.0.conv"),
        ({"batch_size": 1}, "batch_size=1: must be a whole number, at least 2"),
        ({"rounds": 1}, "rounds=1"),
    ],
)
def test_what_cannot_be_asked(options, words):
    model = gs.grow(small(), "lora")
    with untouched(model), pytest.raises(CollapseError, match=words):
        gs.collapse_online(model, inplace=True, **options)


def test_nothing_to_collapse():
    with pytest.raises(CollapseError, match="carries no branches: growshrink.grow"):
        gs.collapse_online(net())
    with pytest.raises(CollapseError, match=r"no branch of the 9 grown modules .*conv: body\.act: lam is 1\.0, not 0"):
        gs.collapse_online(gs.grow(net()))
    report = str(gs.transforms.collapse_report(gs.grow(net())))
    assert re.search(r"stages\.0\.0\.conv .* branch by branch: nothing; branches\.0 \(bottleneck\): body\.act", report)
