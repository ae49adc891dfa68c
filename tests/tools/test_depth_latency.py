from pathlib import Path

import pytest
from torch import nn

import program

latency = program.beside(Path(__file__).parents[2] / "recipes" / "latency.py")
TOOL = Path(__file__).parents[2] / "tools" / "depth_latency.py"


def run(monkeypatch, *args, power=1.0):
    """Its exit code, with a clock that counts convolutions, and is additive if `power` is 1."""

    def clock(calls, **kwargs):
        return {
            name: float(sum(isinstance(module, nn.Conv2d) for module in call.args[0].modules())) ** power
            for name, call in calls.items()
        }

    monkeypatch.setattr(latency, "interleaved_timings", clock)
    monkeypatch.setattr(latency, "ANCHORS", 1)
    return program.run(TOOL, *args)


BRIEF = ["--quiet", "--model-kwargs", "width=0.1", "--pixels", "8", "--longest", "2", "--cuts", "3"]


@pytest.mark.parametrize(("power", "code"), [(1.0, 0), (8.0, 1)])
@pytest.mark.exhaustive
def test_predictions_are_held_against_the_clock(monkeypatch, capsys, power, code):
    assert run(monkeypatch, *BRIEF, power=power) == code
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("stages.") for line in lines) == 12
    assert sum(line.startswith("predicted ") for line in lines) == 3
    assert ("at most 0.0% off (3 cuts)" in lines[-1]) == (code == 0)


@pytest.mark.parametrize(
    ("args", "words"), [(["--model", "reducenet20_x1"], "carries branches"), (["--cuts", "0"], "at least 1")]
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, args, words):
    assert run(monkeypatch, *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("depth_latency: ") and error.count("\n") == 1 and words in error
