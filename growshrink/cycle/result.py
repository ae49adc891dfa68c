"""What a run leaves behind: the plain net on disk, report.json, report.md and curves.png."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from growshrink.base.writing import save_picture, write_atomic, write_json
from growshrink.cycle.timeline import Timeline
from growshrink.data.feed import Feed
from growshrink.errors import EquivalenceError, RunError
from growshrink.proofs._compare import assert_equivalent

PLAIN_FILE = "plain.safetensors"


@dataclass(frozen=True, eq=False)
class CycleResult:
    """Outcome of `run_cycle`.

    Attributes:
        out_dir: Folder with report.md, report.json, curves.png, plain.safetensors, growth_log.json, log.jsonl.
        model: The plain net that was trained, to be deployed.
        rounds: A record per round: top-1 on the val split before growth, at the peak, vanished, dropped, fused and at
            the end; retention; effect; max_rel; costs.
        history: The rows of log.jsonl.
        growth_log: Every change of structure.
        timeline: The plan in updates.
        val: `top1` and `loss` on the part of the training set that rounds are judged by.
        final: The same on the test set, read once.
        plain: `macs` and `params` of the plain architecture.
        deployed: The same of the net that came out.
        training_macs: Spent, forward and backward, teachers included.
        plain_training_macs: What as many updates of the plain net cost.
        seconds: Of training.
        about: Command, plan, config, data and versions.
    """

    out_dir: Path
    model: nn.Module
    rounds: Sequence[Mapping[str, Any]]
    history: Sequence[Mapping[str, Any]]
    growth_log: Sequence[Mapping[str, Any]]
    timeline: Timeline
    val: Mapping[str, float]
    final: Mapping[str, float]
    plain: Mapping[str, int]
    deployed: Mapping[str, int]
    training_macs: int
    plain_training_macs: int
    seconds: float
    about: Mapping[str, Any]

    @property
    def model_about(self) -> dict[str, Any]:
        """What `about` says of the model, its name at the least."""
        found = self.about.get("model", {})
        return {"name": type(self.model).__name__, **(found if isinstance(found, Mapping) else {"name": str(found)})}

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "final": {**self.final, **self.deployed},
            "val": dict(self.val),
            "plain": dict(self.plain),
            "rounds": [dict(record) for record in self.rounds],
            "training": {
                "macs": self.training_macs,
                "macs_of_plain_training": self.plain_training_macs,
                "cost": self.training_macs / self.plain_training_macs,
                "seconds": self.seconds,
            },
            "about": dict(self.about),
        }

    def write(self) -> None:
        """Write the reports into `out_dir`."""
        write_json(self.out_dir / "report.json", self.to_dict())
        write_json(self.out_dir / "growth_log.json", {"entries": list(self.growth_log)})
        drawn = _draw_curves(self)
        write_atomic(self.out_dir / "report.md", _markdown(self, drawn).encode())

    def table(self) -> str:
        """The rounds as an aligned table for the screen."""
        return _table(self.rounds, markdown=False)


def save_plain(result: CycleResult, plain: nn.Module, feed: Feed) -> None:
    """Write the deployed net and prove it: read back from disk into the plain architecture, strictly, and compared.

    Raises:
        RunError: Keys, shapes or outputs are not the plain net's.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in result.model.state_dict().items()}
    metadata = {
        "about": json.dumps(result.model_about),
        "classes": json.dumps(list(feed.classes)),
        "input_size": json.dumps(list(feed.input_size)),
        "mean": json.dumps(list(feed.mean)),
        "std": json.dumps(list(feed.std)),
    }
    path = result.out_dir / PLAIN_FILE
    write_atomic(path, save(state, metadata))
    read = load_file(path)
    try:
        plain.load_state_dict(read, strict=True)
        assert_equivalent(result.model, plain, input_size=feed.input_size)
    except (RuntimeError, EquivalenceError) as error:
        raise RunError(f"{path}: the net read back is not the one that was trained: {error}") from error
    assert all(torch.equal(read[key], value) for key, value in state.items()), path


_COLUMNS = (
    ("round", lambda r: str(r["number"])),
    ("branches", lambda r: ", ".join(r["branch"]) + f" in {r['num_grown']} layers"),
    ("before", lambda r: _percent(r["top1"].get("before"))),
    ("peak", lambda r: _percent(r["top1"].get("peak"))),
    ("vanished", lambda r: _percent(r["top1"].get("vanished"))),
    ("dropped", lambda r: _percent(r["top1"].get("dropped"))),
    ("fused", lambda r: _percent(r["top1"].get("fused"))),
    ("end", lambda r: _percent(r["top1"].get("end"))),
    ("retention", lambda r: _retention(r)),
    ("effect", lambda r: f"{r['trained_effect']:.3f}" if "max_rel" in r else "-"),
    ("max_rel", lambda r: f"{r['max_rel']:.0e}" if "max_rel" in r else "-"),
    ("grown MACs", lambda r: f"x{r['macs']['grown'] / r['macs']['plain']:.2f}"),
    ("tail", lambda r: f"{r['tail_share']:.0%}"),
    ("training MACs", lambda r: f"{r['training_macs']:.2e}"),
)


