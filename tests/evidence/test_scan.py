"""Successive halving over depth and width."""

from pathlib import Path

import pytest
from records import record_of
from test_experiment import TINY

import growshrink as gs
from growshrink.errors import PlanError
from program import module_of

halving = module_of(Path(__file__).parents[2] / "recipes" / "halving.py")
Candidate, Entry, ScanPlan, candidates_of = halving.Candidate, halving.Entry, halving.ScanPlan, halving.candidates_of
front, halve, rungs_of = halving.front, halving.halve, halving.rungs_of

SIZE = (1, 8, 8)


@pytest.mark.parametrize("bound", ["macs", "params", "flash_float32"])
def test_candidates_are_those_within_the_bound(bound):
    options = {"input_size": SIZE, "num_classes": 10}
    every = candidates_of(TINY, (0.125, 0.25), (1, 2), bound=bound, at_most=1e9, **options)
    assert [c.cost for c in every] == sorted(c.cost for c in every) and len(every) == 4
    net = gs.models.reducenet.reducenet20(width=0.25, depths=(2, 2, 2), in_chans=1, num_classes=10)
    largest = next(c for c in every if (c.width, c.depth) == (0.25, 2))
    found = gs.profile(net, SIZE)
    assert largest.cost == {**vars(found), **found.memory}[bound]
    some = candidates_of(TINY, (0.125, 0.25), (1, 2), bound=bound, at_most=every[2].cost, **options)
    assert some == every[:3]
    with pytest.raises(PlanError, match="the cheapest has"):
        candidates_of(TINY, (0.25,), (1,), bound=bound, at_most=1, **options)


def test_milliseconds_are_a_bound_too():
    found = candidates_of(TINY, (0.125,), (1,), bound="ms", at_most=1e6, input_size=SIZE, num_classes=10)
    assert found[0].cost > 0


def test_rungs():
    assert rungs_of(1, 3.0) == [(1, 3.0)]
    assert rungs_of(5, 1.0) == [(5, 1.0), (3, 2.0), (2, 4.0), (1, 8.0)]


def test_the_better_half_goes_on_and_the_best_is_last():
    """With scores that are made up: the widest is best, but for the first rung."""
    candidates = [Candidate(width, 1, 100 * width) for width in (0.1, 0.2, 0.3, 0.4)]
    trained = []

    def train(runs):
        records = []
        for own, job in runs:
            width = own.model_kwargs["width"]
            assert own.model_kwargs["depths"] == [1, 1, 1] and job.net == f"width-{width:g}-depth-1"
            trained.append((width, job.budget))
            value = 90 + (0.35 if width == 0.3 and job.budget == 2.0 else width)
            records.append(record_of(job, val=value, test=value - 1))
        return records

    entries = halve(TINY, candidates, "plain", 1.0, train)
    assert sorted(trained) == [(0.1, 1.0), (0.2, 1.0), (0.3, 1.0), (0.3, 2.0), (0.4, 1.0), (0.4, 2.0), (0.4, 4.0)]
    assert entries[-1].candidate.width == 0.4 and entries[-1].test == pytest.approx(89.4)


def test_the_front_is_what_nothing_cheaper_beats():
    entries = [
        Entry(Candidate(0.1, 1, cost), "plain", 0, 1.0, val, 0.0) for cost, val in ((1, 5), (2, 4), (3, 6), (3, 7))
    ]
    entries.append(Entry(Candidate(0.1, 1, 0.5), "plain", 1, 2.0, 99.0, 0.0))
    assert [(entry.candidate.cost, entry.val) for entry in front(entries)] == [(1, 5), (3, 7)]


def test_the_plan_of_a_scan_goes_through_json_and_back():
    plan = ScanPlan(
        experiment=TINY,
        bound="ms",
        at_most=1.0,
        widths=(0.125, 0.25),
        depths=(1,),
        arm="short",
        budget=5.0,
        candidates=(Candidate(0.125, 1, 0.3),),
    )
    assert ScanPlan.from_dict(plan.to_json()) == plan
    with pytest.raises(PlanError, match="plan of the scan: experiment is missing"):
        ScanPlan.from_dict({"bound": "ms"})
