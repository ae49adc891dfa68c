"""tools/soak.py: a few rounds of it, and its verdicts."""

import json
from pathlib import Path

import pytest

import growshrink as gs
import program

SOAK = Path(__file__).parents[2] / "tools" / "soak.py"
LITTLE = ("--pixels", "8", "--updates", "1", "--quiet")


def run(*args):
    return program.run(SOAK, *args)


@pytest.mark.exhaustive
def test_a_few_rounds(tmp_path, capsys):
    assert run("--rounds", "4", *LITTLE, "--file", tmp_path / "log.jsonl") == 0
    assert "all as it must be" in capsys.readouterr().out
    rounds = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["branch"] for entry in rounds] == ["bottleneck", "insert", "nest", "dbb"]
    assert 0 < rounds[-1]["drift"] < 1e-12 and all(entry["effect"] > 0.01 for entry in rounds)
    assert {(entry["tensors"], entry["modules"], entry["outlived"]) for entry in rounds[1:]} == {
        (rounds[-1]["tensors"], rounds[-1]["modules"], 0)
    }


@pytest.mark.exhaustive
def test_what_outlives_its_round_is_told(capsys, monkeypatch):
    kept = []
    fuse = gs.fuse

    def keeping(net, **options):
        kept.append(net)
        return fuse(net, **options)

    monkeypatch.setattr(gs, "fuse", keeping)
    assert run("--rounds", "2", *LITTLE) == 1
    said = capsys.readouterr().out
    assert "branches outlived their round" in said and "live modules" not in said.split("branch ")[0]


def test_a_fuse_that_is_not_exact_is_told(capsys, monkeypatch):
    monkeypatch.setattr(gs, "fuse", lambda net, **options: gs.drop(net))
    assert run("--rounds", "2", *LITTLE) == 1
    assert "a drift of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rounds", "1"], "at least 2 --rounds"),
        (["--most-growth", "nan"], "--most-growth nan: must be a finite number"),
        (["--model", "reducenett20"], "did you mean reducenet20"),
        (["--file", "."], "a folder, must be a file"),
    ],
)
def test_bad_options(args, words, capsys):
    assert run(*args) == 2
    assert words in (error := capsys.readouterr().err) and error.count("\n") == 1
