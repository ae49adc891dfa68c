import random
from pathlib import Path

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import BasicBlock
from torch import nn

import growshrink as gs
from growshrink.depth.chains import chains_of
from growshrink.depth.segments import Segment, all_segments, merge_cut, uncut, vanish_cut
from growshrink.depth.skips import reserve_skips
from growshrink.errors import MergeError, PlanError
from nets import images, net, randomized, rel, train_a_bit, untouched
from program import module_of
from sampled import sampled

random_cut = module_of(Path(__file__).parents[2] / "recipes" / "latency.py").random_cut
plain_at_depth = module_of(Path(__file__).parents[2] / "recipes" / "knob.py").plain_at_depth

CUTS = [
    (Segment(0, 0, 3), Segment(1, 0, 3), Segment(2, 0, 3)),
    (Segment(0, 0, 3, True), Segment(1, 0, 3, True), Segment(2, 0, 3, True)),
    tuple(
        Segment(*values) for values in ((0, 0, 1), (0, 1, 3, True), (1, 0, 2), (1, 2, 3), (2, 0, 2, True), (2, 2, 3))
    ),
]


def reducenet(**kwargs):
    return randomized(net("reducenet20", dtype=torch.float64, **kwargs)).eval()


def conv_shapes(model):
    return [
        (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding)
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    ]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("size", [(3, 16, 16), (3, 9, 7)])
@torch.no_grad()
def test_merged_is_what_was_trained(cut, size):
    model = vanish_cut(reducenet(), cut)
    with pytest.raises(MergeError, match="does not follow"):
        merge_cut(model, cut, input_size=size)
    gs.set_lambda(model, 0)
    merged = merge_cut(model, cut, input_size=size)
    x = images(*size, dtype=torch.float64)
    assert rel(merged(x), model(x)) < 1e-10
    assert len(conv_shapes(merged)) == 1 + len(cut)
    assert merged(x).shape == (2, 10)


@pytest.mark.parametrize("cut", CUTS)
def test_plain_at_depth_is_of_the_merged_shape_and_trains(cut):
    base = reducenet()
    vanished = vanish_cut(base, cut)
    gs.set_lambda(vanished, 0)
    merged = merge_cut(vanished, cut)
    plain = plain_at_depth(base, cut)
    assert conv_shapes(plain) == conv_shapes(merged)
    assert gs.profile(plain, (3, 16, 16)).macs == gs.profile(merged, (3, 16, 16)).macs
    train_a_bit(plain)
    plain.requires_grad_(False).eval()
    assert rel(gs.fold(plain)(images(dtype=torch.float64)), plain(images(dtype=torch.float64))) < 1e-10


def test_only_what_is_inside_vanishes():
    model = vanish_cut(reducenet(), CUTS[2])
    assert list(gs.get_lambda(model)) == ["stages.0.1.act", "stages.1.0.act", "stages.2.0.act"]
    assert set(gs.get_lambda(model).values()) == {1.0}
    assert [b.conv.padding[0] for stage in model.stages for b in stage] == [1, 1, 0, 3, 0, 1, 1, 0, 1]
    assert [b.conv.kernel_size[0] for stage in model.stages for b in stage] == [3, 3, 1, 3, 3, 3, 3, 1, 3]


def test_with_nothing_cut_the_net_is_the_same():
    model = reducenet()
    cut = uncut(model)
    assert len(cut) == 9
    same = vanish_cut(model, cut)
    x = images(dtype=torch.float64)
    assert torch.equal(same(x), model(x)) and not gs.get_lambda(same)
    assert rel(merge_cut(same, cut)(x).detach(), model(x).detach()) < 1e-12


def test_slim_keeps_the_centres():
    model = reducenet()
    slim = vanish_cut(model, CUTS[1])
    assert torch.equal(slim.stages[1][2].conv.weight[:, :, 0, 0], model.stages[1][2].conv.weight[:, :, 1, 1])
    assert torch.equal(slim.stages[1][0].conv.weight, model.stages[1][0].conv.weight)


def test_all_segments():
    model = net("reducenet32", width=0.1)
    found = all_segments(model, longest=3)
    per_stage = 5 + 2 * (4 + 3)  # by length; from two blocks on, wide and slim
    assert len(found) == len(set(found)) == 3 * per_stage
    assert str(found[0]) == "stages.0[0:1]" and "stages.2[2:5]-slim" in map(str, found)


@pytest.mark.parametrize(
    "cut",
    [(), CUTS[0][:2], CUTS[0][::-1], (*CUTS[0], Segment(2, 2, 3)), (Segment(0, 0, 2), *CUTS[0][1:])],
)
def test_cuts_that_do_not_cover_the_net(cut):
    model = reducenet()
    with untouched(model), pytest.raises(PlanError, match="do not cover the 9 blocks"):
        vanish_cut(model, cut)
    with pytest.raises(PlanError, match="do not cover"):
        plain_at_depth(model, cut)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Conv2d(3, 3, 3), "Conv2d: no two convolutions in a row"),
        (lambda: gs.grow(timm.create_model("test_resnet")), "carries branches"),
        (lambda: net("reducenet20_x1"), r"stages\.0\.0\.conv carries branches"),
        (lambda: net("reducenet20", pad="front"), r"stages\.0\.0: .*pad=\"each\""),
        (lambda: net("reducenet20", linear=True), r"stages\.0\.0: "),
    ],
)
def test_nets_the_knob_does_not_turn(model, message):
    with pytest.raises(PlanError, match=message):
        uncut(model())


