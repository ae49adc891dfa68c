"""tools/why.py: each number by another way."""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from growshrink.data.datasets import load_data
from growshrink.evidence.experiment import Experiment
from growshrink.evidence.record import Job
from nets import net
from program import run

TOP = Path(__file__).parents[2]
WHY = SimpleNamespace(**runpy.run_path(str(TOP / "tools" / "why.py")))


def test_the_top_eigenvalue_is_that_of_the_whole_hessian():
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double().eval()
    )
    x, y = torch.randn(9, 1, 4, 4, dtype=torch.float64), torch.randint(3, (9,))
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    sizes = [shape.numel() for shape in shapes]

    def loss(flat):
        parts = {n: part.view(s) for n, s, part in zip(names, shapes, flat.split(sizes), strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, parts, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
    assert values.max() == values.abs().max()
    assert WHY.top_eigenvalue(model, x, y, iterations=300) == pytest.approx(float(values.max()), rel=1e-6)


def test_kernels_are_compared_over_the_mean_of_their_layer():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Conv2d(2, 1, 3, bias=False), nn.Conv2d(1, 1, 1))
    for scale, conv in ((1.0, model[0]), (10.0, model[2])):
        nn.init.constant_(conv.weight, -scale)
        conv.weight.data[:, :, 1, 1] *= 5
    expected = torch.full((3, 3), 9 / 13)
    expected[1, 1] = 45 / 13
    torch.testing.assert_close(WHY.mean_kernel(model), expected)
    assert WHY.mean_kernel(model[3]) is None


def test_the_teacher_of_each_net_is_found_in_the_checkpoints(tmp_path):
    experiment = Experiment(data="digits", model_kwargs={"width": 0.125})
    data = load_data("digits")
    wide = [net(seed=seed, width=0.25, in_chans=1).state_dict() for seed in (1, 2)]
    joined = {key: torch.cat([each[key] for each in wide]) if value.ndim else value for key, value in wide[0].items()}
    save_file({f"/teacher/{key}": value for key, value in joined.items()}, tmp_path / "checkpoint-1.safetensors")
    save_file({"/model/x": torch.zeros(1)}, tmp_path / "checkpoint-2.safetensors")
    run_of_two = SimpleNamespace(seeds=(0, 1))
    found = WHY.teacher_of(experiment, run_of_two, tmp_path, data, 1)
    assert torch.equal(found.stem.conv.weight, wide[1]["stem.conv.weight"]) and not found.training
    other = replace(experiment, model_kwargs={"width": 1.0})
    assert WHY.teacher_of(other, run_of_two, tmp_path, data, 1) is None


@pytest.mark.exhaustive
def test_it_tells_of_every_arm(tmp_path, capsys):
    plan = {
        **{"data": "digits", "model_kwargs": {"width": 0.125}, "pool": 2, "budget": 6.0, "seeds": [0, 1]},
        **{"batch_size": 64, "flip": False, "config": {"lr": 0.05, "ema_decay": 0.9}, "arms": ["plain", "repvgg"]},
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    out = tmp_path / "experiment"
    assert run("recipes/compare.py", tmp_path / "plan.json", "--out", out, "--quiet", "--no-quantised") == 0
    assert run("tools/why.py", out, "--out", tmp_path / "why", "--hessian-images", "50") == 0
    page, table = ((tmp_path / "why" / "why.md").read_text(), json.loads((out / "table.json").read_text()))
    for row in table:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {row['arm']} | 2 |")]
        assert f"| {row['top1']:.2f} (" in line
    assert (tmp_path / "why" / "why.png").stat().st_size > 1000
    assert Job(arm="plain", seeds=(0, 1), lr=0.05, budget=6.0).folder in str(next(out.glob("runs/plain/*")))
    assert run("tools/why.py", tmp_path, "--out", tmp_path / "x") == 2
    assert "has no finished run" in capsys.readouterr().err
