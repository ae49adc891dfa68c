"""Faults of the machine and of training, in runs of a second."""

import errno
import importlib
import math
import multiprocessing
import os
import signal

import pytest
import torch
from PIL import Image
from small import CONFIG, Feed, Interrupt, data, shorten_settle, small, two_rounds
from test_resume import outcome

import growshrink as gs
from growshrink.base import writing
from growshrink.base.stopping import Stopped, handled
from growshrink.cycle import Fuse, Teacher, exits, running
from growshrink.data.batches import Augment
from growshrink.data.feed import MemoryFeed
from growshrink.data.stream import stream_data
from growshrink.errors import PlanError, RunError
from growshrink.runs.checkpoints import find_checkpoints, load_checkpoint
from growshrink.training import TrainConfig
from growshrink.training.trainer import Trainer
from sampled import exhaustive, sampled

#: In the two rounds, the first is undone and the second is not.
UNDONE = two_rounds(teacher=Teacher("peak"), exit=Fuse(accept_within=0.0))

OTHER = two_rounds(teacher=Teacher("peak"), exit=Fuse(accept_within=0.0), ratio=2.0)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    shorten_settle(monkeypatch)
    monkeypatch.setattr("growshrink.cycle.report.draw_curves", lambda result: False)


@pytest.fixture
def judged(monkeypatch):
    """Rounds are judged by a score that says: worse after round 1, better after round 2; all other scores are true."""
    real = exits.Fuse.judge

    def judge(self, run, before, fused):
        real(self, run, 50.0, 49.9 if run.record.number == 1 else 50.1)

    monkeypatch.setattr(exits.Fuse, "judge", judge)


def run(path, plan=UNDONE, *, fail_at=None, config=CONFIG, model=None, feed=None, **kwargs):
    if feed is None:
        feed = Feed.make(augment=Augment(crop=1))
        feed.train.fail_at = fail_at
    torch.manual_seed(5)
    net = small(dropout=0.3, outputs=4) if model is None else model
    return gs.run_cycle(net, feed, plan, out_dir=path, config=config, **kwargs)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        shorten_settle(patch)
        patch.setattr("growshrink.cycle.report.draw_curves", lambda result: False)
        judged.__wrapped__(patch)
        path = tmp_path_factory.mktemp("undisturbed")
        return outcome(path, run(path))


# ---- a kill at every kind of event, before it and after it

#: All of round 1 (no checkpoint is written between its fuse and its end), and of the end of the run.
EVENTS = (
    "running.snapshot",
    "phases.grow_nets",
    "phases.gradients",
    "journal.json_line",
    "running.save_checkpoint",
    "running.Trainer.calibrate_average",
    "exits.fuse_nets",
    "surgery.fuse_along",
    "surgery.verify",
    "running.Run.go_back",
    "report.save_plain",
    "report.write_json",
)


@pytest.mark.exhaustive
def test_killed_at_every_kind_of_event(tmp_path, undisturbed, judged, monkeypatch):
    """One run, killed before and after each of them: the first time it comes in each life of the run."""
    for event in EVENTS:
        module, *path, attribute = event.split(".")
        target = importlib.import_module(f"growshrink.cycle.{module}")
        for part in path:
            target = getattr(target, part)
        real = getattr(target, attribute)

        def before(*args, event=event, **kwargs):
            raise Interrupt(event)

        def after(*args, event=event, real=real, **kwargs):
            real(*args, **kwargs)
            raise Interrupt(event)

        for die in (before, after):
            with monkeypatch.context() as patch, pytest.raises(Interrupt, match=f"^{event}$"):
                patch.setattr(target, attribute, die)
                run(tmp_path, resume=True)
    assert outcome(tmp_path, run(tmp_path, resume=True)) == undisturbed


# ---- asked to stop


def stopper(feed, update, number=signal.SIGTERM):
    """The feed, which sends a signal while the batch of an update is made."""
    real, sent = feed.train.batch, []

    def batch(asked):
        if asked == update and not sent:  # statistics are taken on the last batches, once more
            sent.append(number)
            os.kill(os.getpid(), number)
        return real(asked)

    feed.train.batch = batch
    return feed


