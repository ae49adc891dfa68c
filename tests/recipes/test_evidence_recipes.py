"""recipes/compare.py and recipes/scan.py as their users run them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from program import run

PLAN = {
    "data": "digits",
    "model_kwargs": {"width": 0.125},
    "pool": 2,
    "budget": 6.0,
    "seeds": [0, 1],
    "batch_size": 64,
    "flip": False,
    "config": {"lr": 0.05, "ema_decay": 0.9},
    "arms": ["plain"],
    "own_arms": {"short": {"about": "one of its own", "rounds": [{"epochs": 1.0, "hold": 0.1, "ratio": 1.0}]}},
}


def compare(folder, *args, **values):
    (folder / "plan.json").write_text(json.dumps({**PLAN, **values}))
    return run("recipes/compare.py", folder / "plan.json", "--out", folder / "out", "--quiet", *args)


def test_it_goes_on_adds_arms_and_refuses_another_plan(tmp_path, capsys):
    assert compare(tmp_path) == 0
    assert "what the others are compared with" in capsys.readouterr().out
    assert compare(tmp_path, "--workers", "2", arms=["plain", "short"]) == 0
    assert "short" in capsys.readouterr().out
    assert (tmp_path / "out" / "README.md").exists() and (tmp_path / "out" / "curves.png").exists()
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())) == 2
    assert compare(tmp_path, budget=13.0) == 2
    assert "another plan (budget differs)" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_where_it_is_ended_its_workers_end_too(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({**PLAN, "budget": 3000.0, "arms": ["plain", "short"]}))
    command = ["recipes/compare.py", tmp_path / "plan.json", "--out", tmp_path / "out", "--quiet", "--workers", "2"]
    program = subprocess.Popen([sys.executable, *map(str, command)], stderr=subprocess.PIPE, start_new_session=True)
    try:
        for _ in range(1200):
            if len(list((tmp_path / "out").glob("*/*/log.jsonl"))) == 2:
                break
            time.sleep(0.1)
        program.send_signal(signal.SIGTERM)
        _, error = program.communicate(timeout=60)
        assert program.returncode == 143 and b"goes on from the last checkpoints" in error
        for _ in range(100):
            try:
                os.killpg(program.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
        pytest.fail("a worker is left")
    finally:
        program.kill()


@pytest.mark.parametrize(
    ("args", "words"), [((), "name a plan file"), (("--workers", "0", "recipes/plans/digits.json"), "--workers 0")]
)
def test_bad_options(args, words, capsys):
    assert run("recipes/compare.py", *args) == 2
    assert words in capsys.readouterr().err


def test_the_arms_are_listed(capsys):
    assert run("recipes/compare.py", "--list") == 0
    assert "never-shrunk" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_a_scan_of_two_nets_filled_and_unfilled(tmp_path, capsys):
    (tmp_path / "plan.json").write_text(json.dumps({**PLAN, "seeds": [0]}))
    args = [tmp_path / "plan.json", "--out", tmp_path / "out", "--quiet", "--widths", "0.125", "--depths", "1", "2"]
    args += ["--at-most", "1e9", "--budget", "6", "--arm", "short"]
    assert run("recipes/scan.py", *args) == 0
    out = capsys.readouterr().out
    assert "2 of 2 nets" in out and "plain: width-0.125" in out and "short: width-0.125" in out
    scan = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert [len(entries) for entries in scan.values()] == [3, 3]
    assert (tmp_path / "out" / "front.png").exists() and "Won:" in (tmp_path / "out" / "report.md").read_text()
    assert run("recipes/scan.py", *args, "--at-most", "2e9") == 2
    assert "another scan" in capsys.readouterr().err
