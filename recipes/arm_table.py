"""What an experiment says (for compare.py; not a program): a row and a verdict for every arm, curves over cost."""

import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike

from growshrink.analysis.stats import CONFIDENCE, Estimate, detectable, holm, paired
from growshrink.base.reading import read_bytes
from growshrink.base.writing import save_picture, write_atomic
from growshrink.data.datasets import DataSet
from growshrink.errors import AnalysisError
from growshrink.evidence.arms import PLAIN
from growshrink.evidence.experiment import Experiment, data_of, deployed_nets
from growshrink.evidence.record import (
    RUNS_FILE,
    WORK,
    ArmComparison,
    RunRecord,
    SeedScore,
    chosen_lr,
    locked,
    read_runs,
    runs_of,
)
from growshrink.export import Source
from growshrink.export.artefacts import ONNX_FILE, Function, onnx_function, quiet, write_onnx
from growshrink.export.int8 import (
    GRANULARITIES,
    calibration_images,
    check_data,
    needs_reduced_range,
    quantise,
    score_all,
)
from growshrink.runs.folder import PLAIN_FILE
from growshrink.training import Score
from growshrink.transforms import fold

#: Level of corrected p values.
LEVEL = 0.05
_INT8_LEGEND = (
    " int8: test top-1 of the deployed net after the exporter's static quantisation (256 training images), one scale "
    "per layer / per output channel."
)
_LEGEND = (
    "Every arm ends as the same plain net, and was trained for the same MACs, forward and backward, teachers "
    "included: those of {budget:g} epochs of the plain net. (Scoring is not counted, nor are the 50 forward "
    "passes before a fuse that take the statistics of norms again.) Seeds {seeds}. Test top-1 in percent, the test "
    "split having had no part in any choice; difference to plain with the same seed (weights, val split, order of "
    "images), its 95 % interval by Student's t, and the same with the noise estimated from all arms together "
    "(pooled). p: of the pooled test, corrected for "
    "the number of arms (Holm). Sees: the true difference that so many seeds tell from 0 with a chance of 80 %, by the "
    "spread of their differences. Epochs: of all updates, a teacher's included. *: the end of the learning rates "
    "that were tried. *val*: on the val split."
)
_CURVES = "![val top-1 over training MACs, a line for each arm, teachers' cost included](curves.png)"


@dataclass(frozen=True)
class TableRow:
    """An arm in the table, with the number of its seeds; `on_val`: judged on the val split, not on the test split.

    Attributes:
        top1: Mean over the seeds, in percent; `sd` over the seeds is NaN for one.
        difference: To plain, seed by seed: mean and Student's interval; None for plain itself or fewer than 2 seeds.
        pooled: The same difference, its interval by the noise of all arms together (`blocked`), its p corrected for the
            number of arms (Holm). None unless all seeds of plain are there.
        sees: The true difference to plain that its seeds tell from 0 with a chance of 80 %; NaN for fewer than 2.
        int8: Mean test top-1 in int8, one scale per layer and per output channel; None where it was not taken.
        cost: Training MACs over the budget.
        seconds: Time of training a net, over plain's; NaN where they were not trained in the same way.
        edge: Its learning rate is the largest or the smallest that was tried.
    """

    arm: str
    about: str
    seeds: int
    lr: float
    top1: float
    sd: float
    difference: Estimate | None
    pooled: Estimate | None
    p: float | None
    sees: float
    int8: tuple[float, float] | None
    epochs: float
    cost: float
    seconds: float
    edge: bool
    on_val: bool
    verdict: str


def rows_of(comparison: ArmComparison, records: Sequence[RunRecord]) -> list[TableRow]:
    """Make the table from the runs that are finished; arms without one are left out."""
    runs = {arm: own for arm, own in runs_of(comparison, chosen_lr(comparison, records), records).items() if own}
    scores = {arm: _by_seed(own, comparison.seeds) for arm, own in runs.items()}
    pairs = {arm: _paired(scores, arm) for arm in scores if arm != PLAIN}
    compared = [arm for arm, (a, _) in pairs.items() if len(a) > 1]
    pooled = _pooled(scores)
    corrected = dict(zip(pooled, holm([p for _, p in pooled.values()]), strict=True))
    plain_seconds = _seconds(runs.get(PLAIN, []))
    tried = comparison.tuning.lr if comparison.tuning else ()
    rows = []
    for arm, own in scores.items():
        on_val, values = _values(own, own)
        difference = paired(*pairs[arm]).difference if arm in compared else None
        first = runs[arm][0]
        alike = PLAIN in runs and len(first.seeds) == len(runs[PLAIN][0].seeds)
        rows.append(
            TableRow(
                arm=arm,
                about=first.about,
                seeds=len(values),
                lr=first.job.lr,
                top1=statistics.mean(values),
                sd=statistics.stdev(values) if len(values) > 1 else float("nan"),
                difference=difference,
                pooled=pooled[arm][0] if arm in pooled else None,
                p=corrected.get(arm),
                sees=_sees(*pairs[arm]) if arm in compared else float("nan"),
                int8=int8_top1(list(own.values())),
                epochs=first.spent.epochs,
                cost=first.spent.macs / first.spent.budget,
                seconds=_seconds(runs[arm]) / plain_seconds if plain_seconds and alike else float("nan"),
                edge=len(tried) > 1 and first.job.lr in (min(tried), max(tried)),
                on_val=on_val,
                verdict=verdict(arm, difference, pooled[arm][0] if corrected.get(arm, 1.0) < LEVEL else None)
                + recurrence_note(runs[arm]),
            )
        )
    return rows


