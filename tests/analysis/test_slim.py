"""Slim nets: at every width the net that is cut there, and what trains and cuts them."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import supernets
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.analysis.channels import ChannelSpace
from growshrink.analysis.prune import SlimSpace
from growshrink.errors import AnalysisError, RunError, WidthError
from growshrink.layers.slim import SlimLayer
from growshrink.layers.widths import Slots, WidthSpace, draw
from growshrink.supernet import load_supernet, save_supernet
from growshrink.training import TrainConfig
from nets import images, net, randomized, small, untouched
from program import module_of
from supernet.twins import soft_loss

train_supernet = supernets.train_supernet
SIZE, SIZE_OF_DIGITS = (3, 8, 8), (1, 8, 8)


class Mixed(nn.Module):
    """A concatenation, a depthwise conv, a norm over channels, a flattened map: channels in every kind of place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect")
        self.bn, self.act = nn.BatchNorm2d(12), nn.PReLU(12)
        self.mix = nn.Conv2d(12, 6, 3, stride=4, padding=1)
        self.fc, self.norm, self.head = nn.Linear(6 * 4, 16), nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.act(self.bn(torch.cat([self.depthwise(self.a(x)), self.b(x)], 1)))
        return self.head(self.norm(self.fc(torch.relu(self.mix(x)).flatten(1))))


def make(name):
    torch.manual_seed(0)
    return randomized(Mixed() if name == "mixed" else net("reducenet20", depths=(2, 2, 1))).double()


@pytest.fixture(scope="module")
def made():
    """Each net, its channel space, and the net slimmed."""
    return {
        name: (make(name), ChannelSpace(make(name), SIZE), gs.slim(make(name), blocks=blocks, input_size=SIZE))
        for name, blocks in (("mixed", False), ("reducenet", True))
    }


def kept(space, width):
    return {name: np.arange(width[name]) for name in space.choices}


def widths(slim):
    space = gs.width_space(slim)
    return [space.base, space.full, *(space.sample(0, step) for step in range(1))]


def all_on(slim, width):
    return {name: 1 if gs.width_space(slim).choices[name] == (0, 1) else value for name, value in width.items()}


@pytest.mark.parametrize("name", ["mixed", "reducenet"])
def test_at_any_width_it_is_the_net_that_is_cut_there(made, name):
    plain, space, slim = made[name]
    assert list(slim.state_dict()) == list(plain.state_dict())
    assert len(space.choices) == (4 if name == "mixed" else 3) and not gs.analysis.left_alone(slim)
    x, target = images(*SIZE, n=6, dtype=torch.float64), torch.arange(6)
    for width in widths(slim):
        slim, width = copy.deepcopy(made[name][2]), all_on(slim, width)
        twin = space.cut(kept(space, width))
        cut = gs.cut(slim, width, input_size=SIZE)
        assert {type(m) for m in cut.modules()} == {type(m) for m in plain.modules()}
        for (key, mine), (other, theirs) in zip(cut.state_dict().items(), twin.state_dict().items(), strict=True):
            assert key == other and torch.equal(mine, theirs), key
        sizes = [m for m in zip(cut.modules(), twin.modules(), strict=True) if isinstance(m[0], (nn.Conv2d, nn.Linear))]
        assert all(mine.extra_repr() == theirs.extra_repr() for mine, theirs in sizes)
        with gs.active_width(slim, width):
            for one in (slim, cut):
                one.eval()
            assert torch.equal(slim(x), cut(x))
            for one in (slim, cut):
                one.train().zero_grad()
                F.cross_entropy(one(x), target).backward()
            # the gradients of the prefix are those of the net of its own, and all others are 0
            grads = copy.deepcopy(slim)
            for mine, parameter in zip(grads.parameters(), slim.parameters(), strict=True):
                mine.data = parameter.grad.clone()
            of_prefix = gs.analysis.cut(grads, input_size=SIZE)
            for (key, mine), parameter in zip(of_prefix.named_parameters(), cut.parameters(), strict=True):
                torch.testing.assert_close(mine, parameter.grad, rtol=1e-9, atol=1e-12, msg=key)
            for whole, part in zip(slim.parameters(), cut.parameters(), strict=True):
                torch.testing.assert_close(whole.grad.abs().sum(), part.grad.abs().sum(), rtol=1e-9, atol=1e-12)
            # and the statistics that a train step leaves
            after = gs.cut(slim, input_size=SIZE)
            for (key, mine), theirs in zip(after.named_buffers(), cut.buffers(), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12, msg=key)


