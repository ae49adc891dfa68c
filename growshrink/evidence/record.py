"""The record of an experiment: one line of runs.jsonl for each finished run, from which every table is made.

The folder of an experiment holds plan.json (what is compared), runs.jsonl, and what is made from these two. An
unfinished run has a run folder under runs/, which only the run itself reads: once its line is written it is done.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from growshrink.base.config import Checked, check_fields, from_dict, to_dict
from growshrink.base.locking import lock_file
from growshrink.base.reading import parse_json, read_bytes, read_json
from growshrink.base.writing import write_atomic
from growshrink.cycle.records import Row
from growshrink.errors import PlanError, RunError
from growshrink.runs.folder import PLAIN_FILE

PLAN_FILE = "plan.json"
RUNS_FILE = "runs.jsonl"
#: Folder, under the experiment's, of the run folders of unfinished runs.
WORK = "runs"
#: Version of the lines.
LINE_FORMAT = 1
#: Columns of a history that are kept to the last digit, because pictures are drawn from them; the others are rounded.
EXACT_COLUMNS = ("val_top1",)
#: Significant digits of the others.
DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Job(Checked):
    """Identify a training run of an arm: part of a table, or a "trial", by which a learning rate is chosen.

    `net` is the candidate in a scan, else empty; `budget` is in epochs of the plain net.
    """

    kind: Literal["run", "trial"] = "run"
    net: str = ""
    arm: str
    seeds: tuple[int, ...]
    lr: float
    budget: float

    @property
    def name(self) -> str:
        """Name for messages, and of the run folder."""
        seeds = "-".join(map(str, self.seeds))
        return f"{self.net}{'/' * bool(self.net)}{self.arm}/budget-{self.budget:g}-lr-{self.lr:g}-seeds-{seeds}"

    @property
    def folder(self) -> str:
        """Path of the run folder, relative to the experiment's."""
        return f"{WORK}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class SeedScore(Checked):
    """Top-1 of the net of one seed, in percent, and its loss on the test split (None: judged on the val split only).

    `int8_tensor` and `int8_channel` are top-1 in int8, one scale per layer and per output channel, None until taken.
    """

    seed: int
    val: float
    test: float | None
    loss: float | None
    int8_tensor: float | None = None
    int8_channel: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cost(Checked):
    """Cost per net: `macs`, teachers included, of a `budget`; `seconds` are those of all nets together."""

    epochs: float
    macs: float
    budget: float
    images: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class History:
    """The rows of a run's log.jsonl as columns of equal length; floats are rounded, but for `EXACT_COLUMNS`."""

    update: tuple[int, ...] = ()
    epoch: tuple[float, ...] = ()
    round: tuple[int, ...] = ()
    phase: tuple[str, ...] = ()
    train_loss: tuple[float, ...] = ()
    val_top1: tuple[float, ...] = ()
    val_loss: tuple[float, ...] = ()
    lr: tuple[float, ...] = ()
    lam: tuple[float | None, ...] = ()
    training_macs: tuple[int, ...] = ()
    images_per_second: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len({len(column) for column in vars(self).values()}) > 1:
            raise ValueError("the columns of the history differ in length")

    @staticmethod
    def from_rows(rows: Sequence[Row]) -> History:
        """Collect rows of log.jsonl."""
        names = [entry.name for entry in fields(History)]
        return History(**{name: tuple(_kept(name, getattr(row, name)) for row in rows) for name in names})


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A finished run: one line of runs.jsonl.

    Attributes:
        about: Line that describes its arm.
        scores: One a seed, in the order of `job.seeds`.
        cost: None for a trial that diverged; `diverged` then says why it was given up.
        rounds: Records of the rounds, as in the run's report.json.
        plan: Plan of the run, in epochs, as the version in `versions` writes plans.
        data: Name, size and fingerprint of the data set.
    """

    job: Job
    about: str
    scores: tuple[SeedScore, ...]
    cost: Cost | None
    diverged: str | None = None
    rounds: tuple[Mapping[str, Any], ...] = ()
    command: str = ""
    plan: Mapping[str, Any]
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    updates: int
    versions: Mapping[str, str]
    history: History = History()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        check_fields(self)
        if tuple(score.seed for score in self.scores) != self.job.seeds or not self.scores:
            raise ValueError("the scores are not those of the seeds")
        if self.cost is None and (self.diverged is None or self.job.kind != "trial"):
            raise ValueError("a cost is missing, which only a diverged trial may lack")

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its nets."""
        return self.job.seeds

    @property
    def val(self) -> float:
        """Mean top-1 on the val split."""
        return sum(score.val for score in self.scores) / len(self.scores)

    @property
    def spent(self) -> Cost:
        """The cost of a run that came to its end."""
        assert self.cost is not None
        return self.cost

    def to_line(self) -> str:
        """Write as a line of runs.jsonl."""
        return json.dumps({"format": LINE_FORMAT, **to_dict(self)}, separators=(",", ":")) + "\n"

    @staticmethod
    def from_line(line: str | bytes) -> RunRecord:
        """Read a line of runs.jsonl; ValueError if it is none, or of another version."""
        values = parse_json(line)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        if (found := values.pop("format", None)) != LINE_FORMAT:
            raise ValueError(f"written in format {found!r}, this version of growshrink reads {LINE_FORMAT}")
        return from_dict(RunRecord, values, "", PlanError)


