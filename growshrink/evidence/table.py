"""What an experiment says: a row and a verdict for every arm, curves of accuracy over cost."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from growshrink.analysis.stats import CONFIDENCE, Estimate, blocked, holm, paired
from growshrink.base.reading import read_json
from growshrink.base.writing import save_picture, write_atomic
from growshrink.evidence.arms import PLAIN
from growshrink.evidence.experiment import SCORES, Experiment, Job, read_scores

#: Of corrected p values.
LEVEL = 0.05
_LEGEND = (
    "Every arm ends as the same plain net, and was trained for the same MACs, forward and backward, teachers "
    "included: those of {budget:g} epochs of the plain net. (Scoring is not counted, nor are the 50 forward "
    "passes before a fuse that take the statistics of norms anew.) Seeds {seeds}. Test top-1 in percent, the test "
    "split having had no part in any choice; difference to plain with the same seed (weights, val split, order of "
    "images), its 95 % interval by Student's t, the same with the noise estimated from all arms together "
    "(pooled), and by the bootstrap, which is too narrow for so few seeds. p: of the pooled test, corrected for "
    "the number of arms (Holm). Epochs: of all updates, a teacher's included. *: the end of the learning rates "
    "that were tried. *val*: on the val split."
)


@dataclass(frozen=True)
class Row:
    """An arm in the table.

    Attributes:
        arm: Its name.
        about: What it is.
        seeds: How many.
        lr: Its learning rate.
        top1: Mean on the test split, in percent (on the val split where `on_val`).
        sd: Over the seeds; NaN for one.
        difference: To plain, seed by seed: mean and Student's interval; None for plain itself or fewer than 2 seeds.
        pooled: The same difference, its interval by the noise of all arms together (`blocked`): much narrower, if they
            are all as noisy. None unless all seeds of plain are there.
        bootstrap: Ends of the bootstrap interval (percentile) of the same mean.
        p: That belongs to it, corrected for the number of arms (Holm).
        epochs: It was trained for.
        cost: Training MACs over the budget.
        seconds: Of training a net, over plain's; NaN where they were not trained in the same way.
        edge: Its learning rate is the largest or the smallest that was tried.
        on_val: It was judged on the val split, and so is the difference.
        verdict: In a line.
    """

    arm: str
    about: str
    seeds: int
    lr: float
    top1: float
    sd: float
    difference: Estimate | None
    pooled: Estimate | None
    bootstrap: tuple[float, float] | None
    p: float | None
    epochs: float
    cost: float
    seconds: float
    edge: bool
    on_val: bool
    verdict: str


def rows_of(experiment: Experiment, jobs: Sequence[Job], out: Path) -> list[Row]:
    """The table, from the runs that are finished; arms without one are left out."""
    scores: dict[str, dict[int, Mapping[str, Any]]] = {}
    runs: dict[str, list[tuple[Job, dict[str, Any]]]] = {}
    for job in jobs:
        for score in read_scores(out, job):
            scores.setdefault(job.arm, {})[score["seed"]] = score
        if job.arm in scores and (path := out / job.folder / SCORES).exists():
            runs.setdefault(job.arm, []).append((job, read_json(path)))
    pairs = {arm: _paired(scores, arm) for arm in scores if arm != PLAIN}
    compared = [arm for arm, (a, _) in pairs.items() if len(a) > 1]
    pooled = _pooled(scores)
    corrected = dict(zip(pooled, holm([p for _, p in pooled.values()]), strict=True))
    plain_seconds = _seconds(runs.get(PLAIN, []))
    rows = []
    for arm, own in scores.items():
        split = "val" if any(score["test"] is None for score in own.values()) else "test"
        values = [score[split] for score in own.values()]
        difference = bootstrap = None
        if arm in compared:
            difference = paired(*pairs[arm]).difference
            bootstrap = bootstrap_interval(*pairs[arm])
        first = runs[arm][0][1]
        alike = PLAIN in runs and len(runs[arm][0][0].seeds) == len(runs[PLAIN][0][0].seeds)
        rows.append(
            Row(
                arm=arm,
                about=experiment.arm(arm).about,
                seeds=len(values),
                lr=runs[arm][0][0].lr,
                top1=statistics.mean(values),
                sd=statistics.stdev(values) if len(values) > 1 else float("nan"),
                difference=difference,
                pooled=pooled[arm][0] if arm in pooled else None,
                bootstrap=bootstrap,
                p=corrected.get(arm),
                epochs=first["epochs"],
                cost=first["macs"] / first["budget"],
                seconds=_seconds(runs[arm]) / plain_seconds if plain_seconds and alike else float("nan"),
                edge=experiment.tuning is not None and runs[arm][0][0].lr in _ends(experiment.tuning.lr),
                on_val=split == "val",
                verdict=verdict(arm, difference, pooled[arm][0] if corrected.get(arm, 1.0) < LEVEL else None),
            )
        )
    return rows


def verdict(arm: str, difference: Estimate | None, pooled: Estimate | None = None) -> str:
    """One line: better, worse, or not told apart, by the interval of the paired difference.

    `pooled` is the pooled interval where its corrected p allows to speak of it.
    """
    if arm == PLAIN:
        return "what the others are compared with"
    if difference is None:
        return "too few seeds for an interval"
    by, word = difference, _word(difference)
    if pooled is not None and word == _UNSURE and _word(pooled) != _UNSURE:
        by, word = pooled, f"{_word(pooled)} by the noise of all arms, not told apart by its own seeds"
    return f"{word} ({by.value:+.2f}, {by.low:+.2f} .. {by.high:+.2f})"


_UNSURE = "not told apart"


def _word(interval: Estimate) -> str:
    return "better" if interval.low > 0 else "worse" if interval.high < 0 else _UNSURE


def bootstrap_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Ends of the percentile bootstrap interval of the mean of a - b (scipy's); too narrow for a handful of pairs."""
    difference = np.asarray(a) - np.asarray(b)
    if np.ptp(difference) == 0:
        return float(difference[0]), float(difference[0])
    found = scipy.stats.bootstrap(
        (difference,), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(0)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def markdown(rows: Sequence[Row], experiment: Experiment, command: str) -> str:
    """The page of an experiment."""
    seeds = ", ".join(map(str, experiment.seeds))
    side = f", {experiment.pool} x {experiment.pool} pixels averaged into one" if experiment.pool > 1 else ""
    kwargs = ", ".join(f"{key}={value}" for key, value in experiment.model_kwargs.items())
    lines = [
        f"# {experiment.model}{f' ({kwargs})' if kwargs else ''} on {experiment.data}{side}",
        "",
        _LEGEND.format(budget=experiment.budget, seeds=seeds),
        "",
        "| arm | top-1 (sd) | less plain | t interval | pooled | bootstrap | p | seeds | lr | epochs | cost | "
        "seconds / plain |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        value = interval = pooled = bootstrap = p = "-"
        if row.difference is not None and row.bootstrap is not None:
            value = f"{row.difference.value:+.2f}"
            interval = f"{row.difference.low:+.2f} .. {row.difference.high:+.2f}"
            bootstrap = f"{row.bootstrap[0]:+.2f} .. {row.bootstrap[1]:+.2f}"
        if row.pooled is not None:
            pooled, p = f"{row.pooled.low:+.2f} .. {row.pooled.high:+.2f}", f"{row.p:.2g}"
        sd = "-" if row.sd != row.sd else f"{row.sd:.2f}"
        lines.append(
            f"| {row.arm} | {row.top1:.2f} ({sd}){' val' * row.on_val} | {value} | {interval} | {pooled} | "
            f"{bootstrap} | {p} | {row.seeds} | {row.lr:g}{'*' * row.edge} | {row.epochs:.1f} | {row.cost:.3f} | "
            f"{'-' if row.seconds != row.seconds else f'{row.seconds:.2f}'} |"
        )
    lines += ["", "## Verdicts", ""]
    lines += [f"- **{row.arm}**: {row.verdict}. {row.about[0].upper()}{row.about[1:]}." for row in rows]
    lines += ["", "![accuracy over cost](curves.png)", "", "## Made by", "", f"`{command}`", ""]
    return "\n".join(lines)


def draw_curves(jobs: Sequence[Job], out: Path) -> bool:
    """curves.png: val top-1 over training MACs, a line an arm (the first of its runs); False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    finals, drawn, best = [], set(), 0.0
    for job in jobs:
        path = out / job.folder / "log.jsonl"
        if job.arm in drawn or not read_scores(out, job):
            continue
        drawn.add(job.arm)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        macs = [row["training_macs"] / len(job.seeds) for row in rows]
        top1 = [row["val_top1"] for row in rows]
        style: dict[str, Any] = {"color": "black", "linewidth": 2.5, "zorder": 3}
        if job.arm != PLAIN:  # ten colours, then the same dashed, then dotted
            number = len(drawn) - 1 - (PLAIN in drawn)
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3], "linewidth": 1.3}
        axis.plot(macs, top1, label=job.arm, **style)
        best = max(best, *top1)  # a peak may be above all that comes of it
        finals += [top1[-1]] * (read_scores(out, job)[0]["test"] is not None)  # else that of a net nobody trained
    if finals:
        axis.set_ylim(min(finals) - 12, best + 1)
    axis.set_xlabel("training MACs of a net (forward and backward, teachers included)")
    axis.set_ylabel("val top-1 (%), mean over the seeds of the run")
    axis.legend(frameon=False, fontsize="small", ncols=2)
    save_picture(figure, out / "curves.png")
    return True


def write_table(rows: Sequence[Row], experiment: Experiment, jobs: Sequence[Job], out: Path, command: str) -> None:
    """table.json and README.md of the experiment's folder, and the picture."""
    drawn = draw_curves(jobs, out)
    page = markdown(rows, experiment, command)
    write_atomic(
        out / "README.md", (page if drawn else page.replace("![accuracy over cost](curves.png)\n", "")).encode()
    )
    table = [
        {**vars(row), **{key: (value := getattr(row, key)) and value._asdict() for key in ("difference", "pooled")}}
        for row in rows
    ]
    write_atomic(out / "table.json", (json.dumps(table, indent=2).replace("NaN", "null") + "\n").encode())


def _paired(scores: Mapping[str, Mapping[int, Mapping[str, Any]]], arm: str) -> tuple[list[float], list[float]]:
    own, plain = scores[arm], scores.get(PLAIN, {})
    split = "val" if any(score["test"] is None for score in own.values()) else "test"
    seeds = [seed for seed in own if seed in plain]
    return [own[seed][split] for seed in seeds], [plain[seed][split] for seed in seeds]


def _pooled(scores: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, tuple[Estimate, float]]:
    """Arms judged on the test split with every seed that plain has, against plain, the noise of all taken together."""
    seeds = list(scores.get(PLAIN, {}))
    arms = [arm for arm, own in scores.items() if all(seed in own and own[seed]["test"] is not None for seed in seeds)]
    if len(arms) < 2 or len(seeds) < 2:
        return {}
    found = blocked([[scores[arm][seed]["test"] for seed in seeds] for arm in arms], control=arms.index(PLAIN))
    return {arm: entry for arm, entry in zip(arms, found, strict=True) if arm != PLAIN}


def _ends(values: Sequence[float]) -> tuple[float, ...]:
    """The largest and the smallest of several."""
    return (min(values), max(values)) if len(values) > 1 else ()


def _seconds(runs: Sequence[tuple[Job, Mapping[str, Any]]]) -> float:
    """Of training one net, on average."""
    return sum(run["seconds"] for _, run in runs) / max(1, sum(len(job.seeds) for job, _ in runs))
