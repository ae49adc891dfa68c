"""Top-1 over training compute, from experiments on one net at several budgets: two questions, one picture.

`recipes/compare.py --curve` makes curve.md and curve.png of it. Equal compute: at which budget is an arm ahead of the
plain net? At saturation: what does an arm reach that no longer training brings? Where the folders hold two nets, the
difference of an arm's gains between them is told as well (interaction).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from arm_table import int8_top1
from growshrink.analysis.stats import Bootstrap, Estimate, detectable, paired
from growshrink.base.writing import save_picture, write_atomic
from growshrink.errors import RunError
from growshrink.evidence.arms import PLAIN
from growshrink.evidence.record import ArmComparison, RunRecord, chosen_lr, read_plan, read_runs, runs_of, trials_of

#: What a student is charged of the training of its teacher.
CHARGES: Mapping[str, float] = {"paid": 1.0, "shared by ten": 0.1, "given": 0.0}
#: Points of top-1 that doubling the plain net's budget brings, below which it is saturated.
SATURATED = 0.3
#: Relative difference of two budgets that count as the same.
SAME = 0.03


@dataclass(frozen=True, kw_only=True)
class Point:
    """An arm at a budget; compute is in epochs' worth of the plain net, a net on average.

    Attributes:
        top1: On the test split, by seed.
        spent: All of it, a teacher that the run trained included.
        teacher: That teacher's share.
        given: Whether another net taught that the run did not train.
        macs: Training MACs of an epoch's worth.
        seconds: Time of training.
        searched: What the trials of its learning rate cost.
        int8: Mean test top-1 in int8, one scale per layer and per output channel; None where it was not taken.
    """

    arm: str
    budget: float
    top1: Mapping[int, float]
    spent: float
    teacher: float
    given: bool
    macs: float
    seconds: float
    searched: float
    int8: tuple[float, float] | None

    @property
    def mean(self) -> float:
        """Top-1."""
        return statistics.mean(self.top1.values())

    def charged(self, share: float) -> float | None:
        """Compute with that share of its teacher's training; None where that is unknown."""
        return None if self.given and share else self.spent - (1 - share) * self.teacher


@dataclass(frozen=True)
class Curves:
    """The points of one net, by arm and rising budget."""

    net: str
    arms: Mapping[str, Sequence[Point]]

    @cached_property
    def plain(self) -> Sequence[Point]:
        """Those of the plain net."""
        return self.arms.get(PLAIN, ())

    def plain_at(self, compute: float, seed: int) -> float | None:
        """Top-1 of the plain net of a seed, linear in log2 of the compute; None outside of what was run."""
        known = [(point.spent, point.top1[seed]) for point in self.plain if seed in point.top1]
        if not known or not known[0][0] * (1 - SAME) <= compute <= known[-1][0] * (1 + SAME):
            return None
        x, y = zip(*known, strict=True)
        return float(np.interp(math.log2(compute), np.log2(x), y))

    def gains(self, point: Point, share: float) -> dict[int, float]:
        """How far a point is above the plain net of as much compute, seed by seed."""
        compute = point.charged(share)
        if compute is None:
            return {}
        plain = {seed: self.plain_at(compute, seed) for seed in point.top1}
        return {seed: point.top1[seed] - value for seed, value in plain.items() if value is not None}

    @cached_property
    def saturation(self) -> float | None:
        """B*: the first budget of the plain net whose doubling brings less than `SATURATED`; None if none is known."""
        for point in self.plain:
            for twice in self.plain:
                gains = doubled(point, twice) if math.isclose(twice.budget, 2 * point.budget, rel_tol=SAME) else {}
                if gains and statistics.mean(gains.values()) < SATURATED:
                    return point.budget
        return None

    def at_saturation(self, arm: str) -> tuple[dict[int, float], float] | None:
        """An arm at B* less the best plain at any budget up to 2 B*, seed by seed; and that plain's budget."""
        point = next((point for point in self.arms[arm] if point.budget == self.saturation), None)
        if self.saturation is None or point is None:
            return None
        rivals = [plain for plain in self.plain if plain.budget <= 2 * self.saturation * (1 + SAME)]
        best = max(rivals, key=lambda plain: plain.mean)
        return {seed: point.top1[seed] - best.top1[seed] for seed in point.top1 if seed in best.top1}, best.budget

    def crossing(self, arm: str) -> Estimate | None:
        """The budget from which an arm is ahead, all paid; infinite where it never is, None for fewer than 2 seeds.

        Linear in log2 of the budget, its interval by bootstrap over the seeds that every budget has.
        """
        points = [(point.budget, self.gains(point, 1.0)) for point in self.arms[arm]]
        points = [(budget, gains) for budget, gains in points if gains]
        seeds = sorted(set.intersection(*(set(gains) for _, gains in points))) if points else []
        if len(seeds) < 2:
            return None
        budgets = [budget for budget, _ in points]
        gains_BS = np.array([[gains[seed] for seed in seeds] for _, gains in points])
        bootstrap = Bootstrap(len(seeds), num=2000)
        samples = bootstrap.of(lambda index: first_crossing(budgets, gains_BS[:, index].mean(1)))
        return bootstrap.corrected(first_crossing(budgets, gains_BS.mean(1)), samples)

    def multiplier(self, point: Point) -> str:
        """What the plain net needs for the same top-1, over what the point costs."""
        if not self.plain:
            return "-"
        compute = point.spent
        x = [plain.spent for plain in self.plain]
        y = list(np.maximum.accumulate([plain.mean for plain in self.plain]))
        if point.mean > y[-1]:
            return f"> {x[-1] / compute:.2g}"
        if point.mean < y[0]:
            return f"< {x[0] / compute:.2g}"
        return f"{2 ** float(np.interp(point.mean, y, np.log2(x))) / compute:.2g}"


