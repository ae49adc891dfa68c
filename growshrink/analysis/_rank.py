"""Does a score rank subnets, and does it rank them any better than their size does?"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

from growshrink.analysis import stats
from growshrink.analysis.stats import Bootstrap, Estimate, Floats
from growshrink.base.limits import checked
from growshrink.errors import AnalysisError

#: What a score has to beat before it is said to add anything.
BASELINES = ("params", "macs", "null")
#: Below this many subnets the interval of a tau is wider than most differences between scores.
FEW = 200


@dataclass(frozen=True)
class Agreement:
    """How one score agrees with the truth, with bootstrap intervals; NaN where a figure has no value.

    `precision` and `regret` are of the k best by score, `tau_within` is tau-b within bins of MACs, `beyond` the partial
    Spearman given the baselines: 0 where the score knows nothing that they do not.
    """

    tau_a: Estimate
    tau_b: Estimate
    spearman: Estimate
    precision: Estimate
    regret: Estimate
    tau_within: Estimate
    beyond: Estimate


@dataclass(frozen=True)
class Verdict:
    """Whether a score adds anything to size, by a rule that was fixed beforehand; `reason` says it in one sentence.

    It does if (1) within bins of MACs its tau-b is above that of every baseline, the interval of the paired difference
    (`differences`) excluding 0 (a baseline that ranks backwards counts as its opposite), and (2) the interval of its
    partial correlation given all baselines excludes 0 from above.
    """

    adds: bool
    differences: dict[str, Estimate]
    reason: str


@dataclass(frozen=True)
class Ranking:
    """Outcome of `rank`: agreement of every score, and verdicts of those that are no baselines.

    Attributes:
        n: Subnets that were compared; `left_out` have no finite score, or truth.
        k: K of precision and regret.
        random_regret: Regret of the best of k random subnets, which cost as much to evaluate as the k of a score.
        tied_truth: Pairs of subnets with equal truth, as a share of all pairs.
        seed_agreement: Mean tau-b between measurements of the truth with other seeds; None if it was measured once.
        ceiling: tau that a score without any error would have, `stats.noise_ceiling`; None if it was measured once.
    """

    agreement: dict[str, Agreement]
    verdicts: dict[str, Verdict]
    n: int
    left_out: int
    k: int
    random_regret: float
    num_bins: int
    tied_truth: float
    seed_agreement: float | None
    ceiling: float | None
    confidence: float
    num_resamples: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON: intervals are [value, low, high], None for NaN and infinity."""
        return jsonable(asdict(self))

    def table(self) -> str:
        """The agreement and the verdicts as text."""
        rows = [["score", *(entry.name for entry in fields(Agreement))]]
        rows += [[name, *map(_cell, vars(agreement).values())] for name, agreement in self.agreement.items()]
        lengths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, lengths, strict=True)).rstrip() for row in rows]
        noise = "The truth was measured once: its seed noise, which bounds every tau, is not known."
        if self.ceiling is not None:
            noise = (
                f"tau-b {self.seed_agreement:.3f} between measurements of the truth with other seeds: a score without "
                f"any error would have about {self.ceiling:.3f} with their mean."
            )
        lines += [
            f"{self.n} subnets, {self.confidence:.0%} intervals of {self.num_resamples} paired resamples; precision "
            f"and regret of the best {self.k}, regret of {self.k} random ones {self.random_regret:.3f}; tau_within: "
            f"{self.num_bins} bins of MACs; {self.tied_truth:.1%} of the pairs are tied in truth.",
            f"{self.left_out} subnets have no finite score, or truth, and were left out." * bool(self.left_out),
            f"Fewer than {FEW} subnets: the intervals are wide, take the verdicts as hints." * (self.n < FEW),
            noise,
            *(f"{name}: {verdict.reason}" for name, verdict in self.verdicts.items()),
        ]
        return "\n".join(filter(None, lines))


