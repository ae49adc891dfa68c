"""The map of methods: every line of code in its tables runs, or is a command that its program takes."""

import copy
import re
import shlex
from pathlib import Path

import pytest
from torch import nn

from growshrink.branches import Branch
from growshrink.branches.spec import PRESETS
from growshrink.cli.program import read_options
from program import args_of
from sampled import sampled

ROOT = Path(__file__).parents[1]
HERE, NOT_BUILT = (ROOT / "docs" / "methods.md").read_text().split("## What is not built")


def rows(text, columns):
    """The cells of the tables in `text`, their headers left out."""
    cells = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert all(len(row) == columns for row in cells), [row for row in cells if len(row) != columns]
    return [[cell.strip() for cell in row] for row in cells if row[0].strip() != "system / idea"]


LINES = [row[3].removeprefix("`").removesuffix("`") for row in rows(HERE, 5)]
COMMANDS = sorted({line for line in LINES if line.startswith("python ")})
PYTHON = [line for line in LINES if not line.startswith("python ")]


@pytest.fixture(scope="module")
def names():
    """What the snippet above the tables defines."""
    defined: dict[str, object] = {}
    exec(re.search(r"^```python\n(.*?)^```$", HERE, re.M | re.S)[1], defined)
    return defined


@pytest.mark.parametrize("line", sampled(PYTHON, lambda line: line.startswith(("ARMS", "Teacher", "gs.CyclePlan"))))
def test_a_line_of_code_runs_and_makes_something(line, names):
    own = {name: copy.deepcopy(value) if isinstance(value, nn.Module) else value for name, value in names.items()}
    assert eval(line, own) is not None


@pytest.mark.parametrize("command", sampled(COMMANDS, lambda line: "recipes/scan.py" in line))
def test_a_command_has_a_program_that_takes_its_options(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)[1:]
    read_options(args_of(ROOT / program)[0], None, words)


def test_every_kind_and_preset_has_a_row_and_every_row_is_whole():
    parts = {"copy", "pointwise", "pointwise_conv", "pointwise_average", "vertical", "horizontal", "identity", "dirac"}
    told = {name.lower() for name in re.findall(r"\w+", HERE)}
    shipped = {kind for kind, cls in Branch.kinds.items() if cls.__module__.startswith("growshrink.")}
    assert (shipped - parts - {"expandnet_stack"}) | set(PRESETS) <= told
    assert all(cell for row in (*rows(HERE, 5), *rows(NOT_BUILT, 3)) for cell in (row[0], row[-1]))