def doubled(point: Point, longer: Point) -> dict[int, float]:
    """What a longer budget brings, seed by seed."""
    return {seed: longer.top1[seed] - point.top1[seed] for seed in point.top1 if seed in longer.top1}


def first_crossing(budgets: Sequence[float], gains: Sequence[float]) -> float:
    """The least budget with a gain of 0 or more, linear in log2 between two; infinite without any.

    >>> first_crossing([100, 200, 400], [-1.0, -0.5, 0.5]), first_crossing([100, 200], [0.1, -1]) == 100
    (282.842712474619, True)
    """
    for number, gain in enumerate(gains):
        if gain >= 0:
            if not number:
                return float(budgets[0])
            low, high = np.log2(budgets[number - 1 : number + 1])
            before = float(gains[number - 1])
            return float(2 ** (low + (high - low) * before / (before - float(gain))))
    return math.inf


def points_of(folder: Path) -> tuple[str, list[Point]]:
    """Name of the net of an experiment, and its arms as points; arms judged on the val split are left out."""
    plan = read_plan(folder)
    if plan is None or "candidates" in plan:
        raise RunError(f"{folder}: holds no experiment with arms.")
    comparison, records = ArmComparison.from_plan(plan), read_runs(folder)
    trials = {job: job.arm for job in trials_of(comparison)}
    points = []
    for arm, runs in runs_of(comparison, chosen_lr(comparison, records), records).items():
        top1 = {score.seed: score.test for run in runs for score in run.scores if score.test is not None}
        if not top1:
            continue
        nets, first = sum(len(run.seeds) for run in runs), runs[0]
        macs = first.spent.budget / comparison.budget
        searched = sum(run.cost.macs * len(run.seeds) for run in records if trials.get(run.job) == arm and run.cost)
        taught = [_taught(run) for run in runs]
        points.append(
            Point(
                arm=arm,
                budget=comparison.budget,
                top1={seed: top1[seed] for seed in sorted(top1)},
                spent=sum(run.spent.macs * len(run.seeds) for run in runs) / nets / macs,
                teacher=sum(macs for macs, _ in taught) / nets / macs,
                given=any(given for _, given in taught),
                macs=macs,
                seconds=sum(run.spent.seconds for run in runs) / nets,
                searched=searched / macs,
                int8=int8_top1([score for run in runs for score in run.scores]),
            )
        )
    kwargs = "".join(f", {key}={value}" for key, value in sorted(comparison.model_kwargs.items()))
    images = f", {comparison.images:,} images" if comparison.images else ""
    return f"{comparison.model}{kwargs} on {comparison.data}{images}", points


def _taught(run: RunRecord) -> tuple[float, bool]:
    """MACs by which a run trained other nets to be teachers, and whether there is one that it did not train."""
    taught: list[Mapping[str, Any]] = [entry for entry in run.rounds if entry.get("answers_macs")]
    return sum(entry["teacher_macs"] for entry in taught), any(not entry["teacher_updates"] for entry in taught)


