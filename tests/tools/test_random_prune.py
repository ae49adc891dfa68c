"""tools/random_prune.py as its users run it."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from program import run

TOOL = Path(__file__).parents[2] / "tools" / "random_prune.py"
SHALLOW = "depths=(1,1,1)"
TINY = ["--model-kwargs", "width=0.5", SHALLOW, "--epochs", "0.3", "--tolerance", "0.2", "--null-draws", "1", "--quiet"]
SMALL = [*TINY, "--subnets", "6", "--seeds", "2", "--criteria", "l1", "random"]


def start(*args):
    return subprocess.Popen(
        [sys.executable, str(TOOL), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def main(capsys, *args):
    return run(TOOL, *args), *capsys.readouterr()


def lines(path):
    file = path / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.exhaustive
def test_killed_and_run_again_by_two_processes_nothing_is_lost_and_nothing_done_twice(tmp_path, capsys):
    pytest.importorskip("torch_pruning")
    out = tmp_path / "run"
    args = [*TINY, "--subnets", "60", "--seeds", "1", "--criteria", "l1", "--out", out]
    killed = start(*args)
    deadline = time.monotonic() + 120
    while len(lines(out)) < 8 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=600)
    survived = lines(out)
    weights = (out / "net-0.safetensors").stat().st_mtime_ns
    assert 8 <= len(survived) < 62
    other = start(*args)
    code, here, _ = main(capsys, *args)
    stdout, stderr = other.communicate(timeout=600)
    assert code == other.returncode == 0, stderr
    assert "Traceback" not in stderr and "60 random subnets" in stdout and "60 random subnets" in here
    found = lines(out)
    assert found[: len(survived)] == survived
    keys = [record["key"] for record in found]
    assert len(keys) == len(set(keys)) == 62
    assert (out / "net-0.safetensors").stat().st_mtime_ns == weights
    assert json.loads((out / "random_prune.json").read_text())["damaged_lines"] == 0


def test_channels_of_a_net(tmp_path, capsys):
    pytest.importorskip("torch_pruning")
    code, out, err = main(capsys, *SMALL, "--out", tmp_path / "run")
    assert code == 0, err
    assert "uniform draws met it" in out and "12 random subnets" in out
    result = json.loads((tmp_path / "run" / "random_prune.json").read_text())
    assert set(result["criteria"]) == {"l1", "random threshold"}
    assert 0 < result["draws"]["acceptance"] <= 1 and (tmp_path / "run" / "random_prune.png").exists()
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    code, out, _ = main(capsys, *SMALL, "--out", tmp_path / "run")
    assert code == 0 and "20 of 20 subnets are there already" in out
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before
    code, _, err = main(capsys, *SMALL, "--macs", "0.4", "--out", tmp_path / "run")
    assert code == 2 and "another options (macs: 0.5 then, 0.4 now)" in err
    again = ["--trained", tmp_path / "run" / "net-0.safetensors", "--out", tmp_path / "again"]
    code, out, _ = main(capsys, *SMALL, *again)
    assert code == 0 and "6 random subnets" in out and "there is no test" in out


def test_widths_of_a_supernet_and_the_truth_they_leave(tmp_path, capsys):
    args = [*SMALL[:-3], "--space", "widths", "--criteria", "params", "excess", "--out", tmp_path / "run"]
    code, out, err = main(capsys, *args)
    assert code == 0, err
    assert "no subnet twice" in out
    with open(tmp_path / "run" / "truth.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and list(rows[0]) == ["subnet", "net0", "net1"]
    weights = ["--trained", tmp_path / "run" / "supernet-0.safetensors", "--out", tmp_path / "again"]
    code, _, err = main(capsys, *args[:-2], *weights)
    assert code == 2 and "look at the supernet before training too: --untrained" in err
    code, out, _ = main(capsys, *args[:-2], *weights, "--untrained", tmp_path / "run" / "init-0.safetensors")
    assert code == 0 and "6 random subnets" in out


def test_subnets_that_are_trained_by_themselves_are_better_than_their_start(tmp_path, capsys):
    args = ["--space", "widths", "--model-kwargs", "width=0.25", SHALLOW, "--tolerance", "0.5", "--epochs", "0.1"]
    args += ["--subnets", "2", "--seeds", "1", "--criteria", "params", "--quiet"]
    for name, epochs in (("alone", "2"), ("untrained", "0.01")):
        code, _, err = main(capsys, *args, "--alone", epochs, "--out", tmp_path / name)
        assert code == 0, err
    top1 = [np.array([row["top1"] for row in lines(tmp_path / name)]) for name in ("alone", "untrained")]
    assert (top1[0] > top1[1]).all() and top1[0].min() > 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--space", "depths"], "--space depths: no such space"),
        (["--criteria", "l9"], "--criteria l9: not one of --space channels"),
        (["--space", "widths", "--criteria", "l1"], "--criteria l1: not one of --space widths"),
        (["--subnets", "1"], "--subnets 1: too few"),
        (["--alone", "1"], "--alone goes with --space widths"),
        (["--trained", "nowhere.safetensors"], "--trained nowhere.safetensors: there is no such file"),
        (["--macs", "0.0001", *TINY[:-3]], "0 subnets within"),
        (["--macs", "2"], "must be above 0 and at most 1"),
        (["--model", "reducenet21"], "timm knows no such model"),
    ],
)
def test_options_that_are_wrong(tmp_path, capsys, monkeypatch, args, message):
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr("growshrink.analysis.prune.MOST_DRAWS", 20_000)
    code, _, err = main(capsys, *args, "--quiet", "--epochs", "0.1", "--out", tmp_path / "out")
    assert code == 2 and message in err and err.count("\n") == 1
