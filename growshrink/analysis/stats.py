"""Statistics of rankings and of random draws: pure functions on arrays, by scipy where scipy has them.

Figures are defined for ties (tau-b), or are expectations over all ways to break them (precision and regret).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy  # its parts are loaded where they are used: scipy.stats takes most of a second
from numpy.typing import ArrayLike, NDArray

from growshrink.errors import AnalysisError

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
#: Mean square of residuals of ranks (of range 2) below which a fit has left rounding errors only.
NOTHING_LEFT = 1e-12


class Estimate(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


class Kendall(NamedTuple):
    """Kendall's rank correlation. `tied_x`, `tied_y`: pairs that are equal in x, and in y."""

    tau_a: float
    tau_b: float
    tied_x: int
    tied_y: int


def kendall(x: ArrayLike, y: ArrayLike) -> Kendall:
    r"""Kendall's tau of n pairs, in O(n log n).

    With P concordant, Q discordant and :math:`n_x, n_y` tied ones of the :math:`n_0 = n(n-1)/2` pairs: :math:`\tau_a =
    (P - Q) / n_0`, :math:`\tau_b = (P - Q) / \sqrt{(n_0 - n_x)(n_0 - n_y)}`, NaN where one side is constant.

    Source: Kendall, The treatment of ties in ranking problems (Biometrika 33, 1945); tau-b is scipy's `kendalltau`.
    """
    x, y = _columns(x, y)
    pairs = math.comb(len(x), 2)
    groups = (np.unique(column, return_counts=True)[1] for column in (x, y))
    tied_x, tied_y = (int((counts * (counts - 1) // 2).sum()) for counts in groups)
    if pairs in (tied_x, tied_y):
        return Kendall(0.0, math.nan, tied_x, tied_y)
    tau_b = float(scipy.stats.kendalltau(x, y, method="asymptotic").statistic)
    scale = math.sqrt(pairs - tied_x) * math.sqrt(pairs - tied_y)
    return Kendall(round(tau_b * scale) / pairs, tau_b, tied_x, tied_y)  # P - Q is a whole number


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rho: Pearson's correlation of the mid-ranks (as scipy's `spearmanr`); NaN if a side is constant."""
    x, y = _columns(x, y)
    return pearson(scipy.stats.rankdata(x), scipy.stats.rankdata(y))


def pearson(x: Floats, y: Floats) -> float:
    """Pearson's correlation; NaN if a side is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan


def partial_spearman(x: ArrayLike, y: ArrayLike, controls: Sequence[ArrayLike]) -> Any:
    """Spearman's correlation of x and y that is left once both have been explained by `controls`.

    The ranks of x and of y are fitted by least squares with polynomials of the controls' ranks (up to the third power,
    and their products), and what the fits leave is correlated. NaN if a fit leaves nothing (up to rounding). Several
    columns x `(K, N)` are fitted at once and give `(K,)`.
    """
    every = [_columns(column, y)[0] for column in (*np.atleast_2d(np.asarray(x, dtype=np.float64)), y, *controls)]
    weights = np.ones(len(every[0]))
    ranks = [_unit(scipy.stats.rankdata(column), len(column)) for column in every]
    found = _correlation_left(ranks, len(every) - len(controls), weights)
    return found if np.ndim(x) > 1 else found[0]


def _correlation_left(ranks: Sequence[Floats], explained: int, weights: Floats) -> Floats:
    """`partial_spearman` of items that count `weights` times: the first `explained` ranks, y's last, given the rest."""
    controls = ranks[explained:]
    squares = [rank * rank for rank in controls]
    terms = [np.ones(len(weights)), *controls, *squares, *map(np.multiply, squares, controls)]
    design = np.stack([*terms, *(controls[i] * controls[j] for i in range(len(controls)) for j in range(i))], axis=1)
    left, root = np.stack(ranks[:explained], axis=1), np.sqrt(weights)[:, None]
    left -= design @ scipy.linalg.lstsq(root * design, root * left, cond=1e-9, lapack_driver="gelsy")[0]
    total, left = weights.sum(), root * left
    enough = (left**2).sum(0) >= NOTHING_LEFT * total
    left -= root * (root * left).sum(0) / total  # to weighted mean 0
    scale = np.sqrt((left**2).sum(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = left[:, :-1].T @ left[:, -1] / (scale[:-1] * scale[-1])
    found[~(enough[:-1] & enough[-1])] = math.nan
    return np.asarray(found)


def size_bins(size: ArrayLike, num_bins: int = 10) -> NDArray[np.int64]:
    """The quantile bin of each item, 0 .. num_bins - 1: bins of about equal counts, equal sizes in one bin."""
    size = np.asarray(size, dtype=np.float64)
    edges = np.quantile(size, np.linspace(0, 1, num_bins + 1)[1:-1])
    return np.searchsorted(edges, size, side="right")


def kendall_within(x: ArrayLike, y: ArrayLike, bins: ArrayLike) -> float:
    """tau-b over the pairs whose two items lie in the same bin; NaN if there are none that differ."""
    x, y = _columns(x, y)
    bins = np.asarray(bins)
    agree = untied_x = untied_y = 0.0
    for number, size in zip(*np.unique(bins, return_counts=True), strict=True):
        if size > 1:
            part, pairs = kendall(x[bins == number], y[bins == number]), math.comb(int(size), 2)
            agree += part.tau_a * pairs
            untied_x += pairs - part.tied_x
            untied_y += pairs - part.tied_y
    return agree / math.sqrt(untied_x * untied_y) if untied_x and untied_y else math.nan


def top_k_precision(score: ArrayLike, truth: ArrayLike, k: int) -> float:
    """The share of the k best by score that are among the k best by truth, expected over ways to break ties."""
    score, truth = _columns(score, truth, k)
    return float(_membership(score, k) @ _membership(truth, k)) / k


def regret(score: ArrayLike, truth: ArrayLike, k: int) -> float:
    r"""What trusting the score costs: best truth of all, less the best truth among the k best by score.

    If m places are left for the g items tied at the border, their best is the largest of m drawn from g without
    replacement, :math:`P(\max \le v_{(j)}) = \binom{j}{m} / \binom{g}{m}`.
    """
    score, truth = _columns(score, truth, k)
    border = np.partition(score, -k)[-k]
    sure, tied = truth[score > border], np.sort(truth[score == border])
    m, g = k - len(sure), len(tied)
    values = tied if not len(sure) else np.maximum(tied, sure.max())
    j = np.arange(m, g + 1)
    log_share = _log_comb(j, m) - _log_comb(np.array([g]), m)
    weights = np.diff(np.exp(log_share), prepend=0.0)
    return float(truth.max() - weights @ values[m - 1 :])


class Bootstrap:
    """Resamples of n items, drawn once and used for every statistic, so that differences of statistics are paired.

    `index` is int64 `(num, n)`; `counts` how often each item is in each resample, int32 `(num, n)`.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993): percentile intervals.
    """

    def __init__(self, n: int, *, num: int = 1000, seed: int = 0, confidence: float = CONFIDENCE) -> None:
        if n < 2 or num < 1:
            raise AnalysisError(f"a bootstrap of {n} items and {num} resamples: needs at least 2 items and 1 resample.")
        self.confidence = confidence
        self.index = np.random.default_rng(seed).integers(n, size=(num, n))
        offset = np.arange(num)[:, None] * n
        counts = np.bincount((self.index + offset).ravel(), minlength=num * n)
        self.counts = counts.reshape(num, n).astype(np.int32)

    def of(self, statistic: Callable[[NDArray[np.int64]], Any]) -> Floats:
        """`statistic(index)` of each resample, `(num, ...)`."""
        return np.array([statistic(index) for index in self.index])

    def kendall(self, x: ArrayLike, y: ArrayLike, bins: ArrayLike | None = None) -> tuple[Floats, Floats]:
        """tau-a and tau-b of each resample (within `bins`, if given), `(num,)` each.

        An item is never paired with itself, so tau-a lacks the bias of about 1/n that pairs of copies would add; tau-b
        is what `kendall` gives for the resample.
        """
        x, y = _columns(x, y)
        agree, untied_x, untied_y, all_pairs = np.zeros((4, len(self.counts)))
        bins = np.zeros(len(x)) if bins is None else np.asarray(bins)
        for number in np.unique(bins):
            members = np.flatnonzero(bins == number)
            members = members[np.argsort(x[members], kind="stable")]
            counts, own_x, own_y = self.counts[:, members], x[members], y[members]
            pairs = counts.sum(1, dtype=np.float64) ** 2
            all_pairs += pairs - (counts.astype(np.float64) ** 2).sum(1)
            untied_x += pairs - _squares_of_groups(counts, own_x)
            untied_y += pairs - _squares_of_groups(counts, own_y)
            agree += 2 * _agreeing_pairs(counts, own_x, own_y)
        with np.errstate(invalid="ignore", divide="ignore"):
            return agree / all_pairs, agree / np.sqrt(untied_x * untied_y)

    def pearson(self, x: Floats, y: Floats) -> Floats:
        """Pearson's correlation in each resample, `(num,)`."""
        x, y = x - x.mean(), y - y.mean()
        sums = self.counts @ np.stack([x, y, x * x, y * y, x * y], axis=1) / len(x)
        mean_x, mean_y, xx, yy, xy = sums.T
        with np.errstate(invalid="ignore", divide="ignore"):
            return (xy - mean_x * mean_y) / np.sqrt((xx - mean_x**2) * (yy - mean_y**2))

    def partial_spearman(self, x: ArrayLike, y: ArrayLike, controls: Sequence[ArrayLike], block: int = 64) -> Floats:
        """`partial_spearman` of columns x `(K, N)` in each resample: `(num, K)`, from one sorting of each column."""
        every, found = [*np.asarray(x, dtype=np.float64), y, *controls], []
        orders = [np.argsort(np.asarray(column), kind="stable") for column in every]
        for counts in np.array_split(self.counts, max(1, len(self.counts) // block)):
            ranks = [
                _ranks_of_draws(np.asarray(column), order, counts) for column, order in zip(every, orders, strict=True)
            ]
            for row, own in enumerate(counts):
                drawn = np.flatnonzero(own)
                few = [_unit(rank[row, drawn], len(own)) for rank in ranks]
                found.append(_correlation_left(few, len(every) - len(controls), own[drawn].astype(np.float64)))
        return np.array(found)

    def interval(self, value: float, samples: Floats) -> Estimate:
        """`value` with the percentile interval of `samples`; NaN where a resample has no value."""
        low, high = np.quantile(samples, [(1 - self.confidence) / 2, (1 + self.confidence) / 2])
        return Estimate(value, float(low), float(high))

    def corrected(self, value: float, samples: Floats) -> Estimate:
        r"""`value` with the bias-corrected percentile interval, for skewed statistics; values may be infinite.

        With :math:`z_0 = \Phi^{-1}` of the share of samples below `value`: the percentiles :math:`\Phi(2 z_0 \pm z)`.

        Source: Efron, Nonparametric standard errors and confidence intervals (Can. J. Stat. 9, 1981).
        """
        share = np.clip(np.mean(samples < value), 0.5 / len(samples), 1 - 0.5 / len(samples))
        z = float(scipy.stats.norm.ppf((1 + self.confidence) / 2))
        ends = scipy.stats.norm.cdf(2 * scipy.stats.norm.ppf(share) + np.array([-z, z]))
        low, high = np.quantile(samples, ends, method="nearest")
        return Estimate(value, float(low), float(high))


@dataclass(frozen=True)
class Paired:
    """Mean difference with its interval, exact p, and effect size d_z (mean over sd) of n pairs."""

    difference: Estimate
    p: float
    effect: float
    n: int


def paired(a: ArrayLike, b: ArrayLike, confidence: float = CONFIDENCE) -> Paired:
    """Student's interval of the mean of a - b over pairs (seeds), and the exact sign-flip test of no difference.

    (A bootstrap of a handful of pairs covers too little.) With n pairs p is never below 2 / 2**n (0.0625 for 5).

    Source: Fisher, The Design of Experiments (1935), by scipy's `permutation_test`; d_z after Cohen.
    """
    a, b = _columns(a, b)
    difference = a - b
    n, mean, spread = len(difference), float(difference.mean()), float(difference.std(ddof=1))
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, n - 1)) * spread / math.sqrt(n)
    if not difference.any():
        return Paired(Estimate(0.0, 0.0, 0.0), 1.0, 0.0, n)
    p = scipy.stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", rng=np.random.default_rng(0)
    ).pvalue
    effect = mean / spread if spread > 0 else math.copysign(math.inf, mean)
    return Paired(Estimate(mean, mean - half, mean + half), float(p), effect, n)


def detectable(sd: float, n: int, power: float = 0.8, confidence: float = CONFIDENCE) -> float:
    """The mean difference that `paired` tells from 0 with this power, for the sd of n differences; NaN if n < 2.

    Source: the noncentral t distribution (Cohen, Statistical Power Analysis, 1988, section 2.2).

    >>> [round(detectable(sd, n), 2) for sd, n in ((0.3, 10), (0.4, 16), (0.3, 3))]
    [0.3, 0.3, 0.98]
    """
    if n < 2:
        return math.nan
    bound = scipy.stats.t.ppf((1 + confidence) / 2, n - 1)
    return float(scipy.special.nctdtrinc(n - 1, 1 - power, bound)) * sd / math.sqrt(n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for being several: the i-th smallest of m times m - i + 1, never falling, at most 1.

    Source: Holm, A simple sequentially rejective multiple test procedure (Scand. J. Stat. 6, 1979).
    """
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate(np.arange(len(order), 0, -1) * np.asarray(p_values)[order]).clip(max=1.0)
    return list(map(float, corrected))


def seed_agreement(columns: Sequence[ArrayLike]) -> float:
    """Mean tau-b between the measurements of the same items with different seeds; NaN for a single one."""
    taus = [kendall(columns[i], columns[j]).tau_b for i in range(len(columns)) for j in range(i)]
    return float(np.mean(taus)) if taus else math.nan


def noise_ceiling(columns: Sequence[ArrayLike]) -> float:
    r"""Tau with the mean of `columns` that a score without any error would reach, were values and noise normal.

    With m measurements and r the correlation of two of them, :math:`r = \sin(\pi\tau/2)` by `seed_agreement`: their
    mean has the reliability :math:`R = m r / (1 + (m - 1) r)`, so the ceiling is :math:`\tfrac2\pi \arcsin \sqrt R`. 0
    where the measurements do not agree at all; NaN for a single one.

    Source: Greiner's relation of tau and r; Spearman (1910) and Brown (1910), Brit. J. Psychology 3.
    """
    agreement, m = seed_agreement(columns), len(columns)
    r = max(0.0, math.sin(math.pi / 2 * agreement))
    return math.nan if math.isnan(agreement) else 2 / math.pi * math.asin(math.sqrt(m * r / (1 + (m - 1) * r)))


def _columns(x: ArrayLike, y: ArrayLike, k: int = 1) -> tuple[Floats, Floats]:
    x, y = finite(x), finite(y)
    if x.shape != y.shape or len(x) < 2:
        raise AnalysisError(f"{len(x)} values against {len(y)}: x and y must have equal length, at least 2.")
    if not 1 <= k <= len(x):
        raise AnalysisError(f"the best {k} of {len(x)}: must be between 1 and {len(x)}.")
    return x, y


def finite(values: ArrayLike) -> Floats:
    """`values` as a column; AnalysisError unless it is one of finite numbers."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        wrong = int((~np.isfinite(values)).sum())
        raise AnalysisError(
            f"a column of shape {values.shape} with {wrong} values that are not finite: statistics need a filled "
            "column of numbers; leave the others out."
        )
    return values


def _membership(values: Floats, k: int) -> Floats:
    """Probability of being among the k largest when ties are broken at random."""
    border = np.partition(values, -k)[-k]
    above, tied = values > border, values == border
    return above + tied * ((k - above.sum()) / tied.sum())


def _squares_of_groups(counts: NDArray[np.int32], values: Floats) -> Floats:
    """Sum over groups of equal values of the squared number of draws: `(num,)`, counts `(num, n)`."""
    groups = _draws_of_groups(counts, values, np.argsort(values, kind="stable"))[0]
    return np.einsum("bg,bg->b", groups, groups, dtype=np.float64)


def _agreeing_pairs(counts: NDArray[np.int32], x: Floats, y: Floats, block: int = 1024) -> Floats:
    """Concordant less discordant pairs of draws, `(num,)`; x is sorted."""
    weights, total = counts.astype(np.float32), np.zeros(len(counts))  # sums of whole numbers below 2**24: exact
    ranks = scipy.stats.rankdata(y, method="dense").astype(np.float32)
    first = np.searchsorted(x, x, side="left")  # of the items equal in x
    for start in range(0, len(x), block):
        stop = min(start + block, len(x))
        sign = np.sign(ranks[None, start:stop] - ranks[:stop, None])
        tail = int(first[start])  # all rows before it are smaller in x than every column
        sign[tail:] *= np.arange(tail, stop)[:, None] < first[None, start:stop]
        total += ((weights[:, :stop] @ sign) * weights[:, start:stop]).sum(1, dtype=np.float64)
    return total


def _ranks_of_draws(values: Floats, order: NDArray[np.int64], counts: NDArray[np.int32]) -> Floats:
    """Mid-ranks that the items of each resample have among its draws: `(num, n)`, counts `(num, n)`."""
    groups, sizes = _draws_of_groups(counts, values, order)
    ranks = np.cumsum(groups, axis=1) - (groups - 1) / 2
    found = np.empty(counts.shape)
    found[:, order] = ranks if len(sizes) == len(values) else np.repeat(ranks, sizes, axis=1)
    return found


def _draws_of_groups(
    counts: NDArray[np.int32], values: Floats, order: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """How often the groups of equal values are drawn, rising, `(num, groups)`, and their sizes, `(groups,)`."""
    starts = np.unique(values[order], return_index=True)[1]
    rising = counts[:, order]
    draws = rising if len(starts) == len(values) else np.add.reduceat(rising, starts, axis=1)
    return draws, np.diff(starts, append=len(values))


def _unit(ranks: Floats, n: int) -> Floats:
    """Mid-ranks of n items, brought to mean 0 and range 2: powers of them stay well conditioned."""
    return (2 * ranks - n - 1) / max(1, n - 1)


def _log_comb(n: NDArray[np.int64], m: int) -> Floats:
    return scipy.special.gammaln(n + 1) - scipy.special.gammaln(m + 1) - scipy.special.gammaln(n - m + 1)
