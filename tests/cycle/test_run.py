import json
import math
import re
import sys
from dataclasses import asdict

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small import (
    BATCH,
    BOTTLENECK,
    CONFIG,
    CONV,
    HEAD,
    SIZE,
    STEM,
    Feed,
    Interrupt,
    data,
    shorten_settle,
    small,
    two_rounds,
)
from timm.models.mlp_mixer import MlpMixer

import growshrink as gs
from growshrink.base.config import to_dict
from growshrink.cycle import Choose, Fuse, NetAug, Teacher, running
from growshrink.cycle.records import replay
from growshrink.data.batches import NO_AUGMENT, Augment
from growshrink.errors import GrowError, PlanError, RunError
from growshrink.layers.grown import grown_modules
from growshrink.proofs import Profile
from growshrink.runs.folder import FORMAT, RunFolder
from growshrink.training import TrainConfig
from nets import untouched
from sampled import exhaustive, sampled

FILES = [
    "curves.png",
    "growth_log.json",
    "log.jsonl",
    "plain.safetensors",
    "report.json",
    "report.md",
    "run.json",
]
TRAIN_CONV = 3 * CONV  # forward, gradient of the input, gradient of the kernel
TRAIN_PLAIN = 2 * STEM + 2 * TRAIN_CONV + 3 * HEAD  # the images need no gradient
FORWARD_PLAIN = STEM + 2 * CONV + HEAD


@pytest.fixture(autouse=True)
def _short(monkeypatch, request):
    shorten_settle(monkeypatch)
    if not request.node.name.startswith(("test_two_rounds", "test_the_report")):  # drawing takes a third of a run
        monkeypatch.setattr("growshrink.cycle.report.draw_curves", lambda result: False)


def run(path, model=None, plan=None, feed=None, config=CONFIG, **kwargs):
    return gs.run_cycle(
        small(outputs=4) if model is None else model,
        Feed.make() if feed is None else feed,
        two_rounds() if plan is None else plan,
        out_dir=path,
        config=config,
        **kwargs,
    )


BASE_ONLY = gs.CyclePlan(rounds=(), base_epochs=2)


def report(path):
    return json.loads((path / "report.json").read_text())