def curves_of(folders: Sequence[Path]) -> list[Curves]:
    """Collect the points of all folders, net by net."""
    nets: dict[str, dict[str, list[Point]]] = {}
    for folder in folders:
        net, points = points_of(folder)
        for point in points:
            nets.setdefault(net, {}).setdefault(point.arm, []).append(point)
    rising = {
        net: {arm: sorted(own, key=lambda p: p.budget) for arm, own in arms.items()} for net, arms in nets.items()
    }
    for net, arms in rising.items():
        for arm, own in arms.items():
            if len({point.budget for point in own}) < len(own):
                raise RunError(f"{net}, {arm}: two of the folders have the same budget.")
    return [Curves(net, arms) for net, arms in rising.items()]


def estimate(gains: Mapping[int, float]) -> Estimate | None:
    """Mean of paired differences with Student's interval; None for fewer than 2."""
    return paired(list(gains.values()), [0.0] * len(gains)).difference if len(gains) > 1 else None


def written(gains: Mapping[int, float]) -> str:
    """A difference for a table: mean, interval, and what so many seeds can see."""
    if (found := estimate(gains)) is None:
        return f"{next(iter(gains.values())):+.2f} (1 seed)" if gains else "-"
    sees = detectable(statistics.stdev(gains.values()), len(gains))
    return f"{found.value:+.2f} ({found.low:+.2f} .. {found.high:+.2f}), sees {sees:.2f}"


def interactions(curves: Sequence[Curves]) -> list[str]:
    """Lines of a table: an arm's gain in the first net less its gain in another, at the longest budget of each."""
    lines = []
    for other in curves[1:]:
        for arm in [arm for arm in curves[0].arms if arm in other.arms and arm != PLAIN]:
            one, two = (each.gains(each.arms[arm][-1], 1.0) for each in (curves[0], other))
            between = {seed: one[seed] - two[seed] for seed in one if seed in two}
            lines.append(f"| {arm} | {other.net} | {written(one)} | {written(two)} | {written(between)} |")
    return lines


def headline(curves: Curves) -> list[str]:
    """The sentences at the top: where it pays at equal compute, and what is left at saturation."""
    others = [arm for arm in curves.arms if arm != PLAIN]
    better = []
    for arm in others:
        gains = [(point.budget, estimate(curves.gains(point, 1.0))) for point in curves.arms[arm]]
        better += [f"{arm} at {budget:g}" for budget, gain in gains if gain is not None and gain.low > 0]
    paid = f"ahead of plain: {', '.join(better)}" if better else "nothing beat the plain net at any budget tried"
    paid = paid if others else "no other arm has run yet"
    lines = [f"**At equal training compute {paid}.** (Budgets in epochs' worth of the plain net, 95 % intervals.)"]
    if curves.saturation is None:
        return [*lines, f"Saturation: doubling no budget tried brings the plain net less than {SATURATED} points."]
    found = {arm: curves.at_saturation(arm) for arm in others}
    above = [arm for arm, at in found.items() if at and (gain := estimate(at[0])) is not None and gain.low > 0]
    what = f"above the best plain net: {', '.join(above)}" if above else "nothing was above the best plain net"
    what = what if any(found.values()) else "no other arm has run yet"
    return [*lines, f"**At saturation (B* = {curves.saturation:g} epochs) {what}** (up to {2 * curves.saturation:g})."]


