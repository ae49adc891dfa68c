"""One execution of a plan: phase by phase, with the changes of structure between them, from any checkpoint on."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from growshrink.base.environment import versions
from growshrink.base.ranks import broadcast_nets_, num_ranks, run_on_rank0, this_rank
from growshrink.base.reading import reason
from growshrink.cycle.augmented import Augmentation, Augmentations, save_net
from growshrink.cycle.control import LamControl
from growshrink.cycle.divergence import check_finite
from growshrink.cycle.identity import check_identity, identity_of
from growshrink.cycle.journal import Journal
from growshrink.cycle.log import check_log, replay, shapes_of
from growshrink.cycle.plan import RoundPlan
from growshrink.cycle.records import round_record
from growshrink.cycle.result import CycleResult, save_plain
from growshrink.cycle.saving import Saving
from growshrink.cycle.state import RunState, load_values, newest_run, save_run, set_values, snapshot, undo
from growshrink.cycle.surgery import collapse_net, fuse_nets, gradients, grow_nets, retention
from growshrink.cycle.teaching import Teaching
from growshrink.cycle.timeline import Segment, Timeline
from growshrink.data.feed import Feed
from growshrink.errors import RunError
from growshrink.layers.grown import grown_modules
from growshrink.layers.swaps import expand_online
from growshrink.layers.widths import set_width, width_space
from growshrink.proofs._profile import profile, training_macs
from growshrink.runs.folder import RunFolder
from growshrink.training._evaluate import Score, evaluate
from growshrink.training.listening import ListeningTrainer
from growshrink.training.trainer import TrainConfig, Trainer


class Execution:
    """One execution of a plan.

    Args:
        model: As `run_cycle` was given it.
        feed: What it is trained and judged on.
        timeline: The plan in updates.
        config: How to train.
        folder: Claimed.
        saving: When to save.
        device: Where to train.
        progress: Show a bar.
        tensorboard: Write event files too.
    """

    def __init__(
        self,
        model: nn.Module,
        feed: Feed,
        timeline: Timeline,
        config: TrainConfig,
        folder: RunFolder,
        saving: Saving,
        *,
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
        self.saving = saving
        self.device = device
        self.state = RunState()
        self.before: Mapping[str, Any] | None = None  # a snapshot, in a round that may be undone
        self.model_about: Mapping[str, Any] = {}
        self.size = feed.input_size
        self.images_per_update = feed.train.batch_size * num_ranks()
        self.teaching = Teaching(timeline, feed.input_size)
        self._augmentations = Augmentations(timeline, feed.input_size)
        self._cost: int | None = None  # MACs of the present structure, see _macs
        self.lam = LamControl(timeline)
        self.trainer = self._make_trainer(self.initial)
        self.journal = Journal(folder.path, timeline.total, progress=progress, tensorboard=tensorboard)

    # ---- the run

    def execute(self, about: dict[str, Any]) -> CycleResult:
        """Begin, or go on, and come to the end; `about` as for `run_cycle`."""
        self.model_about = about.get("model", {})
        command = {"command": about.pop("command", " ".join(sys.argv))}
        self.identity = identity_of(self.feed, self.timeline, self.config, about)
        record = {**command, **self.identity, "versions": versions()}
        with closing(self.journal), self.saving:
            first = 0
            if self.folder.fresh:
                self.folder.write_marker("running", record)
            else:
                run_on_rank0(lambda: self.folder.check_same(self.identity))
                first = self._restore()
            if not self.trainer.update:
                broadcast_nets_(self.trainer.nets)
                if this_rank():  # a dropout of its own
                    torch.manual_seed(torch.initial_seed() + this_rank())
            for index, segment in enumerate(self.timeline.segments):
                if index < first:
                    continue
                if self.trainer.update == segment.start:
                    self._enter(segment)
                self._train(index, segment)
                self._leave(segment)
                self._checkpoint(index + 1)
            return self._finish(record)

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
                    teacher=self.teaching.of(segment),
                    task=augmentation.task if augmentation else None,
                    after_update=self.journal.updated,
                    stop_early=lambda: self.saving.due(self.trainer.update),
                )
            )
            seconds = time.perf_counter() - began
            check_finite(self.trainer, loss, segment=segment, start=start, folder=self.folder.path)
            done = self.trainer.update
            self.state.seconds += seconds
            macs = augmentation.macs(start, done) if augmentation else self._macs(segment, start, done)
            self.state.macs_spent += self.images_per_update * macs
            if segment.phase == "hold" and done == second and not augmentation:
                self.state.rounds[-1]["gradients_at_update_2"] = gradients(self.trainer)
            if done % per_epoch == 0 or done == segment.stop:
                self._log_row(segment, start, loss, seconds)
            if done < segment.stop and (done % per_epoch == 0 or self.saving.due(done)):
                self._checkpoint(index)

    def _enter(self, segment: Segment) -> None:
        if segment.phase == "hold":
            self._grow(segment)
        if not segment.round:
            return
        plan = self.plan.rounds[segment.round - 1]
        if plan.online and segment.phase in (("hold",) if plan.linear else ("hold", "settle")):
            if entry := collapse_net(self.trainer, self.lam(segment.start)):
                broadcast_nets_(self.trainer.nets)  # statistics were taken anew on images of each rank's own
                self._log("collapse", segment, **entry)

    def _grow(self, segment: Segment) -> None:
        plan = self.plan.rounds[segment.round - 1]
        before = self._score()
        built_grown = bool(grown_modules(self.trainer.model))
        if plan.distil == "previous":
            self._appoint(self.trainer.best)
        seed = self.plan.seed + 1000 * segment.round
        entry: dict[str, Any] = {"branches": [], "names": [], "seed": seed}
        if plan.accept_within is not None or plan.exit == "teach":
            self.before = snapshot(self.trainer)
        if not built_grown:
            entry = grow_nets(self.trainer, plan, seed, self.size)
        broadcast_nets_(self.trainer.nets)
        self._log("grow", segment, **entry, shapes=shapes_of(self.trainer.model))
        if plan.augment != "none":
            self._save_supernet("init", segment)
        record = round_record(plan, self.trainer.model, self.initial, self.size, built_grown=built_grown)
        self.state.rounds.append(
            {
                "number": segment.round,
                **record,
                "tail_share": self.timeline.tail_share(segment.round),
                "top1": {"before": None if built_grown else before.top1},
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
            broadcast_nets_([peak])
            record["top1"]["peak"] = self._score(peak).top1
            if not augmentation:
                record["gradients_at_peak"] = gradients(self.trainer)
            if plan.distil == "peak":
                self._appoint(peak)
        if self.timeline.last_grown(segment):
            if plan.exit == "teach":
                self._go_back(segment)
            else:
                record.update(self._merge(segment, plan, augmentation))
                self._judge(segment, record["top1"]["before"], record["top1"]["fused"])
        if segment.stop == max(s.stop for s in self.timeline.segments if s.round == segment.round):
            record["top1"]["end"] = self._score().top1
            record["training_macs"] = self.state.macs_spent - record.pop("training_macs_start")
            self.teaching.dismiss()
            self.state.teacher_log = None
            self.journal.end_round(record)

    def _go_back(self, segment: Segment) -> None:
        """The plain net as it was before it grew; what it grew into has become its teacher."""
        assert self.before is not None
        update, self.trainer = self.trainer.update, self._make_trainer(self.initial)
        set_values(self.trainer, self.before)
        self.trainer.update, self.before = update, None
        self._log("teach", segment)

    def _merge(self, segment: Segment, plan: RoundPlan, augmentation: Augmentation | None) -> dict[str, Any]:
        """Back to the plain structure; what the round's record says of it."""
        self.trainer.calibrate_average()
        left: dict[str, Any] = {}
        top1 = dict(self.state.rounds[-1]["top1"])
        if augmentation:
            self._save_supernet("supernet", segment)
            top1["base"] = self._score().top1
            left["left_by"] = {
                **augmentation.describe(*self.timeline.grown_span(segment.round)),
                **augmentation.leave(self.trainer, plan, self._top1, self.size),
            }
            self._augmentations.close()
        elif plan.exit == "drop":
            for net in self.trainer.nets:
                set_width(net, width_space(net).base)
        broadcast_nets_(self.trainer.nets)  # statistics were taken anew on images of each rank's own
        merged = fuse_nets(self.trainer, self._top1, self.size)
        top1.update(merged.pop("top1"))
        self._log("fuse", segment, max_rel=merged["max_rel"], effect=merged["effect"])
        return {**left, **merged, "top1": top1, "retention": retention(top1)}

    def _judge(self, segment: Segment, before: float, fused: float) -> None:
        """Undo the round if it is one that can be, and has cost too much."""
        if self.before is None:
            return
        most = self.plan.rounds[segment.round - 1].accept_within
        assert most is not None
        self.state.rounds[-1]["undone"] = undone = before - fused > most
        if undone:
            undo(self.trainer, self.before)
            self._log("undo", segment, before=before, fused=fused, accept_within=most)
        self.before = None

    # ---- teachers, scores, costs

    def _log(self, op: str, segment: Segment, **values: Any) -> None:
        self.state.log.append({"op": op, "update": self.trainer.update, "round": segment.round, **values})
        self._cost = None

    def _appoint(self, teacher: nn.Module) -> None:
        self.teaching.appoint(teacher)
        self.state.teacher_log = len(self.state.log)

    def _augmentation_of(self, segment: Segment) -> Augmentation | None:
        return self._augmentations.of(segment, self.trainer, self.teaching.of(segment))

    def _save_supernet(self, name: str, segment: Segment) -> None:
        entry = next(e for e in reversed(self.state.log) if e["op"] == "grow")
        number = f"-{segment.round}" if len(self.plan.rounds) > 1 else ""
        save_net(
            self.folder.path / f"{name}{number}.safetensors", self.trainer.best, self.model_about, entry, self.size
        )

    def _top1(self, model: nn.Module) -> float:
        return self._score(model).top1

    def _score(self, model: nn.Module | None = None) -> Score:
        return run_on_rank0(lambda: evaluate(model or self.trainer.best, self.feed.val))

    def _macs(self, segment: Segment, start: int, stop: int) -> int:
        """Of an image in each of these updates: forward and backward of the graph that runs now, teacher's forward."""
        if self._cost is None:
            self._cost = training_macs(self.trainer.model, self.size, self.feed.train.batch_size)
        return (stop - start) * self._cost + self.teaching.macs(segment, start, stop)

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
            "images_per_second": (self.trainer.update - start) * self.images_per_update / seconds,
            "seconds": self.state.seconds,
        }
        self.state.history.append(row)
        self.journal.add(row)

    # ---- checkpoints

    def _checkpoint(self, next_segment: int) -> None:
        """Save; and leave, if that was asked for."""
        update = self.trainer.update
        self.state.lam = self.lam.state_dict()
        save_run(
            self.folder.path,
            next_segment,
            self.state,
            self.trainer,
            identity=self.identity,
            teacher=self.teaching.net,
            before=self.before,
            keep=self.saving.keep,
        )
        if update < self.timeline.total:
            self.saving.leave_if_asked(f"after update {update} of {self.timeline.total}, saved in {self.folder.path}")

    def _restore(self) -> int:
        """Load the newest checkpoint that is whole; the number of the segment to go on with."""
        newest = newest_run(self.folder.path, self.journal.warn)
        if newest is None:  # killed before the first checkpoint: start again
            self.journal.restart([], 0)
            return 0
        path, saved = newest
        try:
            check_identity(saved["identity"], self.identity)
            first = self._position(saved)
            self._take_over(saved)
            self.journal.restart(self.state.history, self.trainer.update)
        except RunError as error:
            raise RunError(f"{path}: {error}") from error
        except Exception as error:  # it is what was written, but anybody may have written it
            raise RunError(f"{path}: of another model or plan ({reason(error)}).") from error
        return first

    def _position(self, saved: Mapping[str, Any]) -> int:
        """The number of the phase a checkpoint is in; RunError if it is nowhere in the plan."""
        first, update, segments = saved["next_segment"], saved["update"], self.timeline.segments
        starts = [*(segment.start for segment in segments), self.timeline.total]
        stops = [*(segment.stop for segment in segments), self.timeline.total + 1]
        if not (
            type(first) is type(update) is int and 0 <= first < len(starts) and starts[first] <= update < stops[first]
        ):
            raise RunError(f"update {update!r} is not in phase {first!r} of {len(segments)}")
        return first

    def _take_over(self, saved: Mapping[str, Any]) -> None:
        self.state = RunState(**saved["run"])
        check_log(self.state.log, self.plan)
        self.lam.load_state_dict(self.state.lam)
        self.trainer = self._make_trainer(replay(self.initial, self.state.log, self.size))
        self.trainer.update = saved["update"]
        if "cut_short" in saved:
            first, total = saved["cut_short"]
            self.trainer.cut_short = first, total.to(self.device)
        self.before = saved.get("before")
        if self.state.teacher_log is not None:
            teacher = expand_online(replay(self.initial, self.state.log[: self.state.teacher_log], self.size))
            load_values(teacher, saved["teacher"])
            self.teaching.appoint(self._placed(teacher))
        if self.trainer.ema is not None:
            expand_online(self.trainer.ema, inplace=True)  # only the net in training is ever collapsed
        set_values(self.trainer, saved)

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
            final=asdict(run_on_rank0(lambda: evaluate(best, self.feed.test))),
            plain=asdict(profile(plain, self.size)),
            deployed=asdict(profile(best, self.size)),
            training_macs=self.state.macs_spent,
            plain_training_macs=self.timeline.total * self.images_per_update * training_macs(plain, self.size),
            seconds=self.state.seconds,
            about=record,
        )
        if this_rank() == 0:
            save_plain(result, plain, self.feed)
            result.write()
        self.folder.write_marker("finished", record)
        return result
