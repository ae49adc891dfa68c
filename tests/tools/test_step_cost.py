"""tools/step_cost.py and tools/netaug_modes.py as their users run them."""

import json
import re
from pathlib import Path

import pytest

from program import completed

TOOLS = Path(__file__).parents[2] / "tools"


def run(tool, *options):
    return completed(TOOLS / tool, *options)


@pytest.mark.exhaustive
def test_every_mode_is_counted_and_timed():
    result = run("step_cost.py", "--quick", "--strict", "--quiet", "--batch-size", 4, "reducenet20_x2")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {m[1].strip(): float(m[2]) for m in re.finditer(r"^reducenet20_x2 +(.{22}) +([\d.]+) ", result.stdout, re.M)}
    assert len(rows) == 10
    assert 1.0 < rows["default"] <= 1.5
    assert rows["lazy, every 8th"] < rows["lazy, every 4th"] < rows["netaug"] < rows["sandwich"]
    assert rows["suffix"] < rows["netaug"] and rows["netaug"] == rows["netaug, distilled"]
    assert "load average" in result.stdout


@pytest.mark.exhaustive
def test_branches_are_counted_and_timed():
    result = run("step_cost.py", "--quick", "--quiet", "--batch-size", 4, "reducenet20", "--branches", "se", "condconv")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {m[1]: float(m[2]) for m in re.finditer(r"^reducenet20 +(\w+) +([\d.]+) ", result.stdout, re.M)}
    assert rows.keys() == {"se", "condconv"} and 1.0 <= rows["se"] < rows["condconv"] < 1.2


def test_the_trial_of_modes_appends_and_goes_on(tmp_path):
    out = tmp_path / "modes.jsonl"
    options = ("--epochs", 0.4, "--model-kwargs", "width=0.25", "--ratio", 1, "--file", out, "--quiet")
    first = run("netaug_modes.py", *options, "--modes", "plain-x1", "suffix4+distil")
    assert first.returncode == 0, first.stderr
    second = run("netaug_modes.py", *options, "--modes", "plain-x1", "plain-x1.4")
    assert second.returncode == 0, second.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["arm"] for line in lines] == ["plain-x1", "suffix4+distil", "plain-x1.4"]
    assert "| plain-x1.4 | 1 |" in second.stdout and "suffix" not in second.stdout


@pytest.mark.parametrize(
    ("tool", "options", "words"),
    [
        ("step_cost.py", ("reducenett20",), "timm knows no such model"),
        ("step_cost.py", ("--seconds", "0"), "--seconds 0"),
        ("step_cost.py", ("--batch-size", "1"), "--batch-size 1"),
        ("netaug_modes.py", ("--modes", "netog"), "--modes netog: no such arm"),
    ],
)
def test_bad_options_are_refused(tool, options, words):
    result = run(tool, *options)
    assert result.returncode == 2 and result.stdout == "" and words in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_the_speed_of_the_experiment_beside_timms_and_the_originals():
    result = run(
        "experiment_speed.py", "--quick", "--quiet", "--pixels", 8, "--model-kwargs", "width=0.25", "--stacked", 2
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.findall(r"^(one seed|timm|original) +[\d,]+ +[\d,]+ +[\d.]+ ", result.stdout, re.M) == [
        "one seed",
        "timm",
        "original",
    ]
    assert "2 seeds side by side" in result.stdout
