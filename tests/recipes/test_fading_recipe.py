"""recipes/fading.py and the plans beside it."""

import json
import re
from pathlib import Path

import pytest

from growshrink.evidence.experiment import Experiment
from program import run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "branch", [pytest.param(branch, marks=pytest.mark.exhaustive) for branch in ("condconv", "guided")]
)
def test_it_tells_how_constant_the_numbers_are(capsys, branch):
    options = ("--epochs", "3", "--random", "1" if branch == "guided" else "0")
    assert run(ROOT / "recipes" / "fading.py", branch, *options) == 0
    out = capsys.readouterr().out
    spreads = [float(value) for value in re.findall(r"= (\d+\.\d+)", out)]
    assert len(spreads) == 9 and max(spreads) > 0
    assert re.search(r"kept [\d.]+ %, frozen at once [\d.]+ %, faded and fused [\d.]+ %", out)
    assert ("of 1 random nets" in out) == (branch == "guided")


@pytest.mark.parametrize("name", ["digits-fading", "digits-detach", "digits-wider", "fashion-mnist-14px-fading"])
def test_the_plans_can_be_read(name):
    plan = Experiment.from_dict(json.loads((ROOT / "recipes" / "plans" / f"{name}.json").read_text()))
    assert len(plan.seeds) >= 5 and plan.arms[0] == "plain"
    assert not any(plan.stackable(arm) for arm in plan.arms if arm.endswith(("fade", "asr")))
