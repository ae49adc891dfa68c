"""The branches of the literature against twins written from the papers' formulas."""

import re

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.branches import PRESETS, Branch, BranchSpec, Modulated
from growshrink.errors import GrowError
from growshrink.layers.grown import grown_modules
from growshrink.transforms import branch_specs
from nets import ConvNet, images, net, randomized, rel, small, train_a_bit, untouched
from sampled import sampled

SIZE = (3, 16, 16)


# --- twins: what a branch adds to conv(x), in eval mode ---


def bn(norm, x):
    shape = (1, -1, 1, 1)
    std = (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean.view(shape)) / std.view(shape) * norm.weight.view(shape) + norm.bias.view(shape)


def bn_and_pad(norm, x, p):
    """As in DBB zeros become beta - mu gamma / sigma, and so does the padding around the map."""
    constant = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
    out = constant.view(1, -1, 1, 1).repeat(len(x), 1, x.shape[2] + 2 * p, x.shape[3] + 2 * p)
    out[:, :, p : p + x.shape[2], p : p + x.shape[3]] = bn(norm, x)
    return out


def copy(path, x, k, s, p, g):
    return bn(path.norm, F.conv2d(x, path.conv.weight, stride=s, padding=p, groups=g))


def pointwise(path, x, k, s, p, g):
    assert p == k // 2
    return bn(path.norm, F.conv2d(x, path.conv.weight, stride=s, groups=g))


