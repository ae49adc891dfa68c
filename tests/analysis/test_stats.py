"""Against scipy where scipy has it, against enumeration where it is small, and by coverage on simulated data."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from growshrink.analysis import stats
from growshrink.errors import AnalysisError
from program import module_of

blocked = module_of(Path(__file__).parents[2] / "recipes" / "arm_table.py").blocked
study = module_of(Path(__file__).parents[2] / "tools" / "study.py")

RNG = np.random.default_rng


def tied(n=80, levels=7, seed=0):
    random = RNG(seed)
    x = random.normal(size=n)
    return np.round(x * levels / 3), np.round((x + random.normal(size=n)) * levels / 3)


def all_orders(score, k):
    """The sets of the k best by score under every way to break ties, each equally likely."""
    orders = (sorted(range(len(score)), key=lambda i: (-score[i], p[i])) for p in itertools.permutations(range(6)))
    return [order[:k] for order in orders]


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_scipys(seed):
    x, y = tied(seed=seed)
    found = stats.kendall(x, y)
    assert found.tau_b == pytest.approx(scipy_stats.kendalltau(x, y).statistic, abs=1e-14)
    signs = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in itertools.combinations(range(len(x)), 2)]
    assert found.tau_a == sum(signs) / len(signs)
    assert found.tied_x == sum(a == b for a, b in itertools.combinations(x, 2)) > 0
    assert stats.spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y).statistic, abs=1e-14)


def test_without_ties_tau_a_is_tau_b_and_a_constant_side_has_none():
    x, y = RNG(0).normal(size=(2, 50))
    assert stats.kendall(x, y).tau_a == pytest.approx(stats.kendall(x, y).tau_b)
    constant = stats.kendall(np.zeros(50), y)
    assert constant.tau_a == 0.0 and math.isnan(constant.tau_b) and constant.tied_x == math.comb(50, 2)
    assert math.isnan(stats.spearman(np.zeros(50), y))


def test_bootstrap_kendall_is_scipys_of_every_resample_and_ignores_copies():
    x, y = tied(n=60)
    boot = stats.Bootstrap(len(x), num=20)
    tau_a, tau_b = boot.kendall(x, y)
    for index, a, b in zip(boot.index, tau_a, tau_b, strict=True):
        assert b == pytest.approx(scipy_stats.kendalltau(x[index], y[index]).statistic, abs=1e-9)
        pairs = [(i, j) for i, j in itertools.combinations(index, 2) if i != j]
        assert a == pytest.approx(np.mean([np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs]), abs=1e-9)


def test_bootstrap_in_blocks_and_within_bins():
    random = RNG(1)
    x, y = random.normal(size=(2, 1500))  # more than one block of pairs
    bins = random.integers(3, size=1500)
    boot = stats.Bootstrap(1500, num=2)
    assert boot.kendall(x, y)[1][0] == pytest.approx(stats.kendall(x[boot.index[0]], y[boot.index[0]]).tau_b, abs=1e-9)
    expected = stats.kendall_within(x[boot.index[1]], y[boot.index[1]], bins[boot.index[1]])
    assert boot.kendall(x, y, bins)[1][1] == pytest.approx(expected, abs=1e-9)


def test_kendall_within_sees_no_pair_of_two_bins():
    size = np.repeat(np.arange(10.0), 20)
    noise = RNG(0).normal(size=(2, 200))
    x, y = size * 100 + noise[0], size * 100 + noise[1]
    bins = stats.size_bins(size, 10)
    assert stats.kendall(x, y).tau_b > 0.85
    assert abs(stats.kendall_within(x, y, bins)) < 0.1
    assert stats.kendall_within(x, y, np.zeros(200)) == pytest.approx(stats.kendall(x, y).tau_b)
    assert math.isnan(stats.kendall_within(x, y, np.arange(200)))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_best_k_is_the_mean_over_ways_to_break_ties(k):
    score, truth = np.array([3.0, 1, 3, 2, 3, 2]), np.array([5.0, 5, 1, 7, 5, 2])
    by_score, by_truth = all_orders(score, k), all_orders(truth, k)
    overlap = np.mean([len(set(a) & set(b)) for a in by_score[::7] for b in by_truth[::7]]) / k
    assert stats.top_k_precision(score, truth, k) == pytest.approx(overlap, abs=0.02)
    cost = truth.max() - np.mean([truth[order].max() for order in by_score])
    assert stats.regret(score, truth, k) == pytest.approx(cost, abs=1e-12)


def test_top_k_without_ties_counts():
    score, truth = np.arange(6.0), np.array([0.0, 1, 2, 5, 3, 4])
    assert stats.top_k_precision(score, truth, 2) == 0.5 and stats.regret(score, truth, 2) == 1.0
    with pytest.raises(AnalysisError, match="the best 7 of 6"):
        stats.regret(score, truth, 7)


def test_partial_correlation_is_blind_to_what_the_controls_explain():
    random = RNG(3)
    size, own = random.normal(size=(2, 2000))
    x, y = np.exp(size) + 0.3 * own, size**3 + random.normal(size=2000)
    assert stats.spearman(x, y) > 0.5
    assert abs(stats.partial_spearman(x, y, [size])) < 0.05
    assert stats.partial_spearman(x, y + 3 * own, [size]) > 0.5
    assert math.isnan(stats.partial_spearman(np.exp(size), y, [size]))


def test_wilson_and_percentile_are_scipys():
    assert study.wilson(7, 50)[1:] == tuple(scipy_stats.binomtest(7, 50).proportion_ci(0.95, method="wilson"))
    assert study.wilson(0, 10).low == 0.0 and study.wilson(0, 10).high > 0.2
    values = np.arange(10.0)
    assert study.percentile(values, 7) == scipy_stats.percentileofscore(values, 7, kind="mean") == 75.0


def test_expected_max_is_the_mean_over_all_draws_and_equivalent_draws_inverts_it():
    values = np.array([1.0, 4, 4, 9])
    for n in (1, 2, 3):
        assert study.expected_max(values, n) == pytest.approx(
            np.mean([max(draw) for draw in itertools.product(values, repeat=n)])
        )
        assert study.equivalent_draws(values, study.expected_max(values, n)) == pytest.approx(n)
    assert study.equivalent_draws(values, 9) == math.inf and study.equivalent_draws(values, 1) == 0.0
    assert 0 < study.equivalent_draws(values, 2.0) < 1


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.9, 0.5]) == [1.0, 1.0] and stats.holm([]) == []


def test_paired_is_exact_for_few_seeds():
    found = stats.paired([3.0, 4, 5, 6, 7], [1.0, 3, 3, 5, 4])
    assert found.p == 2 / 2**5 and found.n == 5
    assert found.difference == pytest.approx(
        (1.8, *scipy_stats.ttest_rel([3.0, 4, 5, 6, 7], [1.0, 3, 3, 5, 4]).confidence_interval())
    )
    assert found.effect == pytest.approx(1.8 / np.std([2, 1, 2, 1, 3], ddof=1))
    assert stats.paired([1.0, 2], [1.0, 2]).p == 1.0


def test_agreement_of_seeds():
    x, y = tied()
    assert stats.seed_agreement([x, y]) == pytest.approx(stats.kendall(x, y).tau_b, abs=1e-12)
    assert math.isnan(stats.seed_agreement([x])) and math.isnan(stats.noise_ceiling([x]))
    assert stats.noise_ceiling([x, x]) == pytest.approx(1.0) and stats.noise_ceiling([x, -x]) == 0.0


@pytest.mark.parametrize("seeds", [2, 4])
def test_ceiling_is_what_the_values_behind_the_noise_reach(seeds):
    """More than the seeds agree among themselves: that is no bound."""
    random = RNG(0)
    behind = random.normal(size=3000)
    measured = list(behind + 2.0 * random.normal(size=(seeds, 3000)))
    reached = stats.kendall(behind, np.mean(measured, axis=0)).tau_b
    assert stats.noise_ceiling(measured) == pytest.approx(reached, abs=0.04)
    assert reached > stats.seed_agreement(measured) + 0.1


@pytest.mark.parametrize("values", [[1.0, math.nan], [], [[1.0, 2]]])
def test_columns_with_holes_are_refused(values):
    with pytest.raises(AnalysisError, match="not finite"):
        stats.kendall(values, values)
    with pytest.raises(AnalysisError, match="2 values against 3"):
        stats.kendall([1.0, 2], [1.0, 2, 3])


def within(hits, low=0.90, high=0.99):
    """Covered at the nominal 95 %, as far as this many trials can tell."""
    return low <= np.mean(hits) <= high


@pytest.mark.exhaustive
def test_bootstrap_intervals_of_tau_cover():
    rho, hits_a, hits_difference = 0.6, [], []
    truth = 2 / math.pi * math.asin(rho)
    for trial in range(250):
        z, e, f = RNG((1, trial)).normal(size=(3, 80))
        x, other = (rho * z + math.sqrt(1 - rho**2) * noise for noise in (e, f))
        boot = stats.Bootstrap(80, num=250, seed=trial)
        a, b = boot.kendall(x, z)[0], boot.kendall(other, z)[0]
        low, high = boot.interval(0.0, a)[1:]
        hits_a.append(low <= truth <= high)
        low, high = boot.interval(0.0, a - b)[1:]
        hits_difference.append(low <= 0 <= high)
    assert within(hits_a) and within(hits_difference), (np.mean(hits_a), np.mean(hits_difference))


def test_wilson_and_student_intervals_cover():
    share, hits = 0.1, []
    for successes in RNG(0).binomial(60, share, size=400):
        _, low, high = study.wilson(int(successes), 60)
        hits.append(low <= share <= high)
    assert within(hits), np.mean(hits)
    hits = []
    for trial in range(150):
        a, b = RNG((2, trial)).normal(size=(2, 5))
        _, low, high = stats.paired(a + 1.0, b).difference
        hits.append(low <= 1.0 <= high)
    assert within(hits), np.mean(hits)


def test_intervals_of_equivalent_draws_cover():
    """The largest of n uniform draws is n / (n + 1) on average."""
    hits = []
    for trial in range(60):
        values = RNG((4, trial)).random(100)
        boot = stats.Bootstrap(100, num=100, seed=trial)
        samples = boot.of(lambda index, values=values: study.equivalent_draws(values[index], 8 / 9))
        _, low, high = boot.corrected(study.equivalent_draws(values, 8 / 9), samples)
        hits.append(low <= 8 <= high)
    assert within(hits), np.mean(hits)


def test_corrected_interval_is_the_percentiles_where_there_is_no_bias():
    samples = RNG(0).normal(size=1000)
    boot = stats.Bootstrap(5, num=10)
    found = boot.corrected(float(np.median(samples)), samples)
    assert found[1:] == pytest.approx(np.quantile(samples, [0.025, 0.975]), abs=0.1)
    assert boot.corrected(np.inf, np.full(9, np.inf))[1:] == (np.inf, np.inf)


def test_blocks_of_two_rows_are_pairs():
    values = np.random.default_rng(0).normal(size=(2, 5))
    (zero, _), (difference, _) = blocked(values)
    assert zero.value == 0.0
    assert difference == pytest.approx(stats.paired(values[1], values[0]).difference)


def test_blocks_equal_least_squares_of_the_additive_model():
    values_AS = np.random.default_rng(1).normal(size=(4, 3)) + np.arange(3) * 10
    rows, columns = np.indices(values_AS.shape).reshape(2, -1)
    design = np.stack([rows == 1, rows == 2, rows == 3, columns == 0, columns == 1, columns == 2], 1).astype(float)
    fit, (left,), *_ = np.linalg.lstsq(design, values_AS.ravel())
    error = np.sqrt(left / 6 * np.linalg.inv(design.T @ design)[0, 0])
    interval, p = blocked(values_AS)[1]
    assert interval.value == pytest.approx(fit[0])
    assert interval.high - interval.value == pytest.approx(scipy_stats.t.ppf(0.975, 6) * error)
    assert p == pytest.approx(2 * scipy_stats.t.sf(abs(fit[0]) / error, 6))


@pytest.mark.parametrize("values", [[[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 2.0], [1.0, math.nan]]])
def test_blocks_need_two_of_both(values):
    with pytest.raises(AnalysisError, match="2 rows"):
        blocked(values)


@pytest.mark.parametrize("ties", [False, True])
def test_resampled_partial_correlations_are_those_of_each_resample(ties):
    rng = np.random.default_rng(1)
    every = rng.normal(size=(5, 60)) + 0.5 * rng.normal(size=60)
    if ties:
        every = np.round(every)
    x, y, controls = every[:2], every[2], [every[3], every[4], 2 * every[3]]  # the last one explains nothing more
    boot = stats.Bootstrap(60, num=150)
    found = boot.partial_spearman(x, y, controls)
    expected = boot.of(lambda i: stats.partial_spearman(x[:, i], y[i], [control[i] for control in controls]))
    assert found.shape == (150, 2) and np.allclose(found, expected, rtol=0, atol=1e-12)
    nothing = boot.partial_spearman([controls[0]], y, controls)
    assert np.isnan(nothing).all()