def verdict(arm: str, difference: Estimate | None, pooled: Estimate | None = None) -> str:
    """Better, worse, or not told apart, by the paired difference, or by `pooled` if its corrected p allows it."""
    if arm == PLAIN:
        return "what the others are compared with"
    if difference is None:
        return "too few seeds for an interval"
    by, word = difference, _word(difference)
    if pooled is not None and not word and _word(pooled):
        by, word = pooled, f"{_word(pooled)} by the noise of all arms, not told apart by its own seeds"
    return f"{word or 'not told apart'} ({by.value:+.2f}, {by.low:+.2f} .. {by.high:+.2f})"


def recurrence_note(runs: Sequence[RunRecord]) -> str:
    """The norm of A at the end of the rounds that merged branches at equilibrium, "" where none did."""
    norms = [norm for run in runs for entry in run.rounds if (norm := entry.get("recurrence")) is not None]
    if not norms:
        return ""
    tested = "" if min(norms) >= 0.1 else ", below 0.1: the arm has tested nothing"
    return f"; norm of A, from 0.5, at the end {min(norms):.2f} .. {max(norms):.2f}{tested}"


def _word(interval: Estimate) -> str:
    return "better" if interval.low > 0 else "worse" if interval.high < 0 else ""


def title(comparison: ArmComparison) -> str:
    """What a comparison asks, of which net, on which data, and for how long: no two pages have one title."""
    arms = [name for name in comparison.arms if name != PLAIN]
    some = ", ".join(arms[:3]) + f" and {len(arms) - 3} more" * (len(arms) > 3)
    rate = "" if comparison.tuning else f", lr {comparison.lr:g}"
    kwargs = ", ".join(f"{key}={value}" for key, value in comparison.model_kwargs.items())
    images = f"{comparison.images:,} images of " if comparison.images else ""
    side = f", {comparison.pool} x {comparison.pool} pixels averaged into one" if comparison.pool > 1 else ""
    asked = f"{some} against plain" if arms else "plain alone"
    net = f"{comparison.model}{f' ({kwargs})' if kwargs else ''}"
    return f"{asked}: {net} on {images}{comparison.data}{side}, {comparison.budget:g} epochs{rate}"


def markdown(rows: Sequence[TableRow], comparison: ArmComparison, command: str) -> str:
    """The page of an comparison."""
    seeds = ", ".join(map(str, comparison.seeds))
    quantised = any(row.int8 for row in rows)
    lines = [
        f"# {title(comparison)}",
        "",
        _LEGEND.format(budget=comparison.budget, seeds=seeds) + _INT8_LEGEND * quantised,
        "",
        "| arm | top-1 (sd) | less plain | t interval | pooled | p | sees | seeds | lr | epochs | cost | "
        "seconds / plain |" + " int8 |" * quantised,
        "|---|---|---|---|---|---|---|---|---|---|---|---|" + "---|" * quantised,
    ]
    for row in rows:
        value = interval = pooled = p = "-"
        if (found := row.difference) is not None:
            value, interval = f"{found.value:+.2f}", f"{found.low:+.2f} .. {found.high:+.2f}"
        if row.pooled is not None:
            pooled, p = f"{row.pooled.low:+.2f} .. {row.pooled.high:+.2f}", f"{row.p:.2g}"
        int8 = " / ".join(f"{each:.2f}" for each in row.int8) if row.int8 else "-"
        lines.append(
            f"| {row.arm} | {row.top1:.2f} ({_number(row.sd)}){' val' * row.on_val} | {value} | {interval} | {pooled} "
            f"| {p} | {_number(row.sees)} | {row.seeds} | {row.lr:g}{'*' * row.edge} | {row.epochs:.1f} "
            f"| {row.cost:.3f} | {_number(row.seconds)} |" + f" {int8} |" * quantised
        )
    lines += ["", "## Verdicts", ""]
    lines += [f"- **{row.arm}**: {row.verdict}. {row.about[0].upper()}{row.about[1:]}." for row in rows]
    if comparison.predictions:
        lines += ["", "## Predicted", "", "Written before the first run.", ""]
        lines += [f"- {prediction}" for prediction in comparison.predictions]
    lines += ["", _CURVES, "", "## Made by", "", f"`{command}`", ""]
    return "\n".join(lines)


