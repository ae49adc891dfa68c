"""Published compositions against twins written from the papers: train mode, gradients, updates, eval mode, the fuse."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.branches import PRESETS, Branch, BranchSpec
from growshrink.errors import GrowError
from nets import images, rel
from sampled import sampled

SIZE = (3, 9, 12)
BN = nn.BatchNorm2d


class Net(nn.Module):
    """stem -> conv (the block) -> norm (OREPA's, or none) -> tanh."""

    def __init__(self, o=8, norm=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, o, **{"kernel_size": 3, "padding": 1, "bias": not norm, **options})
        self.norm = BN(o) if norm else nn.Identity()

    def forward(self, x):
        return torch.tanh(self.norm(self.conv(self.stem(x))))


# --- twins: a module made of the grown convolution's tensors, in the paper's words


def convolved(x, kernel, conv, padding=0, stride=None, groups=None):
    return F.conv2d(x, kernel, None, stride or conv.stride, padding, 1, groups or conv.groups)


def normed(norm, x):
    """Batch norm written out; updates the statistics as the textbook has it."""
    if norm.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        n = x.numel() / x.shape[1]
        with torch.no_grad():
            norm.running_mean.mul_(0.9).add_(0.1 * mean)
            norm.running_var.mul_(0.9).add_(0.1 * var * n / (n - 1))
    else:
        mean, var = norm.running_mean, norm.running_var
    scale = norm.weight / torch.sqrt(var + norm.eps)
    return x * scale.view(1, -1, 1, 1) + (norm.bias - mean * scale).view(1, -1, 1, 1)


def normed_and_padded(norm, x, padding):
    """DBB: the border holds beta - mu gamma / sigma of the running statistics, as a constant."""
    y = normed(norm, x)
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    border = (norm.bias - norm.running_mean * scale).detach().view(1, -1, 1, 1)
    return F.pad(y - border, [padding[1], padding[1], padding[0], padding[0]]) + border


def own(conv, x):
    return normed(conv.branches[0].norm, conv._conv_forward(x, conv.weight, conv.bias))


def parallel(conv, x, kind, path):
    k, p = conv.kernel_size, conv.padding
    if kind == "copy":
        return normed(path.norm, convolved(x, path.conv.weight, conv, p))
    if kind == "identity":
        return normed(path.norm, x)
    if kind == "pointwise":
        return normed(path.norm, convolved(x, path.conv.weight, conv))
    if kind == "vertical":
        return normed(path.norm, convolved(x, path.conv.weight, conv, (p[0], 0)))
    if kind == "horizontal":
        return normed(path.norm, convolved(x, path.conv.weight, conv, (0, p[1])))
    depthwise = conv.groups == conv.out_channels
    if kind == "pointwise_average" and depthwise:
        return normed(path.norm, F.avg_pool2d(x, k, conv.stride, p))
    inner = normed_and_padded(path.inner.norm, convolved(x, path.pointwise.weight, conv, stride=1), p)
    if kind == "pointwise_average":
        return normed(path.norm, F.avg_pool2d(inner, k, conv.stride))
    assert path.conv.in_channels == conv.in_channels * (2 if depthwise else 1)
    return normed(path.norm, convolved(inner, path.conv.weight, conv))


def block(conv, x):
    """RepVGG, ACNet, DBB, MobileOne: the sum of paths that end in a norm each."""
    branches = list(conv.branches)[1:]
    return own(conv, x) + sum(parallel(conv, x, branch.kind, branch.path) for branch in branches)


def orepa(conv, x):
    """OREPA, path by path on the images, a scale per path and channel."""
    (b,) = conv.branches
    p, g, i = conv.padding, conv.groups, conv.in_channels
    k = conv.kernel_size[0]
    o = conv.out_channels
    waves = torch.tensor(
        [
            [[math.cos(math.pi * ((h if c < o / 2 else w) + 0.5) * (c + 1 - (0 if c < o / 2 else o / 2)) / k)
              for w in range(k)] for h in range(k)]
            for c in range(o)
        ],
        dtype=torch.float64,
    )  # fmt: skip
    paths = [
        convolved(x, conv.weight, conv, p),
        convolved(x, b.pointwise.weight, conv),
        convolved(convolved(x, b.before.weight, conv, stride=1), b.conv.weight, conv, p),
        F.avg_pool2d(convolved(x, b.average.weight, conv, stride=1), k, conv.stride, p),
        convolved(x, b.wave.weight * waves[:, None], conv, p),
        convolved(convolved(x, b.depthwise.weight, conv, p, groups=i), b.mix.weight, conv, stride=1, groups=g),
    ]
    return sum(s.view(1, -1, 1, 1) * path for s, path in zip([b.own, *b.scale], paths, strict=True))


def twin_output(net, kind, x):
    y = (orepa if kind == "orepa" else block)(net.conv, net.stem(x))
    return torch.tanh(normed(net.norm, y) if kind == "orepa" else y)


GEOMETRIES = {
    "3x3": {},
    "3x3 s2": {"stride": 2, "o": 16},
    "depthwise": {"groups": 8},
    "groups": {"groups": 2, "kernel_size": 5, "padding": 2},
    "1x1": {"kernel_size": 1, "padding": 0},
}
DEPTHWISE_DBB = ["own_norm", "pointwise_conv", "pointwise_average"]
#: Paths by the papers, where they are not all of the preset's.
PATHS = {
    ("repvgg", "3x3 s2"): ["own_norm", "pointwise"],
    ("repvgg", "1x1"): ["own_norm", "identity"],
    ("acnet", "1x1"): None,
    ("dbb", "depthwise"): DEPTHWISE_DBB,
    ("dbb", "1x1"): ["own_norm", "pointwise_conv", "pointwise_average"],
    ("mobileone", "3x3 s2"): ["own_norm", *["copy"] * 3, "pointwise"],
    ("mobileone", "1x1"): ["own_norm", *["copy"] * 3, "identity"],
    ("orepa", "1x1"): None,
}
KEPT = [
    ("repvgg", "3x3"),
    ("acnet", "groups"),
    ("dbb", "3x3 s2"),
    ("dbb", "depthwise"),
    ("mobileone", "1x1"),
    ("orepa", "groups"),
]
CASES = [(kind, shape) for kind in (*PRESETS, "orepa") for shape in GEOMETRIES]


def grown_as_published(kind, shape):
    plain = Net(norm=kind == "orepa", **GEOMETRIES[shape]).double()
    return plain, gs.grow(plain, BranchSpec(kind=kind, published=True), init="paper", where=["conv"], input_size=SIZE)


@pytest.mark.parametrize(("kind", "shape"), sampled(CASES, KEPT))
def test_against_the_paper(kind, shape):
    paths = PATHS.get((kind, shape), ["orepa"] if kind == "orepa" else ["own_norm", *PRESETS[kind]])
    if paths is None:
        with pytest.raises(GrowError, match="where names 'conv', which cannot be grown: .*1x1"):
            grown_as_published(kind, shape)
        return
    plain, ours = grown_as_published(kind, shape)
    _, theirs = grown_as_published(kind, shape)  # the same start, by the same seed
    assert [branch.kind for branch in ours.conv.branches] == paths
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (ours, theirs)]
    for step in range(4):
        x = images(*SIZE, n=4, dtype=torch.float64, seed=step)
        outputs = ours.train()(x), twin_output(theirs.train(), kind, x)
        assert rel(*outputs) < 1e-12
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert float((a.grad - b.grad).abs().max()) < 1e-13, name
        [optimizer.step() for optimizer in optimizers]
    statistics = zip(ours.buffers(), theirs.buffers(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in statistics if a.is_floating_point())
    with torch.no_grad():
        x = images(*SIZE, dtype=torch.float64, seed=9)
        expected = twin_output(theirs.eval(), kind, x)
        assert rel(ours.eval()(x), expected) < 1e-12
        fused = gs.fuse(ours, input_size=SIZE)
        assert rel(fused(x), expected) < 1e-12
        assert list(fused.state_dict()) == list(plain.state_dict())
        assert rel(gs.drop(ours)(x), expected) > 0.01


@pytest.mark.parametrize("kind", (*PRESETS, "orepa"))
def test_the_published_start(kind):
    """Gammas 1, betas 0, torch's kernels (OREPA: He's, and the scales of the authors' code)."""
    _, net = grown_as_published(kind, "3x3")
    for name, tensor in net.conv.branches.named_parameters():
        if "norm" in name:
            assert bool((tensor == float(name.endswith("weight"))).all()), name
        elif tensor.dim() == 4 and "before" not in name and not (kind == "dbb" and "1.path.pointwise" in name):
            fan_in = tensor[0].numel()
            bound = math.sqrt(6 / fan_in) if kind == "orepa" else 1 / math.sqrt(fan_in)
            if "pointwise_conv" not in name and tensor.numel() > 100 and not (kind == "dbb" and "2." in name):
                assert 0.9 * bound < float(tensor.detach().abs().max()) <= bound, name
    if kind == "orepa":
        (branch,) = net.conv.branches
        assert [branch.own[0].item(), *branch.scale[:, 0].tolist()] == [0.25, 1.0, 0.5, 0.25, 0.0, 0.5]
        assert torch.equal(branch.before.weight[:, :, 0, 0], torch.eye(8, dtype=torch.float64))
    if kind == "dbb":
        pointwise = net.conv.branches[2].path.pointwise.weight
        assert torch.equal(pointwise[:, :, 0, 0], torch.eye(8, dtype=torch.float64))


def test_the_default_forms_are_other_blocks():
    """What the table of the docs says the default changes: with the same tensors the outputs in train mode differ."""
    for kind in ("dbb", "repvgg"):
        plain = Net().double()
        ours = gs.grow(plain, kind, init="paper", where=["conv"], input_size=SIZE).train()
        _, published = grown_as_published(kind, "3x3")
        x = images(*SIZE, n=4, dtype=torch.float64)
        assert rel(ours(x), published.train()(x)) > 0.01


@pytest.mark.parametrize(
    ("spec", "net", "init", "message"),
    [
        (lambda: BranchSpec(kind="dbb", published=True), Net(), "silent", "'dbb' with published=True starts as publi"),
        (lambda: BranchSpec(kind="repvgg", published=True), Net(norm=True, bias=True), "paper", "norm would norm the"),
        (lambda: BranchSpec(kind="dbb", published=True), Net(padding_mode="reflect"), "paper", None),
        (lambda: BranchSpec(kind="bottleneck", published=True), Net(), "paper", "'bottleneck': no such branch"),
        (
            lambda: BranchSpec(kind="dbb", published=True, norm=None),
            Net(),
            "paper",
            "published blocks have their norms",
        ),
        (lambda: ["lora", BranchSpec(kind="acnet", published=True)], Net(), "paper", "published block begins with"),
    ],
)
def test_what_is_refused(spec, net, init, message):
    if message is None:
        report = gs.growth_report(net, spec(), input_size=SIZE)
        row = next(row for row in report.rows if row.name == "conv")
        assert row.left_out["pointwise_conv"] == "its padding mode is reflect" and not row.reason
        return
    with pytest.raises(GrowError, match=message):
        gs.grow(net, spec(), init=init, where=["conv"], input_size=SIZE)


def test_a_folded_net_of_norms_takes_published_blocks():
    torch.manual_seed(0)
    plain = gs.fold(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), BN(8), nn.ReLU(), nn.Conv2d(8, 8, 3), BN(8))
    )
    grown = gs.grow(plain, BranchSpec(kind="repvgg", published=True), init="paper", where=["3"]).double()
    assert [b.kind for b in grown[3].branches] == ["own_norm", "pointwise", "identity"]
    grown.train()(images(3, 16, 16, n=4, dtype=torch.float64))
    x = images(3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        assert rel(gs.fuse(grown)(x), grown.eval()(x)) < 1e-12
    with pytest.raises(GrowError, match="a published block begins with the norm or scale"):
        gs.grow(grown, BranchSpec(kind="orepa", published=True), init="paper", where=["3"])


def test_published_forms_are_no_kinds_of_their_own():
    assert set(Branch.published) == {"own_norm", "pointwise_conv", "pointwise_average", "orepa"}
    assert "own_norm" not in Branch.kinds
    with pytest.raises(GrowError, match="'own_norm': no such branch"):
        BranchSpec(kind="own_norm")