@pytest.mark.exhaustive
def test_asked_to_stop_in_any_update_it_finishes_the_update_and_saves(tmp_path, undisturbed, judged):
    """One run, stopped after update upon update, in every phase of both rounds."""
    total = undisturbed["rows"][-1]["update"]
    for update in [*range(0, 20), *range(26, 42), 49]:
        feed = stopper(Feed.make(augment=Augment(crop=1)), update, (signal.SIGTERM, signal.SIGINT)[update % 2])
        with handled(), pytest.raises(Stopped) as stopped:
            run(tmp_path, feed=feed, resume=True)
        assert stopped.value.exit_code == (143, 130)[update % 2]
        if update % 10 == 0:
            assert f"after update {update + 1} of {total}, saved in {tmp_path}" in str(stopped.value)
            assert load_checkpoint(find_checkpoints(tmp_path)[0])["update"] == update + 1
    assert outcome(tmp_path, run(tmp_path, resume=True)) == undisturbed


def test_a_second_signal_does_not_wait(tmp_path):
    feed = Feed.make()
    real = feed.train.batch

    def batch(update):
        if update == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return real(update)

    feed.train.batch = batch
    with handled(), pytest.raises(Stopped):
        run(tmp_path, feed=feed)
    assert load_checkpoint(find_checkpoints(tmp_path)[0])["update"] == 4


def test_checkpoints_in_between_change_nothing_and_as_many_as_asked_for_are_kept(tmp_path, undisturbed, judged):
    result = run(tmp_path, save_every=3, keep=4)
    assert [int(p.stem[-9:]) for p in find_checkpoints(tmp_path)] == [51, 48, 45, 44]
    assert outcome(tmp_path, result) == undisturbed
    for name in ("save_every", "keep"):
        with pytest.raises(PlanError, match=f"{name}=0"):
            run(tmp_path / "x", **{name: 0})


@pytest.fixture
def images(tmp_path):
    """A folder of 32 and 12 images, 8 pixels a side."""
    pixels = data()
    for part, images in (("train", pixels.train), ("test", pixels.test)):
        for index, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
            folder = tmp_path / "images" / part / "abcd"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(folder / f"{index}.png")
    return tmp_path / "images"


@pytest.mark.exhaustive
def test_a_stream_goes_on_in_the_middle_of_an_epoch_whoever_of_its_workers_was_asked_to_stop(tmp_path, images):
    """The whole process group gets the signal, as torchrun and terminals send it: workers have a batch to finish."""
    plan = two_rounds((("bottleneck",),), epochs=4, settle=0.2)

    def stream():
        return stream_data(images, batch_size=5, image_size=8, val_fraction=0.25, num_workers=1)

    def stopped(feed):
        real, sent = feed.train.batch, []

        def batch(update):
            found = real(update)
            if update == 5 and not sent:
                sent.append(update)
                workers = multiprocessing.active_children()
                assert len(workers) == 1
                for pid in (workers[0].pid, os.getpid()):
                    os.kill(pid, signal.SIGTERM)
                real(6)  # the worker lives
            return found

        feed.train.batch = batch
        return feed

    expected = outcome(tmp_path / "a", run(tmp_path / "a", plan, feed=stream()))
    with handled(), pytest.raises(Stopped, match="after update 6 of 19"):
        run(tmp_path / "b", plan, feed=stopped(stream()))
    assert outcome(tmp_path / "b", run(tmp_path / "b", plan, feed=stream(), resume=True)) == expected
    (images / "train" / "a" / "0.png").rename(images / "train" / "a" / "00.png")
    with pytest.raises(RunError, match="another data .fingerprint"):
        (tmp_path / "b" / "run.json").write_text(
            (tmp_path / "b" / "run.json").read_text().replace("finished", "running")
        )
        run(tmp_path / "b", plan, feed=stream(), resume=True)


# ---- a growth that makes things worse


def test_a_round_that_costs_too_much_is_undone_bit_for_bit(tmp_path, judged, monkeypatch):
    states = {}
    real_snapshot, real_go_back = running.snapshot, running.Run.go_back

    def keep(trainer):
        states["before", trainer.update] = bits(trainer)
        return real_snapshot(trainer)

    def go_back(self):
        states["grown", self.trainer.update] = bits(self.trainer)
        real_go_back(self)
        states["undone", self.trainer.update] = bits(self.trainer)

    monkeypatch.setattr(running, "snapshot", keep)
    monkeypatch.setattr(running.Run, "go_back", go_back)
    result = run(tmp_path)
    (before, _), (undone,), (grown,) = (
        [state for (name, _), state in states.items() if name == kind] for kind in ("before", "undone", "grown")
    )
    assert undone == before != grown
    assert any(key.endswith("momentum_buffer") for key in before)
    assert [change.kind for change in result.growth_log] == ["grow", "fuse", "undo", "grow", "fuse"]
    assert result.growth_log[2].fused == 49.9 and [r.undone for r in result.rounds] == [True, False]
    assert "Round 1 was **undone**" in (tmp_path / "report.md").read_text()