def test_it_is_the_net_built_at_that_width(made):
    slim = made["reducenet"][2]
    space = gs.width_space(slim)
    assert space.choices["stages.1.0.conv"] == (2, 4, 6, 8) and space.choices["stages.1.1"] == (0, 1)
    built = net("reducenet20", width=0.125, depths=(2, 2, 1)).double().eval()
    width = all_on(slim, space.level(1 / 3))
    built.load_state_dict(gs.cut(slim, width).state_dict())
    x = images(*SIZE, dtype=torch.float64)
    with gs.active_width(slim, width):
        assert torch.equal(built(x), slim.eval()(x))
    cut = gs.cut(slim, width)
    cut.reset_classifier(7)
    assert cut.num_features == 8 and cut(x).shape == (2, 7)


def test_blocks_that_are_off_are_gone(made):
    plain, _, slim = made["reducenet"]
    width = {**gs.width_space(slim).full, "stages.0.1": 0, "stages.1.1": 0}
    without = copy.deepcopy(plain).eval()
    without.stages[0][1] = without.stages[1][1] = nn.Identity()
    cut, x = gs.cut(slim, width), images(*SIZE, dtype=torch.float64)
    assert cut.state_dict().keys() == without.state_dict().keys()
    assert torch.equal(cut.eval()(x), without(x))
    with gs.active_width(slim, width):
        assert torch.equal(slim.eval()(x), without(x))
    assert not torch.equal(without(x), plain.eval()(x))


def test_survival_folds_exactly(made):
    """p_l of stochastic depth: what a block adds times p_l, written out."""
    plain, _, slim = made["reducenet"]
    space = gs.width_space(slim).stochastic_depth(0.4)
    survival = {name: shares[1] for name, shares in space.shares.items()}
    assert list(survival.values()) == pytest.approx([1 - number / 3 * 0.6 for number in range(1, 4)])
    cut, x = gs.cut(slim, space.full, survival=survival), images(*SIZE, dtype=torch.float64)
    y = plain.eval().stem(x)
    for stage in range(3):
        for index, block in enumerate(plain.stages[stage]):
            added = survival.get(f"stages.{stage}.{index}", 1.0) * block.bn(block.conv(y))
            y = torch.relu(added + y if block.skip else added)
    torch.testing.assert_close(cut.eval()(x), plain.head(y), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(cut(x), plain(x), rtol=1e-3)
    with pytest.raises(WidthError, match="stages.0.0.conv is no block"):
        gs.cut(slim, space.full, survival={"stages.0.0.conv": 0.5})


def test_shares_decide_how_often_a_choice_is_drawn():
    drawn = [draw((0, 1, 5), 3, step, "a", (0.1, 0.2, 0.7)) for step in range(2000)]
    assert [drawn.count(value) / 2000 for value in (0, 1, 5)] == pytest.approx([0.1, 0.2, 0.7], abs=0.03)
    space = WidthSpace({"conv": (2, 4), "block": (0, 1)}, None, 1, 8).stochastic_depth(0.25)
    assert space.choices == {"conv": (4,), "block": (0, 1)} and space.shares == {"block": (0.75, 0.25)}
    assert WidthSpace.from_json(space.to_json()) == space
    assert sum(space.sample(0, step)["block"] for step in range(400)) / 400 == pytest.approx(0.25, abs=0.06)
    for wrong in ({"block": (0.5,)}, {"block": (-0.5, 1.5)}, {"other": (0.5, 0.5)}):
        text = json.dumps({**json.loads(space.to_json()), "shares": wrong})
        with pytest.raises(WidthError, match="shares"):
            WidthSpace(space.choices, None, 1, 8, wrong)
        with pytest.raises(WidthError, match="not the JSON"):
            WidthSpace.from_json(text)


def test_a_layer_that_would_not_follow_the_width_is_refused():
    """What replaces layers of a slim net loses the widths: conversions say so themselves, all else the next width."""
    slim = gs.slim(small(), (0.5, 1.0), input_size=SIZE)
    full, base = gs.width_space(slim).full, gs.width_space(slim).base
    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, freeze_batch_norm_2d):
        with pytest.raises(WidthError, match="make it again; norms are converted before growshrink.slim"):
            convert(copy.deepcopy(slim))
        with pytest.raises(WidthError, match=r"stages.0.0.bn has been replaced"):
            other = copy.deepcopy(slim)
            other.stages[0][0].bn = convert(nn.BatchNorm2d(4))
            gs.set_width(other, base)
    for width in (full, base):
        other = copy.deepcopy(slim)
        other.reset_classifier(5)
        with pytest.raises(WidthError, match=r"^head.fc has been replaced.* \(reset_classifier"):
            gs.cut(other, width, input_size=SIZE)
    other.reset_classifier(0)  # no layer, so it runs at any width
    gs.set_width(other, base)
    assert other.eval()(images(*SIZE)).shape == (2, 8)
    plain = small()
    converted = gs.slim(nn.SyncBatchNorm.convert_sync_batchnorm(plain), (0.5, 1.0), input_size=SIZE)
    x = images(*SIZE)
    assert torch.equal(
        gs.cut(converted, base, input_size=SIZE).eval()(x), gs.cut(slim, base, input_size=SIZE).eval()(x)
    )
    with pytest.raises(WidthError, match=r"^stem.bn is frozen"):
        gs.slim(freeze_batch_norm_2d(net("reducenet20")), input_size=SIZE)
    gs.cut(slim, full, input_size=SIZE, inplace=True).reset_classifier(5)
    freeze_batch_norm_2d(slim)
    assert slim.eval()(x).shape == (2, 5)


