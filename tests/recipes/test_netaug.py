"""recipes/netaug.py as its users run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import growshrink as gs
from growshrink.supernet import load_supernet
from program import run
from sampled import sampled

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "netaug.py"
FILES = {"report.md", "report.json", "netaug.json", "netaug.png", "curves.png", "plain.safetensors", "run.json"}
SMALL = ("--model-kwargs", "width=0.25", "depths=(1,1,1)", "--ratio", "2", "--turns", "2", "--quiet")


def main(*args):
    return run(RECIPE, *args)


@pytest.mark.exhaustive
def test_without_arguments_it_learns_the_digits(tmp_path):
    process = subprocess.run(
        [sys.executable, str(RECIPE), "--epochs", "25", "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr and "Warning" not in process.stderr
    path = tmp_path / "run"
    assert {p.name for p in path.iterdir()} >= FILES | {"init.safetensors", "supernet.safetensors"}
    summary = json.loads((path / "netaug.json").read_text())
    assert summary["exit"] == "drop" and summary["width"] == "base" and summary["nets"] == 4**9
    assert summary["val_top1"]["deployed"] == summary["val_top1"]["base"] >= 97.0
    assert summary["test_top1"] >= 96.0
    assert summary["macs_of_a_step"] > 1.0 and summary["seconds_of_a_step"]["ratio"] > 1.0
    for words in (
        "base net",
        "widest net",
        "deployed net (drop)",
        "MACs of an average step",
        "time of an average step",
    ):
        assert words in process.stdout

    # the deployed net is the base of the supernet that was kept, bit for bit
    plain = timm.create_model("reducenet20", num_classes=10, in_chans=1)
    plain.load_state_dict(load_file(path / "plain.safetensors"), strict=True)
    supernet, space, about = load_supernet(path / "supernet.safetensors")
    assert about["input_size"] == [1, 8, 8] and space.size == 4**9
    for key, value in gs.drop(supernet).state_dict().items():
        assert torch.equal(plain.state_dict()[key], value), key
    init, _, _ = load_supernet(path / "init.safetensors")
    assert list(init.state_dict()) == list(supernet.state_dict())


@pytest.mark.parametrize("mode", sampled(["single", "sandwich"], ["single"]))
def test_a_net_grown_at_birth_is_fused_at_the_best_width(tmp_path, capsys, monkeypatch, mode):
    monkeypatch.setattr("growshrink.cycle.layout.LEAST_SETTLE", 9)
    args = ("--model", "reducenet20_x4", "--widths", mode, "--exit", "choose", "--epochs", "3", *SMALL)
    assert main("--out", tmp_path / "run", *args) == 0
    summary = json.loads((tmp_path / "run" / "netaug.json").read_text())
    scores = [candidate["top1"] for candidate in summary["candidates"]]
    assert len(scores) == 6 and summary["val_top1"]["deployed"] == max(scores) and len(set(scores)) > 1
    plain = timm.create_model("reducenet20", num_classes=10, in_chans=1, width=0.25, depths=(1, 1, 1))
    plain.load_state_dict(load_file(tmp_path / "run" / "plain.safetensors"), strict=True)
    assert "deployed net (choose)" in capsys.readouterr().out
    assert main("--out", tmp_path / "run", *args, "--resume") == 0
    assert "is finished" in capsys.readouterr().out


BAD = {
    "mode": (["--widths", "netog"], "--widths netog: mode='netog': no such mode; did you mean netaug"),
    "exit": (["--exit", "jump"], "--exit jump: no such exit"),
    "built grown": (["--model", "reducenet20_x4"], "no kernels that would remain"),
    "alpha": (["--widths", "lazy,alpha=-1"], "--widths lazy,alpha=-1: alpha=-1: must be at least 0"),
    "distil": (["--widths", "lazy,inplace_distil=2"], "--widths lazy,inplace_distil=2: inplace_distil=2"),
    "hold": (["--alive", "2"], "--alive 2"),
    "epochs": (["--epochs", "0"], "--epochs 0: must be above 0"),
    "no blocks": (["--model", "selecsls42", "--widths", "suffix"], "SelecSls: only 1 of its units carry branches"),
}


@pytest.mark.parametrize("case", sampled(BAD, ("mode", "built grown", "alpha")))
def test_bad_input_gets_one_clear_line(tmp_path, monkeypatch, capsys, case):
    args, words = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert main("--out", "run", "--quiet", *args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("netaug: ") and words in err
    assert list(tmp_path.iterdir()) == []
