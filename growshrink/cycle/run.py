"""run_cycle: execute a plan of rounds, and leave a plain net, a proof and a record."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from growshrink.compare import profile, training_macs
from growshrink.cycle.log import replay, shapes_of
from growshrink.cycle.plan import CyclePlan, Segment, Timeline
from growshrink.cycle.result import CycleResult, save_plain, versions
from growshrink.cycle.surgery import fuse_nets, gradients, grow_nets, retention
from growshrink.dataflow import InputSize
from growshrink.errors import RunError
from growshrink.grown import grown_modules
from growshrink.training.batches import Augment
from growshrink.training.checkpoints import (
    find_checkpoints,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
    write_atomic,
)
from growshrink.training.data import DataSet
from growshrink.training.evaluate import Score, evaluate
from growshrink.training.feed import Feed, MemoryFeed, check_model_fits
from growshrink.training.folder import RunFolder, json_line
from growshrink.training.trainer import Teacher, TrainConfig, Trainer
from growshrink.transforms import grow, growth_report


def run_cycle(
    model: nn.Module,
    data: DataSet | Feed,
    plan: CyclePlan,
    *,
    out_dir: str | Path | RunFolder,
    config: TrainConfig | None = None,
    batch_size: int = 128,
    augment: Augment = Augment(),  # noqa: B008 - frozen
    device: torch.device | str = "cpu",
    resume: bool = False,
    progress: bool = False,
    tensorboard: bool = False,
    about: Mapping[str, Any] | None = None,
) -> CycleResult:
    """Train `model` through rounds of grow -> train -> vanish -> fuse -> train.

    Args:
        model: A plain timm model (or one grown at birth, which the first round then does not grow). Not modified.
        data: A data set, or a feed of batches of your own.
        plan: The rounds.
        out_dir: Folder of the run, made here or claimed before; see `RunFolder`.
        config: How to train; None for the defaults.
        batch_size: Images per update, where `data` is a data set.
        augment: Of the training images, where `data` is a data set.
        device: Where to train.
        resume: Go on with the unfinished run in `out_dir`.
        progress: Show a progress bar, and a line per round.
        tensorboard: Also write event files (needs the extra `tensorboard`).
        about: Written into the run's marker and report, e.g. the command and the model's arguments.

    Returns:
        What the run reached. `result.model` is the plain net (the averaged one, where there is an average).

    Raises:
        RunError: The folder is in use or holds another run, or the loss is no longer finite (the last checkpoint
            stays).
        PlanError: The plan does not fit the data.
    """
    feed = (
        MemoryFeed.of(data, batch_size=batch_size, augment=augment, seed=plan.seed, device=device)
        if isinstance(data, DataSet)
        else data
    )
    timeline = Timeline(plan, feed.train.updates_per_epoch)
    assert timeline.total > 0  # a plan that does not fit the data fails here, before anything is written
    check_model_fits(model, feed)
    _check_rounds(model, plan, feed.input_size)
    if isinstance(out_dir, RunFolder):
        claim: AbstractContextManager[RunFolder] = nullcontext(out_dir)  # whoever claimed it releases it
    else:
        claim = RunFolder.claim(Path(out_dir), resume=resume)
    with claim as folder:
        if folder.finished:
            raise RunError(f"{folder.path}: the run in it is finished.")
        run = _Run(model, feed, timeline, config or TrainConfig(), folder, torch.device(device), progress, tensorboard)
        return run.execute(dict(about or {}))


@dataclass
class _State:
    """What a checkpoint holds beside tensors: plain values, all of it written to and read from JSON."""

    log: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    macs_spent: int = 0
    seconds: float = 0.0
    teacher_log: int | None = None  # entries of the log that make the teacher's structure; None: no teacher


class _Run:
    """One execution of a plan."""

    def __init__(
        self,
        model: nn.Module,
        feed: Feed,
        timeline: Timeline,
        config: TrainConfig,
        folder: RunFolder,
        device: torch.device,
        progress: bool,
        tensorboard: bool,
    ) -> None:
        self.initial = copy.deepcopy(model)
        self.feed = feed
        self.timeline = timeline
        self.plan = timeline.plan
        self.config = config
        self.folder = folder
        self.device = device
        self.state = _State()
        self.teacher: nn.Module | None = None
        self.size = feed.input_size
        self.bar = tqdm(total=timeline.total, unit="update", disable=not progress, dynamic_ncols=True, smoothing=0.05)
        self.writer = _tensorboard_writer(folder.path) if tensorboard else None
        self._cost: tuple[int, int] | None = None  # MACs of the present structure, see _macs_per_image
        self.trainer = self._make_trainer(self.initial)

    # ---- the run

    def execute(self, about: dict[str, Any]) -> CycleResult:
        identity = {
            "plan": self.plan.to_dict(),
            "config": asdict(self.config),
            "data": {"name": self.feed.name, "batch_size": self.feed.train.batch_size, "input_size": list(self.size)},
            "updates": self.timeline.total,
        }
        first = 0
        if self.folder.fresh:
            self.folder.write_marker("running", {**identity, "about": about, "versions": versions()})
        else:
            self.folder.check_same(identity)
            first = self._restore()
        try:
            for index, segment in enumerate(self.timeline.segments):
                if index < first:
                    continue
                if self.trainer.update == segment.start:
                    self._enter(segment)
                self._train(index, segment)
                self._leave(segment)
                self._checkpoint(index + 1)
            return self._finish(identity, about)
        finally:
            self.bar.close()
            if self.writer is not None:
                self.writer.close()

    def _train(self, index: int, segment: Segment) -> None:
        """The updates of a segment, in pieces that end at every epoch."""
        per_epoch = self.feed.train.updates_per_epoch
        while self.trainer.update < segment.stop:
            start = self.trainer.update
            stop = min(segment.stop, (start // per_epoch + 1) * per_epoch)
            if segment.phase == "hold" and start == segment.start:
                stop = min(stop, start + 2)  # the second update: by now every new parameter must have a gradient
            self.bar.set_description(
                f"round {segment.round} {segment.phase}" if segment.round else segment.phase, refresh=False
            )
            began = time.perf_counter()
            loss = float(
                self.trainer.train(
                    stop,
                    learning_rate=self.timeline.learning_rate,
                    lam=self.timeline.lam,
                    teacher=self._teacher_of(segment),
                    after_update=self.bar.update,
                )
            )
            seconds = time.perf_counter() - began
            if not loss < float("inf"):
                kept = find_checkpoints(self.folder.path)
                raise RunError(
                    f"the loss is {loss} in round {segment.round}, phase {segment.phase}, between updates {start} and "
                    f"{stop}. {f'{kept[0]} is kept' if kept else 'There is no checkpoint yet'}; try a lower lr, or "
                    "clip_grad=1."
                )
            self.state.seconds += seconds
            self.state.macs_spent += (stop - start) * self.feed.train.batch_size * self._macs_per_image(segment)
            if segment.phase == "hold" and stop == min(segment.start + 2, segment.stop):
                self.state.rounds[-1]["gradients_at_update_2"] = gradients(self.trainer)
            if stop % per_epoch == 0 or stop == segment.stop:
                self._log_row(segment, start, loss, seconds)
            if stop % per_epoch == 0 and stop < segment.stop:
                self._checkpoint(index)

    def _enter(self, segment: Segment) -> None:
        if segment.phase != "hold":
            return
        plan = self.plan.rounds[segment.round - 1]
        before = self._score()
        net = profile(self.trainer.model, self.size)
        born_grown = bool(grown_modules(self.trainer.model))
        if plan.distil == "previous":
            self._set_teacher()
        seed = self.plan.seed + 1000 * segment.round
        entry: dict[str, Any] = {"branches": [], "names": [], "seed": seed}
        if not born_grown:
            entry = grow_nets(self.trainer, plan, seed, self.size)
        self._log("grow", segment, **entry, shapes=shapes_of(self.trainer.model))
        grown = profile(self.trainer.model, self.size)
        self.state.rounds.append(
            {
                "number": segment.round,
                "branch": ["born grown"] if born_grown else list(plan.branch),
                "ratio": plan.ratio,
                "distil": plan.distil,
                "num_grown": len(grown_modules(self.trainer.model)),
                "num_skipped": len(growth_report(self.trainer.model, input_size=self.size).skipped),
                "tail_share": self.timeline.tail_share(segment.round),
                "top1": {"before": None if born_grown else before.top1},
                "params": {"plain": net.params, "grown": grown.params},
                "macs": {"plain": net.macs, "grown": grown.macs},
                "training_macs_start": self.state.macs_spent,
            }
        )

    def _leave(self, segment: Segment) -> None:
        if segment.round == 0:
            return
        record = self.state.rounds[-1]
        plan = self.plan.rounds[segment.round - 1]
        if segment.phase == "hold":
            record["top1"]["peak"] = self._score().top1
            record["gradients_at_peak"] = gradients(self.trainer)
            if plan.distil == "peak":
                self._set_teacher()
        elif segment.phase == "settle":
            fused = fuse_nets(self.trainer, lambda net: self._score(net).top1, self.size)
            record["top1"].update(fused.pop("top1"))
            record.update(fused, retention=retention(record["top1"]))
            self._log("fuse", segment, max_rel=record["max_rel"], effect=record["effect"])
        if segment.stop == max(s.stop for s in self.timeline.segments if s.round == segment.round):
            record["top1"]["end"] = self._score().top1
            record["training_macs"] = self.state.macs_spent - record.pop("training_macs_start")
            self.teacher, self.state.teacher_log = None, None
            if not self.bar.disable:
                self.bar.write(_round_line(record))

    # ---- teachers, scores, costs

    def _log(self, op: str, segment: Segment, **values: Any) -> None:
        self.state.log.append({"op": op, "update": self.trainer.update, "round": segment.round, **values})
        self._cost = None

    def _set_teacher(self) -> None:
        self.teacher = copy.deepcopy(self.trainer.best).eval().requires_grad_(False)
        self.state.teacher_log = len(self.state.log)

    def _teacher_of(self, segment: Segment) -> Teacher | None:
        if self.teacher is None or segment.phase == "hold":
            return None
        plan = self.plan.rounds[segment.round - 1]
        return Teacher(self.teacher, plan.distil_weight, plan.temperature)

    def _score(self, model: nn.Module | None = None) -> Score:
        return evaluate(model or self.trainer.best, self.feed.val, amp=self.config.amp)

    def _macs_per_image(self, segment: Segment) -> int:
        """Forward and backward of the graph that runs now, and the teacher's forward."""
        if self._cost is None:
            teacher = profile(self.teacher, self.size).macs if self.teacher is not None else 0
            self._cost = training_macs(self.trainer.model, self.size), teacher
        return self._cost[0] + (self._cost[1] if self._teacher_of(segment) is not None else 0)

    def _log_row(self, segment: Segment, start: int, loss: float, seconds: float) -> None:
        last = self.trainer.update - 1
        score = self._score()
        row = {
            "update": self.trainer.update,
            "epoch": self.trainer.update / self.feed.train.updates_per_epoch,
            "round": segment.round,
            "phase": segment.phase,
            "train_loss": loss,
            "val_top1": score.top1,
            "val_loss": score.loss,
            "lr": self.config.lr * self.timeline.learning_rate(last),
            "lam": self.timeline.lam(last) if segment.grown else None,
            "training_macs": self.state.macs_spent,
            "images_per_second": (self.trainer.update - start) * self.feed.train.batch_size / seconds,
            "seconds": self.state.seconds,
        }
        self.state.history.append(row)
        with open(self.folder.path / "log.jsonl", "a") as file:
            file.write(json_line(row))
        self.bar.set_postfix(loss=f"{loss:.3f}", val=f"{score.top1:.1f}", refresh=False)
        if self.writer is not None:
            for key in ("train_loss", "val_top1", "val_loss", "lr", "images_per_second"):
                self.writer.add_scalar(key, row[key], self.trainer.update)
            self.writer.add_scalar("lam", row["lam"] or 0.0, self.trainer.update)

    # ---- checkpoints

    def _checkpoint(self, next_segment: int) -> None:
        state: dict[str, Any] = {
            "update": self.trainer.update,
            "next_segment": next_segment,
            "run": asdict(self.state),
            "model": self.trainer.model.state_dict(),
            "optimizer": self.trainer.optimizer_state(),
            "random": random_state(),
        }
        if self.trainer.ema is not None:
            state["ema"] = self.trainer.ema.state_dict()
        if self.teacher is not None:
            state["teacher"] = self.teacher.state_dict()
        save_checkpoint(self.folder.path, self.trainer.update, state)

    def _restore(self) -> int:
        """Load the newest checkpoint that is whole; the number of the segment to go on with."""
        for path in find_checkpoints(self.folder.path):
            try:
                saved = load_checkpoint(path)
            except RunError as error:
                self.bar.write(f"{error} Trying the one before.")
                continue
            self.state = _State(**saved["run"])
            self.trainer = self._make_trainer(replay(self.initial, self.state.log, self.size))
            self.trainer.update = saved["update"]
            self.trainer.model.load_state_dict(saved["model"])
            if self.trainer.ema is not None:
                self.trainer.ema.load_state_dict(saved["ema"])
            self.trainer.load_optimizer_state(saved["optimizer"])
            if self.state.teacher_log is not None:
                teacher = replay(self.initial, self.state.log[: self.state.teacher_log], self.size)
                teacher.load_state_dict(saved["teacher"])
                self.teacher = self._placed(teacher).eval().requires_grad_(False)
            set_random_state(saved["random"])
            rows = "".join(map(json_line, self.state.history))
            write_atomic(self.folder.path / "log.jsonl", rows.encode())
            self.bar.update(self.trainer.update)
            return saved["next_segment"]
        write_atomic(self.folder.path / "log.jsonl", b"")  # killed before the first checkpoint: start again
        return 0

    def _make_trainer(self, model: nn.Module) -> Trainer:
        return Trainer(self._placed(copy.deepcopy(model)), self.config, self.feed.train)

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.to(self.device).to(memory_format=torch.channels_last)

    # ---- the end

    def _finish(self, identity: dict[str, Any], about: dict[str, Any]) -> CycleResult:
        best = self.trainer.best.eval()
        plain = replay(self.initial, [{"op": "fuse"}], self.size)
        result = CycleResult(
            out_dir=self.folder.path,
            model=best,
            rounds=self.state.rounds,
            history=self.state.history,
            growth_log=self.state.log,
            val=asdict(self._score()),
            final=asdict(evaluate(best, self.feed.test, amp=self.config.amp)),
            plain=asdict(profile(plain, self.size)),
            deployed=asdict(profile(best, self.size)),
            training_macs=self.state.macs_spent,
            plain_training_macs=self.timeline.total * self.feed.train.batch_size * training_macs(plain, self.size),
            seconds=self.state.seconds,
            about={**about, **identity, "versions": versions()},
        )
        save_plain(result, plain, self.feed)
        result.write()
        self.folder.write_marker("finished", {**identity, "about": about, "versions": versions()})
        return result


def _check_rounds(model: nn.Module, plan: CyclePlan, input_size: InputSize) -> None:
    """Grow copies as the rounds will, so that a round that cannot be is refused before the first update."""
    born_grown = bool(grown_modules(model))
    plain = replay(model, [{"op": "fuse"}], input_size)
    for entry in plan.rounds[1:] if born_grown else plan.rounds:
        grow(plain, entry.branch, ratio=entry.ratio, where=entry.where, input_size=input_size)


def _round_line(record: Mapping[str, Any]) -> str:
    top1 = record["top1"]
    parts = [
        f"{key} {top1[key]:.2f}" for key in ("before", "peak", "vanished", "fused", "end") if top1.get(key) is not None
    ]
    return f"round {record['number']} ({', '.join(record['branch'])}): val top-1 " + " -> ".join(parts)


def _tensorboard_writer(path: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError("TensorBoard is not installed: pip install 'growshrink[tensorboard]'.") from error
    return SummaryWriter(str(path / "tensorboard"))
