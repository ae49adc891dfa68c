"""recipes/fading.py and the plans beside it."""

import json
import re
from pathlib import Path

import pytest
import torch

import growshrink as gs
from growshrink.branches import Modulated
from growshrink.evidence.experiment import Experiment
from nets import small
from program import module_of, run

ROOT = Path(__file__).parents[2]


@pytest.mark.exhaustive
@pytest.mark.parametrize("branch", ["condconv", "guided"])
def test_it_tells_how_constant_the_numbers_are(capsys, tmp_path, branch):
    options = ("--epochs", "3", "--seeds", "2", "--random", "1" if branch == "guided" else "0", "--out", tmp_path / "a")
    assert run(ROOT / "recipes" / "fading.py", branch, *options, "--quiet") == 0
    out = capsys.readouterr().out
    spreads = [float(value) for value in re.findall(r"= (\d+\.\d+)", out)]
    assert len(spreads) == 9 and max(spreads) > 0
    for state in ("kept", "frozen at once", "faded and fused"):
        assert re.search(rf"{state} +[\d.]+ %", out)
    assert out.count("of 1 random nets") == (2 if branch == "guided" else 0)
    assert len(json.loads((tmp_path / "a" / "fading.json").read_text())["kinds"][branch]) == 2


def test_how_much_the_numbers_differ_image_by_image():
    grown = gs.grow(small(), ["se", "condconv", "asr"], ratio=2.0, init="paper")
    images = torch.randn(5, 3, 32, 32)
    found = module_of(ROOT / "recipes" / "fading.py").spreads(grown, images)
    branches = {name: m for name, m in grown.named_modules() if isinstance(m, Modulated) and hasattr(m, "fade")}
    assert set(found) == set(branches) and min(found.values()) > 1e-4
    seen = {name: [] for name in branches}  # the gates' own inputs, one image at a time
    for name, branch in branches.items():
        gate = branch.gate
        branch.gate = lambda source, name=name, gate=gate: seen[name].append(gate(source)) or seen[name][-1]
    grown.eval()
    with torch.no_grad():
        for image in images:
            grown(image[None])
    for name, numbers in seen.items():
        each = [torch.stack([g[0, a] for g in numbers]) for a in range(numbers[0].shape[1])]
        twin = sum(float(g.std() / g.mean().abs()) for g in each) / len(each)
        assert found[name] == pytest.approx(twin, rel=1e-3)


@pytest.mark.parametrize("name", ["digits-fading", "digits-detach", "digits-wider", "fashion-mnist-14px-fading"])
def test_the_plans_can_be_read(name):
    plan = Experiment.from_dict(json.loads((ROOT / "recipes" / "plans" / f"{name}.json").read_text()))
    assert len(plan.seeds) >= 5 and plan.arms[0] == "plain"
    assert not any(
        module_of(ROOT / "recipes" / "jobs.py").stackable(plan, arm)
        for arm in plan.arms
        if arm.endswith(("fade", "asr"))
    )