def draw_arm_curves(runs: Sequence[RunRecord], out: Path) -> bool:
    """curves.png: val top-1 over training MACs, a line an arm (the first of its runs); False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 6), layout="constrained")
    axis = figure.subplots()
    finals, drawn, best = [], set(), 0.0
    for run in runs:
        arm, top1 = run.job.arm, run.history.val_top1
        if arm in drawn or not top1:
            continue
        drawn.add(arm)
        macs = [value / len(run.seeds) for value in run.history.training_macs]
        dashes, number = divmod(len(drawn) - 1 - (PLAIN in drawn), 10)  # ten colours, then the same dashed, then dotted
        style: dict[str, Any] = {"color": f"C{number}", "linestyle": ("-", "--", ":")[dashes % 3], "linewidth": 1.3}
        if arm == PLAIN:
            style = {"color": "black", "linewidth": 2.5, "zorder": 3}
        axis.plot(macs, top1, label=arm, **style)
        best = max(best, *top1)  # a peak may be above all that comes of it
        finals += [top1[-1]] * (run.scores[0].test is not None)  # else that of a net without any training
    if finals:
        axis.set_ylim(min(finals) - 12, best + 1)
    label = "training MACs of a net (forward and backward, teachers included)"
    axis.set(xlabel=label, ylabel="val top-1 (%), mean over the seeds of the run")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize="small", ncols=2)
    save_picture(figure, out / "curves.png")
    return True


def write_table(comparison: ArmComparison, records: Sequence[RunRecord], out: Path) -> list[TableRow]:
    """Write README.md, table.json and curves.png of an experiment, from its runs alone."""
    rows = rows_of(comparison, records)
    found = runs_of(comparison, chosen_lr(comparison, records), records)
    drawn = draw_arm_curves([run for runs in found.values() for run in runs], out)
    used = {run.job for runs in found.values() for run in runs}
    command = next((record.command for record in reversed(records) if record.job in used), "")
    page = markdown(rows, comparison, f"python {command}")
    page = page if drawn else page.replace(f"{_CURVES}\n", "")
    write_atomic(out / "README.md", page.encode())
    table = [
        {**vars(row), **{key: (value := getattr(row, key)) and value._asdict() for key in ("difference", "pooled")}}
        for row in rows
    ]
    write_atomic(out / "table.json", (json.dumps(table, indent=2).replace("NaN", "null") + "\n").encode())
    return rows


def _by_seed(runs: Sequence[RunRecord], seeds: Sequence[int]) -> dict[int, SeedScore]:
    """The scores of `seeds`, the first where a seed was trained twice, in the order of the runs."""
    found: dict[int, SeedScore] = {}
    for run in runs:
        for score in run.scores:
            if score.seed in seeds:
                found.setdefault(score.seed, score)
    return found


def _values(own: Mapping[int, SeedScore], seeds: Iterable[int]) -> tuple[bool, list[float]]:
    """Whether an arm is judged on the val split, and its top-1 there or on the test split."""
    on_val = any(score.test is None for score in own.values())
    return on_val, [score.val if on_val or score.test is None else score.test for score in map(own.__getitem__, seeds)]


def _paired(scores: Mapping[str, Mapping[int, SeedScore]], arm: str) -> tuple[list[float], list[float]]:
    own, plain = scores[arm], scores.get(PLAIN, {})
    seeds = [seed for seed in own if seed in plain]
    on_val, values = _values(own, seeds)
    return values, [plain[seed].val for seed in seeds] if on_val else _values(plain, seeds)[1]


def _pooled(scores: Mapping[str, Mapping[int, SeedScore]]) -> dict[str, tuple[Estimate, float]]:
    """Arms judged on the test split with every seed that plain has, against plain, the noise of all taken together."""
    seeds = list(scores.get(PLAIN, {}))
    arms = [arm for arm, own in scores.items() if all(seed in own and own[seed].test is not None for seed in seeds)]
    if len(arms) < 2 or len(seeds) < 2:
        return {}
    found = blocked([_values(scores[arm], seeds)[1] for arm in arms], control=arms.index(PLAIN))
    return {arm: entry for arm, entry in zip(arms, found, strict=True) if arm != PLAIN}


def blocked(values: ArrayLike, control: int = 0, confidence: float = CONFIDENCE) -> list[tuple[Estimate, float]]:
    r"""Difference of each row of `values` to the row `control`, with Student's interval and p: columns are blocks.

    With :math:`y_{as} = \mu + \alpha_a + \beta_s + \epsilon`, the noise is estimated from the residuals of all rows,
    :math:`s^2 = \sum r_{as}^2 / ((A-1)(S-1))`, and a difference of rows has the standard error :math:`s \sqrt{2/S}`:
    for few seeds (blocks) and many arms (rows) of equal noise far sharper than pairs alone. `values` is `(A, S)`, at
    least 2 of both. With two rows it is `paired`'s interval.

    Source: Fisher, The Design of Experiments (1935): randomised blocks.
    """
    values_AS = np.asarray(values, dtype=np.float64)
    shape = values_AS.shape
    if len(shape) != 2 or min(shape) < 2 or not np.isfinite(values_AS).all():
        raise AnalysisError(f"values of shape {shape}: needs a finite one for each of 2 rows or more and 2 columns.")
    rows, columns = shape
    means_A = values_AS.mean(1)
    residuals = values_AS - means_A[:, None] - values_AS.mean(0) + values_AS.mean()
    freedom = (rows - 1) * (columns - 1)
    error = math.sqrt(float((residuals**2).sum()) / freedom * 2 / columns)
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, freedom)) * error
    found = []
    for difference in map(float, means_A - means_A[control]):
        p = float(2 * scipy.stats.t.sf(abs(difference) / error, freedom)) if error else float(not difference)
        found.append((Estimate(difference, difference - half, difference + half), p))
    return found


def _sees(values: Sequence[float], of_plain: Sequence[float]) -> float:
    return detectable(statistics.stdev([a - b for a, b in zip(values, of_plain, strict=True)]), len(values))


def int8_top1(scores: Sequence[SeedScore]) -> tuple[float, float] | None:
    """Mean top-1 in int8, one scale per layer and per output channel; None unless all seeds have it."""
    pairs = [(score.int8_tensor, score.int8_channel) for score in scores]
    tensor, channel = ([value for value in column if value is not None] for column in zip(*pairs, strict=True))
    return (statistics.mean(tensor), statistics.mean(channel)) if len(channel) == len(pairs) else None


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"


def _seconds(runs: Sequence[RunRecord]) -> float:
    """Time of training one net, on average."""
    return sum(run.spent.seconds for run in runs) / max(1, sum(len(run.seeds) for run in runs))


def add_int8(experiment: Experiment, out: Path, data_dir: Path | None) -> None:
    """Add int8 top-1 to the lines of finished runs that lack it and have their weights; RunError without ONNX."""
    for record in read_runs(out):
        done = all(score.test is None or score.int8_channel is not None for score in record.scores)
        asked = record.job.kind == "run" and record.job.arm in experiment.arms
        if done or not asked or not (out / record.job.folder / PLAIN_FILE).is_file():
            continue
        scores = []
        nets = deployed_nets(experiment, record.job, out, data_of(experiment, record.job.seeds[0], data_dir))
        for score, plain in zip(record.scores, nets, strict=True):
            data = data_of(experiment, score.seed, data_dir)
            found = int8_scores(Source(Path(), plain, "", {}, data.input_size), data)
            tensor, channel = found["per-tensor"].top1, found["per-channel"].top1
            scores.append(replace(score, int8_tensor=tensor, int8_channel=channel))
        replace_run(out, replace(record, scores=tuple(scores)))


def replace_run(out: Path, record: RunRecord) -> None:
    """Put a run's line in the place of the one that its job has; the others stay as they are, byte for byte."""
    path = out / RUNS_FILE
    with locked(out / WORK):
        lines = read_bytes(path).splitlines(keepends=True)
        kept = [record.to_line().encode() if RunRecord.from_line(line).job == record.job else line for line in lines]
        write_atomic(path, b"".join(kept))


def int8_scores(source: Source, data: DataSet, *, calibration: int = 256, seed: int = 0) -> dict[str, Score]:
    """Score the folded net on the test split in int8, by granularity, with the defaults of `export`; keeps no file.

    Raises:
        RunError: ONNX is not installed, or the data is not the net's.
    """
    check_data(source, data)
    images = calibration_images(source, data, calibration, seed)
    functions: dict[str, Function] = {}
    with tempfile.TemporaryDirectory() as scratch, quiet():
        folder = Path(scratch)
        write_onnx(fold(source.plain, input_size=source.input_size).eval(), source, folder)
        for granularity in GRANULARITIES:
            path = folder / f"{granularity}.onnx"
            reduced = needs_reduced_range()
            quantise(folder / ONNX_FILE, path, images, granularity=granularity, reduce_range=reduced)
            functions[granularity] = onnx_function(path)
        return score_all(functions, source, data)
