"""recipes/implicit.py and implicit_fpn.py as their users run them, briefly."""

import json
import runpy
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import growshrink as gs
from nets import images, rel
from program import run

RECIPES = Path(__file__).parents[2] / "recipes"


@cache
def fpn():
    return runpy.run_path(str(RECIPES / "implicit_fpn.py"))


@pytest.mark.exhaustive
def test_every_arm_gets_a_row(tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        run(
            RECIPES / "implicit.py",
            "--quiet",
            "--epochs",
            0.5,
            "--seeds",
            2,
            "--model-kwargs",
            "width=0.25",
            "--out",
            out,
        )
        == 0
    )
    rows = json.loads((out / "report.json").read_text())
    assert len(rows) == 9 and all(len(row["top1"]) == 2 for row in rows.values())
    control, deq, tied = (rows[name] for name in ("explicit-2", "deq", "tied-4"))
    assert deq["macs"] > tied["macs"] > control["macs"] and deq["epochs"] < tied["epochs"] < control["epochs"]
    assert deq["params"] == tied["params"] and abs(deq["params"] - control["params"]) < 0.02 * control["params"]
    assert deq["evaluations"][0] > 2 and control["evaluations"] == [0.0, 0.0]
    assert len(deq["unrolled"][0]) == 4 and rows["implicit-2"]["norms"][0] > 0.1
    report = (out / "report.md").read_text()
    assert report.count("\n| ") == 10 and "after explicit steps" in report and report in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("implicit", ("--seeds", 1), "--seeds 1: must be at least 2"),
        ("implicit", ("--arms", "deqq"), "no such arm; did you mean deq"),
        ("implicit_fpn", ("--seeds", 1), "--seeds 1: must be at least 2"),
        ("implicit_fpn", ("--necks", "implict"), "no such neck; did you mean implicit"),
    ],
)
def test_bad_options(recipe, options, words, capsys):
    assert run(RECIPES / f"{recipe}.py", *options) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "reducenet20"])
def test_the_implicit_pyramid_takes_the_maps_of_timm(name):
    torch.manual_seed(0)
    backbone = timm.create_model(name, features_only=True).double().eval()
    channels = backbone.feature_info.channels()[-3:]
    neck = fpn()["ImplicitFPN"](channels, 4).double().eval()
    maps = [z.detach().requires_grad_() for z in backbone(images(3, 64, 64, n=1, dtype=torch.float64))[-3:]]
    found, explicit = neck(maps), gs.unroll(neck, 60)(maps)
    assert [z.shape for z in found] == [(1, 4, *z.shape[2:]) for z in maps]
    for a, b in zip(found, explicit, strict=True):
        assert rel(a, b) < 1e-10
    wanted = torch.autograd.grad(explicit[0].square().sum(), maps)
    for a, b in zip(torch.autograd.grad(found[0].square().sum(), maps), wanted, strict=True):
        assert bool(a.any()) and rel(a, b) < 1e-9  # the finest level depends on every map
    assert [z.shape for z in fpn()["FPN"](channels, 4).double()(maps)] == [z.shape for z in found]


class Oracle(nn.Module):
    """Says where the objects are, as far as `known` lets it, and points at as many wrong places."""

    def __init__(self, canvases, known=lambda n, row: True, wrong=False):
        super().__init__()
        self.canvases, self.known, self.wrong = canvases, known, wrong
        self.sizes = [[0], [1], [2]]

    def forward(self, x):
        heats = [torch.full((len(x), 1, 10, 64 // s, 64 // s), -30.0) for s in (2, 4, 8)]
        for n, rows in enumerate(self.canvases.objects):
            for label, index, y, x in rows.tolist():
                heat, stride = heats[int(index)], (2, 4, 8)[int(index)]
                if self.known(n, (label, index)):
                    heat[n, 0, int(label), int(y / stride), int(x / stride)] = 2.0
                if self.wrong:
                    heat[n, 0, (int(label) + 1) % 10, int(y / stride), int(x / stride)] = 3.0
        return heats


def test_average_precision_of_detectors_that_know_the_answer():
    canvases = fpn()["make_canvases"](30, 0, test=True)
    score = fpn()["average_precisions"]
    assert score(Oracle(canvases), canvases) == pytest.approx([100, 100, 100])
    assert score(Oracle(canvases, lambda n, row: row[1] == 1), canvases) == pytest.approx([0, 100, 0], abs=0.1)
    half = score(Oracle(canvases, lambda n, row: row[0] < 5), canvases)  # five of the classes
    assert half == pytest.approx([50, 50, 50], abs=12)
    assert all(5 < value < 60 for value in score(Oracle(canvases, wrong=True), canvases))


def test_canvases_hold_two_to_four_digits_of_three_sizes_that_do_not_overlap():
    canvases = fpn()["make_canvases"](100, 1, test=False)
    assert {len(rows) for rows in canvases.objects} == {2, 3, 4}
    assert torch.cat(canvases.objects)[:, 1].unique().tolist() == [0, 1, 2]
    for rows in canvases.objects:
        taken = torch.zeros(64, 64)
        for _, index, y, x in rows.tolist():
            side = (8, 16, 32)[int(index)]
            assert side / 2 <= y <= 64 - side / 2 and side / 2 <= x <= 64 - side / 2
            taken[int(y - side / 2) : int(y + side / 2), int(x - side / 2) : int(x + side / 2)] += 1
        assert taken.max() == 1
    again = fpn()["make_canvases"](100, 1, test=False)
    assert torch.equal(again.images, canvases.images)
    assert not torch.equal(fpn()["make_canvases"](100, 2, test=False).images, canvases.images)


@pytest.mark.exhaustive
def test_every_neck_gets_a_row(tmp_path, capsys):
    out = tmp_path / "run"
    args = ("--quiet", "--epochs", 1, "--images", 64, "--seeds", 2, "--width", 8, "--out", out)
    assert run(RECIPES / "implicit_fpn.py", *args) == 0
    rows = json.loads((out / "report.json").read_text())
    assert list(rows) == ["fpn", "single", "one-step", "tied-3", "untied-3", "implicit"]
    assert rows["untied-3"]["params"] > rows["tied-3"]["params"] == rows["one-step"]["params"]
    assert all(len(row["precision"]) == 2 and len(row["precision"][0]) == 3 for row in rows.values())
    assert (out / "canvas.png").exists() and (out / "report.md").read_text() in capsys.readouterr().out
