"""run_cycle: execute a plan of rounds, and leave a plain net, a proof and a record."""

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.config import from_dict
from growshrink.base.environment import versions
from growshrink.base.limits import checked
from growshrink.base.ranks import broadcast_nets_, num_ranks, run_on_rank0, this_rank
from growshrink.base.reading import reason
from growshrink.base.stopping import Stopped
from growshrink.cycle.costs import fingerprints, teacher_nets
from growshrink.cycle.layout import Phases, lay_out
from growshrink.cycle.plan import CyclePlan
from growshrink.cycle.records import Grew, RunState, plain_net, replay
from growshrink.cycle.report import leave_result
from growshrink.cycle.result import CycleResult
from growshrink.cycle.running import Run, Saving
from growshrink.cycle.surgery import load_values, set_values
from growshrink.data.batches import Augment
from growshrink.data.datasets import DataSet
from growshrink.data.feed import Feed, MemoryFeed, check_model_fits
from growshrink.errors import GrowShrinkError, PlanError, RunError
from growshrink.layers.grown import grown_modules
from growshrink.layers.recompute import recompute
from growshrink.layers.swaps import expand_online
from growshrink.runs.checkpoints import newest_checkpoint
from growshrink.runs.folder import RunFolder, check_same, claim_together, difference
from growshrink.supernet import NetAugTask
from growshrink.training._evaluate import Loss
from growshrink.training.trainer import TrainConfig


@checked(PlanError)
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
    save_every: int | None = None,
    keep: int = 2,
    teachers: Mapping[int, nn.Module] | None = None,
    loss: Loss | None = None,
) -> CycleResult:
    """Train `model` through rounds of grow -> train -> vanish -> exit -> train.

    On several ranks (see `growshrink.base.ranks`) each calls this with the same arguments, a feed excepted, which holds
    the rank's share; rank 0 writes. Where a program handles signals (`growshrink.cli.program`), the first SIGTERM or
    Ctrl-C finishes the update and saves.

    Args:
        model: A plain timm model (or one built grown, which the first round then does not grow). Not modified.
        data: A data set, or a feed of batches of your own.
        plan: The rounds.
        out_dir: Folder of the run, made here or claimed before; see `RunFolder`.
        config: How to train; None for the defaults.
        batch_size: Images per update, where `data` is a data set.
        augment: Augmentation of the training images, where `data` is a data set.
        device: Where to train.
        resume: Continue the unfinished run in `out_dir`.
        progress: Show a progress bar, and a line per round.
        tensorboard: Also write event files (needs the extra `tensorboard`).
        about: Written into marker and report: "command", and whatever else makes the run what it is (the model's
            arguments, say). A run is resumed only with the same, "command" excepted.
        save_every: Updates between checkpoints; None writes them at the ends of epochs and phases only.
        keep: How many checkpoints are kept, the newest.
        teachers: Nets that teach, by number of the round, in place of those that the plan's `Teacher` names: "given"
            is one of these. They take the same images and give logits of the same classes; none is modified.
        loss: `loss(model, batch)` trains and scores a net that is no classifier: a 0-dim tensor, the mean over the
            images of the batch, a pair as the feed gives it. Wherever a run says top-1, it is then minus this loss on
            the split, also in `accept_within`. No teachers, no sampled widths; `growshrink.penalties` are yours to add.

    Returns:
        What the run reached. `result.model` is the plain net (the averaged one, where there is an average).

    Raises:
        RunError: The folder is in use or holds another run, the disk is full, or the run has diverged (the last
            checkpoint, from before that, stays).
        PlanError: The plan does not fit the data or the model, or an argument is out of range.
        Stopped: A signal was handled.

    >>> from growshrink.data.datasets import load_data
    >>> net = timm.create_model("reducenet20", width=0.25, depths=(1, 1, 1), in_chans=1)
    >>> plan = gs.CyclePlan(rounds=(gs.Round(epochs=1, settle=0, exit=gs.cycle.Drop()),))  # or gs.Round(epochs=30)
    >>> result = gs.run_cycle(net, load_data("digits"), plan, out_dir=folder / "run")
    >>> result.deployed == result.plain
    True
    """
    saving, config = Saving(save_every, keep, torch.device(device)), config or TrainConfig()
    feed, own = _feed_of(data, plan, batch_size, augment, device)
    phases = lay_out(plan, feed.train.updates_per_epoch, built_grown=bool(grown_modules(model)))
    check_model_fits(model, feed, classifies=loss is None)
    rehearse(model, plan, feed.input_size)
    nets = teacher_nets(plan, feed, (about or {}).get("model", {}), teachers)
    own |= {} if loss is None else {"loss": _check_loss(loss, plan, config)}
    own |= {"teachers": digests} if (digests := fingerprints(plan, nets)) else {}
    with _claimed(out_dir, resume) as folder, recompute(config.recompute):  # for what is counted, too
        how: dict[str, Any] = {"progress": progress, "tensorboard": tensorboard, "saving": saving, "config": config}
        told = {key: value for key, value in {**(about or {}), **own}.items() if key != "command"}
        run = Run(
            **how,
            initial=model,
            feed=feed,
            loss=loss,
            folder=folder,
            teachers=nets,
            learning_rate=phases.learning_rate,
            lam=phases.lam_control(),
            model_about=told.get("model", {}),
            num_rounds=len(plan.rounds),
            total=phases.total,
            identity=identity_of(feed, plan, phases.total, config, told),
        )
        return _execute(run, phases, plan, (about or {}).get("command", " ".join(sys.argv)))