# --- any net ---


class Refusals(nn.Module):
    """Convolutions in a row that are no chain, each for a reason of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.e, self.f = nn.Conv2d(3, 3, 3, padding="same"), nn.Conv2d(3, 3, 1)
        self.act, self.pool = nn.ReLU(), nn.AvgPool2d(2)

    def forward(self, x):
        x = self.b(self.act(self.a(x)))
        x = self.d(self.act(self.c(x + self.pool(x).mean())))
        return self.f(self.e(x.sigmoid()))


def residuals():
    """timm's blocks, so small that the default tests can afford them: two of ResNet's, three of MobileNet's."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        BasicBlock(8, 8),
        BasicBlock(8, 12, 2, nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))),
        InvertedResidual(12, 12, exp_ratio=2.0, act_layer=nn.ReLU6),
        InvertedResidual(12, 10, 3, 2, exp_ratio=2.0, act_layer=nn.SiLU),
        InvertedResidual(10, 10, 5, exp_ratio=3.0, act_layer=nn.ReLU6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 10),
    )


def made(name="", size=(3, 32, 32), **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs) if name else residuals()
    chains_of(model.double(), size)
    return randomized(model).eval()


NETS = [("", {}), ("mobilenetv2_050", {}), ("resnet18", {"channels": (8, 16, 24, 32)}), ("test_efficientnet", {})]
NETS = [*NETS, ("resnet26", {"channels": (8, 16, 24, 32)})]


@pytest.mark.parametrize(("name", "kwargs"), sampled(NETS, NETS[:1]))
@torch.no_grad()
def test_any_net_merges_into_what_was_trained(name, kwargs):
    size = (3, 32, 32)
    model, x = made(name, **kwargs), images(*size, dtype=torch.float64)
    segments = all_segments(model, longest=3)
    cut = random_cut([s for s in segments if s.length > 1 or s.start or s.stage % 3 == 0], random.Random(0))
    cut = random_cut(segments, random.Random(2)) if len(cut) < 2 else cut
    vanished = vanish_cut(model, uncut(model))
    assert torch.equal(vanished(x), model(x))
    vanished = vanish_cut(model, cut)
    assert set(gs.get_lambda(vanished).values()) == {1.0}
    gs.set_lambda(vanished, 0)
    merged = merge_cut(vanished, cut, input_size=size)
    assert rel(merged(x), vanished(x)) < 1e-10 and rel(merged(x), model(x)) > 1e-3
    gone = sum(segment.length - 1 for segment in cut)
    assert gone >= 2 and len(conv_shapes(merged)) <= len(conv_shapes(model)) - gone
    plain = plain_at_depth(model, cut)
    assert len(conv_shapes(plain)) == len(conv_shapes(model)) - gone
    assert plain(x.to(next(plain.parameters()))).shape == (2, 10)


def test_an_inverted_residual_becomes_one_dense_convolution_with_its_skip():
    model = made()
    assert [[link.conv for link in chain] for chain in chains_of(model).chains] == [
        *([f"{block}.conv1", f"{block}.conv2"] for block in (3, 4)),
        *([f"{block}.conv_pw", f"{block}.conv_dw", f"{block}.conv_pwl"] for block in (5, 6, 7)),
    ]
    cut = tuple(Segment(stage, 0, 2 + (stage > 1), stage == 0) for stage in range(5))
    vanished = vanish_cut(model, cut)
    gs.set_lambda(vanished, 0)
    merged, x = merge_cut(vanished, cut, input_size=(3, 32, 32)), images(3, 32, 32, dtype=torch.float64)
    assert rel(merged(x).detach(), vanished(x).detach()) < 1e-10
    kernels = [(8, 8, 3, 1), (8, 12, 7, 2), (12, 12, 3, 1), (12, 10, 3, 2), (10, 10, 5, 1)]
    assert [(i, o, k[0], s[0]) for i, o, k, s, _ in conv_shapes(merged)[1:]] == kernels
    assert [type(merged[block]) for block in range(3, 8)] == [nn.Sequential] * 5  # a kernel, and no addition


def test_reserved_skips_are_exact_and_chains_go_on():
    model, size = made(), (3, 32, 32)
    reserved, x = reserve_skips(model, input_size=size), images(3, 32, 32, dtype=torch.float64)
    assert rel(reserved(x).detach(), model(x).detach()) < 1e-10
    assert reserved[3][0].out_channels == 16 == 2 * model[3].conv1.out_channels
    assert [link.conv for link in chains_of(reserved, size).chains[0]] == ["0", "3.0", "3.2"]
    with untouched(model), pytest.raises(MergeError, match="no block of two convolutions"):
        reserve_skips(nn.Sequential(*model[5:]), input_size=(12, 16, 16))


def test_refusals_have_reasons():
    ends = chains_of(Refusals(), (3, 8, 8)).ends
    assert "read 2 times" in ends["b"] and "e" not in ends
    assert ends["d"].startswith("its output goes to sigmoid") and ends["f"].startswith("its output goes to the model")
    with pytest.raises(PlanError, match="no two convolutions in a row for the depth knob to merge: .*it"):
        all_segments(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sigmoid(), nn.Conv2d(3, 3, 3)), 3)