def test_levels_of_another_net_are_refused(tmp_path):
    slim = gs.slim(small(), (0.5, 1.0), input_size=SIZE)
    space = gs.width_space(slim)
    wrong = {name: (1, *own[1:]) for name, own in space.levels.items()}
    about = {"name": "reducenet20", "kwargs": {"width": 0.25, "depths": [1, 1, 1], "num_classes": 10}}
    about |= {"input_size": list(SIZE), "slim": {"levels": [0.5, 1.0]}}
    for levels in ({**space.levels, "x": (1,)}, wrong):
        other = replace(space, levels=levels)
        save_supernet(tmp_path / "slim", slim, other, about)
        for use, given in ((other.check, slim), (load_supernet, tmp_path / "slim")):
            with pytest.raises(WidthError, match="its levels .* are not those of the net"):
                use(given)


def test_each_level_may_have_statistics_of_its_own():
    slim = gs.slim(make("mixed"), (0.5, 1.0), own_statistics=True, input_size=SIZE)
    space, batches = gs.width_space(slim), [images(*SIZE, n=5, dtype=torch.float64, seed=s) + s for s in range(3)]
    cuts = {level: gs.cut(slim, space.level(level), input_size=SIZE) for level in (0.0, 1.0)}
    for key, statistics in slim.named_buffers():
        if "slim_" in key:
            statistics.fill_(torch.nan)  # of a step that diverged: new ones replace them
    for level in cuts:
        with gs.active_width(slim, space.level(level)):
            gs.calibrate_bn(slim, batches)
    x = images(*SIZE, dtype=torch.float64)
    for level, cut in cuts.items():  # both are still there
        gs.calibrate_bn(cut, batches)
        with gs.active_width(slim, space.level(level)):
            again = copy.deepcopy(slim)
            again.load_state_dict(slim.state_dict())
            assert torch.equal(again.eval()(x), cut.eval()(x))
            dense = gs.cut(slim, input_size=SIZE)
        assert dense.state_dict().keys() == make("mixed").state_dict().keys()
        torch.testing.assert_close(dense.bn.running_var, cut.bn.running_var, rtol=0, atol=0)


def test_a_level_is_one_share_of_all_channels():
    """Also where a group has fewer channels than levels, where a choice is gone, and where there are blocks."""
    plain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 3, 3), nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 5))
    shares = (0.1, 0.2, 0.4, 0.9, 1.0)
    slim = gs.slim(plain, shares, input_size=SIZE)
    space = gs.width_space(slim)
    expected = [{str(i): max(1, round(share * n)) for i, n in enumerate((2, 3, 8))} for share in shares]
    assert space.all_levels == expected and space.choices["0"] == (1, 2) and space.diversity == 4
    assert WidthSpace.from_json(space.to_json()) == space
    fewer = replace(space, choices={**space.choices, "2": (1, 7, 8)})
    assert [level["2"] for level in fewer.all_levels] == [1, 1, 1, 7, 8]
    with pytest.raises(WidthError, match="a slot without levels"):
        WidthSpace.from_json(replace(space, levels={"2": ()}).to_json())
    blocks = gs.slim(make("reducenet"), (0.5, 1.0), blocks=True, own_statistics=True, input_size=SIZE)
    space = gs.width_space(blocks)
    assert [all_on(blocks, level) for level in space.all_levels] == space.all_levels
    assert space.base["stages.1.1"] == 0
    with pytest.raises(WidthError, match=r"stages.0.0: no level says whether a block runs"):
        gs.NetAugTask(blocks, mode="levels", verbose=False)
    on = replace(space, choices={name: tuple(v for v in values if v) for name, values in space.choices.items()})
    assert gs.NetAugTask(blocks, mode="levels", verbose=False, space=on).passes().augmented[0] == space.full


