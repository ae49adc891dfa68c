"""tools/targets.py, in an environment that has ExecuTorch or LiteRT, and in one that has neither."""

import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from program import run

TOOL = Path(__file__).parents[2] / "tools" / "targets.py"
PACKAGES = {"executorch": "executorch", "litert": "litert_torch"}
NET = ("--model", "reducenet20", "--model-kwargs", "width=0.25", "in_chans=1", "--image-size", 8)


@pytest.mark.parametrize("target", PACKAGES)
def test_a_target(tmp_path, capsys, target):
    torch.manual_seed(0)
    net = timm.create_model("reducenet20", width=0.25, in_chans=1, num_classes=10)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    code = run(TOOL, tmp_path / "net.safetensors", "--to", target, *NET, "--data", "digits", "--out", tmp_path / "out")
    if importlib.util.find_spec(PACKAGES[target]) is None:
        assert code == 2 and "in an environment of its own" in capsys.readouterr().err
        return
    assert code == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "targets.json").read_text())
    assert report["files"]["float32"]["max_rel"] < 1e-5 and report["files"]["int8"]["max_rel"] < 0.3
    assert report["files"]["int8"]["bytes"] < report["files"]["float32"]["bytes"]
    assert report["scores"]["float32"]["top1"] == pytest.approx(report["scores"]["torch"]["top1"], abs=0.3)
