import importlib
import json
from pathlib import Path

import pytest
import timm
import torch

import growshrink as gs
from growshrink.export import artefacts, int8
from nets import images
from program import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on digits, as short as it can be."""
    path = tmp_path_factory.mktemp("runs") / "run"
    recipe = ROOT / "recipes" / "grow_cycle.py"
    net = ("--model-kwargs", "width=0.5", "depths=(1,1,1)")
    options = ("--rounds", "1", "--epochs", "8", "--ratio", "1", "--quiet", *net)
    assert run(recipe, "--out", path, *options) == 0
    return path


def test_a_run_is_exported_with_int8_and_again_beside_it(trained, capsys):
    tool = ROOT / "tools" / "export.py"
    assert run(tool, trained, "--int8", "per-channel", "--turns", "3", "--quiet") == 0
    out = capsys.readouterr().out
    folder = trained / "export"
    assert {p.name for p in folder.iterdir()} - {".lock"} == {
        *("config.json", "folded.onnx", "folded.pt2", "folded.safetensors", "int8.onnx", "model.safetensors"),
        *("ranges.png", "report.json", "report.md", "run.json"),
    }
    assert "folded against plain" in out and "reducenet20 is growshrink's" in out and str(folder / "report.md") in out
    report = json.loads((folder / "report.json").read_text())
    scores = report["int8"]["scores"]
    final = json.loads((trained / "report.json").read_text())["final"]["top1"]
    assert scores["float32"]["top1"] == pytest.approx(final) == pytest.approx(scores["float32, ONNX"]["top1"])
    assert abs(scores["int8"]["top1"] - final) < 3.0 and scores["int8"]["loss"] != scores["float32"]["loss"]
    bits = 7 if int8.needs_reduced_range() else 8
    assert report["int8"]["weight_bits"] == bits and f"Weights have {bits} bits" in (folder / "report.md").read_text()
    assert report["files"]["int8.onnx"] < 0.8 * report["files"]["folded.onnx"]
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = images(1, 8, 8, n=5)
    with torch.no_grad():
        torch.testing.assert_close(artefacts.onnx_function(folder / "folded.onnx")(x), plain(x), atol=1e-4, rtol=0)

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert run(tool, trained, "--no-onnx", "--no-pt2", "--turns", "0", "--quiet") == 0
    assert (trained / "export-2" / "report.md").is_file() and not (trained / "export-2" / "folded.onnx").exists()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert run(tool, trained, "--out", folder, "--quiet") == 2
    assert "Nothing is overwritten" in capsys.readouterr().err


def test_an_error_beyond_rounding_is_exit_code_1(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("exporting.fold", lambda net, **kwargs: gs.fold(net, **kwargs).requires_grad_(False))
    original = importlib.import_module("exporting").write_folded

    def damaged(source, folder):
        folded = original(source, folder)
        next(folded.parameters()).mul_(1.001)
        return folded

    monkeypatch.setattr("exporting.write_folded", damaged)
    assert (
        run(ROOT / "tools" / "export.py", trained, "--out", tmp_path / "e", "--no-onnx", "--turns", "0", "--quiet") == 1
    )
    assert "NOT as exact" in (tmp_path / "e" / "report.md").read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], "no such file or folder"),
        (["."], "has no plain.safetensors"),
        (["{run}", "--int8", "per-layer"], "--int8 per-layer"),
        (["{run}", "--int8", "per-tensor", "--data", "digit"], "did you mean digits"),
        (["{run}", "--int8", "per-tensor", "--image-size", "16"], "8x8"),
        (["{run}", "--model-kwargs", "width"], "must be KEY=VALUE"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(trained, capsys, args, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(ROOT / "tools" / "export.py", *(arg.format(run=trained) for arg in args), "--quiet") == 2
    error = capsys.readouterr().err
    assert error.startswith("export: ") and error.count("\n") == 1 and words in error
    assert not list(tmp_path.iterdir())
