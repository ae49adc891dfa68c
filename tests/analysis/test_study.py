import copy
import json
from pathlib import Path

import numpy as np
import pytest
import supernets as small

import growshrink as gs
from growshrink.analysis._rank import jsonable
from growshrink.analysis.prune import Budget, draw_widths
from growshrink.errors import AnalysisError
from program import module_of

pytest.importorskip("torch_pruning")
from growshrink.analysis.channels import ChannelSpace

study = module_of(Path(__file__).parents[2] / "tools" / "study.py")
SupernetSpace = study.SupernetSpace


def records(random, criteria, net=0):
    """Results as the tool writes them."""
    rows = [("random", value) for value in random]
    rows += [(kind, value) for kind, values in criteria.items() for value in values]
    return [
        {
            "key": f"{net} {i}",
            "net": net,
            "kind": kind,
            "top1": top1,
            "seconds_to_find": 0.5,
            "seconds_to_evaluate": 1.0,
        }
        for i, (kind, top1) in enumerate(rows)
    ]


def test_criteria_are_placed_among_the_random_subnets_of_their_own_net():
    random = np.arange(1.0, 101.0)
    rows = records(random, {"l1": [90.5], "l1, random channels": [70.0, 80.0]}) + records(
        random - 50, {"l1": [40.5], "l1, random channels": [25.0, 25.0]}, net=1
    )
    summary = study.summarise(rows, [100.0, 50.0], num_resamples=50)
    l1 = summary["criteria"]["l1"]
    assert l1["percentile"] == [90.0, 90.0]
    value, low, high = l1["n_eq"][0]
    assert low < value < high and 8 < value < 12  # n / (n + 1) is the expected maximum of n uniform draws
    assert l1["over_random"]["difference"][0] == pytest.approx(40.0)
    assert l1["of_its_channels"] == pytest.approx(65.5 - 50.0) and l1["of_its_widths"] == pytest.approx(50 - 25.5)
    assert l1["over_random"]["p_holm"] == l1["over_random"]["p"] == 0.5  # two nets cannot say more
    assert summary["random"]["yield"][5.0].value == pytest.approx(0.06)
    assert "no p can be below 0.500" in study.format_summary(summary)
    json.dumps(jsonable(summary), allow_nan=False)


def test_better_than_all_draws_cannot_be_told_in_draws():
    summary = study.summarise(records([1.0, 2.0, 3.0], {"l1": [9.0]}), [10.0], num_resamples=20)
    assert summary["criteria"]["l1"]["n_eq"][0][0] == np.inf
    text = study.format_summary(summary)
    assert " > (>, >)" in text and "there is no test" in text
    with pytest.raises(AnalysisError, match="fewer than 2 random subnets"):
        study.summarise(records([1.0], {}), [10.0])


def test_channel_plans_are_the_same_in_every_process_and_meet_the_budget():
    feed = small.digits()
    model = small.supernet(feed, epochs=0.1)[0]
    gs.set_lambda(model, 0.0)
    space = ChannelSpace(gs.fuse(model, input_size=feed.input_size), feed.input_size)
    budget = Budget(0.5, 0.1)
    draws = draw_widths(space, budget, 3)

    def plan():
        return study.plan_channels(
            space, draws, budget, net=0, criteria=["l2", "taylor", "random"], null_draws=2, seed=0,
            batch=lambda: feed.train.batch(0),
        )  # fmt: skip

    first, second = plan(), plan()
    assert [c.key for c in first] == [c.key for c in second] and len({c.key for c in first}) == 3 + 3 * 3
    full = space.cost(np.array([[len(c) - 1 for c in space.choices.values()]]))[1][0]
    calibration = [feed.train.batch(0)[0]]
    found = {}
    for a, b in zip(first, second, strict=True):
        row, again = (study.measure(c, space, calibration, feed.val) for c in (a, b))
        assert {k: v for k, v in row.items() if "seconds" not in k} == {
            k: v for k, v in again.items() if "seconds" not in k
        }
        assert abs(row["macs"] / full / 0.5 - 1) <= 0.1
        found.setdefault(row["kind"], []).append(row["subnet"])
    assert len(set(found["random"])) > 1
    assert set(found["l2, random channels"]) == set(found["l2"])  # the same widths, other channels
    assert set(found) == {
        f"{c}{n}" for c in ("l2", "taylor", "random threshold") for n in ("", ", random channels")
    } | {"random"}


def test_width_plans_pick_the_best_by_score_of_as_many_draws():
    bench = small.bench(small.digits(), epochs=0.1)
    space = SupernetSpace(bench.trained, bench.table)
    budget = Budget(0.6, 0.1)
    draws = draw_widths(space, budget, 5, distinct=True)
    plan = study.plan_widths(space, draws, budget, net=0, pickers=["params", "angle"], seed=0, bench=bench)
    assert [c.kind for c in plan] == ["random"] * 5 + ["params", "angle"]
    row = study.measure(plan[5], space, bench.calibration(), bench.feed.val)
    pool = draw_widths(space, budget, 5, seed=1)
    assert row["params"] == pool.params.max()


def test_what_is_drawn_blindly_is_drawn_anew_for_every_net():
    """Else one lucky draw, judged on all nets, would look like a criterion that works."""
    feed = small.digits()
    bench = small.bench(feed, epochs=0.1)
    widths = SupernetSpace(bench.trained, bench.table)
    model = copy.deepcopy(bench.init)
    gs.set_lambda(model, 0.0)
    channels = ChannelSpace(gs.fuse(model, input_size=feed.input_size), feed.input_size)
    budget = Budget(0.5, 0.1)
    found = []
    for net in range(4):
        plan = study.plan_channels(
            channels, draw_widths(channels, budget, 2), budget, net=net, criteria=["random"], null_draws=0, seed=0,
            batch=lambda: feed.train.batch(0),
        ) + study.plan_widths(
            widths, draw_widths(widths, budget, 2), budget, net=net, pickers=["params"], seed=0, bench=bench,
        )  # fmt: skip
        found.append([tuple(c.make()[1].values()) for c in plan if c.kind in ("random threshold", "params")])
    for made in zip(*found, strict=True):
        assert len(set(made)) > 2
