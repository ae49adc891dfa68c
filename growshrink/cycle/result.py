"""The outcome of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from growshrink.base.config import to_dict
from growshrink.cycle.layout import Phases
from growshrink.cycle.records import Change, RoundRecord, Row
from growshrink.proofs import Profile
from growshrink.training import Score
from growshrink.training._evaluate import Judgement

_COLUMNS = (
    ("round", lambda r: str(r.number)),
    ("branches", lambda r: f"{', '.join(r.branch)} in {r.num_grown} layers" if r.branch else "none"),
    ("before", lambda r: _percent(r.top1.before)),
    ("peak", lambda r: _percent(r.top1.peak)),
    ("vanished", lambda r: _percent(r.top1.vanished)),
    ("dropped", lambda r: _percent(r.top1.dropped)),
    ("fused", lambda r: _percent(r.top1.fused)),
    ("end", lambda r: _percent(r.top1.end)),
    ("retention", lambda r: _retention(r)),
    ("effect", lambda r: "-" if r.trained_effect is None else f"{r.trained_effect:.3f}"),
    ("max_rel", lambda r: "-" if r.max_rel is None else f"{r.max_rel:.0e}"),
    ("grown MACs", lambda r: f"x{r.macs.grown / r.macs.plain:.2f}"),
    ("tail", lambda r: f"{r.tail_share:.0%}"),
    ("training MACs", lambda r: f"{r.training_macs:.2e}"),
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


def glossary(rounds: Sequence[RoundRecord]) -> list[tuple[str, str]]:
    """What the columns of `rounds_table` mean, those that it has."""
    cells = dict(_COLUMNS)
    return [(name, text) for name, text in _GLOSSARY.items() if any(cells[name](record) != "-" for record in rounds)]


def rounds_table(rounds: Sequence[RoundRecord], *, markdown: bool) -> str:
    """The rounds as an aligned table, without columns that have nothing in them."""
    shown = [each for each in _COLUMNS if any(each[1](record) != "-" for record in rounds)]
    rows = [[title for title, _ in shown], *([cell(record) for _, cell in shown] for record in rounds)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    if markdown:
        lines = [f"| {line} |" for line in lines]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    else:
        lines.insert(1, "-+-".join("-" * width for width in widths))
    return "\n".join(lines)


def _retention(record: RoundRecord) -> str:
    if record.retention is not None:
        return f"{record.retention:.2f}"
    return "-" if None in (record.top1.before, record.top1.peak) or not record.branch else "no gain"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value >= 0 else f"{value:.4g}"  # minus a loss of any size


@dataclass(frozen=True, eq=False)
class CycleResult:
    """Outcome of `run_cycle`.

    Attributes:
        out_dir: Folder with report.md, report.json, curves.png, plain.safetensors, growth_log.json, log.jsonl.
        model: The plain net that was trained, to be deployed.
        history: The rows of log.jsonl.
        growth_log: Every change of structure.
        phases: The plan in updates.
        val: On the part of the training set that rounds are judged by.
        judged: On the test set, read once; `final` is its score.
        plain: MACs and parameters of the plain architecture; `deployed` those of the net that came out.
        training_macs: Spent, forward and backward, teachers included; `plain_training_macs` by as many plain updates.
        seconds: Time of training.
        about: Command, plan, config, data and versions.
    """

    out_dir: Path
    model: nn.Module
    rounds: Sequence[RoundRecord]
    history: Sequence[Row]
    growth_log: Sequence[Change]
    phases: Phases
    val: Score
    judged: Judgement
    classes: tuple[str, ...]
    plain: Profile
    deployed: Profile
    training_macs: int
    plain_training_macs: int
    seconds: float
    about: Mapping[str, Any]

    @property
    def final(self) -> Score:
        """On the test set."""
        return self.judged.score

    @property
    def cost(self) -> float:
        """Training MACs over those of as many updates of the plain net."""
        return self.training_macs / self.plain_training_macs

    @property
    def model_about(self) -> dict[str, Any]:
        """What `about` says of the model, its name at the least."""
        found = self.about.get("model", {})
        return {"name": type(self.model).__name__, **(found if isinstance(found, Mapping) else {"name": str(found)})}

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "final": {**asdict(self.final), **asdict(self.deployed)},
            "val": asdict(self.val),
            "confusion": self.judged.confusion.tolist(),
            "classes": list(self.classes),
            "plain": asdict(self.plain),
            "rounds": to_dict(self.rounds),
            "training": {
                "macs": self.training_macs,
                "macs_of_plain_training": self.plain_training_macs,
                "cost": self.cost,
                "seconds": self.seconds,
            },
            "about": dict(self.about),
        }

    def table(self) -> str:
        """The rounds as an aligned table for the screen."""
        return rounds_table(self.rounds, markdown=False)
