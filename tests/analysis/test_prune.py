import copy
from pathlib import Path

import angle_twins as twins
import numpy as np
import pytest
import torch
from timm.layers import ScaledStdConv2d
from torch import nn
from torch.nn import functional as F

import growshrink as gs
import nets
from growshrink.analysis import prune
from growshrink.analysis._angle import supernet_table
from growshrink.analysis.channels import CRITERIA, ChannelSpace, best_channels
from growshrink.analysis.prune import Budget, draw_widths, random_channels, width_of
from growshrink.errors import AnalysisError
from growshrink.proofs._profile import Profile
from program import module_of

SupernetSpace = module_of(Path(__file__).parents[2] / "tools" / "study.py").SupernetSpace
SIZE = (3, 32, 32)
pytest.importorskip("torch_pruning")


class Ghost(nn.Module):
    """Two layers side by side, one a depthwise one behind the other: their channels go in pairs."""

    def __init__(self):
        super().__init__()
        self.a, self.cheap = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.skip, self.head = nn.Conv2d(3, 12, 1), nn.Linear(12, 5)

    def forward(self, x):
        y = self.a(x)
        return self.head((torch.cat([y, self.cheap(y)], 1) + self.skip(x)).mean((2, 3)))


@pytest.mark.parametrize("criterion", ["random", "l1"])
def test_channels_of_concatenated_layers_go_together(criterion):
    torch.manual_seed(0)
    model = Ghost().eval()
    space = ChannelSpace(model, SIZE)
    assert [len(choices) for choices in space.choices.values()] == [6]
    pruned = gs.random_prune(model, macs=0.5, tolerance=0.1, criterion=criterion, input_size=SIZE)
    assert pruned.a.out_channels == pruned.cheap.groups == 3 and pruned.skip.out_channels == 6
    kept = [i for i in range(6) if any(torch.equal(model.a.weight[i], row) for row in pruned.a.weight)]
    twin, both = Ghost().eval(), [*kept, *(6 + i for i in kept)]
    twin.load_state_dict(model.state_dict())
    gone = [i for i in range(12) if i not in both]
    with torch.no_grad():  # what is not kept adds nothing
        twin.head.weight[:, gone] = 0
        x = nets.images(*SIZE)
        assert nets.rel(pruned(x), twin(x)) < 1e-5


