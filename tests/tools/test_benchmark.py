from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from program import completed, module_of

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"
SLOW = ("rank", "compile")
TARGETS = {"fused": "<=", "grown": ">=", "loader": ">=", "round": "<="}


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return completed(TOOL, "--quick", "--threads", "1", *options)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's own, of images it reads in this process
@pytest.mark.exhaustive
def test_every_section_is_measured_in_pairs_and_judged(tmp_path):
    out = tmp_path / "bench.json"
    result = run("--file", str(out), "--strict", "--quiet")
    found = json.loads(out.read_text())
    rows = found["rows"]
    missed = [row for row in rows if row["verdict"] == "MISSED"]
    assert result.returncode == bool(missed), result.stderr
    assert ("targets MISSED" in result.stdout) == bool(missed)
    assert "Traceback" not in result.stderr

    assert found["threads"] == 1 and found["cores"] >= 1 and found["processor"] and found["versions"]["torch"]
    sections = [row["section"] for row in rows]
    assert list(dict.fromkeys(sections)) == ["fused", "grown", "loader", "round", "activation", "step", "data"]
    assert len({(row["section"], row["what"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["repeats"] == len(row["ratios"]) >= 3
        assert 0 < min(row["ratios"]) <= row["q1"] <= row["ratio"] <= row["q3"] <= max(row["ratios"]) < float("inf")
        assert row["a"] > 0 and row["b"] > 0
        assert row["what"] in result.stdout
        if row["target"]:
            sign, limit = row["target"].split()
            assert sign == TARGETS[row["section"]]
            if row["section"] != "round":
                met = row["ratio"] <= float(limit) if sign == "<=" else row["ratio"] >= float(limit)
                assert row["verdict"] == ("ok" if met else "MISSED")
        else:
            assert row["verdict"] == ""
    assert {row["section"] for row in rows if row["target"]} == set(TARGETS)
    assert {row["unit"] for row in rows if row["section"] == "loader"} == {"images/s"}

    shares = [row["ratio"] for row in rows if row["section"] == "data"]
    assert len(shares) == 3 * 8 + 2 and max(shares) < 1  # a step holds what its batch takes

    steps, whole = (row for row in rows if row["section"] == "round")
    hold, vanish, settle, total = 24, 18, 50, 120  # 20 %, 15 %, and no fewer than 50 updates
    tail = 1 - (hold + vanish + settle) / total
    bound = 1.1 * ((1 - tail) + tail / steps["ratio"])
    assert float(whole["target"].split()[1]) == pytest.approx(bound, rel=0.005)  # it is printed rounded
    assert f"t = {tail:.3f}" in whole["note"] and "growing" in whole["note"] and "fusing" in whole["note"]


def test_one_section_alone_with_a_progress_bar(monkeypatch):
    monkeypatch.setattr("growshrink.base.progress.PAUSE", 0.0)
    result = run("--only", "activation")
    assert result.returncode == 0, result.stderr
    assert "VanishingReLU" in result.stdout and "fused" not in result.stdout
    assert "pair/s" in result.stderr or "s/pair" in result.stderr


def test_an_existing_file_is_refused_before_anything_is_measured(tmp_path):
    out = tmp_path / "bench.json"
    out.write_text("precious")
    result = run("--file", str(out))
    assert result.returncode == 2
    assert result.stdout == "" and result.stderr.count("\n") == 1 and "exists" in result.stderr
    assert out.read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--threads", "0"], "--threads 0"),
        (["--file", "no/such/folder/bench.json"], "does not exist"),
    ],
)
def test_bad_options_are_refused(options, word):
    result = run(*options)
    assert result.returncode == 2
    assert word in result.stderr and "Traceback" not in result.stderr


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own
@pytest.mark.exhaustive
def test_the_suite_has_every_table(tmp_path):
    out = tmp_path / "bench.json"
    result = run("--only", "fused", "--suite", "--quiet", "--file", str(out))
    assert result.returncode == 0, result.stderr
    suite = module_of(TOOL.parent / "suite.py")
    headings = [line[3:] for line in result.stdout.splitlines() if line.startswith("## ")]
    assert headings == list(suite.PROGRAMS)
    assert list(dict.fromkeys(row["section"] for row in json.loads(out.read_text())["rows"])) == ["fused", *SLOW]
    assert "times import timm" in result.stdout, "the last of them"


@pytest.mark.parametrize("options", [("--authors", "."), ("--suite", "--authors", ".")])
def test_a_folder_without_the_authors_module_is_refused_before_anything_is_measured(options):
    result = run(*options)
    assert result.returncode == 2 and "DiverseBranchBlock" in result.stderr and not result.stdout