def bits(trainer):
    """Net, average, optimizer and random state, as bytes."""
    found = {"random": torch.get_rng_state().tolist(), "lr": trainer.config.lr}
    for number, net in enumerate(trainer.nets):
        found |= {f"{number}.{key}": value.tolist() for key, value in net.state_dict().items()}
    for name, values in trainer.optimizer_state().items():
        found |= {f"{name}.{key}": v.tolist() if isinstance(v, torch.Tensor) else v for key, v in values.items()}
    return found


@pytest.mark.parametrize("cost", [0.5, exhaustive(0.6)])
def test_the_tolerance_is_in_points_and_inclusive(tmp_path, monkeypatch, cost):
    real = exits.Fuse.judge
    monkeypatch.setattr(exits.Fuse, "judge", lambda self, run, *_: real(self, run, 50.0, 50.0 - cost))
    result = run(tmp_path, two_rounds((("bottleneck",),), exit=Fuse(accept_within=0.5)))
    assert result.rounds[0].undone is (cost > 0.5)


@pytest.mark.exhaustive
def test_adam_starts_again_where_it_was(tmp_path, judged):
    config = TrainConfig(optimizer="adamw", lr=0.003, ema_decay=0.9)
    plain = run(tmp_path / "a", config=config)
    with pytest.raises(Interrupt):
        run(tmp_path / "b", config=config, fail_at=18)  # after the undoing, from a checkpoint after it
    again = run(tmp_path / "b", config=config, resume=True)
    assert bits_of(plain.model) == bits_of(again.model)


def bits_of(model):
    return {key: value.tolist() for key, value in model.state_dict().items()}


def test_what_has_nothing_to_go_back_to_is_refused(tmp_path):
    with pytest.raises(PlanError, match="accept_within in round 1: a net that is built grown"):
        run(tmp_path, model=small(built_grown=True, outputs=4))
    for value in (-0.1, math.nan, "1"):
        with pytest.raises(PlanError, match="accept_within="):
            Fuse(accept_within=value)


# ---- not a number


@pytest.mark.parametrize(
    ("update", "phase", "advice"),
    [
        (1, "base", "a lower lr"),
        (5, "hold", "a smaller ratio"),
        (11, "vanish", "a longer vanish"),
        (20, "tail", "fuse"),
    ],
)
def test_a_loss_that_is_not_finite(tmp_path, update, phase, advice):
    feed = Feed.make()
    real = feed.train.batch
    feed.train.batch = lambda u: (real(u)[0] * (math.inf if u == update else 1), real(u)[1])
    with pytest.raises(RunError, match=rf"the loss is nan in round \d, phase {phase}.*{advice}"):
        run(tmp_path, feed=feed, save_every=2)
    for path in find_checkpoints(tmp_path):
        saved = load_checkpoint(path)
        assert saved["update"] <= update
        assert all(torch.isfinite(v).all() for v in saved["model"].values())


def test_a_weight_that_is_not_finite_is_never_saved_though_the_loss_was(tmp_path, monkeypatch):
    """The last update before a checkpoint spoils a weight: its own loss is from before that."""
    real = Trainer.train

    def train(self, stop, **kwargs):
        loss = real(self, stop, **kwargs)
        if self.update == 15:
            self.model.head.bias.data[1] = math.inf
        return loss

    monkeypatch.setattr(Trainer, "train", train)
    with pytest.raises(RunError, match=r"head.bias is not finite in round 1, phase settle, between updates 13 and 15"):
        run(tmp_path, save_every=5)
    assert [int(p.stem[-9:]) for p in find_checkpoints(tmp_path)] == [13, 12]


