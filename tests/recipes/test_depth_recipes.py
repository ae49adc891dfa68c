"""recipes/one_layer.py, closed_loop.py and shrink_depth.py as their users run them, on the digits, briefly."""

import json
import re
from pathlib import Path

import pytest
import timm
from safetensors.torch import load_file
from torch import nn

import growshrink as gs
from growshrink.depth.segments import Segment, merge_cut, vanish_cut
from program import beside, run
from sampled import exhaustive, sampled

RECIPES = Path(__file__).parents[2] / "recipes"
latency = beside(RECIPES / "latency.py")
BRIEF = ["--model-kwargs", "width=0.25", "--quiet", "--epochs"]


def main(recipe, *args):
    return run(RECIPES / f"{recipe}.py", *args)


@pytest.mark.exhaustive
def test_one_layer(tmp_path, capsys):
    out = tmp_path / "run"
    assert main("one_layer", *BRIEF, 2, "--model", "reducenet20_x1", "--out", out) == 0
    assert {p.name for p in out.iterdir()} >= {
        *("report.md", "report.json", "templates.png", "one_layer.safetensors", "run.json")
    }
    found = json.loads((out / "report.json").read_text())
    assert found["collapse_max_rel"] < 1e-10
    linear, buggy, default, matrix, squares, logistic = found["rows"].values()
    assert linear["defect"][0] < 1e-10 and matrix["defect"][0] < 1e-10
    assert buggy["defect"][0] > 1e-2 and default["defect"][0] > 1e-2
    assert matrix["top1"] == linear["top1"] and (matrix["layers"], matrix["macs"]) == (1, 640)
    assert linear["top1"][0] < logistic["top1"][0] and 90 < logistic["top1"][0] < 99 and squares["top1"][0] > 85
    report = (out / "report.md").read_text()
    assert "**does not beat** the best linear classifier" in report and "in-place bug" in capsys.readouterr().out
    weights = load_file(out / "one_layer.safetensors")
    one = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    one.load_state_dict(weights)

    assert main("one_layer", *BRIEF, 2, "--out", out) == 2
    error = capsys.readouterr().err
    assert error.startswith("one_layer: ") and error.count("\n") == 1 and "the run in it has another options" in error


def test_closed_loop(tmp_path, capsys):
    out = tmp_path / "run"
    args = (*BRIEF[:2], "--epochs", 1, "--model", "vanillanet_5_x1", "--seeds", "2", "--out", out)
    assert main("closed_loop", *args) == 0
    found = json.loads((out / "report.json").read_text())
    mean, low, high = found["difference"]
    first, second = (a - b for a, b in zip(found["top1"]["closed loop"], found["top1"]["cosine"], strict=True))
    assert mean == pytest.approx((first + second) / 2) and low <= mean <= high
    assert high - mean == pytest.approx(12.706 * abs(first - second) / 2, rel=1e-3)  # Student's t
    said = capsys.readouterr()
    assert "95 % interval" in said.out and (out / "lam.png").stat().st_size > 1000
    assert re.search(r"about \d+ s on this machine \(80 updates of", said.err) and "3 of 4 done, about" in said.err
    done = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
    (out / "results.jsonl").write_bytes(b"".join(done[:3]))  # it was stopped in the last net
    assert main("closed_loop", *args) == 0
    assert (out / "results.jsonl").read_bytes() == b"".join(done) and capsys.readouterr().out == said.out


def layers(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.exhaustive
def test_shrink_depth(tmp_path, capsys, monkeypatch):
    def by_layers(calls, **kwargs):
        return {name: float(len(layers(call.args[0]))) for name, call in calls.items()}

    monkeypatch.setattr(latency, "ANCHORS", 1)
    monkeypatch.setattr(
        latency, "interleaved_timings", by_layers
    )  # the clock of a machine with other users proves nothing
    out = tmp_path / "run"
    options = ["--shrink-epochs", "0.5", "--targets", "0.7", "0.0001", "--remeasure", "--longest", "3"]
    assert main("shrink_depth", *BRIEF, 1, *options, "--out", out) == 0
    assert {p.name for p in out.iterdir()} >= {"report.md", "report.json", "pareto.png", "merged-0.safetensors"}
    found = json.loads((out / "report.json").read_text())
    rows = found["rows"]
    assert rows[0]["name"] == "nothing merged" and len(rows) == 3 and found["hardware"]
    first, second, third = [row["predicted_ms"] for row in rows]
    assert first == pytest.approx(10.0) and third == pytest.approx(4.0)  # the last target cannot be met
    assert second <= 7.0 and [row["ms"] for row in rows] == pytest.approx([first, second, third])
    for number, row in enumerate(rows):
        assert len(row["knob"]) == len(row["plain"]) == 1
        cut = tuple(Segment(*segment) for segment in row["cut"])
        again = vanish_cut(timm.create_model("reducenet20", width=0.25, in_chans=1), cut)
        gs.set_lambda(again, 0)
        merged = merge_cut(again, cut, input_size=(1, 8, 8))
        merged.load_state_dict(load_file(out / f"merged-{number}.safetensors"))  # as the report says
        assert gs.profile(merged, (1, 8, 8)).macs == row["macs"]
    assert found["worst_prediction_error"] < 1e-9
    assert "Predictions are at most 0 % off" in (out / "report.md").read_text()
    assert "| nothing merged |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "args", "message"),
    [
        ("one_layer", ["--model", "reducenet20"], "no ReduceNet that is built grown; did you mean reducenet20_x"),
        ("closed_loop", ["--seeds", "1"], "at least 2"),
        ("closed_loop", ["--model", "resnet18"], "no net that is built grown"),
        ("shrink_depth", ["--model", "reducenet20_x1"], "carries branches"),
        exhaustive(("shrink_depth", ["--data", "digts"], "did you mean digits")),
        exhaustive(("shrink_depth", ["--shrink-epochs", "0"], "--shrink-epochs 0: must be above 0")),
        ("one_layer", ["--flip", "True"], "Unrecognized options: --flip"),
        ("one_layer", ["--model-kwargs", "wdth=2"], "wdth"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(recipe, args, message, tmp_path, capsys):
    assert main(recipe, "--quiet", *args, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{recipe}: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("recipe", sampled(["one_layer", "closed_loop", "shrink_depth"], ["one_layer"]))
def test_help_teaches(recipe, capsys):
    assert main(recipe, "--help") == 0
    text = capsys.readouterr().out
    assert f"python recipes/{recipe}.py" in text and "--seeds" in text
