"""tools/online_cost.py as its users run it."""

import re
from pathlib import Path

import pytest

from program import completed

TOOL = Path(__file__).parents[2] / "tools" / "online_cost.py"


def run(*options):
    return completed(TOOL, "--quiet", *options)


def test_every_branch_of_every_net_gets_a_row_and_every_convolution_its_times():
    options = ("--nets", "reducenet20@8", "--branches", "dbb", "lora", "--ratio", 0.25, "--batch-size", 4)
    result = run("--quick", "--report", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    times, counts = r"+([\d.]+) \(.*?\) ", r"+([\d.]+) +([\d.]+) +([\d.]+) (\d) of 9(.*)$"
    found = rf"^reducenet20@8 +(\w+) +[\d.]+  {times}{times} {counts}"
    rows = {m[1]: m.groups()[1:] for m in re.finditer(found, result.stdout, re.M)}
    assert list(rows) == ["dbb", "lora"]
    assert rows["dbb"][6].strip() in ("ok", "MISSED") and rows["lora"][6] == ""
    assert all(float(row[2]) > 1 and float(row[4]) > 1 for row in rows.values())  # of MACs, and of memory by branch
    assert len(re.findall(r"^stages\.\d\.\d\.conv +[\d.]+ ms -> +[\d.]+ ms  (?:one|branch)", result.stdout, re.M)) == 18
    assert "load average" in result.stdout and ("targets MISSED" in result.stdout) == ("  MISSED" in result.stdout)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--nets", "resnet81@32"), "--nets resnet81@32: timm knows no model 'resnet81'; did you mean"),
        (("--nets", "resnet18"), "--nets resnet18: write MODEL@PIXELS"),
        (("--nets", "reducenet20@32", "--branches", "ddb"), "ddb: no such branch; did you mean dbb"),
    ],
)
def test_bad_options_are_refused(options, words):
    result = run("--quick", *options)
    assert result.returncode == 2 and words in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
