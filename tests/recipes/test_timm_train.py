"""recipes/timm_train.py around a script that uses timm's task the way timm's train.py does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm.optim
import timm.task
import torch
from safetensors.torch import load_file

import growshrink as gs
from program import completed

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "timm_train.py"
SCRIPT = """
import sys
import torch
from timm import create_model
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver

assert sys.argv[1:5] == ["--model", "reducenet20", "--lr", "0.1"] and sys.argv[5:] in ([], ["--img-size", "16"])
torch.manual_seed(0)
model = create_model(sys.argv[2], num_classes=4, width=0.25)
task = ClassificationTask(
    model=model, criterion=LabelSmoothingCrossEntropy(0.1), device=torch.device("cpu"), dtype=None, verbose=False
)
model = task.get_trainable_module()
optimizer = create_optimizer_v2(model, opt="sgd", lr=float(sys.argv[4]), momentum=0.9, weight_decay=1e-3)
task.setup_ema(decay=0.9)
task.get_trainable_module().train()
task.compile(backend="eager")
for update in range(1, 6):
    result = task(torch.randn(8, 3, 16, 16), torch.randint(4, (8,)))
    assert result["output"].shape == (8, 4)
    optimizer.zero_grad()
    result["loss"].backward()
    optimizer.step()
    task.update_ema(step=update)
task.get_eval_model(ema=True)(torch.randn(2, 3, 16, 16))
torch.save({**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}, "last.pth.tar")
"""


def run(folder, *args):
    return subprocess.run(
        [sys.executable, "-W", "error:NetAugTask:UserWarning", str(RECIPE), *args],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.exhaustive
def test_a_script_like_timms_trains_a_net_that_is_deployed_without_its_branches(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    result = run(tmp_path, "--ratio", "2", "--widths", "netaug", "train.py", "--model", "reducenet20", "--lr", "0.1")
    assert result.returncode == 0, result.stderr  # without the warning of a task that is not attached
    checkpoint = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert checkpoint["task_state"] == {"update": 5}
    for key in ("state_dict", "state_dict_ema"):
        assert any(".branches." in name for name in checkpoint[key])
        plain = timm.create_model("reducenet20", num_classes=4, width=0.25)
        plain.load_state_dict({k: v for k, v in checkpoint[key].items() if ".branches." not in k}, strict=True)


@pytest.mark.exhaustive
def test_a_script_like_timms_grows_vanishes_and_fuses(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    ours = [
        "--branch",
        "bottleneck",
        "--widths",
        "none",
        "--hold",
        "1",
        "--vanish",
        "2",
        "--fused",
        "plain.safetensors",
    ]
    theirs = ["--model", "reducenet20", "--lr", "0.1", "--img-size", "16"]
    result = run(tmp_path, *ours, "train.py", *theirs)
    assert result.returncode == 0, result.stderr
    checkpoint = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    plain = timm.create_model("reducenet20", num_classes=4, width=0.25)
    plain.load_state_dict(load_file(tmp_path / "plain.safetensors"), strict=True)
    grown = gs.grow(timm.create_model("reducenet20", num_classes=4, width=0.25), ratio=4, input_size=(3, 16, 16))
    grown.load_state_dict(checkpoint["state_dict_ema"], strict=True)
    assert set(gs.get_lambda(grown).values()) == {0.0}
    assert gs.compare(grown, plain, input_size=(3, 16, 16), dtype=torch.float32).max_rel < 1e-5
    assert gs.compare(gs.drop(grown), plain, input_size=(3, 16, 16)).max_rel > 1e-4


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--widths", "none", "--fused", "x", "train.py"], "--fused without --vanish"),
        ([], "name timm's train.py"),
        (["nowhere/train.py"], "no such script"),
        (["beside/train.py"], "a folder timm beside it"),
        (
            ["--widths", "netog", "train.py", "--model", "reducenet20", "--lr", "0.1"],
            "no such mode; did you mean netaug",
        ),
        (["--branch", "bottel", "train.py", "--model", "reducenet20", "--lr", "0.1"], "no such branch"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    for module, name in ((timm.task, "ClassificationTask"), (timm.optim, "create_optimizer_v2")):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that what the recipe puts there is taken away
    (tmp_path / "beside" / "timm").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "beside"):
        (folder / "train.py").write_text(SCRIPT)
    result = completed(RECIPE, *args)
    assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1
    assert result.stderr.startswith("timm_train: ")