@pytest.mark.parametrize("mode", ["sandwich", "levels", "netaug"])
@pytest.mark.filterwarnings("ignore:NetAugTask. weights")
def test_one_update_is_the_sum_of_its_passes(made, mode):
    """US-Net's update, and NetAug's on outer widths: the gradients of nets of their own, added up."""
    slim = copy.deepcopy(made["mixed"][2])
    space = gs.width_space(slim)
    x, target = images(*SIZE, n=6, dtype=torch.float64), torch.arange(6)
    task = gs.NetAugTask(slim, nn.CrossEntropyLoss(), mode=mode, verbose=False, seed=5)
    task.set_step(2)
    task.train().backward(x, target)
    drawn = space.level(draw(range(4), 5, 2, "levels") / 3) if mode == "levels" else space.sample(5, 2)
    expected = {key: torch.zeros_like(p) for key, p in slim.named_parameters()}
    teacher = None
    for width in ([drawn] if mode == "netaug" else [space.full, drawn]) + [space.base]:
        one = copy.deepcopy(slim).train()
        gs.set_width(one, width)
        one.zero_grad()
        logits = one(x)
        loss = F.cross_entropy(logits, target) if teacher is None else soft_loss(logits, teacher, 1.0)
        loss.backward()
        if mode != "netaug" and teacher is None:
            teacher = logits.detach()
        for key, parameter in one.named_parameters():
            expected[key] += parameter.grad
    for key, parameter in slim.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-8, atol=1e-10, msg=key)
    assert gs.layers.get_width(slim) == space.base


def test_channels_that_no_pass_has_run_do_not_move(made):
    slim = copy.deepcopy(made["mixed"][2])
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    task = gs.NetAugTask(slim, nn.CrossEntropyLoss(), mode="single", verbose=False, seed=1).attach(optimizer)
    for _ in range(3):
        before, width = copy.deepcopy(slim), task.passes().width
        optimizer.zero_grad()
        task.train().backward(images(*SIZE, n=6, dtype=torch.float64), torch.arange(6))
        optimizer.step()
        changed = copy.deepcopy(slim)
        for mine, old in zip(changed.parameters(), before.parameters(), strict=True):
            mine.data = (mine != old).double()
        inside = gs.cut(changed, width, input_size=SIZE)
        total, count = (sum(float(p.detach().sum()) for p in one.parameters()) for one in (changed, inside))
        assert total == count > 0


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: net("reducenet20"), {"levels": (0.5,)}, WidthError, "the last of them 1"),
        (lambda: net("reducenet20"), {"levels": (0.5, 0.5, 1.0)}, WidthError, "rising shares"),
        (lambda: net("reducenet20_x2"), {}, WidthError, "stages.0.0.conv carries branches: growshrink.fuse comes"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), {}, AnalysisError, "no channels"),
        (lambda: Mixed(), {"blocks": True}, WidthError, "none of its modules is a residual block"),
    ],
)
def test_refusals(model, options, error, message):
    model = model()
    with untouched(model), pytest.raises(error, match=message):
        gs.slim(model, **{"inplace": True, "input_size": SIZE, **options})


def test_what_is_slim_or_not(made):
    slim = made["mixed"][2]
    with pytest.raises(WidthError, match="slim already"):
        gs.slim(slim)
    with pytest.raises(WidthError, match="not slim"):
        gs.cut(made["mixed"][0])
    with pytest.raises(WidthError, match="b: width 9 lies beyond"):
        gs.set_width(slim, {**gs.width_space(slim).full, "b": 9})
    assert not any(isinstance(module, SlimLayer) for module in gs.cut(slim, input_size=SIZE).modules())


@pytest.mark.parametrize("name", ["mixed", "reducenet"])
def test_costs_are_those_of_the_nets_that_are_cut(made, name):
    slim = made[name][2]
    space, table = gs.width_space(slim), SlimSpace(slim, SIZE)
    drawn = widths(slim)
    params, macs = table.cost(np.array([[values.index(w[n]) for n, values in space.choices.items()] for w in drawn]))
    found = [gs.profile(gs.cut(slim, width, input_size=SIZE), SIZE) for width in drawn]
    assert [(p.params, p.macs) for p in found] == [*zip(params.tolist(), macs.tolist(), strict=True)]


