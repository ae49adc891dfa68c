"""run_cycle: execute a plan of rounds, and leave a plain net, a proof and a record."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from growshrink.compare import profile, training_macs
from growshrink.cycle.augmented import Augmentation, Augmentations, save_net
from growshrink.cycle.control import LamControl
from growshrink.cycle.journal import Journal
from growshrink.cycle.log import replay, shapes_of
from growshrink.cycle.plan import CyclePlan, Segment, Timeline
from growshrink.cycle.result import CycleResult, save_plain, versions
from growshrink.cycle.state import RunState, newest_run, save_run
from growshrink.cycle.surgery import check_rounds, collapse_net, fuse_nets, gradients, grow_nets, retention
from growshrink.errors import RunError
from growshrink.grown import grown_modules
from growshrink.online import expand_online
from growshrink.training.batches import Augment
from growshrink.training.checkpoints import find_checkpoints, set_random_state
from growshrink.training.data import DataSet
from growshrink.training.evaluate import Score, evaluate
from growshrink.training.feed import Feed, MemoryFeed, check_model_fits
from growshrink.training.folder import RunFolder
from growshrink.training.listening import ListeningTrainer
from growshrink.training.trainer import Teacher, TrainConfig, Trainer
from growshrink.transforms import growth_report


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
        about: Written into the run's marker and report: "command", and whatever else makes the run what it is (the
            model's arguments, say). A run is resumed only with the same, "command" excepted.

    Returns:
        What the run reached. `result.model` is the plain net (the averaged one, where there is an average).

    Raises:
        RunError: The folder is in use or holds another run, or the loss is no longer finite (the last checkpoint
            stays).
        PlanError: The plan does not fit the data or the model.
    """
    about = dict(about or {})
    if isinstance(data, DataSet):
        feed: Feed = MemoryFeed.of(data, batch_size=batch_size, augment=augment, seed=plan.seed, device=device)
        about["augment"] = asdict(augment)
    else:
        feed = data
    timeline = Timeline(plan, feed.train.updates_per_epoch, born_grown=bool(grown_modules(model)))
    assert timeline.total > 0  # a plan that does not fit the data fails here, before anything is written
    check_model_fits(model, feed)
    check_rounds(model, plan, feed.input_size)
    if isinstance(out_dir, RunFolder):
        claim: AbstractContextManager[RunFolder] = nullcontext(out_dir)  # whoever claimed it releases it
    else:
        claim = RunFolder.claim(Path(out_dir), resume=resume)
    with claim as folder:
        if folder.finished:
            raise RunError(f"{folder.path}: the run in it is finished.")
        run = _Run(model, feed, timeline, config or TrainConfig(), folder, torch.device(device), progress, tensorboard)
        return run.execute(about)


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
        self.state = RunState()
        self.teacher: nn.Module | None = None
        self.model_about: Mapping[str, Any] = {}
        self.size = feed.input_size
        self._augmentations = Augmentations(timeline, feed.input_size)
        self._cost: tuple[int, int] | None = None  # MACs of the present structure, see _macs_per_image
        self.lam = LamControl(timeline)
        self.trainer = self._make_trainer(self.initial)
        self.journal = Journal(folder.path, timeline.total, progress=progress, tensorboard=tensorboard)

    # ---- the run

    def execute(self, about: dict[str, Any]) -> CycleResult:
        self.model_about = about.get("model", {})
        command = {"command": about.pop("command", " ".join(sys.argv))}
        data = {
            "name": self.feed.name,
            "batch_size": self.feed.train.batch_size,
            "input_size": list(self.size),
            "mean": list(self.feed.mean),
            "std": list(self.feed.std),
            "val_images": len(self.feed.val),
            "test_images": len(self.feed.test),
        }
        identity = {
            **about,
            "plan": self.plan.to_dict(),
            "config": asdict(self.config),
            "data": data,
            "updates": self.timeline.total,
        }
        record = {**command, **identity, "versions": versions()}
        try:
            first = 0
            if self.folder.fresh:
                self.folder.write_marker("running", record)
            else:
                self.folder.check_same(identity)
                first = self._restore()
            for index, segment in enumerate(self.timeline.segments):
                if index < first:
                    continue
                if self.trainer.update == segment.start:
                    self._enter(segment)
                self._train(index, segment)
                self._leave(segment)
                self._checkpoint(index + 1)
            return self._finish(record)
        finally:
            self.journal.close()

    def _train(self, index: int, segment: Segment) -> None:
        """The updates of a segment, in pieces that end at every epoch."""
        per_epoch = self.feed.train.updates_per_epoch
        self.journal.enter(segment)
        while self.trainer.update < segment.stop:
            start = self.trainer.update
            stop = min(segment.stop, (start // per_epoch + 1) * per_epoch)
            second = segment.start + 2  # by then every new parameter must have a gradient
            if segment.phase == "hold" and start < second:
                stop = min(stop, second)
            augmentation = self._augmentation_of(segment)
            began = time.perf_counter()
            loss = float(
                self.trainer.train(
                    stop,
                    learning_rate=self.timeline.learning_rate,
                    lam=self.lam,
                    teacher=self._teacher_of(segment),
                    task=augmentation.task if augmentation else None,
                    after_update=self.journal.updated,
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
            macs = augmentation.macs(start, stop) if augmentation else (stop - start) * self._macs_per_image(segment)
            self.state.macs_spent += self.feed.train.batch_size * macs
            if segment.phase == "hold" and stop == second and not augmentation:
                self.state.rounds[-1]["gradients_at_update_2"] = gradients(self.trainer)
            if stop % per_epoch == 0 or stop == segment.stop:
                self._log_row(segment, start, loss, seconds)
            if stop % per_epoch == 0 and stop < segment.stop:
                self._checkpoint(index)

    def _enter(self, segment: Segment) -> None:
        if segment.phase == "hold":
            self._grow(segment)
        if segment.phase in ("hold", "settle") and self.plan.rounds[segment.round - 1].online:
            if entry := collapse_net(self.trainer, self.lam(segment.start)):
                self._log("collapse", segment, **entry)

    def _grow(self, segment: Segment) -> None:
        plan = self.plan.rounds[segment.round - 1]
        before = self._score()
        net = profile(self.trainer.model, self.size)
        born_grown = bool(grown_modules(self.trainer.model))
        if plan.distil == "previous":
            self._set_teacher(self.trainer.best)
        seed = self.plan.seed + 1000 * segment.round
        entry: dict[str, Any] = {"branches": [], "names": [], "seed": seed}
        if not born_grown:
            entry = grow_nets(self.trainer, plan, seed, self.size)
        self._log("grow", segment, **entry, shapes=shapes_of(self.trainer.model))
        if plan.augment != "none":
            self._save_supernet("init", segment)
        grown = profile(self.trainer.model, self.size)
        self.state.rounds.append(
            {
                "number": segment.round,
                "branch": ["born grown"] if born_grown else list(plan.branch),
                "ratio": plan.ratio,
                "augment": plan.augment,
                "distil": plan.distil,
                "num_grown": len(grown_modules(self.trainer.model)),
                "num_skipped": len(growth_report(self.trainer.model, input_size=self.size).skipped),
                "tail_share": self.timeline.tail_share(segment.round),
                "top1": {"before": None if born_grown else before.top1},
                "params": {"plain": net.params, "grown": grown.params},
                "macs": {"plain": net.macs, "grown": grown.macs},
                "plain_step_macs": training_macs(replay(self.initial, [{"op": "fuse"}], self.size), self.size),
                "training_macs_start": self.state.macs_spent,
            }
        )

    def _leave(self, segment: Segment) -> None:
        if segment.round == 0:
            return
        record = self.state.rounds[-1]
        plan = self.plan.rounds[segment.round - 1]
        augmentation = self._augmentation_of(segment)
        if segment.phase == "hold":
            peak = augmentation.full_net(self.trainer) if augmentation else self.trainer.best
            record["top1"]["peak"] = self._score(peak).top1
            if not augmentation:
                record["gradients_at_peak"] = gradients(self.trainer)
            if plan.distil == "peak":
                self._set_teacher(peak)
        if self.timeline.last_grown(segment):
            self.trainer.calibrate_average()
            if augmentation:
                self._save_supernet("supernet", segment)
                record["top1"]["base"] = self._score().top1
                record["left_by"] = {
                    **augmentation.describe(*self.timeline.grown_span(segment.round)),
                    **augmentation.leave(self.trainer, plan, self._top1, self.size),
                }
                self._augmentations.close()
            fused = fuse_nets(self.trainer, self._top1, self.size)
            record["top1"].update(fused.pop("top1"))
            record.update(fused, retention=retention(record["top1"]))
            self._log("fuse", segment, max_rel=record["max_rel"], effect=record["effect"])
        if segment.stop == max(s.stop for s in self.timeline.segments if s.round == segment.round):
            record["top1"]["end"] = self._score().top1
            record["training_macs"] = self.state.macs_spent - record.pop("training_macs_start")
            self.teacher, self.state.teacher_log = None, None
            self.journal.end_round(record)

    # ---- teachers, scores, costs

    def _log(self, op: str, segment: Segment, **values: Any) -> None:
        self.state.log.append({"op": op, "update": self.trainer.update, "round": segment.round, **values})
        self._cost = None

    def _set_teacher(self, net: nn.Module) -> None:
        self.teacher = expand_online(net).eval().requires_grad_(False)
        self.state.teacher_log = len(self.state.log)
        self._cost = None

    def _teacher_of(self, segment: Segment) -> Teacher | None:
        if self.teacher is None or segment.phase == "hold":
            return None
        plan = self.plan.rounds[segment.round - 1]
        return Teacher(self.teacher, plan.distil_weight, plan.temperature)

    def _augmentation_of(self, segment: Segment) -> Augmentation | None:
        return self._augmentations.of(segment, self.trainer, self._teacher_of(segment))

    def _save_supernet(self, name: str, segment: Segment) -> None:
        entry = next(e for e in reversed(self.state.log) if e["op"] == "grow")
        number = f"-{segment.round}" if len(self.plan.rounds) > 1 else ""
        save_net(
            self.folder.path / f"{name}{number}.safetensors", self.trainer.best, self.model_about, entry, self.size
        )

    def _top1(self, model: nn.Module) -> float:
        return self._score(model).top1

    def _score(self, model: nn.Module | None = None) -> Score:
        return evaluate(model or self.trainer.best, self.feed.val)

    def _macs_per_image(self, segment: Segment) -> int:
        """Forward and backward of the graph that runs now, and the teacher's forward."""
        if self._cost is None:
            teacher = profile(self.teacher, self.size).macs if self.teacher is not None else 0
            batch_size = self.feed.train.batch_size
            self._cost = training_macs(self.trainer.model, self.size, batch_size), teacher
        return self._cost[0] + (self._cost[1] if self._teacher_of(segment) is not None else 0)

    def _log_row(self, segment: Segment, start: int, loss: float, seconds: float) -> None:
        last = self.trainer.update - 1
        score = self._score(self._augmentations.judged(self.trainer))
        row = {
            "update": self.trainer.update,
            "epoch": self.trainer.update / self.feed.train.updates_per_epoch,
            "round": segment.round,
            "phase": segment.phase,
            "train_loss": loss,
            "val_top1": score.top1,
            "val_loss": score.loss,
            "lr": self.config.lr * self.timeline.learning_rate(last),
            "lam": self.lam(last) if grown_modules(self.trainer.model) else None,
            "training_macs": self.state.macs_spent,
            "images_per_second": (self.trainer.update - start) * self.feed.train.batch_size / seconds,
            "seconds": self.state.seconds,
        }
        self.state.history.append(row)
        self.journal.add(row)

    # ---- checkpoints

    def _checkpoint(self, next_segment: int) -> None:
        self.state.lam = self.lam.state_dict()
        save_run(self.folder.path, next_segment, self.state, self.trainer, self.teacher)

    def _restore(self) -> int:
        """Load the newest checkpoint that is whole; the number of the segment to go on with."""
        newest = newest_run(self.folder.path, self.journal.say)
        if newest is None:  # killed before the first checkpoint: start again
            self.journal.restart([], 0)
            return 0
        path, saved = newest
        try:
            self._take_over(saved)
        except (RunError, RuntimeError) as error:  # PyTorch's own, for other keys or shapes
            raise RunError(f"{path}: of another model ({str(error).splitlines()[0]}).") from error
        self.journal.restart(self.state.history, self.trainer.update)
        return int(saved["next_segment"])

    def _take_over(self, saved: Mapping[str, Any]) -> None:
        self.state = RunState(**saved["run"])
        self.lam.load_state_dict(self.state.lam)
        self.trainer = self._make_trainer(replay(self.initial, self.state.log, self.size))
        self.trainer.update = saved["update"]
        self.trainer.model.load_state_dict(saved["model"])
        if self.trainer.ema is not None:
            expand_online(self.trainer.ema, inplace=True).load_state_dict(saved["ema"])
        self.trainer.load_optimizer_state(saved["optimizer"])
        if self.state.teacher_log is not None:
            teacher = expand_online(replay(self.initial, self.state.log[: self.state.teacher_log], self.size))
            teacher.load_state_dict(saved["teacher"])
            self.teacher = self._placed(teacher).eval().requires_grad_(False)
        set_random_state(saved["random"])

    def _make_trainer(self, model: nn.Module) -> Trainer:
        trainer = ListeningTrainer(self._placed(copy.deepcopy(model)), self.config, self.feed.train)
        trainer.listener = self.lam.observe
        return trainer

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.to(self.device).to(memory_format=torch.channels_last)

    # ---- the end

    def _finish(self, record: dict[str, Any]) -> CycleResult:
        best = self.trainer.best.eval()
        plain = replay(self.initial, [{"op": "fuse"}], self.size)
        result = CycleResult(
            out_dir=self.folder.path,
            model=best,
            rounds=self.state.rounds,
            history=self.state.history,
            growth_log=self.state.log,
            timeline=self.timeline,
            val=asdict(self._score()),
            final=asdict(evaluate(best, self.feed.test)),
            plain=asdict(profile(plain, self.size)),
            deployed=asdict(profile(best, self.size)),
            training_macs=self.state.macs_spent,
            plain_training_macs=self.timeline.total * self.feed.train.batch_size * training_macs(plain, self.size),
            seconds=self.state.seconds,
            about=record,
        )
        save_plain(result, plain, self.feed)
        result.write()
        self.folder.write_marker("finished", record)
        return result