def identity(path, x, k, s, p, g):
    assert (p, s) == (k // 2, 1)
    return bn(path.norm, x)


def vertical(path, x, k, s, p, g):
    assert path.conv.weight.shape[2:] == (k, 1)
    return bn(path.norm, F.conv2d(x, path.conv.weight, stride=s, padding=(p, p - k // 2), groups=g))


def horizontal(path, x, k, s, p, g):
    assert path.conv.weight.shape[2:] == (1, k)
    return bn(path.norm, F.conv2d(x, path.conv.weight, stride=s, padding=(p - k // 2, p), groups=g))


def pointwise_conv(path, x, k, s, p, g):
    inner = bn_and_pad(path.inner, F.conv2d(x, path.pointwise.weight, groups=g), p)
    return bn(path.norm, F.conv2d(inner, path.conv.weight, stride=s, groups=g))


def pointwise_average(path, x, k, s, p, g):
    inner = bn_and_pad(path.inner, F.conv2d(x, path.pointwise.weight, groups=g), p)
    return bn(path.norm, F.avg_pool2d(inner, k, s))


def expandnet(path, x, k, s, p, g):
    x = F.conv2d(x, path.first.weight, padding=p, groups=g)
    return F.conv2d(F.conv2d(x, path.conv.weight, stride=s, groups=g), path.last.weight, groups=g)


def expandnet_stack(path, x, k, s, p, g):
    x = F.pad(x, (p, p, p, p))
    kernels = [m.weight for m in path]
    assert len(kernels) == k // 2 and all(w.shape[2:] == (3, 3) for w in kernels)
    for kernel in kernels[:-1]:
        x = F.conv2d(x, kernel, groups=g)
    return F.conv2d(x, kernels[-1], stride=s, groups=g)


def small_kernel(path, x, k, s, p, g):
    assert path.conv.weight.shape[2:] == (3, 3)
    return bn(path.norm, F.conv2d(x, path.conv.weight, stride=s, padding=p - (k - 3) // 2, groups=g))


def stack(path, x, k, s, p, g):
    assert float(path.act.lam) == 0
    x = bn(path.inner, F.conv2d(F.pad(x, (p - (k - 5) // 2,) * 4), path.first.weight, groups=g))
    return bn(path.norm, F.conv2d(x, path.last.weight, stride=s, groups=g))


def lora(path, x, k, s, p, g):
    ups, downs = path.up.weight.chunk(g), path.down.weight.chunk(g)
    delta = torch.cat(
        [(u.flatten(1) @ d.flatten(1)).view(len(u), *d.shape[1:]) for u, d in zip(ups, downs, strict=True)]
    )
    return F.conv2d(x, delta, stride=s, padding=p, groups=g)


def mixture(branch, x, k, s, p, g):
    kernels = branch.conv.weight.chunk(len(branch.mix))
    return sum(a * F.conv2d(x, w, stride=s, padding=p, groups=g) for a, w in zip(branch.mix, kernels, strict=True))


def orepa(branch, x, k, s, p, g):
    before = F.conv2d(x, branch.before.weight, groups=g)
    paths = [
        F.conv2d(x, branch.conv.weight, stride=s, padding=p, groups=g),
        F.conv2d(x, branch.pointwise.weight, stride=s, groups=g),
        F.conv2d(before, branch.behind.weight, stride=s, padding=p, groups=g),
        F.avg_pool2d(F.conv2d(x, branch.average.weight, groups=g), k, s, p),
    ]
    return sum(scale.view(1, -1, 1, 1) * path for scale, path in zip(branch.scale, paths, strict=True))


def dirac(path, x, k, s, p, g):
    assert (p, s) == (k // 2, 1)
    return path.weight.weight.view(1, -1, 1, 1) * x


def dirac_kernel(branch, x, k, s, p, g):
    a, b = branch.scale.view(2, 1, -1, 1, 1)
    kernels = branch.conv.weight.unbind()
    normalised = torch.stack([w / w.square().sum().sqrt() for w in kernels])
    return a * x[:, :, ::s, ::s] + b * F.conv2d(x, normalised, stride=s, padding=p, groups=g)


TWINS = [
    copy,
    pointwise,
    identity,
    vertical,
    horizontal,
    pointwise_conv,
    pointwise_average,
    expandnet,
    expandnet_stack,
    small_kernel,
    stack,
    lora,
    mixture,
    orepa,
    dirac,
    dirac_kernel,
]
TWINS = {twin.__name__: twin for twin in TWINS}
NAMES = [
    *PRESETS,
    "expandnet",
    "expandnet_stack",
    "small_kernel",
    "stack",
    "lora",
    "mixture",
    "orepa",
    "dirac",
    "dirac_kernel",
]
GEOMETRIES = [
    {},
    {"stride": 2},
    {"kernel_size": 5, "padding": 2, "groups": 2},
    {"kernel_size": 5, "padding": 2, "stride": 2, "groups": 8},
    {"kernel_size": 7, "padding": 3},
]


def test_every_literature_kind_has_a_twin():
    library = {kind for kind, cls in Branch.kinds.items() if cls.__module__.startswith("growshrink.")}
    modulated = {
        kind for kind in library if issubclass(Branch.kinds[kind], Modulated)
    }  # tests/branches/test_modulated.py
    assert library - modulated - {"bottleneck", "insert", "nest", "implicit"} == set(TWINS)
    assert not set(PRESETS) & set(Branch.kinds)
    assert all(Branch.kinds[kind].parallel for kind in TWINS)


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_against_the_paper(name, options):
    plain = randomized(ConvNet(**options)).double().eval()
    if name in ("expandnet_stack", "small_kernel", "stack") and "kernel_size" not in options:
        with pytest.raises(
            GrowError, match=f"no {name}: (a stack of 3x3 makes 5x5|its 3x3 kernel is smaller than 5x5)"
        ):
            gs.grow(plain, name)
        return
    if name == "dirac" and plain.conv.stride != (1, 1):
        with pytest.raises(GrowError, match="no dirac: its stride"):
            gs.grow(plain, name)
        return
    grown = randomized(gs.grow(plain, name, ratio=1.5, init="paper", where=["conv"]), seed=3)
    gs.set_lambda(grown, 0.0)
    conv = grown.conv
    k, s, p, g = conv.kernel_size[0], conv.stride[0], conv.padding[0], conv.groups
    kinds = [b.kind for b in conv.branches]
    assert kinds == [kind for kind in BranchSpec(kind=name).kinds if kind != "identity" or s == 1]
    x = images(8, 11, 14, dtype=torch.float64)
    with torch.no_grad():
        expected = F.conv2d(x, conv.weight, stride=s, padding=p, groups=g)
        own = expected
        for branch in conv.branches:
            expected = expected + TWINS[branch.kind](getattr(branch, "path", branch), x, k, s, p, g)
        assert rel(expected, own) > 0.01
        assert rel(conv(x), expected) < 1e-12
        assert rel(conv.fuse()(x), expected) < 1e-12
        fused = gs.fuse(grown)
        assert list(fused.state_dict()) == list(plain.state_dict())
        picture = images(*SIZE, dtype=torch.float64)
        assert rel(fused(picture), grown(picture)) < 1e-10


def test_the_average_of_orepa_over_a_rectangle():
    branch = BranchSpec(kind="orepa").build(nn.Conv2d(4, 4, (3, 5)), ratio=1.0, init="silent", generator_seed=0)
    branch.scale.data[3] = 1.0
    x = images(4, 7, 8)
    expected = F.avg_pool2d(F.conv2d(x, branch.average.weight), (3, 5), stride=1)
    torch.testing.assert_close(branch(x, expected), expected)


def kernel_sizes(kind, conv):
    branch = BranchSpec(kind=kind).build(conv, ratio=2.0, init="paper", generator_seed=0)
    return {n: tuple(p.shape) for n, p in branch.named_parameters() if p.dim() == 4}


def test_shapes():
    conv = nn.Conv2d(6, 4, 3, padding=1, groups=2)
    assert kernel_sizes("expandnet", conv) == {
        "path.first.weight": (12, 3, 1, 1),
        "path.conv.weight": (8, 6, 3, 3),
        "path.last.weight": (4, 4, 1, 1),
    }
    stack = kernel_sizes("expandnet_stack", nn.Conv2d(6, 4, 7, padding=3))
    assert list(stack.values()) == [(8, 6, 3, 3), (8, 8, 3, 3), (4, 8, 3, 3)]
    assert kernel_sizes("lora", conv) == {"path.down.weight": (8, 3, 3, 3), "path.up.weight": (4, 4, 1, 1)}
    assert kernel_sizes("mixture", conv) == {"conv.weight": (8, 3, 3, 3)}


def test_the_starts_of_the_papers():
    conv = nn.Conv2d(8, 8, 5, padding=2, groups=2)
    built = {kind: BranchSpec(kind=kind).build(conv, ratio=3.0, init="paper", generator_seed=0) for kind in TWINS}
    for kind, branch in built.items():
        for module in branch.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert bool((module.weight == 1).all() and (module.bias == 0).all())
        for name, kernel in branch.named_parameters():
            if kernel.dim() == 4 and name not in ("path.up.weight", "path.weight.weight"):
                assert float(kernel.detach().std()) > 0.01, (kind, name)
    x = images(8, 5, 5)
    for first in (built["pointwise_conv"].path.pointwise, built["orepa"].before):
        assert torch.equal(F.conv2d(x, first.weight, groups=2), x)
    assert torch.equal(built["mixture"].mix, torch.full((3,), 0.5))
    assert built["orepa"].scale[:, 0].tolist() == [0.25, 0.5, 0.5, 0.25]
    assert not built["lora"].path.up.weight.any()


def test_the_border_agrees_in_train_mode():
    """Where x is 0 at the rim, the rim of the first BN's output is what stands in the padding, in either mode."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    branch = BranchSpec(kind="pointwise_conv").build(conv, ratio=1.0, init="paper", generator_seed=0)
    randomized(branch)
    x = F.pad(images(4, 6, 6), (1, 1, 1, 1))
    for train in (True, False):
        inner = branch.train(train).path[:2](x)
        assert inner.shape[2:] == (10, 10)
        assert torch.equal(inner[:, :, 0], inner[:, :, 1])


# --- what fits ---

MIDDLE = "kernel has no middle"
CROSS = "kernel has no row and column that cross"
AGAINST = [
    ({"kernel_size": 3, "padding": 1}, {"expandnet_stack": "3x3 makes 5x5", "stack": "3x3 kernel is smaller than 5x5"}),
    ({"kernel_size": 5, "padding": 2}, {}),
    ({"kernel_size": 5, "padding": 2, "groups": 8}, {}),
    ({"kernel_size": 5, "padding": 0}, {}),
    ({"kernel_size": 5, "padding": "same"}, {}),
    ({"kernel_size": 5, "padding": 2, "padding_mode": "reflect"}, {}),
    ({"kernel_size": 5, "padding": 2, "stride": 2}, {"identity": r"its stride is \(2, 2\)"}),
    ({"kernel_size": 5, "padding": 2, "out_channels": 16}, {"identity": "its 8 input channels become 16"}),
    ({"kernel_size": 5, "padding": 3}, {"identity": "pads by more than half"}),
    ({"kernel_size": 5, "padding": 4, "dilation": 2}, {"pointwise_average": r"its dilation is \(2, 2\)"}),
    (
        {"kernel_size": 1},
        {"vertical": f"1x1 {CROSS}", "horizontal": CROSS, "expandnet_stack": "not its 1x1", "stack": "1x1"},
    ),
    (
        {"kernel_size": 4, "padding": "same"},
        {
            **dict.fromkeys(["identity", "pointwise", "vertical", "horizontal", "orepa", "stack"], f"its 4x4 {MIDDLE}"),
            **dict.fromkeys(["pointwise_conv", "pointwise_average"], "padding='same' is lopsided"),
            "expandnet_stack": "not its 4x4",
        },
    ),
    (
        {"kernel_size": (3, 2), "padding": 1},
        {
            **dict.fromkeys(["identity", "pointwise", "vertical", "orepa", "stack"], f"its 3x2 {MIDDLE}"),
            "expandnet_stack": "not its 3x2",
        },
    ),
]


@pytest.mark.parametrize(("options", "against"), AGAINST, ids=str)
def test_reasons(options, against):
    conv = nn.Conv2d(8, options.get("out_channels", 8), **{k: v for k, v in options.items() if k != "out_channels"})
    for kind in (*TWINS, "bottleneck", "insert", "nest"):
        reason = Branch.kinds[kind].reason_against(conv)
        alike = {"dirac": "identity", "dirac_kernel": "orepa", "small_kernel": "stack"}.get(kind, kind)
        assert bool(reason) == (alike in against), (kind, reason)
        assert re.search(against.get(alike, ""), reason)


def test_an_exact_name_that_a_kind_does_not_fit_is_refused():
    model = net()
    strided = "stages.1.0.conv"
    with untouched(model):
        message = f"where names '{strided}', which cannot be grown: no identity: its 4 input channels become 8"
        with pytest.raises(GrowError, match=message):
            gs.grow(model, ["pointwise", "identity"], where=["stages.0.1.conv", strided], inplace=True)
    pointwise = ConvNet(kernel_size=1, padding=0)
    with pytest.raises(GrowError, match="no vertical: its 1x1 kernel .*; no horizontal: its 1x1"):
        gs.grow(pointwise, "acnet", where=["conv"])
    with pytest.raises(GrowError, match=r"none of 3 layers can be grown exactly \(conv: no vertical: its 1x1"):
        gs.grow(pointwise, "acnet")


def test_of_a_preset_a_convolution_gets_what_fits_it_and_the_report_tells():
    strided = {"stages.1.0.conv", "stages.2.0.conv"}
    model = small()
    asked = gs.growth_report(model, "repvgg")
    grown = gs.grow(model, "repvgg")
    for report in (asked, gs.growth_report(grown), gs.growth_report(grown, "repvgg")):
        rows = {row.name: row for row in report.rows}
        assert {name for name, row in rows.items() if row.left_out} == strided
        assert list(rows["stages.1.0.conv"].left_out) == ["identity"]
        assert "; no identity: its 4 input channels become 8" in str(report)
        assert set(report.skipped) == {"stem.conv", "head.fc"}
    for name, kinds in gs.growth_report(grown).grown.items():
        assert kinds == (("pointwise",) if name in strided else ("pointwise", "identity"))
    # a kind by its own name is all or nothing, and what it did not fit has its reason too
    alone = gs.grow(model, "identity")
    assert set(grown_modules(grown)) - set(grown_modules(alone)) == strided
    assert gs.growth_report(alone).skipped.keys() == strided | {"stem.conv", "head.fc"}
    assert gs.growth_report(model, "identity").skipped == gs.growth_report(alone).skipped
    assert gs.growth_report(model).skipped.keys() == {"stem.conv", "head.fc"}
    # so that a log of names and of what they were grown with can be played again
    again = gs.grow(model, "repvgg", where=list(grown_modules(grown)))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in grown.state_dict().items()}


def test_presets_as_specs():
    assert branch_specs(["dbb", "insert"]) == [BranchSpec(kind="dbb"), BranchSpec(kind="insert")]
    assert BranchSpec(kind="dbb").kinds == ("pointwise", "pointwise_conv", "pointwise_average")
    with pytest.raises(GrowError, match="'repvg': no such branch; did you mean repvgg"):
        BranchSpec(kind="repvg")
    parts, reason = BranchSpec(kind="mobileone", ratio=0.5).fitting(nn.Conv2d(4, 8, 3))
    assert [part.kind for part in parts] == ["copy"] * 3 + ["pointwise"] and not reason
    assert all(part.ratio == 0.5 for part in parts)


def test_a_branch_that_adds_no_bias_needs_no_norm_behind_it():
    plain = randomized(ConvNet(norm=False, kernel_size=5, padding=2)).double().eval()
    x = images(*SIZE, dtype=torch.float64)
    unbiased = [kind for kind in TWINS if not Branch.kinds[kind].biased]
    assert unbiased == ["expandnet", "expandnet_stack", "lora", "mixture", "orepa", "dirac", "dirac_kernel"]
    for kind in unbiased:
        assert not gs.growth_report(plain, kind).skipped.get("conv")
        grown = randomized(gs.grow(plain, kind, init="paper", where=["conv"]))
        fused = gs.fuse(grown)
        assert rel(fused(x), grown(x)) < 1e-10 and rel(fused(x), plain(x)) > 1e-3
        assert list(fused.state_dict()) == list(plain.state_dict())
    for branch in ("repvgg", ["lora", "copy"], None):
        assert "finds no batch norm to go to" in gs.growth_report(plain, branch).skipped["conv"]
    with pytest.raises(GrowError, match="finds no batch norm to go to"):
        gs.grow(plain, ["lora", "copy"])


# --- whole nets ---


@pytest.mark.parametrize(
    "branch",
    sampled(["repvgg", "acnet", "dbb", "mobileone", ["expandnet", "lora", "mixture", "orepa"]], ("acnet",)),
    ids=str,
)
def test_whole_nets(branch):
    model = gs.grow(net("test_resnet", zero_init_last=False), branch, input_size=(3, 32, 32))
    report = gs.verify(model, input_size=(3, 32, 32))
    assert report.ok and report.max_rel < 1e-10 and report.effect > 0.01
    with torch.no_grad():
        fused = gs.fuse(randomized(model), input_size=(3, 32, 32))
    timm.create_model("test_resnet", num_classes=10).load_state_dict(fused.state_dict(), strict=True)


def test_all_of_them_in_one_net_and_trained():
    kinds = [kind for kind in TWINS if kind not in ("expandnet_stack", "small_kernel", "stack")]
    grown = train_a_bit(gs.grow(small(), [*kinds, "nest", "insert"], where=r"stages\.0", ratio=1.0).double(), steps=3)
    gs.set_lambda(grown.eval(), 0.0)
    x = images(*SIZE, dtype=torch.float64)
    assert rel(gs.fuse(grown)(x), grown(x)) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_widths(name):
    """A branch without a middle is there or not, and so it is fused."""
    grown = randomized(gs.grow(ConvNet(kernel_size=5, padding=2), [name, "bottleneck"])).double().eval()
    gs.set_lambda(grown, 0.0)
    space = gs.width_space(grown)
    last = f"conv.branches.{len(grown.conv.branches) - 1}"
    assert all(values == (0, 1) for slot, values in space.choices.items() if slot != last)
    width = {**space.full, "conv.branches.0": 0}
    x = images(*SIZE, dtype=torch.float64)
    fused = gs.fuse(grown, width=width)
    assert rel(fused(x), gs.fuse(grown)(x)) > 1e-3
    del grown.conv.branches[0]
    assert rel(fused(x), grown(x)) < 1e-10


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("options", [{}, {"kernel_size": 5, "padding": 0}], ids=str)
def test_they_script(options):
    branches = ["repvgg", "acnet", "dbb", "expandnet", "lora", "orepa", "mixture"]
    conv = randomized(gs.grow(ConvNet(**options), branches)).eval().conv
    x = images(8, 9, 9)
    with torch.no_grad():
        assert rel(torch.jit.script(conv)(x), conv(x)) < 1e-5