@checked(AnalysisError, scores=Any, truth=Any)
def rank(
    scores: Mapping[str, ArrayLike],
    truth: Floats | Sequence[Floats],
    *,
    baselines: str | Sequence[str] = BASELINES,
    k: int | None = None,
    num_bins: int = 10,
    num_resamples: int = 1000,
    confidence: float = stats.CONFIDENCE,
    seed: int = 0,
) -> Ranking:
    """Compare scores with the truth, and with what size alone would have said.

    Args:
        scores: `(N,)` each, higher is better; every baseline, `macs` among them, has to be there. Subnets without a
            finite value in one of them, or in the truth, are left out and counted.
        truth: `(N,)`, higher is better; or several measurements of it with different seeds, whose mean is the truth: a
            list of them, or one array, `(seeds, N)` or `(N, seeds)`.
        baselines: Names of the scores that any other has to beat, at least one.
        k: K of top-k precision and regret; None is a tenth of the subnets.
        num_bins: Bins of MACs for `tau_within`, of equal counts; fewer if a bin would have less than 8 subnets.
        num_resamples: Resamples of the bootstrap over subnets.
        confidence: Confidence of the intervals.
        seed: Seed of the bootstrap.

    Raises:
        AnalysisError: Columns of different lengths, a truth that is not finite or all tied, or fewer than 8 subnets.

    >>> scores = {"mine": [i % 7 + i / 9 for i in range(40)], "macs": [i % 9 for i in range(40)]}
    >>> gs.rank(scores, scores["mine"], baselines=["macs"], num_resamples=20).verdicts["mine"].adds
    True
    """
    baselines = (baselines,) if isinstance(baselines, str) else tuple(baselines)
    columns, measured, left_out = _read(scores, truth, baselines)
    target = np.mean(measured, axis=0)
    n, several = len(target), len(measured) > 1
    k = max(1, round(n / 10)) if k is None else k
    num_bins = max(1, min(num_bins, n // 8))
    bins = stats.size_bins(columns["macs"], num_bins)
    boot = Bootstrap(n, num=num_resamples, seed=seed, confidence=confidence)
    agreement, within = {}, {}
    beyond = _beyond(columns, target, baselines, boot)
    for name, column in columns.items():
        agreement[name], within[name] = _agreement(column, target, beyond[name], bins, k, boot)
    verdicts = {name: _verdict(name, agreement, within, baselines, boot) for name in columns if name not in baselines}
    return Ranking(
        agreement,
        verdicts,
        n=n,
        left_out=left_out,
        k=k,
        random_regret=float(target.max() - np.diff((np.arange(n + 1) / n) ** k) @ np.sort(target)),
        num_bins=num_bins,
        tied_truth=stats.kendall(target, target).tied_x / math.comb(n, 2),
        seed_agreement=stats.seed_agreement(measured) if several else None,
        ceiling=stats.noise_ceiling(measured) if several else None,
        confidence=confidence,
        num_resamples=num_resamples,
    )


def _read(
    scores: Mapping[str, ArrayLike], truth: Any, baselines: Sequence[str]
) -> tuple[dict[str, Floats], list[Floats], int]:
    """Columns of scores, one or several of truth, of the subnets that have all of them, and how many have not."""
    if not baselines:
        raise AnalysisError("baselines=(): name at least one score that any other has to beat.")
    try:
        seeds = np.asarray(truth, dtype=np.float64)
        n = np.size(next(iter(scores.values()), ()))
        if seeds.ndim == 2 and seeds.shape[1] != n and seeds.shape[0] == n:
            seeds = seeds.T
        measured = list(np.atleast_2d(seeds))
        columns = {name: np.asarray(column, dtype=np.float64) for name, column in scores.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise AnalysisError(f"scores must be numbers by name, and truth numbers: {error}.") from error
    for name in (*baselines, "macs"):
        if name not in columns:
            raise AnalysisError(f"{name}: no such score; what a score adds is judged against {', '.join(baselines)}.")
    for name, column in [*columns.items(), *(("the truth", column) for column in measured)]:
        if column.shape != measured[0].shape or column.ndim != 1:
            raise AnalysisError(f"{name}: {column.shape} values, the truth has {measured[0].shape}.")
    finite = np.all([np.isfinite(column) for column in (*columns.values(), *measured)], axis=0)
    columns = {name: column[finite] for name, column in columns.items()}
    measured = [column[finite] for column in measured]
    target = np.mean(measured, axis=0)
    if len(target) < 8:
        raise AnalysisError(f"{len(target)} subnets with a finite truth and finite scores: too few to rank.")
    if np.ptp(target) == 0:
        raise AnalysisError("the truth is the same for all subnets: there is nothing to rank.")
    return columns, measured, int((~finite).sum())


def _beyond(
    columns: Mapping[str, Floats], truth: Floats, baselines: Sequence[str], boot: Bootstrap
) -> dict[str, Estimate]:
    """Partial Spearman of each score given the baselines but itself; those with equal controls are fitted at once."""
    groups = [[name] for name in baselines] + [[name for name in columns if name not in baselines]]
    found: dict[str, Estimate] = {}
    for names in filter(None, groups):
        own = np.stack([columns[name] for name in names])
        controls = [columns[other] for other in baselines if other not in names]
        values, resampled = (of(own, truth, controls) for of in (stats.partial_spearman, boot.partial_spearman))
        found |= {name: boot.interval(*each) for name, *each in zip(names, values, resampled.T, strict=True)}
    return found


def _agreement(
    score: Floats, truth: Floats, beyond: Estimate, bins: Any, k: int, boot: Bootstrap
) -> tuple[Agreement, Floats]:
    """Its figures, and the resamples of tau_within."""
    if np.ptp(score) == 0:  # a constant score ranks nothing
        nothing = [Estimate(math.nan, math.nan, math.nan)] * 6
        return Agreement(Estimate(0.0, 0.0, 0.0), *nothing), np.full(len(boot.index), math.nan)
    tau_a, tau_b = boot.kendall(score, truth)
    within = boot.kendall(score, truth, bins)[1]
    found = stats.kendall(score, truth)
    ranks = scipy.stats.rankdata(score), scipy.stats.rankdata(truth)
    every = np.arange(len(score))

    def estimate(statistic: Callable[[Any], float]) -> Estimate:
        return boot.interval(statistic(every), boot.of(statistic))

    agreement = Agreement(
        tau_a=boot.interval(found.tau_a, tau_a),
        tau_b=boot.interval(found.tau_b, tau_b),
        spearman=boot.interval(stats.pearson(*ranks), boot.pearson(*ranks)),
        precision=estimate(lambda i: stats.top_k_precision(score[i], truth[i], k)),
        regret=estimate(lambda i: stats.regret(score[i], truth[i], k)),
        tau_within=boot.interval(stats.kendall_within(score, truth, bins), within),
        beyond=beyond,
    )
    return agreement, within


def _verdict(
    name: str,
    agreement: Mapping[str, Agreement],
    within: Mapping[str, Floats],
    baselines: Sequence[str],
    boot: Bootstrap,
) -> Verdict:
    own, differences = agreement[name], {}
    for other in baselines:
        theirs = agreement[other].tau_within.value
        sign = -1.0 if theirs < 0 else 1.0  # where small is good, smallness is what has to be beaten
        value = own.tau_within.value - sign * (0.0 if math.isnan(theirs) else theirs)
        differences[other] = boot.interval(value, within[name] - sign * np.nan_to_num(within[other]))
    why = []
    if missed := [other for other in baselines if not differences[other].low > 0]:
        why.append(f"within bins of MACs not shown to be better than {', '.join(missed)}")
    if not own.beyond.low > 0:
        why.append(f"partial correlation given {', '.join(baselines)} {_cell(own.beyond)}")
    reason = f"adds to {', '.join(baselines)}: better within bins of MACs, partial correlation {_cell(own.beyond)}."
    return Verdict(not why, differences, f"adds nothing that could be shown: {'; '.join(why)}." if why else reason)


def _cell(interval: Estimate) -> str:
    if math.isnan(interval.value):
        return "-"
    shown = (f"{round(value, 3) + 0.0:+.3f}" for value in (interval.value, interval.low, interval.high))  # not -0.000
    return "{} ({}, {})".format(*shown)


def jsonable(value: Any) -> Any:
    """What JSON can hold: None for NaN and infinity, at any depth."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
