import json

import angle_twins as twins
import numpy as np
import pytest

import growshrink as gs
import nets
from growshrink.analysis._angle import supernet_table
from growshrink.analysis._rank import _cell, rank
from growshrink.analysis.stats import Estimate
from growshrink.errors import AnalysisError
from sampled import sampled

N = 250


@pytest.fixture(scope="module")
def scores():
    """Real angles of random subnets: of a net that has turned by chance, so that they are structure and little else."""
    init = nets.net("reducenet20_x4")
    table = supernet_table(init, twins.moved(init, 0.3), gs.width_space(init, divisor=1), input_size=(3, 8, 8))
    found = table.score(np.unique(table.sample(N + 10), axis=0)[:N])
    names = ("angle", "params", "macs", "null", "excess")
    return {name: np.asarray(getattr(found, name), dtype=float) for name in names}


def standard(x):
    return (x - x.mean()) / x.std()


@pytest.mark.parametrize("sign", sampled([1, -1], [1]))
def test_where_truth_is_size_and_noise_angle_adds_nothing(scores, sign):
    wrong = 0
    for trial in range(3):
        noise = np.random.default_rng(trial).normal(size=N)
        truth = sign * standard(np.log(scores["macs"])) + 0.5 * noise
        result = rank(scores, truth, num_resamples=100)
        assert abs(result.agreement["macs"].tau_b.value) > 0.5
        wrong += result.verdicts["angle"].adds + result.verdicts["excess"].adds
        assert "adds nothing" in result.verdicts["angle"].reason or result.verdicts["angle"].adds
    assert wrong == 0


def test_where_truth_is_noise_nothing_agrees(scores):
    truth = np.random.default_rng(5).normal(size=N)
    result = rank(scores, truth, num_resamples=100)
    assert not any(verdict.adds for verdict in result.verdicts.values())
    assert result.agreement["angle"].tau_b.low < 0 < result.agreement["angle"].tau_b.high


def test_where_truth_depends_on_a_score_beyond_size_that_is_found(scores):
    random = np.random.default_rng(0)
    own = random.normal(size=N)
    mine = standard(scores["macs"]) + own
    truth = standard(scores["macs"]) + own + 0.3 * random.normal(size=N)
    result = rank({**scores, "mine": mine}, truth, num_resamples=100)
    assert result.verdicts["mine"].adds and not result.verdicts["angle"].adds
    assert result.agreement["mine"].beyond.low > 0.5
    assert set(result.verdicts["mine"].differences) == {"params", "macs", "null"}
    assert "mine: adds to params, macs, null" in result.table()


def test_both_parts_of_the_rule_are_needed(scores):
    random = np.random.default_rng(1)
    size, own = standard(scores["macs"]), random.normal(size=N)
    copied = {**scores, "mine": size + 0.05 * random.normal(size=N)}  # the MACs, a little worse
    verdict = rank(copied, size + 0.5 * own, num_resamples=100).verdicts["mine"]
    assert verdict.differences["params"].low > 0 and not verdict.adds
    assert "not shown to be better than macs" in verdict.reason
    weak = rank({**scores, "mine": own}, 3 * size + own, num_bins=1, num_resamples=100)
    assert weak.agreement["mine"].beyond.low > 0 and not weak.verdicts["mine"].adds


def test_a_baseline_that_ranks_backwards_counts_as_its_opposite(scores):
    noise = np.random.default_rng(2).normal(size=(2, N))
    truth = -standard(scores["macs"]) + 0.3 * noise[0]
    result = rank({**scores, "mine": noise[1]}, truth, num_bins=1, num_resamples=50)
    assert result.agreement["macs"].tau_within.value < -0.5
    assert result.verdicts["mine"].differences["macs"].high < 0


def test_bins_leave_little_of_what_size_alone_explains(scores):
    result = rank(scores, np.log(scores["macs"]), num_resamples=20)
    assert result.agreement["macs"].tau_b.value == pytest.approx(1.0)
    assert result.agreement["params"].tau_within.value < 0.6 * result.agreement["params"].tau_b.value


def test_ties_holes_and_seeds_are_told(scores):
    random = np.random.default_rng(0)
    truth = np.round(random.normal(size=N))
    holes = {**scores, "angle": np.where(np.arange(N) < 4, np.nan, scores["angle"])}
    result = rank(holes, [truth, np.round(truth + random.normal(size=N))], num_resamples=20)
    assert result.n == N - 4 and result.left_out == 4 and result.tied_truth > 0.05
    assert 0.2 < result.seed_agreement < result.ceiling < 0.9
    assert f"tau-b {result.seed_agreement:.3f} between" in result.table()
    assert f"about {result.ceiling:.3f} with their mean" in result.table()
    assert abs(result.agreement["angle"].tau_a.value) < abs(result.agreement["angle"].tau_b.value)
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_constant_score_has_no_figures_and_adds_nothing(scores):
    result = rank({**scores, "flat": np.ones(N)}, scores["macs"], num_resamples=20)
    assert not result.verdicts["flat"].adds and np.isnan(result.agreement["flat"].tau_b.value)
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_same_seed_gives_the_same_intervals(scores):
    truth = np.random.default_rng(0).normal(size=N)
    results = [rank(scores, truth, num_resamples=20, seed=seed).to_dict() for seed in (3, 3, 4)]
    assert results[0] == results[1] != results[2]


def test_what_cannot_be_ranked_is_refused(scores):
    for truth, message in (
        (np.ones(N), "the same for all"),
        (np.full(N, np.nan), "0 subnets with a finite truth"),
        ("abc", "truth numbers"),
        (np.ones(N - 1), r"the truth has \(249,\)"),
    ):
        with pytest.raises(AnalysisError, match=message):
            rank(scores, truth)
    with pytest.raises(AnalysisError, match="null: no such score"):
        rank({k: v for k, v in scores.items() if k != "null"}, np.arange(N))
    with pytest.raises(AnalysisError, match="too few"):
        rank({k: v[:5] for k, v in scores.items()}, np.arange(5.0))


def test_truth_of_several_seeds_in_any_form_and_with_holes(scores):
    random = np.random.default_rng(0)
    measured = standard(scores["macs"]) + random.normal(size=(3, N))
    expected = rank(scores, list(measured), num_resamples=20).to_dict()
    assert rank(scores, measured, num_resamples=20).to_dict() == expected
    assert rank(scores, measured.T, num_resamples=20).to_dict() == expected
    measured[0, :2], measured[1, 5] = np.nan, np.inf
    holed = rank(scores, measured.T, num_resamples=20)
    rest = [i for i in range(N) if i not in (0, 1, 5)]
    alone = rank({k: v[rest] for k, v in scores.items()}, measured[:, rest], num_resamples=20)
    assert holed.left_out == 3 and holed.to_dict() == {**alone.to_dict(), "left_out": 3}


def test_baselines_are_names_and_at_least_one(scores):
    truth = np.random.default_rng(0).normal(size=N)
    one = rank(scores, truth, baselines="macs", num_resamples=20)
    assert one.to_dict() == rank(scores, truth, baselines=["macs"], num_resamples=20).to_dict()
    assert "params" in one.verdicts and "macs" not in one.verdicts
    with pytest.raises(AnalysisError, match="name at least one score"):
        rank(scores, truth, baselines=())


def test_zero_has_no_sign():
    assert _cell(Estimate(-0.0, -0.0004, 0.0004)) == "+0.000 (+0.000, +0.000)"