class Plain(nn.Module):
    """Two convolutions, nothing shared: the channels of the first are free."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.b = nn.Conv2d(12, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.bn(self.a(x))))).mean((2, 3)))


@pytest.fixture
def plain():
    return nets.randomized(Plain()).eval()


@pytest.mark.parametrize("name", ["reducenet20", "test_resnet", "mobilenetv3_small_050", "test_efficientnet"])
def test_costs_are_those_of_the_nets_that_are_cut(name):
    model = nets.net(name).eval()
    space = ChannelSpace(model, SIZE)
    random = np.random.default_rng(0)
    for seed in range(2):
        row = np.array([random.integers(len(choices)) for choices in space.choices.values()])
        net = space.cut(random_channels(space, width_of(space, row), seed))
        params, macs = space.cost(row[None])
        assert gs.profile(net, SIZE) == Profile(int(macs[0]), int(params[0]))
        net(torch.zeros(2, *SIZE))


@pytest.mark.parametrize("name", ["reducenet20", "test_efficientnet"])
def test_judged_subnets_are_those_of_a_loop_over_torch_pruning(name):
    """Its graph traced for each net, statistics averaged by plain passes in train mode, nothing folded."""
    import torch_pruning as tp

    model = nets.randomized(nets.net(name)).eval().double()
    space = ChannelSpace(model, SIZE)
    batches = [nets.images(*SIZE, n=6, dtype=torch.float64, seed=seed) for seed in range(3)]
    draws = draw_widths(space, Budget(0.5, 0.1), 2, seed=0)
    found = gs.analysis.random_subnets(space, 2, tolerance=0.1)
    for number, (net, row) in enumerate(zip(found, draws.index, strict=True)):
        twin = copy.deepcopy(model).requires_grad_(True)
        graph = tp.DependencyGraph().build_dependency(twin, batches[0])
        for layer, kept in random_channels(space, width_of(space, row), number).items():
            gone = np.setdiff1d(np.arange(space.choices[layer][-1]), kept).tolist()
            graph.get_pruning_group(twin.get_submodule(layer), tp.prune_conv_out_channels, gone).prune()
        norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        with torch.no_grad():
            for x in batches[:2]:
                twin.train()(x)
            expected = twin.eval()(batches[2])
            gs.calibrate_bn(net, batches[:2])
            ours = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
            for norm, own in zip(norms, ours, strict=True):
                assert nets.rel(own.running_mean, norm.running_mean) < 1e-10
                assert nets.rel(own.running_var, norm.running_var) < 1e-10
            folded = space.fold(net)
            assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) < len(norms)
            assert nets.rel(folded(batches[2]), expected) < 1e-10


def test_channels_that_are_left_compute_what_they_did(plain):
    """Pruned is the full net with the others' outputs at 0, exactly."""
    space = ChannelSpace(plain, SIZE)
    assert dict(space.choices) == {"b": tuple(range(1, 7)), "a": tuple(range(2, 13))}
    kept = {"a": np.array([0, 3, 11]), "b": np.array([1, 2, 5])}
    with nets.untouched(plain):
        net = space.cut(kept).double()
    full = Plain().eval().double()
    full.load_state_dict(plain.state_dict())
    x = nets.images(*SIZE, dtype=torch.float64)
    mask_a, mask_b = (torch.isin(torch.arange(n), torch.as_tensor(k)) for n, k in ((12, kept["a"]), (6, kept["b"])))
    middle = F.relu(full.bn(full.a(x))) * mask_a[:, None, None]
    expected = full.head((F.relu(full.b(middle)) * mask_b[:, None, None]).mean((2, 3)))
    assert nets.rel(net(x).detach(), expected.detach()) < 1e-12


def test_criteria_are_what_they_say(plain):
    space = ChannelSpace(plain, SIZE)
    batch = nets.images(*SIZE, n=4), torch.tensor([0, 1, 2, 3])
    scale = plain.bn.weight.detach().abs().double().numpy()
    assert np.corrcoef(space.importance("bn_scale")["a"], scale)[0, 1] == pytest.approx(1.0)
    for criterion in CRITERIA:
        found = space.importance(criterion, batch)
        assert {name: len(values) for name, values in found.items()} == {"a": 12, "b": 6}
        assert all(np.isfinite(values).all() for values in found.values()), criterion
    with torch.no_grad():
        plain.a.weight[4] *= 100
        plain.b.weight[:, 4] *= 100
    space = ChannelSpace(plain, SIZE)
    for criterion in ("l1", "l2", "fpgm"):
        assert 4 in best_channels(space.importance(criterion), {"a": 1})["a"], criterion
    with pytest.raises(AnalysisError, match="taylor needs a batch"):
        space.importance("taylor")
    with pytest.raises(AnalysisError, match="l3: no such criterion"):
        space.importance("l3")


