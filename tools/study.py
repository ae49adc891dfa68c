"""A study of pruning: random subnets under a budget, criteria at the same budget, and where these lie among those.

The plan is the same list of candidates in every process; each is made by the process that evaluates it.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy  # its parts are loaded where they are used
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from growshrink.analysis import prune, stats
from growshrink.analysis._angle import AngleTable, Floats, Index
from growshrink.analysis.channels import ChannelSpace, best_channels
from growshrink.analysis.prune import Budget, DrawnWidths, Space, cost_of, draw_widths, width_of
from growshrink.analysis.scores import RANDOM, SCORES, Bench
from growshrink.base.copying import copy_net
from growshrink.data.feed import ScoringBatches
from growshrink.errors import AnalysisError
from growshrink.layers.widths import set_width
from growshrink.training import calibrate_bn, evaluate

#: What a subnet of a supernet may be picked by.
PICKERS = ("angle", "excess", "null", "params", "naswot", "grad_norm", "jacob_cov", "early_loss")
Made = tuple[nn.Module, Mapping[str, int]]
"""A net and its widths."""


@dataclass(frozen=True, eq=False)
class SupernetSpace:
    """The widths of a trained supernet, whose subnets keep the first channels; `table` has their costs."""

    model: nn.Module
    table: AngleTable

    @property
    def choices(self) -> Mapping[str, Sequence[int]]:
        """Rising widths by name."""
        return self.table.choices

    def cost(self, index: Index) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Parameters and MACs of `(N, names)` subnets, each given by the positions of its widths."""
        scores = self.table.score(index)
        return scores.params, scores.macs

    def subnet(self, widths: Mapping[str, int]) -> nn.Module:
        """A copy of the supernet at these widths."""
        net = copy_net(self.model)
        set_width(net, widths)
        return net


@dataclass(frozen=True, eq=False)
class PlannedNet:
    """A subnet of trained net number `net`; `kind` is "random", a criterion, or "CRITERION, random channels"."""

    key: str
    net: int
    kind: str
    make: Callable[[], Made]


def plan_channels(
    space: ChannelSpace,
    draws: DrawnWidths,
    budget: Budget,
    *,
    net: int,
    criteria: Sequence[str],
    null_draws: int,
    seed: int,
    batch: Callable[[], tuple[Tensor, Tensor]],
) -> list[PlannedNet]:
    """Random widths with random channels; each criterion's net; the criterion's widths with random channels.

    Criteria are keys of `CRITERIA`, or "random": a threshold on importances drawn uniformly. `net` is the number of the
    trained net, `null_draws` how often random channels are drawn at each criterion's widths.
    """

    def at_random(widths: Mapping[str, int], number: int) -> Made:
        return space.cut(prune.random_channels(space, widths, seed * 1_000_003 + number)), widths

    def drawn(number: int) -> Made:
        return at_random(width_of(space, draws.index[number]), number)

    def by(criterion: str, channels: int | None) -> Made:
        if criterion == RANDOM:
            random = np.random.default_rng((seed, 1, net))
            importance = {name: random.random(choices[-1]) for name, choices in space.choices.items()}
        else:
            importance = space.importance(criterion, batch())
        widths = prune.threshold_widths(space, importance, budget)
        if channels is not None:
            return at_random(widths, channels)
        return space.cut(best_channels(importance, widths)), widths

    plan = [PlannedNet(f"net {net}, random {i}", net, RANDOM, partial(drawn, i)) for i in range(len(draws.index))]
    for criterion in criteria:
        name = f"{criterion} threshold" if criterion == RANDOM else criterion
        plan.append(PlannedNet(f"net {net}, {name}", net, name, partial(by, criterion, None)))
        kind = f"{name}, random channels"
        plan += [PlannedNet(f"net {net}, {kind} {i}", net, kind, partial(by, criterion, i)) for i in range(null_draws)]
    return plan


def plan_widths(
    space: SupernetSpace,
    draws: DrawnWidths,
    budget: Budget,
    *,
    net: int,
    pickers: Sequence[str],
    seed: int,
    bench: Bench,
) -> list[PlannedNet]:
    """Random widths of trained supernet number `net`, and for each score the best by it of as many other draws."""

    def at(row: Index) -> Made:
        widths = width_of(space, row)
        return space.subnet(widths), widths

    def by(picker: str) -> Made:
        pool = draw_widths(space, budget, len(draws.index), seed=seed + 1 + net).index
        return at(pool[int(np.nanargmax(SCORES[picker](bench, pool)))])

    plan = [PlannedNet(f"net {net}, random {i}", net, RANDOM, partial(at, row)) for i, row in enumerate(draws.index)]
    return plan + [PlannedNet(f"net {net}, {name}", net, name, partial(by, name)) for name in pickers]


