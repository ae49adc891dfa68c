"""Branches with numbers from data against twins written from the papers' formulas, image by image."""

import copy
import math

import pytest
import timm.layers
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

import growshrink as gs
from growshrink.branches import Branch, BranchSpec, KernelFactors, Modulated
from growshrink.branches.guide import EMBEDDING, Guided, RunGuide
from growshrink.errors import GrowError
from growshrink.layers.as_conv import as_conv
from growshrink.layers.grown import GrownConv2d, grown_modules
from growshrink.layers.grown_linear import GrownNorm2d, GrownNormAct2d
from growshrink.layers.swaps import attach
from nets import ConvNet, images, net, randomized, rel, small, train_a_bit
from sampled import sampled

SIZE = (3, 16, 16)
TINY = 1e-12


# --- twins: what a branch adds for one image x (1, I, H, W), whose layer gave y (1, O, H', W'), at strength lam ---


def two(layers, v):
    first, _, last = layers
    return last.weight @ torch.clamp(first.weight @ v + first.bias, min=0) + last.bias


def faded(branch, g):
    return branch.fade.mean.to(g) + branch.fade.lam.to(g) * (g - branch.fade.mean.to(g))


def gap(x):
    return x[0].flatten(1).mean(1)


def rows(branch, g, y):
    c = faded(branch, g)
    return torch.stack([branch.scale[o] * (c[o] - 1) * y[0, o] for o in range(len(c))])[None]


def convolved(branch, kernel, x, bias=None):
    kernel = torch.stack([branch.scale[o] * kernel[o] for o in range(len(kernel))])
    return branch.conv._conv_forward(x, kernel, None if bias is None else branch.scale * bias)