def _check_loss(loss: Loss, plan: CyclePlan, config: TrainConfig) -> str:
    """Name of the caller's loss; PlanError for what computes a loss of its own."""
    clashes = [key for key in ("mixup", "label_smoothing", "class_weights") if getattr(config, key)]
    clashes += [key for entry in plan.rounds for key in ("teacher", "widths") if getattr(entry, key) is not None]
    if config.metric != "top1" or clashes:
        raise PlanError(f"{[*clashes, 'metric'][0]}: not with loss=, which is for tasks of its own; leave it out.")
    return getattr(loss, "__qualname__", type(loss).__name__)


def _feed_of(
    data: DataSet | Feed, plan: CyclePlan, batch_size: int, augment: Augment, device: torch.device | str
) -> tuple[Feed, dict[str, Any]]:
    """The batches, and what has to be said of them."""
    if isinstance(data, DataSet):
        ranks = {"rank": this_rank(), "world_size": num_ranks()}
        feed = MemoryFeed.of(data, batch_size=batch_size, augment=augment, seed=plan.seed, device=device, **ranks)
        return feed, {"augment": asdict(augment)}
    if not hasattr(data, "input_size"):
        raise RunError(f"a {type(data).__name__} is no data set, and no feed of batches.")
    return data, {}


@contextmanager
def _claimed(out_dir: str | Path | RunFolder, resume: bool) -> Iterator[RunFolder]:
    """The folder of an unfinished run; the caller that claimed it releases it."""
    if isinstance(out_dir, RunFolder):
        claim: AbstractContextManager[RunFolder] = nullcontext(out_dir)
    else:
        claim = claim_together(lambda: RunFolder.claim(Path(out_dir), resume=resume))
    with claim as folder:
        if folder.finished:
            raise RunError(f"{folder.path}: the run in it is finished.")
        yield folder


def _execute(run: Run, phases: Phases, plan: CyclePlan, command: str) -> CycleResult:
    """Start, or continue, and come to the end."""
    record = {"command": command, **run.identity, "versions": versions()}
    with closing(run.journal), run.saving:
        if run.folder.fresh:
            run.folder.write_marker("running", record)
        else:
            run_on_rank0(lambda: check_same(run.folder.path, run.identity))
            restore(run, phases, plan)
            run.folder.write_marker("running", record)  # without what it was stopped by
        if not run.trainer.update:
            broadcast_nets_(run.trainer.nets)
            if this_rank():  # a dropout of its own
                torch.manual_seed(torch.initial_seed() + this_rank())
        try:
            for phase in phases.all[run.phase :]:
                if run.trainer.update == phase.start:
                    phase.enter(run)
                phase.train(run)
                phase.leave(run)
                run.phase += 1
                run.checkpoint()
            return leave_result(run, phases, record)
        except (Stopped, GrowShrinkError) as end:
            with suppress(GrowShrinkError):  # of a full disk, say
                run.folder.write_marker("running", {**record, "stopped": str(end)})
            raise


