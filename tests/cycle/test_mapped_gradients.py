"""Runs whose gradients are mapped: they cost what was said, resume bit for bit, and train as the branches would."""

import copy

import pytest
import torch
from small import CONFIG, SIZE, Feed, Interrupt, small
from torch import nn

import growshrink as gs
from growshrink.branches import BranchSpec
from growshrink.cycle import CyclePlan, FromBranches, FromPixels, lay_out
from growshrink.cycle.costs import Costs
from growshrink.errors import GrowError, PlanError
from growshrink.evidence.arms import ARMS
from growshrink.training import TrainConfig, Trainer
from growshrink.training.gradient_maps import dependence, pixel_maps
from nets import rel
from sampled import sampled

SOURCES = [
    FromBranches(),
    FromBranches(branch=("dbb", "lora")),
    FromBranches(search=0.25),
    FromPixels(every=0.3, batches=1),
]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr("growshrink.cycle.report.draw_curves", lambda result: False)


def plan(gradients):
    return CyclePlan(rounds=(), base_epochs=3.0, gradients=gradients, rewarm=1)


def run(path, gradients, *, fail_at=None, **kwargs):
    feed = Feed.make()
    feed.train.fail_at = fail_at
    torch.manual_seed(5)
    return gs.run_cycle(small(outputs=4), feed, plan(gradients), out_dir=path, **{"config": CONFIG, **kwargs})


@pytest.mark.parametrize("gradients", sampled(SOURCES, SOURCES[2:]), ids=str)
def test_the_cost_is_known_before_and_resumed_runs_are_the_same(tmp_path, gradients):
    whole, feed = run(tmp_path / "whole", gradients), Feed.make()
    costs = Costs(small(outputs=4), plan(gradients), feed.train, SIZE)
    assert lay_out(plan(gradients), 4).macs(costs) == whole.training_macs
    assert CyclePlan.from_dict(plan(gradients).to_dict()) == plan(gradients)
    for index, update in enumerate((2, 6, 11)):
        with pytest.raises(Interrupt):
            run(tmp_path / "cut", gradients, fail_at=update, resume=index > 0, save_every=1)
    resumed = run(tmp_path / "cut", gradients, resume=True)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert resumed.training_macs == whole.training_macs
    plain = run(tmp_path / "plain", None)
    assert plain.training_macs <= whole.training_macs
    assert not torch.equal(plain.model.conv1.weight, whole.model.conv1.weight)


def test_a_run_trains_as_compiled_branches_do(tmp_path):
    result = run(tmp_path, FromBranches())
    grown = gs.grow(small(outputs=4), BranchSpec(kind="repvgg", norm=None), init="paper", input_size=SIZE)
    model, maps = gs.compile_gradients(grown, input_size=SIZE)
    trainer = Trainer(model.to(memory_format=torch.channels_last), CONFIG, Feed.make().train)
    trainer.map_gradients(maps)
    phases = lay_out(plan(FromBranches()), 4)
    trainer.train(12, learning_rate=phases.learning_rate, lam=phases.lam)
    assert rel(trainer.ema.conv1.weight, result.model.conv1.weight) < 1e-5


def test_what_a_search_finds_is_used(tmp_path, monkeypatch):
    kept = []

    def compile_gradients(grown, **kwargs):
        kept.append(copy.deepcopy(grown))
        return gs.compile_gradients(grown, **kwargs)

    monkeypatch.setattr("growshrink.cycle.gradients.compile_gradients", compile_gradients)
    run(tmp_path, FromBranches(branch=("pointwise",), search=0.5))
    scale = kept[0].conv1.branches[0].path.scale.weight
    assert scale.shape == (4, 1, 1, 1) and bool((scale != 1).all()) and not scale.requires_grad
    fresh = gs.grow(small(outputs=4), BranchSpec(kind="pointwise", norm=None), init="paper", input_size=SIZE)
    assert torch.equal(kept[0].conv1.branches[0].path.conv.weight, fresh.conv1.branches[0].path.conv.weight)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(PlanError, match="gradients='branches': for a plan without rounds"):
        CyclePlan(rounds=(gs.Round(epochs=1),), gradients=FromBranches())
    with pytest.raises(GrowError, match="a branch of kind 'insert' has no form"):
        FromBranches(branch=("insert",))
    with pytest.raises(PlanError, match="search=0.1: a branch of kind 'orepa' has no scale to search for"):
        FromBranches(branch=("repvgg", "orepa"), search=0.1)
    with pytest.raises(PlanError, match="every=0: must be above 0"):
        FromPixels(every=0)
    with pytest.raises(PlanError, match="clip_grad=1.0: clipping is not linear"):
        run(tmp_path, FromBranches(), config=TrainConfig(clip_grad=1.0))


def test_the_arms_are_there():
    assert {name: arm.gradients.kind for name, arm in ARMS.items() if arm.gradients is not None} == {
        "gradmult-fixed": "branches",
        "gradmult-search": "branches",
        "gradmult-pixels": "pixels",
    }
    arm = ARMS["gradmult-pixels"]
    assert arm.plan(10, seed=3) == CyclePlan(rounds=(), base_epochs=10, gradients=FromPixels(), seed=3)


# ---- pixels


def test_dependence_of_pixels():
    conv = nn.Conv2d(3, 4, (3, 5), dilation=(2, 1))
    noise = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    independent = dependence(noise, conv)
    middle = independent.clone()
    middle[1, 2] = 0.0
    assert float(independent[1, 2]) == pytest.approx(1.0) and float(middle.max()) < 0.01
    smooth = nn.functional.avg_pool2d(noise, (1, 3), 1, (0, 1))  # rows depend within 2 pixels, columns do not
    row = dependence(smooth, conv)[1]
    assert row[2] == 1.0 and 0.01 < row[0] < row[1] / 3 < 0.3
    torch.testing.assert_close(row, row.flip(0), rtol=0.05, atol=0)
    assert float(dependence(smooth, conv)[0].max()) < 0.005
    assert dependence(torch.zeros(2, 3, 8, 8), conv)[1, 2] == 1.0
    assert dependence(noise[..., :2, :2], nn.Conv2d(3, 4, 5)).count_nonzero() == 9


def test_two_pixels_from_the_formula():
    levels = torch.tensor([0, 0, 1, 1, 0, 1]).float()
    x = levels.view(1, 1, 1, 6)
    a, b = levels[:-1], levels[1:]
    joint = torch.stack([((a == i) & (b == j)).double().mean() for i in (0, 1) for j in (0, 1)]).view(2, 2)
    entropy = lambda p: -(p[p > 0] * p[p > 0].log()).sum()  # noqa: E731
    one, two, both = entropy(joint.sum(1)), entropy(joint.sum(0)), entropy(joint.flatten())
    expected = (one + two - both) / (one * two).sqrt()
    found = dependence(x, nn.Conv2d(1, 1, (1, 3)))
    torch.testing.assert_close(found[0], torch.stack([expected, torch.ones(()).double(), expected]))


def test_pixel_maps_leave_the_net_alone():
    model = small().train()
    before = copy.deepcopy(model.state_dict())
    maps = pixel_maps(model, torch.randn(8, *SIZE))
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [*maps.maps] == ["stem.weight", "conv1.weight", "conv2.weight"]
    kernel = maps.maps["conv1.weight"]
    assert float(kernel.factor.mean()) == pytest.approx(1.0)
    assert kernel.factor[0, 0, 1, 1] == kernel.factor.max()
    with pytest.raises(gs.errors.GradientError, match="no convolution that sees more than one pixel"):
        pixel_maps(nn.Conv2d(3, 4, 1), torch.randn(2, *SIZE))
