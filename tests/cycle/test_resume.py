"""A run that is killed, anywhere, and resumed ends with the weights of one that was not, bit for bit."""

import importlib
import json
import os

import pytest
import torch
from small import CONFIG, Feed, Interrupt, shorten_settle, small, two_rounds

import growshrink as gs
from growshrink.cycle import Drop, NetAug, Rewind, Teacher, lay_out
from growshrink.data.batches import Augment
from growshrink.errors import RunError
from growshrink.runs.checkpoints import find_checkpoints
from growshrink.training import TrainConfig
from sampled import exhaustive, sampled

CASES = {
    "peak": {"plan": two_rounds(teacher=Teacher("peak")), "model": {"dropout": 0.3}, "config": CONFIG},
    "previous": {
        "plan": two_rounds((("insert", "bottleneck"), ("nest",)), teacher=Teacher("previous")),
        "model": {"bias": True},
        "config": TrainConfig(optimizer="adamw", lr=0.003, ema_decay=0.0, clip_grad=1.0),
    },
    "built grown": {
        "plan": two_rounds(teacher=Teacher("peak")),
        "model": {"built_grown": True, "dropout": 0.3},
        "config": TrainConfig(optimizer="nadamw", lr=0.003, ema_decay=0.9),
    },
}
CASES["closed loop"] = {
    "plan": two_rounds(control="closed_loop", hold=1 / 12, vanish=1 / 2, settle=1 / 12),
    "model": {"dropout": 0.5},
    "config": TrainConfig(lr=0.3, ema_decay=0.9),  # so high that the loss jumps, and lam has to wait
}
CASES["teach"] = {
    "plan": gs.CyclePlan(
        rounds=(
            gs.Round(epochs=4, init="paper", linear=True, branch=("dbb",)),
            gs.Round(epochs=6, exit=Rewind(), hold=0.5, vanish=0, settle=0, teacher=Teacher("peak", asked=0.4)),
            gs.Round(epochs=4, exit=Drop(), hold=0.5, vanish=0, settle=0),
        ),
        base_epochs=1,
        restarts=(0.5,),
    ),
    "model": {"dropout": 0.3},
    "config": CONFIG,
}
CASES["online"] = {
    "plan": two_rounds(
        (("pointwise_conv", "expandnet", "insert"), ("bottleneck",)), online=True, teacher=Teacher("peak")
    ),
    "model": {"dropout": 0.3},
    "config": CONFIG,
}
CASES["implicit"] = {
    "plan": two_rounds((("implicit",), ("insert", "implicit")), widths=NetAug("netaug")),
    "model": {},
    "config": TrainConfig(optimizer="adamw", lr=0.003),
}
CASES["fading"] = {
    "plan": two_rounds(
        (("dynamic_conv", "se", "guided"), ("moe", "guided", "guided_kernel")), guide="test_resnet", rise=0.1
    ),
    "model": {},
    "config": CONFIG,
}
TIMES = ("seconds", "images_per_second")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    shorten_settle(monkeypatch)
    monkeypatch.setattr("growshrink.cycle.report.draw_curves", lambda result: False)


def run(path, case, *, fail_at=None, resume=False):
    feed = Feed.make(augment=Augment(crop=1))
    feed.train.fail_at = fail_at
    torch.manual_seed(5)  # the process starts like the one before, as the recipe does
    return gs.run_cycle(
        small(**CASES[case]["model"], outputs=4),
        feed,
        CASES[case]["plan"],
        out_dir=path,
        config=CASES[case]["config"],
        resume=resume,
    )


