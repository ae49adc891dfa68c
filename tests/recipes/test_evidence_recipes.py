"""recipes/compare.py and recipes/scan.py as their users run them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from program import run
from sampled import sampled

TOP = Path(__file__).parents[2]
EVIDENCE = TOP / "docs" / "evidence"
EXPERIMENTS = sorted(path.parent.name for path in EVIDENCE.glob("*/plan.json"))
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


#: Epochs in which a seed of an arm is trained, where that is enough.
BRIEF = 4.0
#: What compare leaves beside run folders.
FILES = ("README.md", "curves.png", "plan.json", "runs.jsonl", "table.json")


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """An experiment of one arm and one seed, finished."""
    folder = tmp_path_factory.mktemp("started")
    assert compare(folder, seeds=[0], budget=BRIEF) == 0
    return folder / "out"


def compare(folder, *args, **values):
    (folder / "plan.json").write_text(json.dumps({**PLAN, **values}))
    return run("recipes/compare.py", folder / "plan.json", "--out", folder / "out", "--quiet", "--no-quantised", *args)


@pytest.mark.exhaustive
def test_it_goes_on_adds_arms_and_refuses_another_plan(tmp_path, capsys):
    assert compare(tmp_path) == 0
    assert "what the others are compared with" in capsys.readouterr().out
    assert compare(tmp_path, "--workers", "2", arms=["plain", "short"]) == 0
    assert "short" in capsys.readouterr().out
    assert (tmp_path / "out" / "README.md").exists() and (tmp_path / "out" / "curves.png").exists()
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*FILES, "runs"])
    assert compare(tmp_path, budget=13.0) == 2
    assert "another plan (budget differs)" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_an_experiment_is_extended_from_its_two_files_alone(started, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("growshrink.cycle.layout.LEAST_SETTLE", 9)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("plan.json", "runs.jsonl"):
        shutil.copy(started / name, moved / name)
    first = (moved / "runs.jsonl").read_text()
    capsys.readouterr()
    plan = tmp_path / "more.json"
    plan.write_text(json.dumps({**PLAN, "budget": BRIEF, "arms": ["plain", "short"]}))
    assert run("recipes/compare.py", plan, "--out", moved, "--quiet", "--no-quantised") == 0
    assert re.findall(r"run \d of \d, (\S+)", capsys.readouterr().out) == [
        "plain/budget-4-lr-0.05-seeds-1",
        "short/budget-4-lr-0.05-seeds-0-1",
    ]
    lines = (moved / "runs.jsonl").read_text()
    assert lines.startswith(first) and lines.count("\n") == 3
    made = {name: (moved / name).read_bytes() for name in FILES}
    for name in set(FILES) - {"plan.json", "runs.jsonl"}:
        (moved / name).unlink()
    shutil.rmtree(moved / "runs")
    assert run("recipes/compare.py", "--table", moved) == 0
    assert {name: (moved / name).read_bytes() for name in FILES} == made


def test_a_damaged_record_and_the_form_before_are_refused(started, tmp_path, capsys):
    shutil.copytree(started, tmp_path / "out")
    (tmp_path / "plan.json").write_text(json.dumps({**PLAN, "budget": BRIEF}))
    with open(tmp_path / "out" / "runs.jsonl", "a") as file:
        file.write('{"format":1,"job":\n')
    old = tmp_path / "old"
    (old / "plain" / "budget-6-lr-0.4-seeds-0").mkdir(parents=True)
    (old / "plain" / "budget-6-lr-0.4-seeds-0" / "seeds.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    plan = tmp_path / "plan.json"
    for args, words in (
        ((plan, "--out", tmp_path / "out"), "runs.jsonl, line 2: damaged"),
        (("--table", tmp_path / "out"), "runs.jsonl, line 2: damaged"),
        ((plan, "--out", old), "run folders from before runs.jsonl (growshrink 0.1.0"),
        (("--table", old), "run folders from before runs.jsonl (growshrink 0.1.0"),
        (("--table", tmp_path / "empty"), "holds no experiment"),
        (("--table", tmp_path / "out", "--out", old, plan), "takes folders of results"),
    ):
        assert run("recipes/compare.py", *args) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


def approx(value):
    """Equal to the last digit but one, whichever versions of numpy and scipy sum."""
    if isinstance(value, dict):
        return {key: approx(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [approx(inner) for inner in value]
    return pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value


@pytest.mark.parametrize("name", sampled(EXPERIMENTS, EXPERIMENTS[::4] + ["digits-scan"]))
def test_published_tables_are_made_from_their_records(name, tmp_path):
    out = tmp_path / name
    out.mkdir()
    for needed in ("plan.json", "runs.jsonl"):
        shutil.copy(EVIDENCE / name / needed, out / needed)
    assert run("recipes/compare.py", "--table", out) == 0
    published = {path.name for path in (EVIDENCE / name).iterdir()} - {"runs"}
    assert {path.name for path in out.iterdir()} == published
    for page in out.glob("*.md"):
        assert page.read_text() == (EVIDENCE / name / page.name).read_text()
    for table in {"table.json", "scan.json"} & published:
        assert json.loads((out / table).read_text()) == approx(json.loads((EVIDENCE / name / table).read_text()))


@pytest.mark.skipif(not EVIDENCE.exists(), reason="an sdist has no docs")
def test_published_evidence_is_small_and_its_links_lead_somewhere():
    files = [path for path in EVIDENCE.rglob("*") if path.is_file() and "runs" not in path.relative_to(EVIDENCE).parts]
    raw = {page: {path.name for path in files if path.parent.name == page} for page in ("claims", "gpu")}
    assert len(EXPERIMENTS) >= 10 and len(files) == 5 * len(EXPERIMENTS) + 1 + sum(map(len, raw.values()))
    for page, names in raw.items():
        text = (TOP / "docs" / "measured" / f"{page}.md").read_text()
        assert set(re.findall(rf"evidence/{page}/([\w.-]+)\)", text)) == names
    for page in EVIDENCE.rglob("*.md"):
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link.split("#")[0]).exists(), f"{page}: {link}"


@pytest.mark.exhaustive
def test_where_it_is_ended_its_workers_end_too(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({**PLAN, "budget": 3000.0, "arms": ["plain", "short"]}))
    command = ["recipes/compare.py", tmp_path / "plan.json", "--out", tmp_path / "out", "--quiet", "--workers", "2"]
    program = subprocess.Popen([sys.executable, *map(str, command)], stderr=subprocess.PIPE, start_new_session=True)
    try:
        for _ in range(1200):
            if len(list((tmp_path / "out").glob("runs/*/*/log.jsonl"))) == 2:
                break
            time.sleep(0.1)
        program.send_signal(signal.SIGTERM)
        _, error = program.communicate(timeout=600)
        assert program.returncode == 143 and b"continues from the last checkpoints" in error
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


@pytest.mark.parametrize("program", ["compare", "scan"])
def test_a_budget_that_is_too_small_is_refused_before_any_training(program, tmp_path, capsys):
    (tmp_path / "plan.json").write_text(json.dumps({**PLAN, "budget": 1.0, "arms": ["plain", "short"]}))
    scan = ("--channels", "0.125", "--depths", "1", "--at-most", "1e9", "--budget", "1", "--fill", "short")
    options = scan if program == "scan" else ("--no-quantised",)
    assert run(f"recipes/{program}.py", tmp_path / "plan.json", "--out", tmp_path / "out", "--quiet", *options) == 2
    error = capsys.readouterr().err
    assert "short" in error and "too few for hold" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]


def test_the_arms_are_listed(capsys):
    assert run("recipes/compare.py", "--list") == 0
    assert "never-shrunk" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_a_scan_of_two_nets_filled_and_unfilled(tmp_path, capsys):
    (tmp_path / "plan.json").write_text(json.dumps({**PLAN, "seeds": [0]}))
    args = [tmp_path / "plan.json", "--out", tmp_path / "out", "--quiet", "--channels", "0.125", "--depths", "1", "2"]
    args += ["--at-most", "1e9", "--budget", "6", "--fill", "short"]
    assert run("recipes/scan.py", *args) == 0
    out = capsys.readouterr().out
    assert "2 of 2 nets" in out and "plain: width-0.125" in out and "short: width-0.125" in out
    scan = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert [len(entries) for entries in scan.values()] == [3, 3]
    assert (tmp_path / "out" / "front.png").exists() and "Won:" in (tmp_path / "out" / "report.md").read_text()
    made = [(tmp_path / "out" / name).read_bytes() for name in ("scan.json", "report.md", "front.png", "runs.jsonl")]
    shutil.rmtree(tmp_path / "out" / "runs")
    assert run("recipes/scan.py", *args) == 0
    assert run("recipes/compare.py", "--table", tmp_path / "out") == 0
    again = [(tmp_path / "out" / name).read_bytes() for name in ("scan.json", "report.md", "front.png", "runs.jsonl")]
    assert again == made
    assert run("recipes/scan.py", *args, "--at-most", "2e9") == 2
    assert "another scan (at_most differs)" in capsys.readouterr().err
    lines = (tmp_path / "out" / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "runs.jsonl").write_text("".join(lines[:-1]))
    assert run("recipes/compare.py", "--table", tmp_path / "out") == 2
    assert "the scan is not finished (width-0.125" in capsys.readouterr().err