def rehearse(model: nn.Module, plan: CyclePlan, input_size: InputSize) -> None:
    """Grow copies as the rounds will, so that a round that cannot be is refused before the first update."""
    rounds = plan.rounds
    if grown_modules(model):
        if not rounds:
            raise PlanError("the model is built grown, but the plan has no round at whose end it would be fused.")
        if not rounds[0].branch:
            raise PlanError("branch=() in round 1: a net that is built grown would not be fused in it.")
        leaves, rounds = rounds[0].exit, rounds[1:]
        if leaves.needs_kernels:
            raise PlanError(f"exit={leaves.kind!r} in round 1: a net built grown has no kernels that would remain.")
        if leaves.may_go_back:
            raise PlanError("accept_within in round 1: a net that is built grown has nothing to go back to.")
    plain = plain_net(model, input_size)
    for entry in rounds:
        if not entry.branch:
            continue
        grown = entry.grown(plain, input_size)
        if entry.widths is not None:
            NetAugTask(grown, mode=entry.widths.mode, verbose=False, input_size=input_size)


def identity_of(
    feed: Feed, plan: CyclePlan, updates: int, config: TrainConfig, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the result of a run depends on, as plain values."""
    data = {
        "name": feed.name,
        "batch_size": feed.train.batch_size,
        "input_size": list(feed.input_size),
        "mean": list(feed.mean),
        "std": list(feed.std),
        "val_images": len(feed.val),
        "test_images": len(feed.test),
        "fingerprint": getattr(feed, "fingerprint", None),  # a feed of the user's own need not have one
    }
    values = {"plan": plan.to_dict(), "config": asdict(config), "data": data, "updates": updates, "ranks": num_ranks()}
    return {**about, **values}


def restore(run: Run, phases: Phases, plan: CyclePlan) -> None:
    """Load the newest checkpoint that is whole, if there is one; `run.phase` is then where to continue."""
    newest = newest_checkpoint(run.folder.path, run.journal.warn)
    if newest is None:  # killed before the first checkpoint: start again
        run.journal.restart([], 0)
        return
    path, saved = newest
    try:
        if found := difference(saved["identity"], run.identity):
            raise RunError(f"it is of a run with another {found}.")
        run.phase = _position(saved, phases)
        _take_over(run, saved, phases, plan)
        run.journal.restart(run.state.history, run.trainer.update)
    except RunError as error:
        raise RunError(f"{path}: {error}") from error
    except Exception as error:  # a right digest proves nothing about the content
        raise RunError(f"{path}: of another model or plan ({reason(error)}).") from error


def _position(saved: Mapping[str, Any], phases: Phases) -> int:
    """The number of the phase a checkpoint is in; RunError if it is nowhere in the plan."""
    first, update = saved["next_phase"], saved["update"]
    starts = [*(phase.start for phase in phases.all), phases.total]
    stops = [*(phase.stop for phase in phases.all), phases.total + 1]
    whole = type(first) is type(update) is int
    if not (whole and 0 <= first < len(starts) and starts[first] <= update < stops[first]):
        raise RunError(f"update {update!r} is not in phase {first!r} of {len(phases.all)}")
    return int(first)


def _take_over(run: Run, saved: Mapping[str, Any], phases: Phases, plan: CyclePlan) -> None:
    run.state = from_dict(RunState, saved["run"], "its state", RunError)
    _check_log(run.state, plan)
    run.lam.load_state_dict(run.state.lam)
    phase = phases.all[min(run.phase, len(phases.all) - 1)]
    apart = phase.apart and saved["update"] > phase.start
    run.trainer = run.make_trainer(run.teachers[phase.round] if apart else replay(run.initial, run.state.log, run.size))
    run.trainer.update = saved["update"]
    if "cut_short" in saved:
        first, total = saved["cut_short"]
        run.trainer.cut_short = first, total.to(run.device)
    run.before = saved.get("before")
    if "teacher" in saved:
        teacher = copy.deepcopy(run.teachers.get(phase.round))
        if teacher is None:
            teacher = expand_online(replay(run.initial, run.state.log[: run.state.teacher_log], run.size))
        load_values(teacher, saved["teacher"])
        run.teaching.set_teacher(run.placed(teacher))
    if run.trainer.ema is not None:
        expand_online(run.trainer.ema, inplace=True)  # only the net in training is ever collapsed
    set_values(run.trainer, saved)


def _check_log(state: RunState, plan: CyclePlan) -> None:
    """RunError unless what was grown is what the plan grows: a file may not ask for branches of any size."""
    for change in state.log:
        if isinstance(change, Grew) and change.names:
            wanted = plan.rounds[change.round - 1]
            grown = [*change.branches, change.ratio, change.guide]
            if grown != [*wanted.branch, wanted.ratio, wanted.guide]:
                raise RunError(
                    f"its round {change.round} has grown {change.branches!r} of ratio {change.ratio!r}, "
                    "which is not in the plan."
                )