def test_channels_that_gates_use_little_go_first(plain):
    grown = gs.grow(plain, ["manidp", "se"], where=["b"], input_size=SIZE)
    assert set(gs.analysis.channel_usage(grown)) == {"b"}, "no norm is behind it"
    grown = gs.grow(nets.randomized(nets.ConvNet()), ["guided", "condconv"], where=["conv"], input_size=SIZE)
    branch = grown.bn.branches[0]
    branch.fade.mean[:] = torch.tensor([0.0, 2.0, 0.1, 1.0, 0.2, 3.0, 0.3, 1.5])
    branch.scale.data.fill_(1.0)
    gs.set_lambda(grown, 0.0)
    usage = gs.analysis.channel_usage(grown)
    assert usage["bn"] == pytest.approx(branch.fade.mean.double().numpy())
    fused = gs.fuse(grown, input_size=SIZE)
    small = gs.random_prune(fused, criterion=usage, macs=0.5, tolerance=0.5, input_size=SIZE)
    kept = {float(v) for v in small.bn.running_mean} if small.bn.num_features < 8 else set()
    assert small.bn.num_features < 8 and kept <= {float(v) for v in fused.bn.running_mean}
    gone = set(range(8)) - {int((fused.bn.running_mean == v).nonzero()[0]) for v in kept}
    assert gone <= {0, 2, 4, 6, 3} and 0 in gone


def test_random_channels_are_uniform_and_groups_are_independent(plain):
    space = ChannelSpace(plain, SIZE)
    counts = {"a": np.zeros(12), "b": np.zeros(6)}
    together = 0
    for seed in range(400):
        kept = random_channels(space, {"a": 6, "b": 3}, seed)
        for name, channels in kept.items():
            assert (np.diff(channels) > 0).all()
            counts[name][channels] += 1
        together += 0 in kept["a"] and 0 in kept["b"]
    for found in counts.values():  # a binomial of 400 trials at 1/2: sd 10
        assert np.abs(found - 200).max() < 40
    assert abs(together - 100) < 40
    again = random_channels(space, {"a": 6, "b": 3}, 7)
    assert all(np.array_equal(again[n], random_channels(space, {"a": 6, "b": 3}, 7)[n]) for n in again)


def test_draws_meet_the_budget_and_follow_the_uniform_law_given_it(plain):
    space = ChannelSpace(plain, SIZE)
    budget = Budget(0.5, 0.1)
    draws = draw_widths(space, budget, 3000, seed=1)
    share = draws.macs / prune.profile_macs(space)
    assert (np.abs(share / 0.5 - 1) <= 0.1).all() and len(draws.index) == 3000
    assert np.array_equal(draws.index, draw_widths(space, budget, 3000, seed=1).index)
    every = np.stack(np.meshgrid(*(np.arange(len(c)) for c in space.choices.values()), indexing="ij"), -1).reshape(
        -1, 2
    )
    meets = np.abs(space.cost(every)[1] / prune.profile_macs(space) / 0.5 - 1) <= 0.1
    assert draws.acceptance == pytest.approx(meets.mean(), abs=0.02)
    found, counts = np.unique(draws.index, axis=0, return_counts=True)
    assert len(found) == meets.sum()
    expected = 3000 / meets.sum()
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert len(np.unique(draw_widths(space, budget, 4, distinct=True).index, axis=0)) == 4


def test_thresholds_meet_the_budget_or_say_how_near_they_come(plain):
    space = ChannelSpace(plain, SIZE)
    widths = prune.threshold_widths(space, space.importance("l1"), Budget(0.5, 0.1))
    row = np.array([[space.choices[name].index(width) for name, width in widths.items()]])
    assert space.cost(row)[1][0] / prune.profile_macs(space) == pytest.approx(0.5, abs=0.05)
    alike = {name: np.ones(choices[-1]) for name, choices in space.choices.items()}
    with pytest.raises(AnalysisError, match="the nearest a threshold comes is"):
        prune.threshold_widths(space, alike, Budget(0.5, 0.1))


@pytest.mark.parametrize("criterion", ["random", "l1", "taylor"])
def test_random_prune_is_a_transform(criterion):
    model = nets.net("test_resnet").eval()
    batch = nets.images(*SIZE, n=4), torch.arange(4)
    with nets.untouched(model):
        pruned = gs.random_prune(model, macs=0.4, criterion=criterion, seed=3, batch=batch, input_size=SIZE)
    full, found = gs.profile(model, SIZE), gs.profile(pruned, SIZE)
    assert found.macs / full.macs == pytest.approx(0.4, rel=0.05) and found.params < full.params
    assert pruned(torch.zeros(2, *SIZE)).shape == (2, 10)
    again = gs.random_prune(model, macs=0.4, criterion=criterion, seed=3, batch=batch, input_size=SIZE)
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), again.parameters(), strict=True))