def experts(branch):
    return branch.conv.weight.chunk(branch.conv.out_channels // len(branch.scale))


def mixed(branch, g, x):
    return convolved(branch, sum(c * w for c, w in zip(faded(branch, g), experts(branch), strict=True)), x)


def se(branch, x, y):
    return rows(branch, torch.sigmoid(two(branch.router, gap(y))), y)


def asr(branch, x, y):
    c = 1 / (1 + torch.exp(-two(branch.router, branch.vector)))
    return (branch.scale * (c - 1)).view(1, -1, 1, 1) * y


def condconv(branch, x, y):
    return mixed(branch, torch.sigmoid(branch.router.weight @ gap(x) + branch.router.bias), x)


def dynamic_conv(branch, x, y, tau=1.0):
    attention = torch.softmax(two(branch.router, gap(x)) / tau, 0)
    c = faded(branch, attention)
    kernel = sum(a * w for a, w in zip(c, experts(branch), strict=True))
    return convolved(branch, kernel, x, sum(a * b for a, b in zip(c, branch.bias, strict=True)))


def dynet(branch, x, y):
    eta = faded(branch, torch.sigmoid(branch.router.weight @ gap(x) + branch.router.bias)).chunk(len(experts(branch)))
    kernel = sum(e.view(-1, 1, 1, 1) * w for e, w in zip(eta, experts(branch), strict=True))
    return convolved(branch, kernel, x)


def weightnet(branch, x, y):
    """The paper's grouped layer as a dense, block-diagonal matrix."""
    reduce, expand = branch.router
    a = faded(branch, torch.sigmoid(expand.weight @ (reduce.weight @ gap(x) + reduce.bias) + expand.bias))
    shape = branch.conv.weight.shape
    slices = branch.conv.weight.reshape(len(a), -1)
    dense = torch.block_diag(*slices.unsqueeze(-1))  # (O*I*k*k, O*slices)
    return convolved(branch, (dense @ a).view(shape), x)


def moe(branch, x, y):
    scores = (branch.router.weight @ gap(x)).chunk(2)[0]
    best = scores.argsort(descending=True)[:2]
    gates = torch.zeros_like(scores)
    gates[best] = torch.exp(scores[best]) / torch.exp(scores[best]).sum()
    return mixed(branch, gates, x)


def manidp(branch, x, y):
    mask = torch.clamp(two(branch.router, gap(y)), 0, 1000)
    least = branch.fade.mean.sort(descending=True).values[len(mask) // 2 - 1]
    return rows(branch, torch.where(mask < least, 0.0, mask), y)


def guided(branch, x, y):
    return rows(branch, torch.relu(branch.router.weight @ branch.guide.embedding[0]), y)


def guided_kernel(branch, x, y):
    c = faded(branch, torch.sigmoid(branch.router.weight @ branch.guide.embedding[0] + branch.router.bias))
    kernel = sum(a * w for a, w in zip(c, experts(branch), strict=True))
    return convolved(branch, kernel, x, sum(a * b for a, b in zip(c, branch.bias, strict=True)))


TWINS = [se, asr, condconv, dynamic_conv, dynet, weightnet, moe, manidp, guided, guided_kernel]
TWINS = {twin.__name__: twin for twin in TWINS}
GEOMETRIES = [
    {},
    {"stride": 2, "groups": 2, "bias": True},
    {"kernel_size": 5, "padding": 4, "dilation": 2, "groups": 8},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "reflect", "out_channels": 4},
    {"kernel_size": 1, "padding": 0},
]


def test_every_kind_has_a_twin():
    library = {kind for kind, cls in Branch.kinds.items() if cls.__module__.startswith("growshrink.")}
    assert {kind for kind in library if issubclass(Branch.kinds[kind], Modulated)} == set(TWINS)


def of(kind, layer, lam=0.5):
    """The layer with one branch of a kind, everything random."""
    conv = as_conv(layer)
    branch = BranchSpec(kind=kind).build(conv, ratio=3.0, init="paper", generator_seed=0)
    branch = randomized(branch, seed=2)
    with torch.no_grad():
        branch.scale.uniform_(0.5, 1.5)
        if kind in ("moe", "dynamic_conv", "guided_kernel"):  # what starts at 0
            for parameter in branch.router.parameters() if kind == "moe" else [branch.bias]:
                parameter.normal_(std=0.3)
    branch.guide = RunGuide(images(EMBEDDING, n=3, dtype=torch.float64))
    gs.set_lambda(branch, lam)
    return branch.eval()


def one_by_one(branch, x, y):
    parts = []
    for n in range(len(x)):
        alone = copy.copy(branch)
        alone.__dict__ = {**branch.__dict__, "guide": RunGuide(branch.guide.embedding[n : n + 1])}
        parts.append(TWINS[branch.kind](alone, x[n : n + 1], y[n : n + 1]))
    return torch.cat(parts)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kind", TWINS)
def test_against_the_formula_image_by_image(kind, options):
    conv = ConvNet(**options).double().eval().conv
    branch = of(kind, conv)
    x = images(8, 9, 10, n=3, dtype=torch.float64)
    with torch.no_grad():
        y = conv(x)
        expected = one_by_one(branch, x, y)
        assert rel(branch(x, y), expected) < TINY
        attach(conv, [branch])
        assert conv.branches[0].joined == isinstance(branch, KernelFactors)
        assert rel(conv(x), y + expected) < TINY and rel(y, y + expected) > 0.05
        branch.guide = None  # as where it runs alone
        gs.set_lambda(conv, 0.0)
        assert rel(conv.as_convmap()(x), conv(x)) < TINY


@pytest.mark.parametrize("kind", TWINS)
def test_on_tokens(kind):
    """A linear layer is the 1x1 convolution it is on the image of its tokens."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 4).double().eval()
    branch = of(kind, linear)
    x = images(5, 6, n=3, dtype=torch.float64)
    with torch.no_grad():
        y = linear(x)
        columns, out = (t.transpose(1, 2).unsqueeze(-1) for t in (x, y))
        expected = one_by_one(branch, columns, out).squeeze(-1).transpose(1, 2)
        attach(linear, [branch])
        assert rel(linear(x), y + expected) < TINY


def test_the_same_as_timms():
    conv = nn.Conv2d(8, 6, 3, 2, 1, groups=2, bias=False).double()
    nn.init.zeros_(conv.weight)
    branch = BranchSpec(kind="condconv").build(conv, ratio=4.0, init="paper", generator_seed=0)
    theirs = timm.layers.CondConv2d(8, 6, 3, 2, 1, groups=2, num_experts=4).double()
    theirs.weight.data = branch.conv.weight.detach().reshape(4, -1)
    x = images(8, 7, 7, n=3, dtype=torch.float64)
    attach(conv, [branch])
    assert rel(conv(x), theirs(x, branch.router(x.mean((2, 3))).sigmoid())) < 1e-14

    norm = nn.BatchNorm2d(16).double()
    branch = BranchSpec(kind="se").build(nn.Conv2d(16, 16, 3).double(), ratio=1.0, init="paper", generator_seed=0)
    theirs = timm.layers.SEModule(16).double()
    for own, other in ((branch.router[0], theirs.fc1), (branch.router[2], theirs.fc2)):
        other.weight.data, other.bias.data = own.weight.detach()[:, :, None, None], own.bias.detach()
    x = images(16, 7, 7, n=3, dtype=torch.float64)
    expected = theirs(norm(x))
    assert rel(attach(norm, [branch])(x), expected) < 1e-14


def test_temperature_and_lam_both_make_attention_constant():
    conv = ConvNet().double().conv
    branch = of("dynamic_conv", conv, lam=1.0)
    x = images(8, 6, 6, n=3, dtype=torch.float64)
    with torch.no_grad():
        branch.fade.mean.fill_(1 / 3)
        apart = rel(branch(x, x), dynamic_conv(branch, x, x, tau=1e9))
        gs.set_lambda(branch, 0.0)
        assert rel(branch(x, x), dynamic_conv(branch, x, x, tau=1e9)) < 1e-7 < apart


# --- whole nets ---

NETS = ("reducenet20", "resnet18", "test_efficientnet", "mobilenetv3_small_050")


@pytest.mark.parametrize(
    ("name", "kind"),
    sampled(
        [(name, kind) for name in NETS for kind in [*TWINS, ("condconv", "se", "bottleneck", "guided_kernel")]],
        lambda case: case[0] == "reducenet20" and (case[1] == "se" or isinstance(case[1], tuple)),
    ),
)
def test_silent_refused_and_fused(name, kind):
    size = (3, 32, 32)
    plain = (small() if name == "reducenet20" else net(name)).double().eval()
    x = images(*size, n=3, dtype=torch.float64)
    grown = gs.grow(plain, kind, ratio=3.0, input_size=size)
    for train in (False, True):
        grown.train(train), plain.train(train)
        with torch.no_grad():
            assert rel(grown(x), plain(x)) < 1e-13, "adds nothing at first"
    assert grown_modules(grown).keys() == grown_modules(gs.grow(plain, kind, where=list(grown_modules(grown)))).keys()
    if kind != "asr":  # which has nothing to fade
        gs.set_lambda(grown, 1e-3)
        with pytest.raises(gs.errors.FuseError, match="have not vanished"):
            gs.fuse(grown, input_size=size)
    gs.set_lambda(grown, 0.0)
    randomized(grown)
    with torch.no_grad():  # one kind alone is hard to see beside the gates that a net has; several overflow float32
        for parameter in gs.branch_parameters(grown) if isinstance(kind, str) else ():
            parameter.mul_(5.0)
    report = gs.verify(grown, input_size=size, randomize_norms=False)
    assert report.ok and report.max_rel < 1e-10 and report.effect > 0.1
    fused = gs.fuse(grown.eval(), input_size=size)
    assert rel(fused(x), grown(x)) < 1e-10
    plain.load_state_dict(fused.state_dict(), strict=True)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert list(gs.drop(grown).state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("kind", TWINS)
def test_every_parameter_has_a_gradient_by_the_second_update(kind):
    grown = gs.grow(ConvNet(), kind, ratio=4.0, where=["conv"])
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    labels = torch.arange(8)
    for _ in range(2):
        logits = grown(images(*SIZE, n=8))
        optimizer.zero_grad()
        (F.cross_entropy(logits, labels) + gs.penalties(grown, labels, logits)).backward()
        optimizer.step()
    without = [n for n, p in grown.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


CONVERT = {
    "torch": (nn.SyncBatchNorm.convert_sync_batchnorm, nn.SyncBatchNorm),
    "timm": (timm.layers.convert_sync_batchnorm, nn.SyncBatchNorm),
    "frozen": (freeze_batch_norm_2d, FrozenBatchNorm2d),
}


@pytest.mark.parametrize("way", CONVERT)
def test_a_norm_is_not_converted_under_its_branches(way):
    convert, norm = CONVERT[way]
    for plain, size in ((ConvNet(), None), (net("test_efficientnet"), (3, 32, 32))):  # timm's norms with activations
        grown = gs.grow(plain, "se", input_size=size)
        with pytest.raises(GrowError, match="convert the plain net, then grow it"):
            convert(grown)
        assert grown.state_dict() and str(grown) and copy.deepcopy(grown)
    beside = convert(gs.grow(ConvNet(), "bottleneck", where=["conv"]))  # these are on the convolution
    assert len(grown_modules(beside)) == 1 and isinstance(beside.conv.branches[0].norm, norm)


def test_rows_act_behind_the_norm():
    """In front of a batch norm a factor of 0 gives a constant, behind it 0; folding is exact for negative factors."""
    grown = gs.grow(ConvNet(), "se", where=["conv"])
    assert type(grown.bn) is GrownNorm2d and type(grown.conv) is nn.Conv2d
    grown.bn.branches[0].scale.data.fill_(1.0)
    grown.bn.branches[0].fade.mean.copy_(torch.linspace(-1, 1, 8).roll(1))
    grown.bn.branches[0].fade.mean[3] = 0.0
    gs.set_lambda(grown, 0.0)
    randomized(grown.bn.eval(), seed=4)
    x = images(8, 5, 5)
    off = grown.bn.branches[0].fade.mean == 0
    fused = gs.fuse(grown.eval())
    assert type(fused.bn) is nn.BatchNorm2d
    assert torch.equal((fused.bn(x) == 0).all(0).flatten(1).all(1), (fused.bn.weight == 0) & (fused.bn.bias == 0))
    assert rel(fused.bn(x), grown.bn(x)) < 1e-6 and off.dtype == torch.bool
    kinds = gs.growth_report(grown).grown
    assert kinds == {"conv": ("se",)}
    assert type(gs.grow(ConvNet(norm=False), "se", where=["conv"]).conv) is GrownConv2d
    efficient = gs.grow(net("test_efficientnet"), "se", input_size=(3, 32, 32))
    assert any(type(m) is GrownNormAct2d for m in efficient.modules())


def test_series_branches_find_in_the_output_what_came_before():
    grown = gs.grow(ConvNet(), ["condconv", "insert", "weightnet"], where=["conv"])
    assert [branch.joined for branch in grown.conv.branches] == [True, False, False]
    gs.set_lambda(randomized(grown).double().eval(), 0.0)
    x = images(8, 6, 6, dtype=torch.float64)
    assert rel(grown.conv.as_convmap()(x), grown.conv(x)) < TINY


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_modes_and_formats_give_the_same():
    grown = randomized(gs.grow(ConvNet(), ["condconv", "dynamic_conv", "se"], where=["conv"])).eval()
    x = images(*SIZE, n=3)
    with torch.no_grad():
        y = grown(x)
        last = copy.deepcopy(grown).to(memory_format=torch.channels_last)
        assert rel(last(x.contiguous(memory_format=torch.channels_last)), y) < 1e-5
        half = copy.deepcopy(grown).bfloat16()
        assert half.conv.branches[0].fade.mean.dtype == half.conv.branches[0].fade.lam.dtype == torch.float32
        assert rel(half(x.bfloat16()).float(), y) < 0.05
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert rel(grown(x).float(), y) < 0.05
        assert rel(torch.cat([grown(x[:1]), grown(x[1:])]), y) < 1e-5
    with pytest.raises(gs.errors.GrowError, match="no TorchScript"):
        torch.jit.script(grown.conv)


def test_online_they_are_part_of_the_kernel():
    grown = randomized(gs.grow(ConvNet(), ["condconv", "bottleneck"], where=["conv"])).double().eval()
    gs.set_lambda(grown, 0.0)
    x = images(*SIZE, dtype=torch.float64)
    online = gs.collapse_online(grown, choose="always")
    assert rel(online(x), grown(x)) < TINY and all(branch.merged for branch in online.conv.branches)
    with pytest.raises(ValueError, match="is part of a kernel"):
        gs.set_lambda(online, 0.5)
    assert rel(gs.expand_online(online)(x), grown(x)) < TINY


# --- losses of gates ---


def test_balance_of_experts():
    """CV^2 of importance and load, from the paper's formulas, one image and expert at a time."""
    branch = of("moe", ConvNet().double().conv, lam=1.0).train()
    x = images(8, 5, 5, n=4, dtype=torch.float64)
    torch.manual_seed(3)
    noise = torch.randn(4, 3, dtype=torch.float64)
    torch.manual_seed(3)
    gates = branch.gate(x)
    with torch.no_grad():
        clean, spread = (x.mean((2, 3)) @ branch.router.weight.T).chunk(2, 1)
        spread = F.softplus(spread)
    noisy = clean + noise * spread
    load = torch.zeros(3, dtype=torch.float64)
    for n in range(4):
        for e in range(3):
            others = sorted((float(noisy[n, i]) for i in range(3) if i != e), reverse=True)
            load[e] += 0.5 * (1 + math.erf(float((clean[n, e] - others[1]) / spread[n, e]) / math.sqrt(2)))
    cv = [float(v.detach().std(correction=0) / v.detach().mean()) ** 2 for v in (gates.sum(0), load)]
    assert branch.penalty(None, None).item() == pytest.approx(0.01 * sum(cv), rel=1e-6)


def test_losses_of_masks_and_guides():
    labels = torch.tensor([0, 1, 2])
    branch = of("manidp", ConvNet().double().conv, lam=1.0).train()
    y = images(8, 5, 5, n=3, dtype=torch.float64)
    branch.fade.mean.copy_(torch.linspace(-1, 0.5, 8))
    mask, features = branch.gate(y), y.mean((2, 3))
    logits = 6 * F.one_hot(torch.tensor([0, 2, 2]), 10).double()
    losses = [-torch.log_softmax(row, 0)[label] for row, label in zip(logits, labels, strict=True)]
    half = sum(losses) / 6
    eased = sum(m.mean() * max(0.0, float((half - loss) / half)) for m, loss in zip(mask, losses, strict=True)) / 3
    difference = sum(
        (F.cosine_similarity(mask[i], mask[j], dim=0) - F.cosine_similarity(features[i], features[j], dim=0)) ** 2 / 9
        for i in range(3)
        for j in range(3)
    )
    expected = 0.005 * eased + difference
    assert branch.penalty(labels, logits).item() == pytest.approx(expected.item(), rel=1e-6)
    assert eased > 0 and branch.KEPT == 0.5

    grown = gs.grow(net(), "guided")  # DeepMoE
    logits = grown(images(3, 16, 16, n=3))
    gates = [m.seen for m in grown.modules() if isinstance(m, Guided)]
    expected = F.cross_entropy(grown.guide.seen, labels) + 0.001 * sum(g.abs().sum(1).mean() for g in gates)
    assert gs.penalties(grown, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    assert gs.penalties(grown, labels) == 0, "each pass counts once"
    gs.set_lambda(grown, 0.0)
    grown(images(3, 16, 16, n=3))
    faint = gs.penalties(grown, labels) - F.cross_entropy(grown.guide.classify(grown.guide(images(n=3))), labels)
    assert abs(faint.item()) < 1e-6, "they fade with the gates"


# --- a new kind ---


def test_a_new_kind_is_one_class():
    try:

        class Clocked(KernelFactors, kind="tests-brightness"):
            """In parallel: two kernels mixed by how bright the image is."""

            def __init__(self, conv, ratio):
                super().__init__(conv, ratio, nn.Identity(), num=2)
                self.threshold = nn.Parameter(torch.zeros(()))

            def gate(self, source):
                dark = torch.sigmoid(self.threshold - source.mean((1, 2, 3)))
                return torch.stack([dark, 1 - dark], 1)

        grown = gs.grow(ConvNet(), "tests-brightness", where=["conv"])
        gs.set_lambda(train_a_bit(copy.deepcopy(grown)), 0.0)
        gs.set_lambda(grown, 0.0)
        report = gs.verify(grown, input_size=SIZE)
        assert report.ok and report.effect > 0.05
    finally:
        Branch.kinds.pop("tests-brightness", None)