def test_two_rounds_leave_a_plain_net_a_proof_and_a_record(tmp_path):
    model, feed = small(outputs=4), Feed.make()
    with untouched(model):
        result = run(tmp_path / "run", model, feed=feed, about={"command": "python me", "note": 3})
    kept = {entry.name for entry in (tmp_path / "run").iterdir() if not entry.name.startswith("checkpoint-")}
    assert kept == {".lock", *FILES}
    assert feed.test.reads == 1

    # the net
    assert list(result.model.state_dict()) == list(model.state_dict())
    fresh = small(outputs=4)
    read = load_file(tmp_path / "run" / "plain.safetensors")
    fresh.load_state_dict(read, strict=True)
    assert all(torch.equal(value, result.model.state_dict()[key]) for key, value in read.items())
    with safe_open(tmp_path / "run" / "plain.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["run"])
    assert metadata["classes"] == list("abcd") and metadata["mean"] == [0.5] * 3
    right = sum(
        int((fresh.eval()(pixels).argmax(1) == labels).sum()) for pixels, labels in Feed.make().test
    )  # the file alone gives the number in the report

    # report.json
    found = report(tmp_path / "run")
    assert found["final"]["top1"] == pytest.approx(100 * right / 12) == result.final.top1
    assert found["final"]["params"] == found["plain"]["params"] == sum(p.numel() for p in model.parameters())
    assert found["final"]["macs"] == found["plain"]["macs"] == FORWARD_PLAIN
    assert 0 <= found["val"]["top1"] <= 100 and found["val"]["loss"] > 0
    assert [record["number"] for record in found["rounds"]] == [1, 2]
    for record, kinds in zip(found["rounds"], (["bottleneck"], ["insert"]), strict=True):
        assert record["branch"] == kinds and record["num_grown"] == 2 and record["num_skipped"] == 2
        assert list(record["top1"]) == ["before", "peak", "base", "vanished", "dropped", "fused", "end"]
        assert record["top1"].pop("base") is None
        assert all(0 <= value <= 100 for value in record["top1"].values())
        assert record["max_rel"] <= 1e-12 and record["max_rel_float32"] <= 1e-5 and record["top1_agreement"] == 1.0
        assert record["effect"] >= 0.1 and record["trained_effect"] > 0
        assert record["retention"] is None or math.isfinite(record["retention"])
        assert record["top1"]["vanished"] == record["top1"]["fused"]
        assert record["tail_share"] == pytest.approx(10 / 24)
        assert record["macs"]["plain"] == FORWARD_PLAIN < record["macs"]["grown"]
        assert record["params"]["plain"] == found["plain"]["params"] < record["params"]["grown"]
        for key in ("gradients_at_update_2", "gradients_at_peak"):
            assert record[key]["with_gradient"] == record[key]["new_parameters"] > 0
    assert found["rounds"][1]["top1"]["before"] == found["rounds"][0]["top1"]["end"]
    assert found["rounds"][1]["top1"]["end"] == found["val"]["top1"]
    about = found["about"]
    assert about["plan"] == json.loads(json.dumps(two_rounds().to_dict())) and about["config"]["lr"] == 0.05
    assert about["command"] == "python me" and about["note"] == 3 and about["versions"]["torch"]

    # run.json, growth_log.json, log.jsonl, curves.png
    marker = json.loads((tmp_path / "run" / "run.json").read_text())
    assert marker == {"status": "finished", "format": FORMAT, **about}
    assert gs.CyclePlan.from_dict(marker["plan"]) == two_rounds()
    entries = json.loads((tmp_path / "run" / "growth_log.json").read_text())["entries"]
    assert [(e["kind"], e["round"], e["update"]) for e in entries] == [
        ("grow", 1, 3),
        ("fuse", 1, 17),
        ("grow", 2, 27),
        ("fuse", 2, 41),
    ]
    assert entries[0]["seed"] != entries[2]["seed"]
    assert entries == to_dict(result.growth_log)
    assert list(replay(model, result.growth_log[:3], SIZE).state_dict()) == list(
        gs.grow(model, "insert", input_size=SIZE).state_dict()
    )
    assert not grown_modules(replay(model, result.growth_log, SIZE))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows == to_dict(result.history)
    ends = sorted({*range(4, 52, 4), 3, 9, 13, 17, 27, 33, 37, 41, 51})  # every epoch, every phase
    assert [row["update"] for row in rows] == ends
    assert all(row["lam"] is None for row in rows if row["phase"] in ("base", "tail"))
    assert {row["lam"] for row in rows if row["phase"] == "hold"} == {1.0}
    assert {row["lam"] for row in rows if row["phase"] == "settle"} == {0.0}
    assert [row["training_macs"] for row in rows] == sorted(row["training_macs"] for row in rows)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("of", sampled([None, "peak", "previous"], ["peak"]))
def test_training_macs_are_what_a_count_by_hand_gives(tmp_path, of):
    plan = two_rounds((("bottleneck",), ("bottleneck",)), teacher=of and Teacher(of))
    result = run(tmp_path, plan=plan)
    grown = TRAIN_PLAIN + 2 * 3 * BOTTLENECK
    teacher = {None: 0, "peak": FORWARD_PLAIN + 2 * BOTTLENECK, "previous": FORWARD_PLAIN}[of]
    one_round = 14 * grown + 10 * TRAIN_PLAIN + 18 * teacher  # the teacher is asked from the end of the hold on
    assert [record.training_macs for record in result.rounds] == [BATCH * one_round] * 2
    assert result.training_macs == BATCH * (3 * TRAIN_PLAIN + 2 * one_round)
    assert result.plain_training_macs == BATCH * 51 * TRAIN_PLAIN
    assert result.history[-1].training_macs == result.training_macs
    cost = report(tmp_path)["training"]
    assert cost["cost"] == pytest.approx(result.training_macs / result.plain_training_macs)


@pytest.mark.parametrize(
    ("branches", "model"),
    [
        exhaustive(((("nest",),), {})),
        exhaustive(((("insert", "bottleneck"),), {})),
        exhaustive(((("bottleneck", "insert"), ("nest", "insert")), {"bias": True})),
        ((("bottleneck",), ("nest", "insert")), {"bias": True, "norm": False, "dropout": 0.5}),
        ((("condconv", "bottleneck", "se"), ("moe", "guided")), {"bias": True}),
    ],
    ids=str,
)
def test_any_branches_in_any_net(tmp_path, branches, model):
    config = TrainConfig(lr=0.01, ema_decay=0.9 if "bias" in model else 0.0, clip_grad=1.0)
    result = run(tmp_path, small(**model, outputs=4), two_rounds(branches), config=config)
    assert len(result.rounds) == len(branches)
    assert list(result.model.state_dict()) == list(small(**model).state_dict())
    assert result.deployed == result.plain
    assert all(record.max_rel <= 1e-12 and record.effect >= 0.1 for record in result.rounds)


@pytest.mark.parametrize("average", sampled([0.9, 0.0], [0.9]))
def test_linear_branches_can_be_trained_online(tmp_path, average):
    plan = (("pointwise_conv", "expandnet"), ("bottleneck",))
    outcomes = [
        run(
            tmp_path / str(online), plan=two_rounds(plan, online=online), config=TrainConfig(lr=0.05, ema_decay=average)
        )
        for online in (True, False)
    ]
    entries = [(e.kind, e.round, e.update) for e in outcomes[0].growth_log]
    assert entries == [
        ("grow", 1, 3),
        ("collapse", 1, 3),
        ("collapse", 1, 13),
        ("fuse", 1, 17),
        ("grow", 2, 27),
        ("collapse", 2, 37),  # with a live activation there is nothing to merge before
        ("fuse", 2, 41),
    ]
    assert all(e.names == ["conv1", "conv2"] for e in outcomes[0].growth_log if e.kind == "collapse")
    online = replay(small(outputs=4), outcomes[0].growth_log[:6], SIZE)
    assert all(branch.merged for conv in (online.conv1, online.conv2) for branch in conv.branches)
    costs = (
        [outcome.history[0].training_macs for outcome in outcomes],
        [{row.update: row.training_macs for row in outcome.history} for outcome in outcomes],
    )
    assert costs[0][0] == costs[0][1]
    cheap, dear = ((by[17] - by[13]) / (4 * BATCH) for by in costs[1])
    # forward and backward of the plain net but for the stem's input, and what merging costs a batch
    assert 3 * FORWARD_PLAIN - STEM < cheap < 1.1 * (3 * FORWARD_PLAIN - STEM) < 0.7 * dear
    assert not grown_modules(outcomes[0].model) and all(record.max_rel < 1e-10 for record in outcomes[0].rounds)


def test_a_net_born_grown_lives_until_its_first_round_ends(tmp_path):
    model = small(built_grown=True, outputs=4)
    result = run(tmp_path, model)
    base = [row for row in result.history if row.phase == "base"]
    assert [row.lam for row in base] == [1.0]  # vanishing begins after the hold, not before
    first, second = result.rounds
    assert first.branch == ["built grown"] and first.num_grown == 2
    assert first.retention is None and first.top1.before is None and first.top1.dropped is None
    assert second.branch == ["insert"] and second.top1.before is not None
    assert list(result.model.state_dict()) == list(small(outputs=4).state_dict())
    assert (
        result.deployed == result.plain == Profile(FORWARD_PLAIN, sum(p.numel() for p in small(outputs=4).parameters()))
    )
    assert " | -         | " in result.table()  # no retention without a plain net before


def test_the_report_of_a_timm_model_says_how_to_use_it_and_it_works(tmp_path, monkeypatch):
    kwargs = {"num_classes": 4, "width": 0.25, "depths": (1, 1, 1)}
    about = {"model": {"name": "reducenet20", "plain_name": "reducenet20", "plain_kwargs": kwargs}}
    model = timm.create_model("reducenet20", **kwargs)
    result = run(tmp_path, model, two_rounds((("bottleneck",),)), about=about)
    text = (tmp_path / "report.md").read_text()
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    pixels = torch.randn(2, *SIZE)
    read = scope["net"].state_dict()
    assert all(torch.equal(value, read[key]) for key, value in result.model.state_dict().items())
    found, expected = (net.eval().double()(pixels.double()) for net in (scope["net"], result.model))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # one is channels_last
    assert "12 images of the training set (one image is 8.33 points)" in text
    assert "![curves](curves.png)" in text and "exactly the plain net's" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 3 and len({line.count("|") for line in table}) == 1
    assert result.table().splitlines()[2].startswith("1     | bottleneck in 3 layers |")


def test_a_run_without_rounds_is_plain_training(tmp_path):
    result = run(tmp_path, plan=BASE_ONLY)
    assert result.rounds == [] and result.training_macs == result.plain_training_macs
    sections = re.findall("^## (.*)$", (tmp_path / "report.md").read_text(), re.M)
    assert sections == ["The file", "Use it", "Made by"]  # nothing on rounds, proofs and gradients there were not


def test_a_data_set_is_as_good_as_a_feed(tmp_path):
    plan = two_rounds((("bottleneck",),))
    a = run(tmp_path / "a", plan=plan)
    b = run(tmp_path / "b", plan=plan, feed=data(), batch_size=BATCH, augment=NO_AUGMENT)
    for key, value in a.model.state_dict().items():
        assert torch.equal(value, b.model.state_dict()[key])
    assert b.about["augment"] == asdict(NO_AUGMENT)


def test_without_matplotlib_there_are_no_curves_and_all_the_rest(tmp_path, monkeypatch):
    monkeypatch.undo()
    shorten_settle(monkeypatch)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(tmp_path, plan=two_rounds((("bottleneck",),)))
    assert not (tmp_path / "curves.png").exists()
    assert "curves.png" not in (tmp_path / "report.md").read_text()


def test_progress_goes_to_the_screen_and_a_line_a_round(tmp_path, capsys):
    run(tmp_path, plan=two_rounds((("bottleneck",),)), progress=True)
    out, err = capsys.readouterr()
    assert "round 1 (bottleneck): val top-1 before " in out and " -> end " in out
    assert "27/27" in err
    run(tmp_path / "quiet", plan=two_rounds((("bottleneck",),)))
    assert capsys.readouterr() == ("", "")


def bad_weights():
    model = small(outputs=4)
    torch.nn.init.constant_(model.head.weight, math.nan)
    return model


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"plan": two_rounds(where="nothing")}, GrowError, "where='nothing'.*matches no convolution"),
        ({"plan": two_rounds(where="stem")}, GrowError, "the stem is left alone"),
        ({"plan": two_rounds(epochs=1)}, PlanError, "round 1 has 4 updates: too few"),
        ({"plan": BASE_ONLY, "model": small(built_grown=True, outputs=4)}, PlanError, "built grown"),
        ({"model": small(outputs=7)}, RunError, "has 4 classes: make it with num_classes=4"),
        ({"config": TrainConfig(optimizer="lamb")}, PlanError, "optimizer='lamb'"),
        ({"config": TrainConfig(optimizer="lamb"), "progress": True, "tensorboard": True}, PlanError, "optimizer="),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, kwargs, error, words, capsys):
    with pytest.raises(error, match=words):
        run(tmp_path / "run", **kwargs)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_loss_that_is_nan_ends_the_run_with_the_last_checkpoint_kept(tmp_path):
    with pytest.raises(RunError, match=r"the loss is nan in round 0, phase base.*There is no checkpoint yet"):
        run(tmp_path / "a", bad_weights(), plan=BASE_ONLY)
    feed = Feed.make()
    good = feed.train.batch
    feed.train.batch = lambda update: (good(update)[0] * (math.nan if update >= 14 else 1), good(update)[1])
    with pytest.raises(RunError, match=r"round 1, phase settle, between updates 13 and 16. .*-000000013.* is kept"):
        run(tmp_path / "b", feed=feed)
    assert (tmp_path / "b" / "checkpoint-000000013.safetensors").exists()
    assert run(tmp_path / "b", resume=True).final.loss < math.inf  # with the data in order again