def measure(
    candidate: PlannedNet,
    space: Space,
    calibration: Iterable[Tensor],
    val: ScoringBatches,
    train: Callable[[nn.Module], object] | None = None,
) -> dict[str, Any]:
    """Make a candidate, train it (None: judge it as cut), recalibrate its batch norms, evaluate it: its record."""
    began = time.perf_counter()
    net, widths = candidate.make()
    found = time.perf_counter()
    if train is not None:
        train(net)
    calibrate_bn(net, calibration)
    if isinstance(space, ChannelSpace):
        space.fold(net)
    score = evaluate(net, val)
    params, macs = cost_of(space, widths)
    return {
        "key": candidate.key,
        "net": candidate.net,
        "kind": candidate.kind,
        "subnet": "-".join(map(str, widths.values())),
        "params": params,
        "macs": macs,
        "top1": score.top1,
        "loss": score.loss,
        "seconds_to_find": found - began,
        "seconds_to_evaluate": time.perf_counter() - found,
    }


def summarise(
    records: Sequence[Mapping[str, Any]], full: Sequence[float], *, num_resamples: int = 500
) -> dict[str, Any]:
    """Where every criterion lies among the random draws of its own net; `full` has the val top-1 of each full net.

    Returns `random`, distribution and yields, and `criteria`: for each its top-1 by net, percentile, N_eq with its
    interval, the best of as many random draws as could have been evaluated in the time that it takes to find and
    evaluate its net, difference from the mean random draw over nets (Student's interval, sign-flip test, Holm over
    criteria), and, where known, what its choice of channels and of widths are worth.
    """
    nets = sorted({int(record["net"]) for record in records})

    def top1_by_net(kind: str) -> list[Floats]:
        return [np.array([float(r["top1"]) for r in records if r["kind"] == kind and r["net"] == n]) for n in nets]

    top1 = {kind: top1_by_net(kind) for kind in dict.fromkeys(str(record["kind"]) for record in records)}
    random = top1[RANDOM]
    if any(len(values) < 2 for values in random):
        raise AnalysisError("fewer than 2 random subnets of a net: there is no distribution to place anything on.")
    summary: dict[str, Any] = {"random": _distribution(records, random, full), "criteria": {}}
    means = [float(own.mean()) for own in random]
    tests = []
    for kind in top1:
        if kind == RANDOM or kind.endswith(", random channels"):
            continue
        values = [float(found[0]) for found in top1[kind]]
        placed = [_place(own, value, num_resamples) for own, value in zip(random, values, strict=True)]
        own_seconds = _mean(r["seconds_to_find"] + r["seconds_to_evaluate"] for r in records if r["kind"] == kind)
        draws = max(1.0, own_seconds / summary["random"]["seconds_each"])
        row: dict[str, Any] = {
            "top1": values,
            "random_at_its_cost": [expected_max(own, draws) for own in random],
            "percentile": [place["percentile"] for place in placed],
            "n_eq": [place["n_eq"] for place in placed],
            "seconds_to_find": _mean(r["seconds_to_find"] for r in records if r["kind"] == kind),
        }
        over = row["over_random"] = {"difference": [values[0] - means[0], None, None], "p": None, "effect": None}
        if len(nets) > 1:
            compared = stats.paired(values, means)
            over |= {"difference": compared.difference, "p": compared.p, "effect": compared.effect}
            tests.append(over)
        if f"{kind}, random channels" in top1:
            null = [float(found.mean()) for found in top1[f"{kind}, random channels"]]
            row["of_its_channels"] = float(np.mean(values) - np.mean(null))
            row["of_its_widths"] = float(np.mean(null) - np.mean(means))
        summary["criteria"][kind] = row
    for over, corrected in zip(tests, stats.holm([over["p"] for over in tests]), strict=True):
        over["p_holm"] = corrected
    return summary


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary as tables."""
    random = summary["random"]
    lines = [
        f"full nets: val top-1 {_list(random['full'])} %",
        f"{random['n']} random subnets: mean {random['mean']:.2f} %, sd {random['sd']:.2f}, "
        f"best {random['max']:.2f} %; {random['seconds_each']:.3f} s each",
    ]
    for points, (value, low, high) in random["yield"].items():
        lines.append(f"yield within {points:g} points of the full net: {value:.1%} ({low:.1%}, {high:.1%})")
    if not summary["criteria"]:
        return "\n".join(lines)
    lines += [
        "",
        f"{'criterion':20s} {'top-1 by net':>24s} {'random at its cost':>24s} {'percentile':>16s} "
        f"{'N_eq (of net 0)':>22s} {'over random':>24s} "
        f"{'p (Holm)':>9s} {'channels':>9s} {'widths':>7s} {'s':>7s}",
    ]
    for name, row in summary["criteria"].items():
        over = row["over_random"]
        value, low, high = over["difference"]
        difference = f"{value:+.2f}" + ("" if low is None else f" ({low:+.2f}, {high:+.2f})")
        n_eq, n_low, n_high = (">" if math.isinf(x) else f"{x:.3g}" for x in row["n_eq"][0])
        draws = f"{n_eq} ({n_low}, {n_high})"
        lines.append(
            f"{name:20s} {_list(row['top1']):>24s} {_list(row['random_at_its_cost']):>24s} "
            f"{_list(row['percentile'], 0):>16s} {draws:>22s} {difference:>24s} {_cell(over.get('p_holm'), '.3f'):>9s} "
            f"{_cell(row.get('of_its_channels'), '+.2f'):>9s} {_cell(row.get('of_its_widths'), '+.2f'):>7s} "
            f"{row['seconds_to_find']:7.3f}"
        )
    lines += [
        "",
        "random at its cost: the best to be expected of as many random subnets as are evaluated in the same time.",
        "percentile: among random subnets of the same net. N_eq: random draws whose expected best is as good (>: more",
        "than the draws there are can tell). over random: top-1 less the mean random subnet, over nets.",
        "channels: what its channels are worth over random ones at its widths; widths: those over random widths.",
    ]
    nets = len(random["full"])
    if nets < 6:
        told = f"no p can be below {2 / 2**nets:.3f} before correction" if nets > 1 else "there is no test"
        lines.append(f"Nets are few ({nets}): {told}.")
    return "\n".join(lines)


def wilson(successes: int, n: int, confidence: float = stats.CONFIDENCE) -> stats.Estimate:
    """A share with Wilson's interval (J. Am. Stat. Assoc. 22, 1927), by scipy's `binomtest`."""
    result = scipy.stats.binomtest(successes, n)
    low, high = result.proportion_ci(confidence, method="wilson")
    return stats.Estimate(result.statistic, float(low), float(high))


def percentile(values: ArrayLike, value: float) -> float:
    """Percent of `values` below `value`, equal ones counted half (scipy's `percentileofscore`, kind "mean")."""
    return float(scipy.stats.percentileofscore(stats.finite(values), value, kind="mean"))


def expected_max(values: ArrayLike, n: float) -> float:
    r"""The largest of n draws that is to be expected, from the empirical distribution of N `values`.

    :math:`E = \sum_i v_{(i)} \left[(i/N)^n - ((i-1)/N)^n\right]`, for any n > 0, not only whole ones.

    Source: Dodge et al., Show Your Work (arXiv:1909.03004), equation 6. Too low for n near N: no draw beats the best.
    """
    values = np.sort(stats.finite(values))
    share = np.arange(len(values) + 1) / len(values)
    return float(np.diff(share**n) @ values)


def equivalent_draws(values: ArrayLike, value: float) -> float:
    """N_eq: how many random draws have `value` as their expected maximum; the inverse of `expected_max`.

    Infinite where `value` is not below the best of `values`: more draws would be needed to tell.
    """
    values = stats.finite(values)
    if value >= values.max():
        return math.inf
    if value <= values.min():
        return 0.0
    # Sorted once; expected_max rises strictly from min to max.
    return math.exp(scipy.optimize.brentq(lambda log_n: expected_max(values, math.exp(log_n)) - value, -40.0, 40.0))


def _distribution(
    records: Sequence[Mapping[str, Any]], random: Sequence[Floats], full: Sequence[float]
) -> dict[str, Any]:
    values = np.concatenate(random)
    tops = np.repeat(full, [len(own) for own in random])
    return {
        "full": list(full),
        "n": len(values),
        "mean": float(values.mean()),
        "sd": float(np.mean([own.std(ddof=1) for own in random])),
        "max": float(values.max()),
        "quantiles": {q: float(np.quantile(values, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
        "yield": {d: wilson(int((values >= tops - d).sum()), len(values)) for d in (1.0, 2.0, 5.0)},
        "seconds_each": _mean(r["seconds_to_find"] + r["seconds_to_evaluate"] for r in records if r["kind"] == RANDOM),
    }


def _place(random: Floats, value: float, num_resamples: int) -> dict[str, Any]:
    boot = stats.Bootstrap(len(random), num=num_resamples)
    samples = boot.of(lambda index: equivalent_draws(random[index], value))
    n_eq = boot.corrected(equivalent_draws(random, value), samples)
    return {"percentile": percentile(random, value), "n_eq": n_eq}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _list(values: Sequence[float], digits: int = 1) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)


def _cell(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