def page_of(curves: Curves) -> list[str]:
    """The lines on one net."""
    lines = [f"## {curves.net}", "", *headline(curves), "", "### Equal compute", ""]
    lines += [
        "Less plain of as much compute, seed by seed, between budgets linear in log2; charged with all of a teacher's "
        "training, with a tenth of it (ten students share it), with none. Sees: the true difference that so many seeds "
        "tell from 0 with a chance of 80 %. Multiplier: what plain needs for the same top-1, over what the run cost. "
        "Hours: of training one net; tried: what choosing its learning rate cost, in epochs. int8: top-1 of the nets "
        "that the exporter quantised, one scale per layer / per output channel.",
        "",
        "| arm | budget | top-1 | int8 | seeds | teacher | " + " | ".join(CHARGES) + " | multiplier | hours | tried |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, points in curves.arms.items():
        for point in points:
            charges = [written(curves.gains(point, share)) if arm != PLAIN else "-" for share in CHARGES.values()]
            teacher = "given" if point.given else f"{point.teacher:.0f}" if point.teacher else "-"
            int8 = " / ".join(f"{each:.2f}" for each in point.int8) if point.int8 else "-"
            multiplier = curves.multiplier(point) if arm != PLAIN else "-"
            lines.append(
                f"| {arm} | {point.budget:g} | {point.mean:.2f} | {int8} | {len(point.top1)} | {teacher} "
                f"| {' | '.join(charges)} | {multiplier} | {point.seconds / 3600:.2f} | {point.searched:.0f} |"
            )
    return [*lines, "", *_saturation_lines(curves)]


def _saturation_lines(curves: Curves) -> list[str]:
    lines = ["### At saturation, and where the curves cross", ""]
    steps = zip(curves.plain, curves.plain[1:], strict=False)
    gains = [f"{a.budget:g} to {b.budget:g}: {written(doubled(a, b))}" for a, b in steps]
    lines += [f"What more training brings the plain net: {'; '.join(gains) or 'one budget only'}.", ""]
    lines += ["| arm | at B* less the best plain | ahead from a budget of |", "|---|---|---|"]
    for arm in [arm for arm in curves.arms if arm != PLAIN]:
        at, crossing = curves.at_saturation(arm), curves.crossing(arm)
        best = f"{written(at[0])}, plain at {at[1]:g}" if at else "-"
        ends = (
            "-"
            if crossing is None
            else f"{_budget(crossing.value)} ({_budget(crossing.low)} .. {_budget(crossing.high)})"
        )
        lines.append(f"| {arm} | {best} | {ends} |")
    return [*lines, ""]


def _budget(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.0f}"


def draw_curve(curves: Sequence[Curves], path: Path) -> None:
    """A panel for each net: top-1 over training MACs, with intervals; dashed, what a given teacher leaves to pay."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 * len(curves), 5.5), layout="constrained")
    for axis, own in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves, strict=True):
        for number, (arm, points) in enumerate(own.arms.items()):
            style = {"color": "black", "linewidth": 2.5} if arm == PLAIN else {"color": f"C{number}", "linewidth": 1.5}
            means = [point.mean for point in points]
            half = [_half(point) for point in points]
            axis.errorbar(
                [point.spent * point.macs for point in points], means, half, label=arm, marker="o", capsize=3, **style
            )
            if any(point.teacher for point in points):
                x = [(point.charged(0.0) or 0.0) * point.macs for point in points]
                axis.plot(
                    x,
                    means,
                    linestyle="--",
                    marker="o",
                    markerfacecolor="white",
                    label=f"{arm}, teacher given",
                    **style,
                )
        if own.saturation is not None:
            axis.axvline(
                own.saturation * own.plain[0].macs, color="grey", linestyle=":", label="B*: plain is saturated"
            )
        axis.set(
            xscale="log", xlabel="training MACs of a net, teacher included", ylabel="test top-1 (%)", title=own.net
        )
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    save_picture(figure, path)


def _half(point: Point) -> float:
    """Half of Student's interval of the mean over the seeds; 0 for one."""
    found = estimate(point.top1)
    return 0.0 if found is None else found.high - found.value


def write_curve(folders: Sequence[Path], out: Path) -> None:
    """Write curve.md and curve.png from plan.json and runs.jsonl of the folders alone."""
    curves = curves_of(folders)
    if not curves:
        raise RunError("there is no finished run in these folders.")
    lines = ["# Top-1 over training compute", ""]
    for own in curves:
        lines += page_of(own)
    if between := interactions(curves):
        lines += [
            "## Interaction",
            "",
            f"Gain in {curves[0].net} (first) less that in another net, at the longest budget of each, all paid.",
            "",
        ]
        lines += ["| arm | other net | first | other | first less other |", "|---|---|---|---|---|", *between, ""]
    predictions = dict.fromkeys(line for folder in folders for line in (read_plan(folder) or {}).get("predictions", ()))
    if predictions:
        lines += ["## Predicted", "", "Written before the first run.", "", *(f"- {line}" for line in predictions), ""]
    names = " ".join(folder.resolve().name for folder in folders)
    lines += ["![top-1 over training compute](curve.png)", "", "## Made by", ""]
    lines += [f"`python recipes/compare.py --curve {names} --out OUT`, in the folder of the experiments.", ""]
    out.mkdir(parents=True, exist_ok=True)
    draw_curve(curves, out / "curve.png")
    write_atomic(out / "curve.md", "\n".join(lines).encode())
