"""tools/claims.py and tools/speed_claims.py as their users run them."""

import json
import runpy
from pathlib import Path

import pytest

from program import completed
from sampled import sampled

TOOLS = Path(__file__).parents[2] / "tools"
BRIEF = ["--epochs", 0.05, "--seeds", 2, "--quiet", "--model-kwargs", "width=0.25"]


@pytest.mark.parametrize("claims", sampled([["order"], ["activations", "netaug", "stack", "robust"]], [["order"]]))
def test_claims_are_compared_over_paired_seeds_and_go_on(tmp_path, claims):
    pytest.importorskip("torch_pruning")
    out = tmp_path / "run"
    result = completed(TOOLS / "claims.py", *claims, *BRIEF, "--out", out)
    assert result.returncode == 0, result.stderr
    found = json.loads((out / "claims.json").read_text())["claims"]
    assert list(found) == claims
    for rows in found.values():
        first, *others = rows.values()
        measure = next(iter(first))
        assert len(first[measure]) == 2 and f"{measure}_difference" not in first
        for row in others:
            difference = row[f"{measure}_difference"]
            value, low, high = difference["difference"]
            assert low <= value <= high and difference["detectable"] >= 0
            assert value == pytest.approx(sum(row[measure]) / 2 - sum(first[measure]) / 2)
    again = completed(TOOLS / "claims.py", *claims, *BRIEF, "--out", out)
    assert again.stdout == result.stdout and len((out / "results.jsonl").read_text().splitlines()) == 2 * len(claims)


def test_the_orders_of_a_layer_are_what_they_say():
    made = runpy.run_path(str(TOOLS / "claims.py"))["_layer"]
    kinds = {
        order: [type(m).__name__ for m in made(8, 16, 1, order, True)] for order in ("conv norm relu", "norm relu conv")
    }
    assert kinds == {
        "conv norm relu": ["Conv2d", "BatchNorm2d", "ReLU"],
        "norm relu conv": ["BatchNorm2d", "ReLU", "Conv2d"],
    }
    norm, relu, conv = made(8, 16, 1, "norm relu conv", True)
    assert norm.num_features == conv.in_channels == 8
    assert [type(m).__name__ for m in made(8, 16, 1, "conv norm relu", False)] == ["Conv2d", "BatchNorm2d"]


@pytest.mark.parametrize("sections", sampled([["kernels"], ["shallow", "depthwise"]], [["kernels"]]))
def test_speeds_are_timed_in_turns_and_drawn(tmp_path, sections):
    file, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    options = ["--quick", "--quiet", "--pixels", 32, "--side", 4, "--batches", 1]
    result = completed(TOOLS / "speed_claims.py", "--only", *sections, *options, "--file", file, "--picture", picture)
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == sections and all(row["ratio"] > 0 for found in rows.values() for row in found)
    if "kernels" in rows:
        by_hand = [9 * 64 * (6 * 6 + 4 * 4), 25 * 64 * 4 * 4]  # all padding in front: the first of two sees a border
        assert rows["kernels"][0]["macs"] == by_hand
    assert picture.read_bytes().startswith(b"\x89PNG")