@pytest.mark.parametrize("spoil", ["average", "optimizer"])
def test_so_are_an_average_and_a_momentum(tmp_path, monkeypatch, spoil):
    real = Trainer.train

    def train(self, stop, **kwargs):
        loss = real(self, stop, **kwargs)
        if spoil == "average":
            self.ema.head.bias.data[1] = math.nan
        else:
            self.optimizer.state[self.model.head.bias]["momentum_buffer"][0] = math.nan
        return loss

    monkeypatch.setattr(Trainer, "train", train)
    with pytest.raises(RunError, match=f"{spoil}.* is not finite in round 0, phase base"):
        run(tmp_path)
    assert not find_checkpoints(tmp_path)


# ---- a full disk


@pytest.mark.parametrize("call", sampled(["write", "fsync", "replace"], ["write"]))
def test_a_full_disk_leaves_older_checkpoints_and_nothing_half_written(
    tmp_path, undisturbed, judged, monkeypatch, call
):
    """From the 8th file that is written on, at each of the three moments it shows."""
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        count = []

        def fails(*args, real=None):
            count.append(1)
            if len(count) > 8:
                raise full
            return real(*args)

        if call == "write":
            patch.setattr(writing, "open", lambda *a: fails(*a, real=open), raising=False)
            patch.setattr("builtins.open", open)
        else:
            real = getattr(os, call)
            patch.setattr(os, call, lambda *args: fails(*args, real=real))
        with pytest.raises(RunError, match=r"cannot be written \(No space left on device.*older checkpoints are kept"):
            run(tmp_path)
    assert not list(tmp_path.glob(".*.partial")) and not list(tmp_path.glob("*.partial"))
    kept = find_checkpoints(tmp_path)
    assert len(kept) >= 1 and all(load_checkpoint(path) for path in kept)
    assert outcome(tmp_path, run(tmp_path, resume=True)) == undisturbed


def test_a_device_that_is_really_full(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    writing.write_atomic(path, b"old")
    os.symlink("/dev/full", tmp_path / ".a.json.partial")
    with pytest.raises(RunError, match=r"a.json: cannot be written \(No space left on device, 3 bytes\)"):
        writing.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


# ---- a checkpoint that is another's


def test_other_data_of_the_same_name_and_size_are_refused(tmp_path):
    with pytest.raises(Interrupt):
        run(tmp_path, fail_at=9)
    other = data()
    other.train.images[3, 2, 1, 0] ^= 1
    feed = MemoryFeed.of(other, batch_size=8, augment=Augment(crop=1))
    with pytest.raises(RunError, match=r"another data \(fingerprint: '\w{16}' then, '\w{16}' now\)"):
        run(tmp_path, feed=feed, resume=True)


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path):
    for name, plan in (
        ("a", UNDONE),
        ("b", OTHER),
    ):
        with pytest.raises(Interrupt):
            run(tmp_path / name, plan, fail_at=9)
    for path in find_checkpoints(tmp_path / "b"):
        path.unlink()
    newest = find_checkpoints(tmp_path / "a")[0]
    newest.rename(tmp_path / "b" / newest.name)
    with pytest.raises(
        RunError,
        match=r"000000009.safetensors: it is of a run with another plan \(rounds: \[0\]: ratio: 1.0 then, 2.0 now",
    ):
        run(tmp_path / "b", OTHER, resume=True)


def test_another_model_is_refused_with_the_difference(tmp_path):
    with pytest.raises(Interrupt):
        run(tmp_path, fail_at=9)
    with pytest.raises(RunError, match="another model|is of another model"):
        run(tmp_path, model=small(bias=True, outputs=4), resume=True)


def test_a_fall_back_is_told_even_to_those_who_want_no_progress(tmp_path, capfd, undisturbed, judged):
    with pytest.raises(Interrupt):
        run(tmp_path, fail_at=30)
    newest = find_checkpoints(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[:-9])
    assert outcome(tmp_path, run(tmp_path, resume=True)) == undisturbed
    assert f"{newest}: damaged" in (said := capfd.readouterr().err) and "Trying the one before." in said


def test_half_written_files_of_a_killed_process_are_cleared_away(tmp_path):
    with pytest.raises(Interrupt):
        run(tmp_path, fail_at=9)
    (tmp_path / ".checkpoint-000000009.safetensors.partial").write_bytes(b"half")
    run(tmp_path, resume=True)
    assert not list(tmp_path.glob(".*.partial"))