def outcome(path, result):
    """Everything a run leaves, but for the times."""
    lines = (path / "log.jsonl").read_text().splitlines()
    rows = [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]
    report = json.loads((path / "report.json").read_text())
    del report["training"]["seconds"], report["about"]["command"]
    log = json.loads((path / "growth_log.json").read_text())
    state = {key: value.tolist() for key, value in result.model.state_dict().items()}
    return {"rows": rows, "report": report, "log": log, "state": state, "random": torch.rand(3).tolist()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of each case, run once from start to end."""
    found = {}

    def of(case):
        if case not in found:
            path = tmp_path_factory.mktemp("undisturbed")
            found[case] = outcome(path, run(path, case))
        return found[case]

    return of


def starts(plan):
    return [phase.start for phase in lay_out(plan, 4).all]


@pytest.mark.parametrize(
    ("case", "places"),
    [("peak", "phases"), *map(exhaustive, [("closed loop", "fall"), *((case, "both") for case in CASES)])],
)
def test_killed_again_and_again(tmp_path, undisturbed, case, places):
    """In every phase of both rounds, at its first update (right after a surgery) and later."""
    expected = undisturbed(case)
    points = starts(CASES[case]["plan"])
    if case == "peak":
        assert {0, 3, 9, 13, 17, 27, 33, 37, 41} == set(points)
        points = sorted({*points, 4, 7, 10, 20, 42, 50} if places == "both" else {*points, 20})
    elif case == "closed loop":
        assert {0, 3, 5, 17, 19, 27, 29, 41, 43} == set(points)
        falls = (9, 14, 34, 38)  # lam falls from 5 and from 29 on
        points = sorted({*points, *falls} if places == "both" else falls)
    for index, update in enumerate(points):
        with pytest.raises(Interrupt, match=f"before update {update}$"):
            run(tmp_path, case, fail_at=update, resume=index > 0)
        json.loads((tmp_path / "run.json").read_text())
    result = run(tmp_path, case, resume=True)
    assert outcome(tmp_path, result) == expected


def test_the_closed_loop_of_these_runs_has_waited(undisturbed):
    rows = undisturbed("closed loop")["rows"]
    lams = [row["lam"] for row in rows if row["phase"] == "vanish"]
    assert len(lams) == 8 and lams[:4] != lams[4:]  # the rounds' plans are the same, and their losses are not


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ["implicit", "peak"])
def test_rounds_with_equilibria_record_the_norm_of_a(undisturbed, case):
    norms = [entry["recurrence"] for entry in undisturbed(case)["report"]["rounds"]]
    assert norms == [pytest.approx(0.5, abs=0.1)] * 2 if case == "implicit" else set(norms) == {None}


#: In a surgery, at its end, at the end.
PLACES = ("surgery.fuse_along", "running.save_checkpoint", "report.save_plain", "report.write_json")


@pytest.mark.parametrize("place", sampled(PLACES, ("surgery.fuse_along", "report.write_json")))
def test_killed_between_two_updates(tmp_path, undisturbed, monkeypatch, place):
    expected = undisturbed("peak")
    module, _, name = place.partition(".")
    module = importlib.import_module(f"growshrink.cycle.{module}")
    real, calls = getattr(module, name), []

    def die(*args, **kwargs):
        calls.append(1)
        if len(calls) == (2 if place in ("surgery.fuse_along", "running.save_checkpoint") else 1):
            raise Interrupt(place)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, die)
        with pytest.raises(Interrupt):
            run(tmp_path, "peak")
    assert outcome(tmp_path, run(tmp_path, "peak", resume=True)) == expected


def test_killed_while_a_checkpoint_is_written(tmp_path, undisturbed, monkeypatch):
    expected = undisturbed("peak")
    real, calls = os.replace, []

    def die(*args):
        calls.append(args)
        if len(calls) == 9:
            raise Interrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Interrupt):
            run(tmp_path, "peak")
    assert list(tmp_path.glob(".*.partial"))
    assert outcome(tmp_path, run(tmp_path, "peak", resume=True)) == expected


@pytest.mark.parametrize("damage", sampled(["truncated", "bit"], ["bit"]))
def test_a_damaged_checkpoint_makes_way_for_the_one_before(tmp_path, undisturbed, damage):
    expected = undisturbed("peak")
    with pytest.raises(Interrupt):
        run(tmp_path, "peak", fail_at=30)
    newest, before = find_checkpoints(tmp_path)
    content = bytearray(newest.read_bytes())
    if damage == "bit":
        content[-7] ^= 8
    newest.write_bytes(content if damage == "bit" else content[:-100])
    assert outcome(tmp_path, run(tmp_path, "peak", resume=True)) == expected


def test_where_all_checkpoints_are_damaged_nothing_is_overwritten(tmp_path):
    with pytest.raises(Interrupt):
        run(tmp_path, "peak", fail_at=30)
    for path in find_checkpoints(tmp_path):
        path.write_bytes(path.read_bytes()[:-1])
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(RunError, match=r"its checkpoints \(2\) are all damaged"):
        run(tmp_path, "peak", resume=True)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_resume_of_an_empty_folder_is_a_fresh_run(tmp_path, undisturbed):
    expected = undisturbed("peak")
    assert outcome(tmp_path, run(tmp_path, "peak", resume=True)) == expected
