import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch

from growshrink.depth.segments import all_segments, uncut
from growshrink.errors import PlanError
from nets import images, net, untouched
from program import beside, module_of

knob = module_of(Path(__file__).parents[2] / "recipes" / "knob.py")
latency = beside(Path(__file__).parents[2] / "recipes" / "latency.py")
Latencies, hardware_name = latency.Latencies, latency.hardware_name
measure_cuts, measure_latencies = latency.measure_cuts, latency.measure_latencies
RESOLUTION, depth_frontier, measure_plans = knob.RESOLUTION, knob.depth_frontier, knob.measure_plans
plan_depth, segment_harms = knob.plan_depth, knob.segment_harms


def partitions(segments, stage, start, stop):
    """Every way to cut a stage, by recursion."""
    if start == stop:
        yield ()
    for segment in segments:
        if segment.stage == stage and segment.start == start:
            for rest in partitions(segments, stage, segment.stop, stop):
                yield (segment, *rest)


def made_up(seed=0, model=None):
    random.seed(seed)
    segments = all_segments(model or net("reducenet20", width=0.1), longest=3)
    changes = {s: random.uniform(-0.5, 0.3) * (s.length - 1) for s in segments}
    harms = {s: random.uniform(0.1, 1.0) * (s.length - 1) for s in segments}
    return Latencies("made up", 10.0, changes), harms


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_that_of_all_cuts(seed):
    latencies, harms = made_up(seed)
    stages = [list(partitions(list(harms), stage, 0, 3)) for stage in range(3)]
    every = []
    for parts in itertools.product(*stages):
        cut = tuple(segment for part in parts for segment in part)
        every.append((latencies.predict(cut), sum(harms[s] for s in cut)))
    assert len(every) == 7**3  # 1+1+1, and 1+2, 2+1, 3 wide and slim
    frontier = depth_frontier(latencies, harms)
    slack = 3 * RESOLUTION * latencies.net_ms
    assert frontier[-1].harm == 0.0 and frontier[-1].ms == 10.0
    for plan in frontier:
        assert plan.ms == pytest.approx(latencies.predict(plan.cut)) and plan.ms <= 10.0
        assert plan.harm == pytest.approx(sum(harms[s] for s in plan.cut))
        assert not any(ms < plan.ms - slack and harm <= plan.harm for ms, harm in every)
    assert all(a.ms < b.ms and a.harm > b.harm for a, b in zip(frontier, frontier[1:], strict=False))
    for target in (9.0, 8.5, 8.0):
        best = min((harm for ms, harm in every if ms <= target), default=math.inf)
        if best < math.inf:
            plan = plan_depth(latencies, harms, target_ms=target + slack)
            assert plan.ms <= target + slack and plan.harm <= best + 1e-9


def test_where_merging_never_pays_nothing_is_merged():
    latencies, harms = made_up()
    slower = Latencies("made up", 10.0, {s: abs(change) for s, change in latencies.change_ms.items()})
    (plan,) = depth_frontier(slower, harms)
    assert plan.cut == uncut(net("reducenet20", width=0.1)) and str(plan) == "nothing merged"
    with pytest.raises(PlanError, match=r"target_ms=9.000: no cut .* The fastest takes 10.000 ms"):
        plan_depth(slower, harms, target_ms=9.0)


def test_a_deep_net_is_searched_in_no_time():
    model = net("reducenet110", width=0.1)
    random.seed(0)
    segments = all_segments(model, longest=4)
    changes = {s: random.uniform(-0.05, 0.01) * (s.length - 1) for s in segments}
    harms = {s: random.random() * (s.length - 1) for s in segments}
    frontier = depth_frontier(Latencies("made up", 10.0, changes), harms)
    assert len(frontier) > 50 and sum(s.length for s in frontier[0].cut) == 54


