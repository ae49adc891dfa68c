"""The outcome of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from growshrink.base.config import to_dict
from growshrink.cycle.layout import Phases
from growshrink.cycle.records import Change, RoundRecord, Row
from growshrink.cycle.tables import rounds_table
from growshrink.proofs import Profile
from growshrink.training import Score
from growshrink.training._evaluate import Judgement

PLAIN_FILE = "plain.safetensors"


@dataclass(frozen=True, eq=False)
class CycleResult:
    """Outcome of `run_cycle`.

    Attributes:
        out_dir: Folder with report.md, report.json, curves.png, plain.safetensors, growth_log.json, log.jsonl.
        model: The plain net that was trained, to be deployed.
        rounds: A record per round.
        history: The rows of log.jsonl.
        growth_log: Every change of structure.
        phases: The plan in updates.
        val: On the part of the training set that rounds are judged by.
        judged: On the test set, read once; `final` is its score.
        classes: Their names.
        plain: MACs and parameters of the plain architecture.
        deployed: The same of the net that came out.
        training_macs: Spent, forward and backward, teachers included.
        plain_training_macs: What as many updates of the plain net cost.
        seconds: Of training.
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
