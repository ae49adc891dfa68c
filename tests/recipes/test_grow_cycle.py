"""recipes/grow_cycle.py as its users run it."""

import errno
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from growshrink.cli.options import ModelOptions, RunOptions
from growshrink.cycle import CyclePlan
from growshrink.data.batches import TrainBatches
from growshrink.errors import RunError
from growshrink.layers.activations import set_lambda, was_grown
from growshrink.runs.folder import RunFolder
from growshrink.transforms import fuse
from program import args_of, run
from sampled import sampled

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "grow_cycle.py"
FILES = {"curves.png", "growth_log.json", "log.jsonl", "plain.safetensors", "report.json", "report.md", "run.json"}
SMALL = [
    "--model-kwargs",
    "width=0.25",
    "depths=(1,1,1)",
    "--ratio",
    "1",
    "--rounds",
    "1",
    "--epochs",
    "5",
    "--teacher",
    "peak",
    "--quiet",
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same sums as in the process of the tests


def main(*args):
    return run(RECIPE, *args)


def start(*args, **kwargs):
    """Run the recipe in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(RECIPE), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        **kwargs,
    )


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


@pytest.mark.exhaustive
def test_without_arguments_it_learns_the_digits_and_leaves_everything(tmp_path):
    began = time.monotonic()
    process = start("--out", tmp_path / "run", cwd=tmp_path)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert "Traceback" not in err and "Warning" not in err
    print(f"{time.monotonic() - began:.0f} s")
    path = tmp_path / "run"
    assert {p.name for p in path.iterdir()} >= FILES
    report = json.loads((path / "report.json").read_text())
    assert report["final"]["top1"] >= 97.0
    assert report["final"]["params"] == report["plain"]["params"] == 123_610
    assert report["final"]["macs"] == report["plain"]["macs"]
    assert [record["branch"] for record in report["rounds"]] == [["bottleneck"], ["insert"]]
    for record in report["rounds"]:
        assert record["max_rel"] <= 1e-10 and record["max_rel_float32"] <= 1e-5 and record["effect"] >= 0.1
        assert record["tail_share"] >= 0.55
        assert record["gradients_at_update_2"]["with_gradient"] == record["gradients_at_update_2"]["new_parameters"]
    assert report["training"]["seconds"] < 180
    net = timm.create_model("reducenet20", num_classes=10, in_chans=1)
    net.load_state_dict(load_file(path / "plain.safetensors"), strict=True)
    assert "round | branches" in out and f"Read {path / 'report.html'}" in out
    assert "round 1 (bottleneck): val top-1 before" in out
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.exhaustive
def test_a_run_killed_with_signal_9_is_resumed_to_the_same_weights(tmp_path, capsys):
    path, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    process = start("--out", path, *SMALL)
    deadline = time.monotonic() + 300
    while not (found := [p for p in path.glob("checkpoint-*") if int(p.stem[-9:]) >= 28]):  # in the vanishing
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert main("--out", undisturbed, *SMALL) == 0
    assert process.returncode == -signal.SIGKILL and found
    assert json.loads((path / "run.json").read_text())["status"] == "running"
    assert main("--out", path, *SMALL) == 2
    assert "an unfinished run (--resume continues it)" in capsys.readouterr().err
    assert main("--out", path, *SMALL, "--crop", "2", "--resume") == 2
    assert "another options (crop: None then, 2 now)" in capsys.readouterr().err
    assert main("--out", path, *SMALL, "--seed", "1", "--resume") == 2
    for number, update, code, line in (
        (signal.SIGTERM, 45, 143, "stopped by SIGTERM after update 46 of 100, saved in"),
        (signal.SIGINT, 60, 130, "stopped by SIGINT after update 61 of 100, saved in"),
        (None, 70, 2, "cannot be written (No space left on device"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            sends_or_fills(patch, number, update)
            capsys.readouterr()
            assert main("--out", path, *SMALL, "--resume") == code
        err = capsys.readouterr().err
        assert err.startswith("grow_cycle: ") and err.count("\n") == 1 and line in err
        assert err.endswith(
            "; --resume continues from there.\n" if number else "older checkpoints are kept; make room.\n"
        )
        assert not list(path.glob(".*.partial"))
    assert main("--out", path, *SMALL, "--resume") == 0
    expected = load_file(undisturbed / "plain.safetensors")
    found = load_file(path / "plain.safetensors")
    assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in expected)
    reports = [json.loads((p / "report.json").read_text()) for p in (path, undisturbed)]
    assert reports[0]["rounds"] == reports[1]["rounds"] and reports[0]["final"] == reports[1]["final"]

    before = contents(path)  # finished now
    capsys.readouterr()
    assert main("--out", path, *SMALL, "--resume") == 0
    out, err = capsys.readouterr()
    assert "is finished" in out and not err
    assert main("--out", path, *SMALL) == 2
    assert "holds a finished run. Nothing is overwritten" in capsys.readouterr().err
    assert contents(path) == before


def sends_or_fills(patch, number, update):
    """At an update: send this process a signal, or where `number` is None fill the disk."""
    real, sent = TrainBatches.batch, []

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    def batch(self, asked):
        if asked == update and not sent:
            sent.append(1)
            if number is None:
                patch.setattr(os, "fsync", full)
            else:
                os.kill(os.getpid(), number)
        return real(self, asked)

    patch.setattr(TrainBatches, "batch", batch)


@pytest.mark.parametrize(
    "content",
    sampled(['{"plan": {"base_epochs": 0.5}, "status": "finished"}', '{"base_epochs": 0.5}'], '{"plan"'.__lt__),
)
def test_a_plan_comes_from_a_file_of_its_own_or_from_a_run(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    options = ("--model-kwargs", "width=0.25", "depths=(1,1,1)", "--quiet")
    assert main("--out", tmp_path / "run", "--plan", tmp_path / "plan.json", *options) == 0
    plan = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]
    assert CyclePlan.from_dict(plan) == CyclePlan(rounds=(), base_epochs=0.5)


def test_a_net_born_grown_on_a_folder_of_images_in_the_default_place(tmp_path, monkeypatch, capsys):
    pictures = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("test", 4)):
        for label, name in enumerate(("dark", "light")):
            folder = tmp_path / "my data" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(100, (16, 16, 3), generator=pictures) + 120 * label
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{index}.png")
    monkeypatch.chdir(tmp_path / "my data")
    monkeypatch.setattr("growshrink.cycle.layout.LEAST_SETTLE", 9)
    net = ["--model", "reducenet20_x2", "--model-kwargs", "width=0.125", "depths=(1,1,1)"]
    options = ["--data", ".", "--batch-size", "8", "--epochs", "9", "--rounds", "1", "--quiet"]
    assert main(*net, *options) == 0
    path = tmp_path / "my data" / "runs" / "my data-reducenet20_x2"
    report = json.loads((path / "report.json").read_text())
    assert report["rounds"][0]["branch"] == ["built grown"]
    assert report["final"]["params"] == report["plain"]["params"]
    assert main(*net, *options, "--resume") == 0
    assert "is finished" in capsys.readouterr().out
    monkeypatch.chdir(path)
    exec((path / "report.md").read_text().split("```python\n")[1].split("```")[0], {})


@pytest.mark.parametrize(
    ("name", "kwargs", "plain"),
    [
        ("reducenet20_x4", ("width=0.25",), "reducenet20"),
        ("reducenet20", ("expansion=3", "linear=True"), "reducenet20"),
        ("reducenet32_x2", ("expansion=1", "checkpoint_path="), "reducenet32"),
        ("test_resnet", ("drop_rate=0.1",), "test_resnet"),
    ],
)
def test_how_to_make_the_plain_net_is_told(name, kwargs, plain):
    recipe = runpy.run_path(str(RECIPE))
    args = recipe["Args"](model=ModelOptions(model=name, model_kwargs=kwargs), running=RunOptions(quiet=True))
    model, about = args.model.make(args.feed())
    grown = was_grown(model)
    if grown:
        set_lambda(model, 0.0)
    again = timm.create_model(about["plain_name"], **about["plain_kwargs"])
    assert about["plain_name"] == plain
    fused = fuse(model, input_size=(1, 8, 8)) if grown else model
    again.load_state_dict(fused.state_dict(), strict=True)


def test_help_explains_every_option(capsys):
    assert main("--help") == 0
    out = capsys.readouterr().out
    options = args_of(RECIPE)[1]
    assert len(options) >= 40
    words = " ".join(out.replace("│", " ").split())
    for name, option in options.items():
        assert f"--{name.replace('_', '-')}" in out, name
        assert len(option.doc) > 10 and option.doc.split(".")[0][:40].strip() in words, name
    groups = [name for name in ("data", "model", "training", "rounds", "running") if f" {name} options " in out]
    assert len(groups) == 5
    squeezed = "".join(out.replace("│", "").split())
    assert (
        "fuse[,accept_within=None]|drop" in squeezed
        and "peak|previous|wider|given[,weight=0.5][,asked=1.0]" in squeezed
    )


BAD = {
    "unknown model": (["--model", "reducenett20"], "--model reducenett20: timm knows no such model; did you mean "),
    "unknown data": (["--data", "digitz"], "--data digitz: no such data set"),
    "missing folder": (["--data", "cifar10", "--data-dir", "nowhere"], "nowhere"),
    "init": (["--init", "nowhere"], "--init nowhere: there is no such file or folder"),
    "channels": (["--model-kwargs", "in_chans=3"], "takes 3 channels, the images of digits have 1"),
    "classes": (["--model-kwargs", "num_classes=7"], "has 10 classes: make it with num_classes=10"),
    "model argument": (["--model-kwargs", "widht=2"], "widht"),
    "model argument's value": (["--model-kwargs", "width=-1"], "width=-1"),
    "no argument": (["--model-kwargs", "width"], "--model-kwargs width: must be KEY=VALUE"),
    "big net": (["--model", "vit_tiny_patch16_224"], "does not run on images of size (1, 8, 8)"),
    "ratio": (["--ratio", "0"], "ratio"),
    "negative ratio": (["--ratio=-2"], "ratio"),
    "regex": (["--where", "nothing"], "where='nothing': matches no convolution"),
    "broken regex": (["--where", "("], "not a regular expression"),
    "branch": (["--branches", "bottelneck"], "--branches bottelneck: no such branch; did you mean bottleneck"),
    "half a branch": (["--branches", "insert+"], "--branches insert+: no such branch"),
    "mixture": (["--mixup", "0.2", "--batch-size", "63"], "need an even batch size"),
    "hours": (["--hours", "1e-6"], "--hours 1e-06: no plan fits ("),
    "device": (["--device", "warp9"], "--device warp9: not to be had here"),
    "no gpu": (["--device", "cuda:77"], "--device cuda:77: not to be had here"),
    "too few epochs": (["--epochs", "4"], "The plan needs at least 9 epochs at this batch size (20 updates an epoch"),
    "no epochs": (["--epochs", "0"], "--epochs 0: must be above 0"),
    "negative epochs": (["--epochs=-3"], "--epochs -3: must be above 0"),
    "infinite epochs": (["--epochs", "inf"], "--epochs inf: must be a finite number"),
    "rounds": (["--rounds=-1"], "--rounds -1: must be at least 0"),
    "base": (["--base", "2"], "--base 2"),
    "shares": (["--hold", "0.6", "--vanish", "0.3"], "hold + vanish = 0.9"),
    "no val": (["--val-fraction", "0"], "the val split of digits is empty"),
    "val fraction": (["--val-fraction", "1.5"], "--val-fraction 1.5"),
    "batch": (["--batch-size", "0"], "--batch-size 0"),
    "huge batch": (["--batch-size", "100000"], "too few for one update"),
    "optimizer": (["--optimizer", "sdg"], "timm knows no such optimizer; did you mean"),
    "lr": (["--lr", "0"], "--lr 0: must be above 0"),
    "momentum": (["--momentum", "1"], "--momentum 1"),
    "crop": (["--crop=-1"], "--crop -1"),
    "stream": (["--stream"], "digits has no folder train"),
    "size": (["--image-size", "16"], "works for class folders only"),
    "mode": (["--widths", "netog"], "--widths netog: mode='netog': no such mode; did you mean netaug"),
    "exit": (["--widths", "lazy", "--exit", "fall"], "--exit fall: no such exit"),
    "exit of what": (["--exit", "choose"], "--exit choose: only a round with sampled widths"),
    "alpha": (["--widths", "lazy,alpha=-1"], "--widths lazy,alpha=-1: alpha=-1: must be at least 0"),
    "no plan": (["--plan", "nowhere.json"], "--plan nowhere.json: there is no such file"),
    "nan": (["--lr", "1e9", "--epochs", "20"], "the loss is nan in round 0, phase base, between updates 0 and "),
}


#: Not limits of one option, which tests/cli tries for every option of every program.
WHOLE = (
    *("unknown data", "init", "channels", "model argument's value", "big net", "regex", "half a branch", "mixture"),
    *("hours", "too few epochs", "shares", "no val", "huge batch", "stream", "exit of what", "nan"),
)


@pytest.mark.parametrize("case", sampled(BAD, WHOLE))
def test_bad_input_gets_one_clear_line(tmp_path, monkeypatch, capsys, case):
    args, words = BAD[case]
    monkeypatch.chdir(tmp_path)
    small = [] if "--model-kwargs" in args or "--model" in args else ["--model-kwargs", "width=0.25"]
    assert main("--out", "run", "--quiet", *small, *args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("grow_cycle: ")
    assert words in err
    if case == "nan":
        assert json.loads(Path("run/run.json").read_text())["status"] == "running"
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not readable as JSON"),
        ("[1]", "not a JSON object"),
        ('{"plan": 3}', "the plan: must be an object"),
        ('{"rounds": [{"epochs": 60, "brnch": ["insert"]}]}', "'brnch' is not an option of Round; did you mean"),
        ('{"rounds": [{"branch": ["insert"]}]}', "rounds[0]: "),
        ('{"rounds": [{"epochs": "many"}]}', "rounds[0]: epochs='many'"),
    ],
)
def test_a_malformed_plan_file_gets_one_clear_line(tmp_path, capsys, content, words):
    (tmp_path / "plan.json").write_text(content)
    assert main("--out", tmp_path / "run", "--quiet", "--plan", tmp_path / "plan.json") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("args", "words"), [(["--epoch", "3"], "--epochs"), (["--epochs", "abc"], "abc"), (["--teacher", "peek"], "peak")]
)
def test_an_unknown_option_or_value_is_named_before_anything_is_made(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    assert main(*args) == 2
    out, err = capsys.readouterr()
    assert args[0] in out + err and words in out + err and "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_or_of_somebody_else_is_refused_and_left_as_it_was(tmp_path, capsys):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    with RunFolder.claim(tmp_path / "busy"):
        assert main("--out", tmp_path / "busy", "--quiet") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "in use by another run" in err
    for name, words in {"foreign": "thesis.tex is in it", "file": "cannot be used"}.items():
        assert main("--out", tmp_path / name, "--quiet") == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and words in err and str(tmp_path / name) in err
    assert contents(tmp_path) == {"foreign": None, "foreign/thesis.tex": b"years of work", "file": b"x"}


def test_an_interrupt_from_the_keyboard_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def press(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("growshrink.cycle.running.evaluate", press)
    assert main("--out", tmp_path / "run", *SMALL) == 130
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(RunError, match="unfinished run"):
        RunFolder.claim(tmp_path / "run")


def test_an_arm_of_the_experiment_is_a_recipe_for_users(tmp_path):
    options = ("--model-kwargs", "width=0.125", "depths=(1,1,1)", "--epochs", "3", "--quiet", "--out", tmp_path / "run")
    assert main("--arm", "return", *options) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [entry["exit"] for entry in report["about"]["plan"]["rounds"]] == [{"kind": "rewind"}]
    assert report["about"]["plan"]["rounds"][0]["teacher"]["asked"] == 0.3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["retrun"], "--arm retrun: no such arm; did you mean return"),
        (["never-shrunk"], "makes no plain net"),
        (["reducenet-x4"], "add --model reducenet20_x4"),
        (["return", "--plan", "recipes/plans/digits.json"], "give one of them"),
    ],
)
def test_arms_that_cannot_be(args, words, tmp_path, capsys):
    assert main("--arm", *args, "--out", tmp_path / "run") == 2
    assert words in " ".join(capsys.readouterr().err.split())
