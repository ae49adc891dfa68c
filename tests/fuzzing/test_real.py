"""Nets as people have them: the tool's, all of them in the exhaustive run; and the checks can fail."""

from collections import Counter

import pytest
import torch

from fuzzing import real
from fuzzing.real import AXES, COUNT, check_real, drawn


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(COUNT))
def test_nets_of_the_tool(number):
    outcome = check_real(number)
    assert outcome.verdict in ("fused", "left alone"), outcome
    assert outcome.effect > 1e-6 or outcome.verdict != "fused"


def test_the_first_of_them_most_of_which_grow():
    outcomes = [check_real(number) for number in range(10)]
    assert {outcome.verdict for outcome in outcomes} == {"fused", "left alone"}, outcomes
    assert sum(outcome.verdict == "fused" and outcome.effect > 1e-6 for outcome in outcomes) >= 5


def test_each_choice_is_drawn_ten_times_and_more():
    counts = Counter(choice for number in range(COUNT) for choice in drawn(number).items())
    assert all(counts[axis, choice] >= 10 for axis, choices in AXES.items() for choice in choices)


@pytest.mark.parametrize("way", ["shifted", "refused", "crashed"])
def test_what_is_looked_for_is_found(monkeypatch, way):
    fuse = real.fuse

    def broken(net, **kwargs):
        if way == "refused":
            raise real.GrowShrinkError("no")
        fused = fuse(net, **kwargs)
        with torch.no_grad():
            fused.three.weight.mul_(1.001 if way == "shifted" else torch.ones(7))
        return fused

    monkeypatch.setattr(real, "fuse", broken)
    number = next(n for n in range(COUNT) if drawn(n)["dtype"] == "float64" and drawn(n)["bias"] == "bias")
    assert check_real(number).verdict == {"shifted": "wrong", "refused": "refused after growing"}.get(way, "crashed")