def test_a_budget_that_nothing_meets_is_told_with_what_there_is(plain, monkeypatch):
    monkeypatch.setattr(prune, "MOST_DRAWS", 40_000)
    with pytest.raises(AnalysisError, match=r"0 subnets within 5% of [\d,]+ MACs \(0.001 of the full net\) in 40,000"):
        gs.random_prune(plain, macs=0.001, input_size=SIZE)
    for macs in (0.0, 1.5):
        with pytest.raises(AnalysisError, match="must be above 0 and at most 1"):
            gs.random_prune(plain, macs=macs, input_size=SIZE)
    with pytest.raises(AnalysisError, match="no such criterion"):
        gs.random_prune(plain, criterion="l7", input_size=SIZE)


def test_grouped_convolutions_are_left_alone_and_said_so(monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    space = ChannelSpace(model, SIZE)
    assert list(space.choices) == ["4"] and "grouped convolution" in " ".join(space.left_alone.values())
    monkeypatch.setattr(prune, "MOST_DRAWS", 20_000)
    for criterion in ("random", "l1"):
        with pytest.raises(AnalysisError, match=r"; 2 of 3 groups are left alone \(a grouped convolution takes part\)"):
            gs.random_prune(model, macs=0.1, criterion=criterion, input_size=SIZE)


@pytest.mark.exhaustive
def test_standardised_convolutions_lose_their_gains_with_their_channels():
    torch.manual_seed(0)
    model = nn.Sequential(
        ScaledStdConv2d(3, 12, 3), nn.ReLU(), ScaledStdConv2d(12, 6, 3), nn.Flatten(), nn.Linear(384, 5)
    )
    for conv in (model[0], model[2]):
        nn.init.uniform_(conv.gain, 0.5, 2.0)
    size = (3, 8, 8)
    assert not ChannelSpace(model, size).left_alone
    pruned = gs.random_prune(model.eval(), macs=0.5, tolerance=0.1, input_size=size)
    x = nets.images(*size)
    kept = [(pruned[0](x)[:, [i]] - model[0](x)).abs().amax((0, 2, 3)).argmin() for i in range(pruned[0].out_channels)]
    assert len(pruned[0].gain) == len(set(map(int, kept))) < 12
    assert nets.rel(pruned[0](x), model[0](x)[:, kept]) < 1e-6 and pruned(x).shape == (len(x), 5)


def test_groups_without_which_a_net_runs_are_left_alone():
    space = ChannelSpace(nets.net("test_vit"), (3, 160, 160))
    assert space.choices and all(name.endswith("mlp.fc1") for name in space.choices)
    assert "with fewer channels it does not run (shape" in " ".join(space.left_alone.values())


def test_a_net_that_does_not_run_once_pruned_is_refused():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.a(x).mean((2, 3)).reshape(-1, 4))

    with pytest.raises(AnalysisError, match=r"^Fixed: with fewer channels it does not run \(.*\)\.$"):
        ChannelSpace(Fixed(), SIZE)


def test_widths_of_a_supernet_are_a_space_too():
    init = nets.net("reducenet20_x4")
    trained = twins.moved(init)
    table = supernet_table(init, trained, gs.width_space(init), input_size=SIZE)
    space = SupernetSpace(trained, table)
    draws = draw_widths(space, Budget(0.5, 0.03), 20, distinct=True)
    for row, macs in zip(draws.index[:3], draws.macs, strict=False):
        net = space.subnet(width_of(space, row))
        assert gs.profile(net, SIZE).macs == macs and gs.layers.get_width(net) == width_of(space, row)
    assert gs.layers.get_width(trained) == gs.width_space(trained).full