def test_a_folder_is_not_used_twice(tmp_path):
    plan = two_rounds((("bottleneck",),))
    run(tmp_path, plan=plan)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(RunError, match="holds a finished run"):
        run(tmp_path, plan=plan)
    with pytest.raises(RunError, match="is finished"):
        run(tmp_path, plan=plan, resume=True)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
    with RunFolder.claim(tmp_path / "mine") as folder:
        run(folder, plan=plan)
        with pytest.raises(RunError, match="in use"):
            run(tmp_path / "mine", plan=plan)


def test_the_test_split_and_the_val_split_decide_nothing(tmp_path):
    feeds = [Feed.make(), Feed.make()]
    feeds[1].val.split.labels.add_(1).remainder_(4)
    feeds[1].test.batches.split.labels.add_(1).remainder_(4)
    a, b = (run(tmp_path / str(index), feed=feed) for index, feed in enumerate(feeds))
    assert all(torch.equal(value, b.model.state_dict()[key]) for key, value in a.model.state_dict().items())


def test_tensorboard_gets_the_rows_too(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, plan=two_rounds((("bottleneck",),)), tensorboard=True)
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_run_is_resumed_only_with_the_options_it_was_started_with(tmp_path):
    options = {"feed": data(), "batch_size": BATCH, "augment": NO_AUGMENT, "about": {"model": "a", "command": "x"}}
    other_model = small(outputs=4, norm=False, bias=True)
    changes = [
        ({"plan": two_rounds(teacher=Teacher("peak"))}, "another plan"),
        ({"config": TrainConfig(lr=0.05, ema_decay=0.8)}, r"another config \(ema_decay: 0.9 then, 0.8 now\)"),
        ({"about": {"model": "b"}}, r"another model \('a' then, 'b' now\)"),
        ({"batch_size": 4}, "another data"),
        ({"augment": Augment(crop=1, flip=False)}, r"another augment \(crop: 0 then, 1 now\)"),
        ({"model": other_model}, "checkpoint-000000004.*of another model"),
    ]
    real = running.save_checkpoint

    def save_and_fail_at_4(folder, update, values, keep):
        real(folder, update, values, keep)
        if update == 4:
            raise Interrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr("growshrink.cycle.running.save_checkpoint", save_and_fail_at_4)
        run(tmp_path, **options)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    for change, words in changes:
        with pytest.raises(RunError, match=words):
            run(tmp_path, **{**options, **change}, resume=True)
        assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
    run(tmp_path, **{**options, "about": {"model": "a", "command": "another command"}}, resume=True)


