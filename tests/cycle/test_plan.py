import json
import math

import pytest
from growshrink.cycle.timeline import LEAST_SETTLE, Segment, Timeline
from hypothesis import given, settings
from hypothesis import strategies as st

from growshrink.cycle import NetAug, Teacher
from growshrink.cycle.plan import CyclePlan, Round
from growshrink.errors import PlanError

ROUND = {"epochs": 10.0}
TWO_ROUNDS = CyclePlan(
    base_epochs=3,
    rounds=(Round(epochs=20, teacher=Teacher("peak")), Round(epochs=15, branch=("insert", "bottleneck"), hold=0.3)),
)


@st.composite
def timelines(draw):
    """Timelines of up to 3 rounds that fit their updates."""
    rounds = []
    per_epoch = draw(st.integers(1, 40))
    for _ in range(draw(st.integers(1, 3))):
        hold = draw(st.floats(0.05, 0.8))
        vanish = draw(st.floats(0.05, 0.85)) * (0.85 - hold)
        settle = draw(st.floats(0.0, 1.0)) * (1 - hold - vanish)
        updates = draw(st.integers(60, 800))
        distil = draw(st.sampled_from(["none", "peak", "previous"]))
        rounds.append(
            Round(epochs=updates / per_epoch, hold=hold, vanish=vanish, settle=settle, distil=distil),
        )
    base, rewarm = draw(st.sampled_from([0.0, 0.3, 2.0])), draw(st.sampled_from([0, 1, 20]))
    timeline = Timeline(CyclePlan(rounds=tuple(rounds), base_epochs=base, rewarm=rewarm), per_epoch)
    try:
        timeline.segments  # noqa: B018
    except PlanError as error:
        assert "too few" in str(error)
        return None
    return timeline


@settings(max_examples=150, deadline=None)
@given(timelines())
def test_phases_cover_the_run_and_lam_and_learning_rate_keep_their_promises(timeline):
    if timeline is None:
        return
    segments = timeline.segments
    assert segments[0].start == 0 and timeline.total == segments[-1].stop
    assert all(a.stop == b.start for a, b in zip(segments, segments[1:], strict=False))
    assert all(s.stop > s.start for s in segments)
    for segment in segments:
        assert timeline.segment_at(segment.start) == timeline.segment_at(segment.stop - 1) == segment
        lams = [timeline.lam(update) for update in range(segment.start, segment.stop)]
        if segment.phase == "hold":
            assert set(lams) == {1.0}
        elif segment.phase == "vanish":
            assert all(0 < lam <= 1 for lam in lams) and lams == sorted(lams, reverse=True)
        else:
            assert set(lams) == {0.0}
    factors = [timeline.learning_rate(update) for update in range(timeline.total)]
    assert all(0 < factor <= 1 for factor in factors)
    for number, plan in enumerate(timeline.plan.rounds, start=1):
        own = {s.phase: s for s in segments if s.round == number}
        assert [*own] == [phase for phase in ("hold", "vanish", "settle", "tail") if phase in own]
        assert own["settle"].stop - own["settle"].start >= LEAST_SETTLE
        start, stop = own["hold"].start, max(s.stop for s in own.values())
        assert stop - start == round(plan.epochs * timeline.updates_per_epoch)
        linear = sum(timeline.lam(update) == 0 for update in range(start, stop)) / (stop - start)
        assert linear >= 0.15 - 1e-12
        if plan.settle * (stop - start) >= LEAST_SETTLE + 2:  # what was asked for is what there is, to the update
            for phase in ("hold", "vanish", "settle"):
                length = own[phase].stop - own[phase].start
                assert abs(length - getattr(plan, phase) * (stop - start)) <= 1, phase
        tail = own.get("tail", Segment(number, "tail", stop, stop))
        assert timeline.tail_share(number) == pytest.approx((tail.stop - tail.start) / (stop - start))


def test_shares_that_add_up_in_decimals_are_not_refused_for_their_last_bit():
    Round(epochs=10, hold=0.45, vanish=0.4, settle=0.15)  # 0.8500000000000001
    timeline = Timeline(CyclePlan(rounds=(Round(epochs=203, hold=0.5, vanish=0.25, settle=0.25),)), 1)
    assert timeline.total == 203  # 101.5 + 50.75 + 50.75, each rounded up, are 204