def read_runs(out: Path) -> tuple[RunRecord, ...]:
    """Read the finished runs in `out`, in the order they were finished; RunError for a damaged line or the old form."""
    path, records = out / RUNS_FILE, []
    if not path.exists():
        _refuse_old_form(out)
        return ()
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            records.append(RunRecord.from_line(line))
        except ValueError as error:
            raise RunError(f"{path}, line {number}: damaged or of another version ({error}).") from error
    return tuple(records)


def append_run(out: Path, record: RunRecord) -> None:
    """Add the line of a finished run, atomically, also among other processes; do nothing if its job has one."""
    path = out / RUNS_FILE
    with locked(out / WORK):
        if record.job in {old.job for old in read_runs(out)}:
            return
        content = read_bytes(path) if path.exists() else b""
        if content and not content.endswith(b"\n"):
            content += b"\n"
        write_atomic(path, content + record.to_line().encode())


def read_plan(out: Path) -> dict[str, Any] | None:
    """Read the plan of the experiment in `out`, None if there is none; RunError for the form without runs.jsonl."""
    if not (out / RUNS_FILE).exists():
        _refuse_old_form(out)
    return read_json(out / PLAN_FILE) if (out / PLAN_FILE).exists() else None


def _refuse_old_form(out: Path) -> None:
    """RunError for an experiment of early growshrink 0.1.0: run folders directly in it, each with its seeds.json."""
    folders = ("*/budget-*", "width-*/*/budget-*")
    old = next((path for folder in folders for path in out.glob(f"{folder}/seeds.json")), None)
    if old is not None:
        raise RunError(
            f"{out}: holds run folders from before runs.jsonl (growshrink 0.1.0, {old.parent.relative_to(out)}), which "
            "this version does not read. Choose another folder with --out, or read it with the version that wrote it."
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time inside."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:  # closing it ends the lock
        while not lock_file(lock):
            time.sleep(0.02)
        yield


def _kept(name: str, value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and name not in EXACT_COLUMNS else value


@dataclass(frozen=True, kw_only=True)
class Tuning(Checked):
    """How the learning rate of every arm is chosen: the same trials for each, judged on the val split.

    `budget` is that of a trial, in epochs of the plain net; `seeds` are others than the experiment's, or with its
    budget the very same: the trials at the chosen rate are then its runs.
    """

    lr: tuple[float, ...]
    budget: float
    seeds: tuple[int, ...] = (100,)


@dataclass(frozen=True, kw_only=True)
class ArmComparison(Checked):
    """The part of an experiment that its table depends on; `lr` is that of an arm without trials."""

    data: str
    model: str
    model_kwargs: Mapping[str, Any]
    pool: int
    budget: float
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    lr: float
    tuning: Tuning | None
    images: int | None = None
    predictions: tuple[str, ...] = ()

    @staticmethod
    def from_plan(plan: Mapping[str, Any]) -> ArmComparison:
        """Read plan.json of an experiment's folder, without what only training needs; PlanError for what is none."""
        kept = {entry.name: plan[entry.name] for entry in fields(ArmComparison) if entry.name in plan}
        config = plan.get("config")
        lr = config.get("lr") if isinstance(config, Mapping) else None
        return from_dict(ArmComparison, {**kept, "lr": lr}, "the plan")


def trials_of(comparison: ArmComparison) -> list[Job]:
    """List the runs that learning rates are chosen by."""
    if (tuning := comparison.tuning) is None:
        return []
    pairs = itertools.product(comparison.arms, tuning.lr)
    return [Job(kind="trial", arm=arm, seeds=tuning.seeds, lr=lr, budget=tuning.budget) for arm, lr in pairs]


def chosen_lr(comparison: ArmComparison, records: Sequence[RunRecord]) -> dict[str, float]:
    """Choose for every arm the learning rate with the best mean val top-1 of its trials; without any, the config's."""
    best = dict.fromkeys(comparison.arms, comparison.lr)
    done = {record.job: record for record in records}
    for arm in comparison.arms:
        trials = [done[job] for job in trials_of(comparison) if job.arm == arm and job in done]
        if trials:
            best[arm] = max(trials, key=lambda trial: trial.val).job.lr
    return best


def runs_of(
    comparison: ArmComparison, lr: Mapping[str, float], records: Sequence[RunRecord]
) -> dict[str, list[RunRecord]]:
    """Find the finished runs that the table is made of, for every arm, in the order of the seeds."""
    found: dict[str, list[RunRecord]] = {}
    order = {seed: number for number, seed in enumerate(comparison.seeds)}
    for arm in comparison.arms:
        wanted = Job(arm=arm, seeds=(), lr=lr[arm], budget=comparison.budget)
        runs = [run for run in records if replace(run.job, seeds=()) == wanted and order.keys() & set(run.seeds)]
        found[arm] = sorted(runs, key=lambda run: min(order.get(seed, len(order)) for seed in run.seeds))
    return found


def states_of(out: Path, job: Job) -> list[dict[str, Tensor]]:
    """Read the state_dict of the plain net of each seed of a finished run; RunError where it was not kept."""
    path = out / job.folder / PLAIN_FILE
    if not path.is_file():
        raise RunError(f"{path}: the weights of a finished run are missing; only its line of runs.jsonl was kept.")
    return unstack_state(load_file(path), len(job.seeds))


def unstack_state(state: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The state_dict of each of the nets in that of their stack; what has no dimension is the same for all."""
    return [
        {key: value.chunk(count)[index] if value.ndim else value for key, value in state.items()}
        for index in range(count)
    ]
