"""tools/draw_docs.py: the same bytes every time, and docs/pictures is what it draws."""

from pathlib import Path

import pytest

from program import run
from sampled import sampled

TOP = Path(__file__).parents[2]
TOOL = TOP / "tools" / "draw_docs.py"
NAMES = sorted(path.stem for path in (TOP / "docs" / "pictures").glob("*.svg"))


@pytest.mark.parametrize("name", sampled(NAMES, {"kernels"}))
def test_a_picture_is_the_same_every_time(name, tmp_path):
    for folder in ("a", "b"):
        assert run(TOOL, "--only", name, "--out", tmp_path / folder) == 0
    drawn = (tmp_path / "a" / f"{name}.svg").read_text()
    assert drawn.startswith("<?xml") and drawn == (tmp_path / "b" / f"{name}.svg").read_text()


def test_an_unknown_picture_names_those_that_are_drawn(tmp_path, capsys):
    assert run(TOOL, "--only", "kernel", "--out", tmp_path) == 2
    assert "did you mean kernels" in capsys.readouterr().err
    assert NAMES == ["cost", "grown", "kernels", "knobs", "vanishing"]
