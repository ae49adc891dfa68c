"""recipes/slim.py and tools/slim_speed.py as their users run them."""

import json
from pathlib import Path

import pytest

from program import run

ROOT = Path(__file__).parents[2]
SMALL = ("--model-kwargs", "width=0.25", "depths=(2,1,1)", "--epochs", "0.3", "--gate-epochs", "0.2", "--draws", "2")


@pytest.mark.exhaustive
def test_slim_compares_ways_to_choose_a_width(tmp_path, capsys):
    args = (*SMALL, "--seeds", "2", "--prices", "0.1", "--depth", "--quiet", "--out", tmp_path / "run")
    assert run(ROOT / "recipes/slim.py", *args) == 0
    out, _ = capsys.readouterr()
    rows = json.loads((tmp_path / "run" / "slim.json").read_text())["rows"]
    arms = {(row["level"], row["arm"]) for row in rows["arms"]}
    assert len(arms) == 2 * 5 + 2
    uniform = {row["level"]: row for row in rows["arms"] if row["arm"] == "uniform"}
    for row in rows["arms"]:
        ratio = row["macs"] / uniform[row["level"]]["macs"]
        assert 0.95 <= ratio <= 1.05 if row["arm"] == "random" else 0 < ratio <= 1
        assert len(row["test"]) == 2
    names = [policy["name"] for policy in rows["policies"]]
    assert names[:5] == ["net 0", "net 1", "net 2", "net 3", "oracle"]
    gates = [f"{way}, price 0.1" for way in ("exact", "gumbel", "labels", "reinforce")]
    assert names[-5:] == [*gates, "oracle of another seed"]
    assert [row["last"] for row in rows["drops"]] == [1.0, 0.8, 0.5] and rows["drops"][-1]["macs"] < 0.9
    assert [row["name"] for row in rows["blocks"]][-3:] == ["oracle", "gumbel, price 0.1", "reinforce, price 0.1"]
    assert run(ROOT / "recipes/slim.py", *args) == 0
    assert capsys.readouterr().out == out
    assert "needs" not in out and "over the random mix" in out


@pytest.mark.exhaustive
def test_slim_speed_times_what_it_says(capsys):
    assert run(ROOT / "tools/slim_speed.py", "--model-kwargs", "width=0.25", "--batches", "4", "--turns", "2") == 0
    assert "0.500 in the mean" in capsys.readouterr().out


def test_slim_needs_a_val_split(tmp_path, capsys):
    assert run(ROOT / "recipes/slim.py", "--val-fraction", "0", "--out", tmp_path / "run") != 0
    assert "widths are chosen on the val split" in capsys.readouterr().err