_GLOSSARY = {
    "before": "the net as the round found it",
    "peak": "grown, activations alive",
    "vanished": "grown, lam = 0",
    "dropped": "vanished, but with the branches cut off instead of merged: vanished less dropped is what they held",
    "fused": "the plain net right after merging",
    "end": "after the tail on the plain net",
    "retention": "(fused - before) / (peak - before), or *no gain* where the peak is no higher than before; *before* "
    "is a stage of this same run, not a plain net trained as long, so this says nothing about what growing is worth",
    "effect": "relative change of the outputs when the branches, as trained, are silenced",
    "max_rel": "largest relative difference between grown and fused outputs in float64",
    "grown MACs": "of an image through the grown net, over the plain net's",
    "tail": "share of the round's updates that train the plain net",
    "training MACs": "of the round, forward and backward, teachers included",
}


def _retention(record: Mapping[str, Any]) -> str:
    if (value := record.get("retention")) is not None:
        return f"{value:.2f}"
    return "-" if record["top1"].get("before") is None else "no gain"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(rounds: Sequence[Mapping[str, Any]], *, markdown: bool) -> str:
    rows = [[title for title, _ in _COLUMNS], *([cell(record) for _, cell in _COLUMNS] for record in rounds)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    if markdown:
        lines = [f"| {line} |" for line in lines]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    else:
        lines.insert(1, "-+-".join("-" * width for width in widths))
    return "\n".join(lines)


def _markdown(result: CycleResult, drawn: bool) -> str:
    about, final, plain, deployed = result.about, result.final, result.plain, result.deployed
    data, model = about["data"], result.model_about
    same = "exactly the plain net's" if deployed == plain else "NOT the plain net's"
    lines = [
        f"# {model['name']} on {data['name']}",
        "",
        f"**Test top-1 {final['top1']:.2f} %** (loss {final['loss']:.4f}; the test set was read once, at the end), "
        f"val {result.val['top1']:.2f} %.",
        f"Deployed: {deployed['params']:,} parameters, {deployed['macs']:,} MACs an image, {same}.",
        f"Training cost {result.training_macs:.3e} MACs, {result.training_macs / result.plain_training_macs:.2f} times "
        f"that of as many updates of the plain net; {result.seconds:.0f} s.",
        "",
        "## Rounds",
        "",
        _table(result.rounds, markdown=True),
        "",
        f"Top-1 in percent on the val split, {data['val_images']} images of the training set (one image is "
        f"{100 / data['val_images']:.2f} points), of the averaged weights where an average is kept.",
        "",
        *(f"- *{word}*: {meaning}." for word, meaning in _GLOSSARY.items()),
        "",
        *(
            f"- Round {r['number']} was **undone**: fused {r['top1']['fused']:.2f} against {r['top1']['before']:.2f} "
            "before. The net from before it went on, so the proof below is of a net that is gone.\n"
            for r in result.rounds
            if r.get("undone")
        ),
        *_sampled_widths(result),
        "## Did the new parameters learn?",
        "",
    ]
    for record in result.rounds:
        for key, moment in (("gradients_at_update_2", "second update"), ("gradients_at_peak", "peak")):
            if found := record.get(key):
                lines.append(
                    f"- Round {record['number']}, {moment}: {found['with_gradient']} of {found['new_parameters']} new "
                    f"tensors had a gradient, of {found['share_of_norm']:.0%} of the whole gradient's norm."
                )
    if result.rounds:
        lines.append(
            "- The bias of a branch's last norm is among them; where a batch norm follows, that norm subtracts it and "
            "its gradient is rounding noise."
        )
    else:
        lines.append("- No round: the net was never grown.")
    lines += [
        "",
        "## Proof",
        "",
        *(
            f"- Round {r['number']}: fused against grown, max_rel {r['max_rel']:.1e} in float64, "
            f"{r['max_rel_float32']:.1e} in float32, top-1 agreement {r['top1_agreement']:.0%}. Silencing the branches "
            f"changes the outputs by {r['trained_effect']:.2g} as trained, by {r['effect']:.2g} with random norms."
            for r in result.rounds
            if "max_rel" in r
        ),
        *(
            f"- Round {r['number']} merged nothing: its grown net taught the plain net, which started anew."
            for r in result.rounds
            if "max_rel" not in r
        ),
        *(
            "- max_rel is the larger of two: of the net as trained, and of a copy with random norms, where no mistake "
            "can hide behind a small gamma."
            for _ in result.rounds[:1]
        ),
        f"- `{PLAIN_FILE}` was read back into the plain architecture (strict): tensors bit-identical, outputs equal.",
        "",
        "## Use it",
        "",
        "```python",
        "import growshrink, timm, safetensors.torch",
        f"net = timm.create_model({model.get('plain_name', '...')!r}, **{model.get('plain_kwargs', {})!r})",
        f"net.load_state_dict(safetensors.torch.load_file({PLAIN_FILE!r}))",
        "```",
        "",
        f"It takes images of size {tuple(data['input_size'])}, values in [0, 1], less the mean "
        f"{_rounded(data['mean'])}, over the standard deviation {_rounded(data['std'])} (exact in the file's metadata, "
        "with the names of the classes).",
        "",
    ]
    if drawn:
        lines += ["![curves](curves.png)", ""]
    lines += ["## Made by", "", f"`{about.get('command', ' '.join(sys.argv))}`", "", "```json"]
    lines += [json.dumps(dict(about), indent=2), "```", ""]
    return "\n".join(lines)


def _sampled_widths(result: CycleResult) -> list[str]:
    """The section of the rounds whose middle widths were sampled."""
    lines = []
    for record in result.rounds:
        if (left := record.get("left_by")) is None:
            continue
        every = f", in every {left['every']}th update" if left["every"] > 1 else ""
        own = f", {left['inplace_distil']:.0%} of its loss learnt from the wider net" * bool(left["inplace_distil"])
        lines += [
            f"- Round {record['number']}: mode {left['mode']}{every}, out of {left['nets']:,} nets; base net "
            f"{record['top1']['base']:.2f} %{own}, widest net {record['top1']['peak']:.2f} % (at the end of the hold, "
            f"statistics taken anew). An average step cost {left['step_macs'] / record['plain_step_macs']:.2f} times "
            f"the plain net's in MACs. Left by *{left['exit']}*, at width: {_width_name(left['width'])}.",
        ]
        for candidate in left.get("candidates", ()):
            lines.append(f"    - {candidate['top1']:.2f} % fused at width: {_width_name(candidate['width'])}")
    if not lines:
        return []
    return ["## Sampled widths", "", *lines, ""]


def _width_name(width: str | Mapping[str, int]) -> str:
    return width if isinstance(width, str) else f"one drawn at random, {sum(width.values())} middle channels in all"


def _rounded(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.4f}' for value in values)})"


def _draw_curves(result: CycleResult) -> bool:
    """curves.png: accuracy, loss, lam and learning rate, and cost, over the updates; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows, timeline = result.history, result.timeline
    figure = Figure(figsize=(9, 10), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(4, 1, sharex=True)
    accuracy, loss, schedule, cost = axes
    updates = [row["update"] for row in rows]

    top1 = [row["val_top1"] for row in rows]
    accuracy.plot(updates, top1, color="C0")
    interesting = [row["val_top1"] for row in rows if row["round"]] or top1  # the climb from chance would hide the rest
    margin = 0.08 * (max(top1) - min(interesting)) or 1.0
    accuracy.set_ylim(min(interesting) - margin, max(top1) + margin)
    accuracy.set_ylabel("val top-1 (%)")

    teachers = any(record["distil"] != "none" for record in result.rounds)
    loss.plot(updates, [row["train_loss"] for row in rows], color="C1", label="training" + " (and teacher)" * teachers)
    loss.plot(updates, [row["val_loss"] for row in rows], color="C0", label="val")
    loss.set_yscale("log")
    loss.set_ylabel("loss")

    every = range(timeline.total)  # rows are too far apart to show a re-warm
    schedule.plot(every, [timeline.learning_rate(update) for update in every], color="C2", label="learning rate / peak")
    for number in sorted({s.round for s in timeline.segments if s.grown}):
        own = [update for s in timeline.segments if s.round == number and s.grown for update in range(s.start, s.stop)]
        lams = dict(zip(own, map(timeline.lam, own), strict=True))
        if timeline.plan.rounds[number - 1].control == "closed_loop":  # what lam was is in the rows alone
            lams = {row["update"] - 1: row["lam"] for row in rows if row["round"] == number and row["lam"] is not None}
        schedule.plot(list(lams), list(lams.values()), color="C3", label="lam" if number == 1 else None)
    schedule.set_ylabel("lam, learning rate")

    cost.plot([0, *updates], [0, *(row["training_macs"] for row in rows)], color="C4", label="this run")
    cost.plot(
        [0, timeline.total], [0, result.plain_training_macs], "--", color="0.6", label="plain net, as many updates"
    )
    cost.set_ylabel("training MACs")
    cost.set_xlabel("optimizer updates (shaded: grown)")
    cost.set_xlim(0, timeline.total)

    for entry in result.growth_log:
        accuracy.annotate(
            f"{entry['op']} {entry['round']}", (entry["update"], 1.0), xycoords=("data", "axes fraction"), va="bottom"
        )
    for axis in axes:
        for segment in timeline.segments:
            if segment.grown:
                axis.axvspan(segment.start, segment.stop, color="0.93", linewidth=0, zorder=0)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figure.suptitle(
        f"{result.model_about['name']} on {result.about['data']['name']}: test top-1 {result.final['top1']:.2f} %"
    )
    save_picture(figure, result.out_dir / "curves.png")
    return True
