from pathlib import Path

import pytest
import torch
from torch import nn

import growshrink as gs
from growshrink.depth.segments import Segment, all_segments, merge_cut, uncut, vanish_cut
from growshrink.errors import MergeError, PlanError
from nets import images, net, randomized, rel, train_a_bit, untouched
from program import module_of

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
        (lambda: nn.Conv2d(3, 3, 3), "not Conv2d"),
        (lambda: net("reducenet20_x1"), r"stages\.0\.0\.conv carries branches"),
        (lambda: net("reducenet20", pad="front"), r"stages\.0\.0: .*pad=\"each\""),
        (lambda: net("reducenet20", linear=True), r"stages\.0\.0: "),
    ],
)
def test_nets_the_knob_does_not_turn(model, message):
    with pytest.raises(PlanError, match=message):
        uncut(model())