def test_random_pruning_draws_from_the_space(made):
    slim = made["reducenet"][2]
    pruned = [gs.random_prune(slim, macs=0.5, tolerance=0.1, seed=seed, input_size=SIZE) for seed in (0, 1)]
    full = gs.profile(made["reducenet"][0], SIZE).macs
    assert all(0.45 < gs.profile(net, SIZE).macs / full < 0.55 for net in pruned)
    with pytest.raises(AnalysisError, match="its widths are drawn"):
        gs.random_prune(slim, criterion="l1", input_size=SIZE)


def test_angles_of_deployed_widths(made):
    """The angle between the kernels of two nets cut at the same width, by its definition."""
    slim = gs.slim(net("reducenet20").double(), (0.5, 1.0), input_size=SIZE)
    later = copy.deepcopy(slim)
    with torch.no_grad():
        for number, parameter in enumerate(later.parameters()):
            parameter.add_(torch.randn_like(parameter, dtype=torch.float64) * 0.05 * (1 + number % 3))
    space = gs.width_space(slim)
    drawn = [space.base, space.full, space.sample(0, 0)]
    scores = gs.angle(slim, later, space, drawn, input_size=SIZE)
    for row, width in enumerate(drawn):
        cuts = [gs.cut(one, width) for one in (slim, later)]
        a, b = (torch.cat([p.detach().flatten() for p in one.parameters() if p.ndim > 1]) for one in cuts)
        assert scores.angle[row] == pytest.approx(float(torch.arccos(F.cosine_similarity(a, b, 0))), rel=1e-6)
        assert scores.macs[row] == gs.profile(cuts[0], SIZE).macs
        assert scores.params[row] == sum(p.numel() for p in cuts[0].parameters())
    with pytest.raises(AnalysisError, match="other channels lie beside its own"):
        gs.angle(made["mixed"][2], made["mixed"][2], gs.width_space(made["mixed"][2]), input_size=SIZE)
    with pytest.raises(AnalysisError, match="with all their blocks"):
        gs.angle(made["reducenet"][2], made["reducenet"][2], gs.width_space(made["reducenet"][2]), input_size=SIZE)


@pytest.mark.exhaustive
def test_a_width_that_never_ran_is_exported_and_compiled(made):
    slim = copy.deepcopy(made["mixed"][2]).float().eval()
    x = images(*SIZE)
    with gs.active_width(slim, gs.width_space(slim).sample(0, 5)), torch.no_grad():
        expected = slim(x)
        fresh = copy.deepcopy(slim)
        for module in fresh.modules():
            for axis in module.slim[:2] if isinstance(module, SlimLayer) else ():
                if axis is not None:
                    axis._found.clear()
        torch.testing.assert_close(torch.export.export(fresh, (x,)).module()(x), expected)
        assert torch.equal(torch.compile(slim, backend="eager")(x), expected)


@pytest.mark.parametrize("driver", ["angle", "supernet_accuracy"])
def test_the_shrinking_loop_and_rank_take_deployed_widths(driver):
    feed = supernets.digits()
    init = gs.slim(net("reducenet20", depths=(1, 1, 1), in_chans=1), (0.25, 0.5, 0.75, 1.0), input_size=SIZE_OF_DIGITS)
    model, space = copy.deepcopy(init), gs.width_space(init)
    train_supernet(model, feed, epochs=0.2, config=TrainConfig(lr=0.1), space=space)
    module = module_of(Path(__file__).parents[2] / "recipes" / "shrinking.py")
    plan = module.ShrinkPlan(first_epochs=0.2, later_epochs=0.1, samples=2, drop=2, stop_size=2**4, rebase_after=None)
    found = module.shrink(init, model, space, feed, driver=driver, plan=plan, config=TrainConfig(lr=0.1))
    assert found.space.size <= 2**4 and found.steps and set(found.space.choices) == set(space.choices)
    if driver == "angle":
        drawn = [space.sample(0, step) for step in range(30)]
        scores = gs.angle(init, model, space, drawn, input_size=SIZE_OF_DIGITS)
        columns = {name: getattr(scores, name) for name in ("angle", "excess", "null", "params", "macs")}
        ranking = gs.rank(columns, scores.macs + np.arange(30.0), num_resamples=20)
        assert scores.num_undefined == 0 and ranking is not None


