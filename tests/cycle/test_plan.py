import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growshrink.cycle import NetAug, Teacher, lay_out
from growshrink.cycle.layout import LEAST_SETTLE
from growshrink.cycle.plan import CyclePlan, Round
from growshrink.errors import PlanError

ROUND = {"epochs": 10.0}
TWO_ROUNDS = CyclePlan(
    base_epochs=3,
    rounds=(Round(epochs=20, teacher=Teacher("peak")), Round(epochs=15, branch=("insert", "bottleneck"), hold=0.3)),
)


@st.composite
def layouts(draw):
    """A plan of up to 3 rounds, updates per epoch, and the phases; None in their place where it does not fit."""
    rounds = []
    per_epoch = draw(st.integers(1, 40))
    for _ in range(draw(st.integers(1, 3))):
        hold = draw(st.floats(0.05, 0.8))
        vanish = draw(st.floats(0.05, 0.85)) * (0.85 - hold)
        settle = draw(st.floats(0.0, 1.0)) * (1 - hold - vanish)
        updates = draw(st.integers(60, 800))
        teacher = draw(st.sampled_from([None, Teacher("peak"), Teacher("previous")]))
        rounds.append(
            Round(epochs=updates / per_epoch, hold=hold, vanish=vanish, settle=settle, teacher=teacher),
        )
    base, rewarm = draw(st.sampled_from([0.0, 0.3, 2.0])), draw(st.sampled_from([0, 1, 20]))
    plan = CyclePlan(rounds=tuple(rounds), base_epochs=base, rewarm=rewarm)
    try:
        return plan, per_epoch, lay_out(plan, per_epoch)
    except PlanError as error:
        assert "too few" in str(error)
        return plan, per_epoch, None


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_phases_cover_the_run_and_lam_and_learning_rate_keep_their_promises(drawn):
    cycle, per_epoch, phases = drawn
    if phases is None:
        return
    assert phases.all[0].start == 0 and phases.total == phases.all[-1].stop
    assert all(a.stop == b.start for a, b in zip(phases.all, phases.all[1:], strict=False))
    assert all(phase.stop > phase.start for phase in phases.all)
    for phase in phases.all:
        assert phases.at(phase.start) == phases.at(phase.stop - 1) == phase
        lams = [phases.lam(update) for update in range(phase.start, phase.stop)]
        if phase.name == "hold":
            assert set(lams) == {1.0}
        elif phase.name == "vanish":
            assert all(0 < lam <= 1 for lam in lams) and lams == sorted(lams, reverse=True)
        else:
            assert set(lams) == {0.0}
    factors = [phases.learning_rate(update) for update in range(phases.total)]
    assert all(0 < factor <= 1 for factor in factors)
    for span, plan in zip(phases.spans, cycle.rounds, strict=True):
        own = {phase.name: phase for phase in phases.all if phase.round == span.number}
        assert [*own] == [name for name in ("hold", "vanish", "settle", "tail") if name in own]
        assert own["settle"].stop - own["settle"].start >= LEAST_SETTLE
        start, stop = own["hold"].start, max(phase.stop for phase in own.values())
        assert stop - start == round(plan.epochs * per_epoch) and (start, stop) == (span.start, span.stop)
        linear = sum(phases.lam(update) == 0 for update in range(start, stop)) / (stop - start)
        assert linear >= 0.15 - 1e-12
        if plan.settle * (stop - start) >= LEAST_SETTLE + 2:  # what was asked for is what there is, to the update
            for name in ("hold", "vanish", "settle"):
                length = own[name].stop - own[name].start
                assert abs(length - getattr(plan, name) * (stop - start)) <= 1, name
        tail = own["tail"].stop - own["tail"].start if "tail" in own else 0
        assert span.tail_share == pytest.approx(tail / (stop - start))


def test_shares_that_add_up_in_decimals_are_not_refused_for_their_last_bit():
    Round(epochs=10, hold=0.45, vanish=0.4, settle=0.15)  # 0.8500000000000001
    phases = lay_out(CyclePlan(rounds=(Round(epochs=203, hold=0.5, vanish=0.25, settle=0.25),)), 1)
    assert phases.total == 203  # 101.5 + 50.75 + 50.75, each rounded up, are 204


@pytest.mark.parametrize("of", [None, "previous", "peak"])
def test_the_learning_rate_follows_one_cosine_and_is_warmed_anew_after_each_change(of):
    plan = CyclePlan(base_epochs=10, rounds=(Round(epochs=40, teacher=of and Teacher(of)),) * 2, rewarm=8)
    phases = lay_out(plan, 10)

    def envelope(update):
        return 0.5 + 0.5 * math.cos(math.pi * update / phases.total)

    names = ("base", "hold", "tail") + ("vanish",) * (of == "peak")
    changes = [s.start for s in phases.all if s.name in names]
    for change in changes:
        ratios = [phases.learning_rate(change + step) / envelope(change + step) for step in range(9)]
        assert ratios == pytest.approx([(step + 1) / 9 for step in range(9)])
    for segment in phases.all:
        last = phases.learning_rate(segment.stop - 1)
        if of == "peak" and segment.name == "hold":
            assert last < 0.01 * envelope(segment.stop - 1)
            anneal = [phases.learning_rate(u) for u in range((segment.start + segment.stop) // 2, segment.stop)]
            assert anneal == sorted(anneal, reverse=True)
        else:
            assert last == pytest.approx(envelope(segment.stop - 1))
    assert phases.learning_rate(phases.total - 1) < 1e-5


def test_a_net_that_is_born_grown_is_alive_from_the_first_update():
    plan = CyclePlan(base_epochs=10, rounds=(Round(epochs=40),))
    assert [lay_out(plan, 10, built_grown=built).lam(5) for built in (False, True)] == [0.0, 1.0]
    assert lay_out(plan, 10, built_grown=True).lam(499) == 0.0


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
        ({"teacher": "peak"}, "teacher='peak': must be a Teacher"),
        ({"widths": "lazy"}, "widths='lazy': must be a NetAug"),
        ({"exit": "fuse"}, "exit='fuse': must be a Exit"),
        ({"exit": None}, "exit=None"),
        ({"teacher": Teacher("peak", asked=0.5), "widths": NetAug("lazy")}, "teacher.asked: with sampled widths"),
        ({"online": "yes"}, "online='yes': must be true or false"),
        ({"online": True, "widths": NetAug("lazy")}, "online=True: .* sampled widths"),
    ],
    ids=str,
)
def test_a_round_that_cannot_be_is_refused_by_the_name_of_its_field(values, words):
    with pytest.raises(PlanError, match=words):
        Round(**{**ROUND, **values})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"of": "peek"}, "of='peek'.*did you mean peak"),
        ({"of": None}, "of=None"),
        ({"weight": 0}, "weight=0"),
        ({"weight": 1.5}, "weight=1.5"),
        ({"asked": 0}, "asked=0"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": math.inf}, "temperature=inf"),
    ],
    ids=str,
)
def test_a_teacher_that_cannot_be_is_refused_by_the_name_of_its_field(values, words):
    with pytest.raises(PlanError, match=words):
        Teacher(**values)


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
        ({"rounds": [{"epochs": 3, "exit": "fse"}]}, r"rounds\[0\].exit: no such exit 'fse'; did you mean fuse"),
        ({"rounds": [{"epochs": 3, "exit": {"accept_within": 1}}]}, r"rounds\[0\].exit: must be one of fuse"),
        ({"rounds": [{"epochs": 3, "teacher": {"off": "peak"}}]}, r"rounds\[0\].teacher: 'off' is not an option"),
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
        lay_out(plan, 10)
