"""tools/gpu_check.py as it is run on the machine that is lent, here without a GPU."""

import json
from pathlib import Path

import pytest
import torch

import program

TOOL = Path(__file__).parents[2] / "tools" / "gpu_check.py"


def main(capsys, *args):
    return program.run(TOOL, *args), *capsys.readouterr()


def test_some_checks_and_a_speed_on_the_cpu(tmp_path, capsys):
    out = tmp_path / "out"
    args = ["--device", "cpu", "--tiny", "--quiet", "--out", out, "--only", "stack", "epoch"]
    code, text, err = main(capsys, *args)
    assert code == 0, err
    found = json.loads((out / "gpu_check.json").read_text())
    assert set(found["checks"]) == {"stack"}
    assert found["speeds"]["epoch"]["over the roofline"] > 0
    assert found["lines"] and not any(found["lines"].values()), "a line for CUDA is said to have run on the CPU"
    page = (out / "gpu_check.md").read_text()
    assert "no figure means anything" in page and "0 of" in page
    code, _, err = main(capsys, *args)
    assert code == 2 and "Nothing is overwritten" in err


def test_a_check_that_fails_is_written_down_and_the_next_one_runs(tmp_path, capsys, monkeypatch):
    stack = program.beside(TOOL.parents[1] / "recipes" / "side_by_side.py")

    def unstacked(net, x):
        return x.new_zeros(len(x), 10)

    monkeypatch.setattr(stack._StackedLinear, "forward", unstacked)
    monkeypatch.setattr(stack, "_check", lambda *args: None)
    out = tmp_path / "out"
    options = ["--device", "cpu", "--tiny", "--quiet", "--out", out, "--only", "merged", "stack"]
    code, _, _ = main(capsys, *options)
    found = json.loads((out / "gpu_check.json").read_text())["checks"]
    assert code == 1 and "error" in found["stack"] and found["merged"]["gradients"] < 1e-8


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    code, _, err = main(capsys, "--out", tmp_path / "out")
    assert code == 2 and "--device cuda: not to be had here" in err and err.count("\n") == 1


@pytest.mark.exhaustive
def test_every_check_holds_on_the_cpu(tmp_path, capsys):
    out = tmp_path / "out"
    code, _, err = main(capsys, "--device", "cpu", "--tiny", "--quiet", "--minutes", "0.01", "--out", out)
    found = json.loads((out / "gpu_check.json").read_text())
    assert code == 0, {name: figures for name, figures in found["checks"].items() if "error" in figures}
    assert all("the time was up" in figures["error"] for figures in found["speeds"].values())
