from pathlib import Path

import pytest

from program import completed
from sampled import sampled

TOOL = Path(__file__).parents[2] / "tools" / "exactness.py"


def run(*args):
    return completed(TOOL, *args)


@pytest.mark.parametrize("branch", sampled([["bottleneck"], ["insert", "nest"]], [["bottleneck"]]))
def test_table_of_a_small_net(branch):
    done = run("test_resnet", "--branch", *branch, "--pixels", "32")
    assert done.returncode == 0, done.stderr
    header, row = done.stdout.splitlines()
    name, _, *figures = row.split()
    values = dict(zip(header.split()[2:], map(float, figures), strict=True))
    assert name == "test_resnet"
    assert values["float64"] <= 1e-10 and values["float32"] <= 1e-5
    assert values["drift"] < 1e-9 and values["effect"] > 0.1


def test_unknown_model_is_one_line_and_exit_code_2():
    done = run("resnet8")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("exactness: resnet8: timm knows no such model") and done.stderr.count("\n") == 1
