"""tools/kills.py as its users run it, with few kills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import growshrink
from program import completed

TOOL = Path(__file__).parent.parent.parent / "tools" / "kills.py"


def run(*args):
    environment = {**os.environ, "PYTHONPATH": str(Path(growshrink.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.exhaustive
def test_three_kills(tmp_path):
    done = run("--kills", 3, "--quiet", "--out", tmp_path / "kills")
    assert done.returncode == 0, done.stderr
    assert "3 of 3 kills survived" in done.stdout
    found = json.loads((tmp_path / "kills" / "kills.json").read_text())
    assert found["survived"] == found["kills"] == len(found["each"]) == 3
    assert all(run["equal"] for run in found["runs"]) and sum(run["kills"] for run in found["runs"]) == 3
    assert not [path for path in (tmp_path / "kills").glob("run-*") if path.is_dir()]


def test_bad_numbers_are_refused(tmp_path):
    done = completed(TOOL, "--kills", 0, "--out", tmp_path / "kills")
    assert done.returncode == 2 and done.stderr == "kills: --kills 0: must be at least 1 and at most 1,000,000,000.\n"