def test_a_slim_net_is_saved_with_its_levels(tmp_path):
    kwargs = {"width": 0.25, "depths": [2, 1, 1]}
    how = {"levels": [0.5, 1.0], "blocks": True, "own_statistics": True}
    slim = gs.slim(randomized(timm.create_model("reducenet20", **kwargs)), **how, input_size=SIZE)
    space = gs.width_space(slim)
    with gs.active_width(slim, space.level(0)):
        gs.calibrate_bn(slim, [images(*SIZE, n=5) * 2 + 1])
    about = {"name": "reducenet20", "kwargs": kwargs, "slim": how, "input_size": list(SIZE)}
    save_supernet(path := tmp_path / "slim.safetensors", slim, space, about)
    read, its_space, its_about = load_supernet(path)
    assert its_space == space == gs.width_space(read) and its_about == about
    x = images(*SIZE)
    for width in (space.level(0), space.full, space.base):
        with gs.active_width(slim, width), gs.active_width(read, width):
            assert torch.equal(slim.eval()(x), read.eval()(x))
    for wrong, said in (({"levels": [1.0] * 65}, "more than 64 levels"), ([0.5], "needs levels, blocks and own_stat")):
        save_supernet(path, slim, space, {**about, "slim": wrong})
        with pytest.raises(RunError, match=said):
            load_supernet(path)


NETS = ["reducenet20", "resnet18", "mobilenetv2_050", "regnetx_002", "convnext_atto", "efficientnet_lite0"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NETS)
def test_nets_of_timm(name, tmp_path):
    """Slimmed, cut at half width, exported; the cut net is a net of its own."""
    model = randomized(timm.create_model(name, num_classes=10))
    size = (3, 32, 32) if name == "reducenet20" else (3, 64, 64)
    slim = gs.slim(model, (0.5, 1.0), blocks=True, input_size=size)
    space = gs.width_space(slim)
    width = all_on(slim, space.base)
    cut = gs.cut(slim, width, input_size=size)
    x = images(*size)
    with gs.active_width(slim, width), torch.no_grad():
        expected = slim.eval()(x)
        assert torch.equal(cut.eval()(x), expected)
    assert gs.profile(cut, size).macs < 0.8 * gs.profile(model, size).macs
    copied = copy.deepcopy(cut)
    copied.load_state_dict(cut.state_dict())
    if name == "reducenet20":  # the one with an argument for its width
        timm.create_model(name, num_classes=10, width=0.5).load_state_dict(cut.state_dict())
    program = torch.export.export(cut, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(program, (), path := tmp_path / "net.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(path)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-3, atol=1e-4)
    assert len(Slots(slim).layers) == sum(1 for values in space.choices.values() if values != (0, 1))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_norms_without_parameters_and_another_layout(norm):
    layers = [nn.Conv2d(3, 8, 3), norm(8, affine=False), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 5)]
    plain = randomized(nn.Sequential(*layers)).to(memory_format=torch.channels_last)
    slim = gs.slim(plain, (0.5, 1.0), input_size=SIZE)
    cut = gs.cut(slim, gs.width_space(slim).base, input_size=SIZE)
    assert cut[1].num_features == 4 and cut(images(*SIZE)).shape == (2, 5)


def test_survival_folds_where_the_sum_is_in_place():
    slim = gs.slim(net("resnet18"), (1.0,), blocks=True, input_size=(3, 32, 32))
    width = gs.width_space(slim).full
    cut = gs.cut(slim, width, survival={"layer1.0": 0.5}, input_size=(3, 32, 32))
    assert torch.equal(cut.layer1[0].bn2.weight, 0.5 * slim.layer1[0].bn2.weight)


class Squeezed(nn.Module):
    """A block whose last norm is scaled by a hard sigmoid of its own: an `add` that is not the block's."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return x + y * F.relu6(self.fc(y.mean((2, 3))) + 3)[..., None, None] / 6


def test_a_factor_is_not_folded_into_a_layer_that_does_not_end_the_block():
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), Squeezed(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    model = gs.slim(randomized(nn.Sequential(*layers)), (1.0,), blocks=True, input_size=SIZE)
    with untouched(model), pytest.raises(WidthError, match=r"2: what it adds is not 0 where 2\.fc gives 0"):
        gs.cut(model, gs.width_space(model).full, survival={"2": 0.5}, input_size=SIZE)
