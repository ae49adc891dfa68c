"""AutoSlim's path, against brute force, and the twin of its published rule."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import growshrink as gs
from growshrink.analysis import WidthScore, headroom
from growshrink.analysis.headroom import _mix
from growshrink.errors import AnalysisError, WidthError
from nets import images, net, randomized

SIZE = (3, 8, 8)


@pytest.fixture(scope="module")
def slim():
    """Three groups, whose MACs are known by cutting."""
    return gs.slim(randomized(net("reducenet20", depths=(1, 1, 1))), (0.25, 0.5, 0.75, 1.0), input_size=SIZE)


@pytest.fixture(scope="module")
def costs(slim):
    space, found = gs.width_space(slim), {}
    for values in itertools.product(*space.choices.values()):
        with gs.active_width(slim, dict(zip(space.choices, values, strict=True))):
            found[values] = gs.profile(slim, SIZE).macs
    return found


def key(width):
    return tuple(width.values())


def concave(width):
    """More channels are worth less and less: no step regrets the one before."""
    return sum(weight * math.log(value) for weight, value in zip((3.0, 2.0, 5.0), width.values(), strict=True))


@pytest.mark.parametrize("per_mac", [True, False])
def test_the_path_is_greedy(slim, costs, per_mac):
    """Every step by trying all of them."""
    space = gs.width_space(slim)
    full = costs[key(space.full)]
    path = gs.allocate(slim, space, macs=0.2, score=concave, per_mac=per_mac, input_size=SIZE)
    now = space.full
    for step in path.steps[1:]:
        options = []
        for name, values in space.choices.items():
            position = values.index(now[name])
            if position:
                narrower = {**now, name: values[position - 1]}
                saved = (costs[key(now)] - costs[key(narrower)]) / full
                lost = concave(now) - concave(narrower)
                options.append((lost / saved if per_mac else lost, narrower))
        now = min(options, key=lambda option: option[0])[1]
        assert step.width == now
        assert step.cost == pytest.approx(costs[key(now)] / full) and step.score == pytest.approx(concave(now))
    shares = [step.cost for step in path.steps]
    assert shares == sorted(shares, reverse=True) and shares[-1] <= 0.2 < shares[-2]
    assert path.within(0.5) == next(step for step in path.steps if step.cost <= 0.5)
    with pytest.raises(WidthError, match="no net of the path costs 0.01"):
        path.within(0.01)


def test_the_path_ends_where_brute_force_does(slim, costs):
    """With a score that adds up over slots and a cost that does, greedy is optimal where its steps land."""
    space = gs.width_space(slim)
    prices = dict(zip(space.choices, (1.0, 2.0, 1.5), strict=True))

    def cost(width):
        return sum(prices[name] * value / space.full[name] for name, value in width.items())

    whole = cost(space.full)
    path = gs.allocate(slim, space, macs=0.3, score=concave, cost=cost)
    for step in path.steps:
        every = (dict(zip(space.choices, values, strict=True)) for values in itertools.product(*space.choices.values()))
        best = max(concave(width) for width in every if cost(width) / whole <= step.cost + 1e-9)
        assert step.score == pytest.approx(best)


def test_a_score_takes_statistics_anew(slim):
    batches = [images(*SIZE, n=8, seed=seed) for seed in range(2)]
    seen = []

    def score(model):
        seen.append(model.stem.bn.running_mean[:1].clone())
        return float(model.eval()(batches[0]).detach().var())

    evaluate, space = WidthScore(slim, batches, score), gs.width_space(slim)
    before = slim.stem.bn.running_mean.clone()
    for width in (space.base, space.full, space.base):
        cut = gs.cut(slim, width)
        gs.calibrate_bn(cut, batches)
        assert evaluate(width) == pytest.approx(float(cut.eval()(batches[0]).detach().var()), rel=1e-5)
    assert len(seen) == 2 and torch.equal(slim.stem.bn.running_mean, before)
    with pytest.raises(WidthError, match="no net so small"):
        gs.allocate(slim, space, macs=0.001, score=concave, input_size=SIZE)


# ---- headroom


def table(n=400, seed=0):
    random = np.random.default_rng(seed)
    hard = random.random(n)
    right = hard[:, None] < np.array([0.6, 0.75, 0.8]) + 0.05 * random.standard_normal((n, 3))
    return right, np.array([1.0, 2.0, 4.0]), 1 - hard[:, None] + 0.1 * random.standard_normal((n, 3))


def test_policies_are_what_they_say():
    right, macs, sure = table()
    gate = np.random.default_rng(1).integers(3, size=len(right))
    found = {p.name: p for p in headroom(right, macs, confidence=sure, gates={"gate": gate}, num=100)}
    for choice in range(3):
        assert found[f"net {choice}"].top1 == pytest.approx(100 * right[:, choice].mean())
        assert found[f"net {choice}"].over_mix.value <= 1e-9
    spent = [next((macs[c] for c in range(3) if row[c]), macs[0]) for row in right]
    assert found["oracle"].macs == pytest.approx(np.mean(spent))
    assert found["oracle"].top1 == pytest.approx(100 * right.any(1).mean())
    assert found["oracle"].over_mix.low > 0
    assert found["gate"].top1 == pytest.approx(100 * right[np.arange(len(right)), gate].mean())
    assert found["gate"].over_mix.low < 0.5  # a gate that knows nothing is the mix
    threshold = np.quantile(sure[:, :2], 0.5)
    stop = [next((c for c in range(2) if row[c] >= threshold), 2) for row in sure]
    cascade = found["cascade 0.50"]
    assert cascade.macs == pytest.approx(np.mean([macs[: s + 1].sum() for s in stop]))
    assert cascade.top1 == pytest.approx(100 * np.mean([right[i, s] for i, s in enumerate(stop)]))


def test_the_mix_is_the_upper_hull():
    macs, top1 = np.array([1.0, 2.0, 3.0, 5.0]), np.array([0.5, 0.55, 0.8, 0.7])
    for at in np.linspace(1, 6, 23):  # by linear programming over all mixes, on a grid
        shares = [np.array(s) / 20 for s in itertools.product(range(21), repeat=3) if sum(s) <= 20]
        mixes = np.array([[*s, 1 - s.sum()] for s in shares])
        best = (mixes @ top1)[mixes @ macs <= at + 1e-9].max()
        assert best - 1e-9 <= _mix(macs, top1, at) <= best + 0.02


@pytest.mark.parametrize("macs", [(1.0, 1.0, 2.0), (1.0, 2.0), (3.0, 2.0, 1.0)])
def test_tables_that_are_none(macs):
    with pytest.raises(AnalysisError, match="rising"):
        headroom(table()[0], macs)


def test_a_cascade_runs_once_what_all_nets_begin_with():
    right, macs, sure = table()
    one, two = (
        next(p for p in headroom(right, macs, confidence=sure, shared=shared, num=10) if p.name == "cascade 0.50")
        for shared in (0.0, 0.5)
    )
    stop = [next((c for c in range(2) if row[c] >= np.quantile(sure[:, :2], 0.5)), 2) for row in sure]
    assert one.macs - two.macs == pytest.approx(0.5 * np.mean(stop)) and one.top1 == two.top1


def test_a_net_that_diverges_is_not_taken(slim):
    space = gs.width_space(slim)
    bad = next(iter(space.choices))
    score = lambda width: concave(width) if width[bad] == space.full[bad] else math.nan  # noqa: E731
    path = gs.allocate(slim, space, macs=0.8, score=score, input_size=SIZE)
    assert len(path.steps) > 1 and path.steps[-1].width[bad] == space.full[bad]


def test_what_cannot_be_is_told(slim):
    space, right = gs.width_space(slim), np.eye(3, 2)
    for macs in (math.nan, 0.0, 1.5):
        with pytest.raises(WidthError, match=f"macs={macs} .*must be"):
            gs.allocate(slim, space, macs=macs, score=concave, input_size=SIZE)
    name, values = max(space.choices.items(), key=lambda item: item[1])
    odd = replace(space, choices={**space.choices, name: (values[0], values[0] + 1, values[-1])})
    with pytest.raises(WidthError, match="values beside the slim net's levels"):
        gs.allocate(slim, odd, macs=0.5, score=concave, input_size=SIZE)
    for words, given in {
        "right: must hold": {"right": 2 * right},
        "confidence of shape": {"right": right, "confidence": right[:, :1]},
        "without NaN": {"right": right, "confidence": right * math.nan},
        "gates, g: must be one of 0 to 1 for each of 3": {"right": right, "gates": {"g": [0, 1, 2]}},
        "gates, h": {"right": right, "gates": {"h": [0, 1]}},
    }.items():
        with pytest.raises(AnalysisError, match=words):
            headroom(macs=[0.5, 1.0], **given)
    for levels in (0.5, "half", ("a", 1.0), (0.5, 0.25, 1.0)):
        with pytest.raises(WidthError, match="must be rising shares|must be a sequence|must be a finite number"):
            gs.slim(net("reducenet20", depths=(1, 1, 1)), levels, input_size=SIZE)
    with pytest.raises(WidthError, match="a width is a mapping"):
        gs.set_width(slim, None)
    with pytest.raises(WidthError, match="not slim: growshrink.slim comes first"):
        gs.route(gs.grow(net("reducenet20", depths=(1, 1, 1)), input_size=SIZE), space, after="stages.0")
    with pytest.raises(WidthError, match="hidden=0"):
        gs.route(slim, space, after="stages.0", hidden=0, input_size=SIZE)
    routed = gs.route(slim, space, after="stages.0", input_size=SIZE)
    for threshold in (math.nan, 2):
        with pytest.raises(WidthError, match="threshold=.* must be"):
            routed.cascade(threshold)
