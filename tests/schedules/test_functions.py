import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growshrink import schedules
from growshrink.schedules.functions import constant, cosine, hold_then_vanish, join, linear, rewarm

RAMPS = {"linear": linear, "cosine": cosine}


@pytest.mark.parametrize("ramp", RAMPS)
@given(
    start=st.floats(-10, 10), end=st.floats(-10, 10), steps=st.integers(0, 50), begin=st.integers(0, 20), data=st.data()
)
def test_ramps_stay_between_their_ends_and_end_exactly(ramp, start, end, steps, begin, data):
    schedule = RAMPS[ramp](start, end, steps, begin)
    values = [schedule(step) for step in range(begin + steps + 3)]
    low, high = min(start, end), max(start, end)
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in values)
    assert all(v == start for v in values[:begin])
    assert all(v == end for v in values[begin + steps :])
    ordered = values[begin:] if start <= end else [-v for v in values[begin:]]
    assert all(a <= b + 1e-12 for a, b in zip(ordered, ordered[1:], strict=False))
    again = data.draw(st.integers(0, begin + steps + 2))
    assert schedule(again) == values[again]


@pytest.mark.parametrize("total", [1, 2, 3, 7, 1000, 12345])
def test_lam_vanishes_to_exactly_0_and_stays(total):
    schedule = hold_then_vanish(hold=5, vanish=total)
    assert [schedule(s) for s in range(6)] == [1.0] * 6
    assert schedule(5 + total) == 0.0 and schedule(10**9) == 0.0
    assert 0.0 < schedule(5 + total - 1) <= 1.0
    assert all(0.0 <= schedule(s) <= 1.0 for s in range(0, 6 + total, max(1, total // 50)))


def test_cosine_is_the_formula():
    schedule = cosine(3.0, 1.0, steps=10, begin=2)
    for step in range(2, 12):
        assert schedule(step) == pytest.approx(1 + 2 * (1 + math.cos(math.pi * (step - 2) / 10)) / 2, abs=1e-12)


def test_zero_steps_is_a_jump():
    assert [linear(1.0, 0.5, steps=0, begin=2)(s) for s in range(4)] == [1.0, 1.0, 0.5, 0.5]
    assert hold_then_vanish(0, 0)(0) == 0.0


def test_join_counts_from_each_boundary():
    seen = []

    def spy(name):
        return lambda step: seen.append((name, step)) or 0.0

    schedule = join([spy("a"), spy("b"), spy("c")], boundaries=[2, 5])
    for step in range(7):
        schedule(step)
    assert seen == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1)]
    assert join([constant(1.0)], boundaries=[])(3) == 1.0
    # a boundary given twice leaves nothing of the schedule between
    assert [join([constant(1.0), constant(2.0), constant(3.0)], [2, 2])(s) for s in range(4)] == [1, 1, 3, 3]


def rewarm_by_loop(envelope, restarts, warmup, step):
    past = [r for r in restarts if r <= step]
    if not past:
        return envelope(step)
    return envelope(step) * min(1.0, (step - max(past) + 1) / (warmup + 1))


@given(restarts=st.lists(st.integers(0, 30), max_size=4), warmup=st.integers(0, 8), step=st.integers(0, 40))
def test_rewarm_against_a_slow_twin(restarts, warmup, step):
    envelope = linear(1.0, 0.0, steps=50)
    assert rewarm(envelope, restarts, warmup)(step) == pytest.approx(rewarm_by_loop(envelope, restarts, warmup, step))
    assert rewarm(envelope, restarts, warmup)(step) > 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(1, 0, steps=-1), "linear needs steps >= 0"),
        (lambda: cosine(1, 0, steps=1, begin=-1), "cosine needs steps >= 0 and begin >= 0"),
        (lambda: hold_then_vanish(-1, 2), "hold=-1"),
        (lambda: hold_then_vanish(1, -2), "steps=-2"),
        (lambda: join([constant(1.0)], [3]), "one boundary fewer"),
        (lambda: join([], []), "one boundary fewer"),
        (lambda: join([constant(1.0)] * 3, [5, 2]), "rising order"),
        (lambda: rewarm(constant(1.0), [0], -1), "warmup"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_public_function_is_tested_here():
    public = {
        n for n, f in vars(schedules).items() if callable(f) and getattr(f, "__module__", "") == schedules.__name__
    }
    assert {n for n in public if not n.startswith("_")} <= set(globals())