@pytest.mark.parametrize("distil", ["none", "previous", "peak"])
def test_the_learning_rate_follows_one_cosine_and_is_warmed_anew_after_each_change(distil):
    plan = CyclePlan(base_epochs=10, rounds=(Round(epochs=40, distil=distil),) * 2, rewarm=8)
    timeline = Timeline(plan, 10)

    def envelope(update):
        return 0.5 + 0.5 * math.cos(math.pi * update / timeline.total)

    phases = ("base", "hold", "tail") + ("vanish",) * (distil == "peak")
    changes = [s.start for s in timeline.segments if s.phase in phases]
    for change in changes:
        ratios = [timeline.learning_rate(change + step) / envelope(change + step) for step in range(9)]
        assert ratios == pytest.approx([(step + 1) / 9 for step in range(9)])
    for segment in timeline.segments:
        last = timeline.learning_rate(segment.stop - 1)
        if distil == "peak" and segment.phase == "hold":
            assert last < 0.01 * envelope(segment.stop - 1)
            anneal = [timeline.learning_rate(u) for u in range((segment.start + segment.stop) // 2, segment.stop)]
            assert anneal == sorted(anneal, reverse=True)
        else:
            assert last == pytest.approx(envelope(segment.stop - 1))
    assert timeline.learning_rate(timeline.total - 1) < 1e-5


def test_a_net_that_is_born_grown_is_alive_from_the_first_update():
    plan = CyclePlan(base_epochs=10, rounds=(Round(epochs=40),))
    assert [Timeline(plan, 10, built_grown=born).lam(5) for born in (False, True)] == [0.0, 1.0]
    assert Timeline(plan, 10, built_grown=True).lam(499) == 0.0


def test_a_plan_goes_through_json_and_back():
    values = json.loads(json.dumps(TWO_ROUNDS.to_dict()))
    assert CyclePlan.from_dict(values) == TWO_ROUNDS
    assert CyclePlan.from_dict({"base_epochs": 2}) == CyclePlan(rounds=(), base_epochs=2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": -1.0}, "epochs=-1.0"),
        ({"epochs": math.nan}, "epochs=nan"),
        ({"epochs": math.inf}, "epochs=inf"),
        ({"epochs": "3"}, "epochs='3'"),
        ({"epochs": True}, "epochs=True"),
        ({"branch": ()}, "branch=()"),
        ({"branch": ("bottelneck",)}, "bottelneck.*did you mean bottleneck"),
        ({"branch": "bottleneck"}, "branch='bottleneck': must be a tuple"),
        ({"branch": (3,)}, "branch="),
        ({"ratio": 0}, "ratio"),
        ({"ratio": -2.0}, "ratio"),
        ({"ratio": math.nan}, "ratio"),
        ({"ratio": None}, "ratio"),
        ({"where": 3}, "where=3"),
        ({"hold": -0.1}, "hold=-0.1"),
        ({"hold": 0.0}, "hold=0.0"),
        ({"hold": 1.1}, "hold=1.1"),
        ({"hold": None}, "hold=None"),
        ({"vanish": 0}, "vanish=0"),
        ({"vanish": math.nan}, "vanish=nan"),
        ({"settle": -1}, "settle=-1"),
        ({"settle": 0.9}, "hold .* settle = 1.25: more than the round"),
        ({"hold": 0.6, "vanish": 0.3}, "hold .* vanish = 0.9: at most 0.85"),
        ({"control": "loop"}, "control='loop': no such control.*closed_loop"),
        ({"control": "closed_loop", "widths": NetAug("lazy")}, "control='closed_loop': listens to plain training"),
        ({"distil": "peek"}, "distil='peek'.*did you mean peak"),
        ({"distil": None}, "distil=None"),
        ({"distil_weight": 0}, "distil_weight=0"),
        ({"distil_weight": 1.5}, "distil_weight=1.5"),
        ({"distil_asked": 0}, "distil_asked=0"),
        ({"distil_asked": 0.5, "widths": NetAug("lazy")}, "distil_asked: with sampled widths"),
        ({"online": "yes"}, "online='yes': must be true or false"),
        ({"online": True, "widths": NetAug("lazy")}, "online=True: .* sampled widths"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": math.inf}, "temperature=inf"),
    ],
    ids=str,
)
def test_a_round_that_cannot_be_is_refused_by_the_name_of_its_field(values, words):
    with pytest.raises(PlanError, match=words):
        Round(**{**ROUND, **values})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "the plan is empty"),
        ({"rounds": []}, "the plan is empty"),
        ({"base_epochs": -1, "rounds": [ROUND]}, "base_epochs=-1"),
        ({"base_epochs": math.nan}, "base_epochs=nan"),
        ({"base_epochs": "6"}, "base_epochs='6'"),
        ({"rewarm": -1, "rounds": [ROUND]}, "rewarm=-1"),
        ({"rewarm": 0.5, "rounds": [ROUND]}, "rewarm=0.5"),
        ({"seed": "x", "rounds": [ROUND]}, "seed='x'"),
        ({"rounds": 5}, "rounds=5"),
        ({"rounds": {"epochs": 3}}, "rounds="),
        ({"rounds": [5]}, r"rounds\[0\]: must be an object"),
        ({"rounds": [ROUND, {}]}, r"rounds\[1\].*epochs"),
        ({"rounds": [ROUND, {"epochs": 3, "hodl": 1}]}, r"rounds\[1\]: 'hodl'.*did you mean hold"),
        ({"rounds": [ROUND, {"epochs": -3}]}, r"rounds\[1\]: epochs=-3"),
        ({"rounds": [{"epochs": 3, "branch": "insert"}]}, r"rounds\[0\]: branch='insert'"),
        ({"round": [ROUND]}, "'round'.*did you mean rounds"),
        ([1, 2], "must be an object"),
        (None, "must be an object"),
    ],
    ids=str,
)
def test_a_malformed_plan_file_is_refused_by_the_name_of_its_field(values, words):
    with pytest.raises(PlanError, match=words):
        CyclePlan.from_dict(values)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (CyclePlan(rounds=(Round(epochs=5),)), "round 1 has 50 updates: too few"),
        (CyclePlan(rounds=(Round(epochs=20), Round(epochs=1))), "round 2 has 10 updates: too few"),
        (CyclePlan(rounds=(Round(epochs=20, hold=0.001),)), "too few for hold 0"),
        (CyclePlan(rounds=(), base_epochs=0.01), "base_epochs=0.01: less than one update"),
    ],
    ids=["all", "second", "hold", "base"],
)
def test_rounds_that_are_too_short_for_their_phases_are_refused(plan, words):
    with pytest.raises(PlanError, match=words):
        Timeline(plan, 10).segments  # noqa: B018