def test_latencies_are_kept_on_disk_under_the_name_of_the_hardware(tmp_path, monkeypatch):
    model, size = net("reducenet20", width=0.1), (3, 8, 8)
    asked = []

    def additive(model, cuts, input_size, **kwargs):
        asked.extend(cuts)
        return 10.0, [10.0 - sum((0.5 * s.length + 0.25 * s.slim) * (s.length > 1) for s in cut) for cut in cuts]

    monkeypatch.setattr(latency, "measure_cuts", additive)
    with untouched(model):
        first = measure_latencies(model, size, cache=tmp_path)
    assert not first.cached and first.net_ms == pytest.approx(10.0)
    expected = {s: (-0.5 * s.length - 0.25 * s.slim) * (s.length > 1) for s in first.change_ms}
    assert first.change_ms == pytest.approx(expected) and set(expected) == set(all_segments(model, longest=4))
    assert len([cut for cut in asked if len(cut) == 8 or len(cut) == 7 and max(s.length for s in cut) == 3]) >= 16
    assert len(asked) <= 16 + latency.ANCHORS < 18 + latency.ANCHORS  # blocks of one shape are measured once
    cut = (*uncut(model)[:3], *(s for s in first.change_ms if s.length == 3 and s.stage > 0 and s.slim))
    assert first.predict(cut) == pytest.approx(10.0 - 2 * 1.75)

    (file,) = tmp_path.iterdir()
    table = json.loads(file.read_text())
    assert table["hardware"] == first.hardware == hardware_name(torch.device("cpu"))
    assert f"torch-{torch.__version__.split('+')[0]}" in file.name
    monkeypatch.setattr(latency, "measure_cuts", None)  # would fail if called
    again = measure_latencies(model, size, cache=tmp_path)
    assert again.cached and (again.net_ms, again.change_ms) == (first.net_ms, first.change_ms)
    for other in ({"batch_size": 2}, {"longest": 3, "input_size": (3, 9, 9)}):
        with pytest.raises(TypeError):
            measure_latencies(model, **{"input_size": size, "cache": tmp_path, **other})


def test_an_error_in_the_nets_own_time_does_not_count_once_per_segment(monkeypatch):
    def off(model, cuts, input_size, **kwargs):
        return 10.5, [10.0 - 2.0 * sum(s.length > 1 for s in cut) for cut in cuts]

    monkeypatch.setattr(latency, "measure_cuts", off)
    latencies = measure_latencies(net("reducenet20", width=0.1), (3, 8, 8), cache=None)
    cut = tuple(s for s in latencies.change_ms if s.length == 3 and s.slim)
    assert latencies.predict(cut) == pytest.approx(4.0, rel=0.05)  # 3.0 if the changes were taken from 10.5
    assert latencies.predict(uncut(net("reducenet20", width=0.1))) == pytest.approx(10.0, rel=0.05)


def test_measured_plans_that_are_slower_than_the_net_are_left_out(monkeypatch):
    model = net("reducenet20", width=0.1)
    latencies, harms = made_up(model=model)
    plans = depth_frontier(latencies, harms)
    monkeypatch.setattr(knob, "measure_cuts", lambda *args, **kwargs: (20.0, [10.0, 20.5, *[19.0] * (len(plans) - 2)]))
    found = measure_plans(model, plans, latencies, (3, 8, 8))
    assert [m.plan for m in found] == [plans[0], *plans[2:]] and len(plans) > 3
    assert (found[0].ms, found[0].share) == (10.0, 0.5)
    assert found[0].error == pytest.approx(plans[0].ms / 10.0 / 0.5 - 1)
    monkeypatch.setattr(knob, "measure_cuts", lambda *args, **kwargs: (20.0, [20.1] * len(plans)))
    assert [m.plan for m in measure_plans(model, plans, latencies, (3, 8, 8))] == [plans[-1]]  # which merges nothing


def test_latencies_are_measured(monkeypatch):
    monkeypatch.setattr(latency, "ANCHORS", 1)
    model = net("reducenet20", width=0.1).eval()  # how fast it is depends on who else runs here: only that it runs
    latencies = measure_latencies(model, (3, 8, 8), longest=2, rounds=2, cache=None)
    assert latencies.net_ms > 0 and set(latencies.change_ms) == set(all_segments(model, longest=2))
    assert all((change == 0) == (s.length == 1) for s, change in latencies.change_ms.items())
    cut = tuple(s for s in latencies.change_ms if s.slim and s.start == 1 or s.length == 1 and s.start == 0)
    net_ms, (merged_ms,) = measure_cuts(model, [cut], (3, 8, 8), rounds=2)
    assert 0 < merged_ms < 100 and 0 < net_ms < 100


def test_harms():
    model = net("reducenet20", width=0.25).eval()
    x = images(3, 8, 8, n=16)
    with torch.no_grad():
        own = model(x)

    def loss(other):
        with torch.no_grad():
            return float((other.eval()(x) - own).abs().max())

    with untouched(model):
        harms = segment_harms(model, [x], loss, longest=2)
    assert set(harms) == set(all_segments(model, longest=2))
    assert all((harm == 0) == (segment.length == 1) for segment, harm in harms.items())