@pytest.mark.parametrize(
    ("widths", "leaves"), [(None, Fuse()), exhaustive((NetAug("netaug"), Choose()))], ids=["fuse", "choose"]
)
def test_a_cycle_of_a_net_of_linear_layers(tmp_path, widths, leaves):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MlpMixer(num_classes=4, img_size=8, patch_size=2, embed_dim=8, num_blocks=1)
    plan = two_rounds((("bottleneck", "insert"),), widths=widths, exit=leaves)
    result = run(tmp_path / "run", model, plan)
    assert list(result.model.state_dict()) == list(model.state_dict())
    assert {k: v.shape for k, v in result.model.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    (record,) = report(tmp_path / "run")["rounds"]
    assert record["num_grown"] == 4 and record["max_rel"] <= 1e-12
    assert leaves.decides or record["effect"] >= 0.01  # it may choose the base, in which nothing is merged


def test_a_run_folder_of_an_older_version_is_refused_by_its_version(tmp_path):
    feed = Feed.make()
    feed.train.fail_at = 9
    with pytest.raises(Interrupt):
        run(tmp_path, feed=feed)
    marker = json.loads((tmp_path / "run.json").read_text())
    del marker["format"]
    marker["versions"]["growshrink"] = "0.1.0"
    (tmp_path / "run.json").write_text(json.dumps(marker))
    with pytest.raises(RunError, match="a run of growshrink 0.1.0, whose run folders this version cannot resume"):
        run(tmp_path, resume=True)
