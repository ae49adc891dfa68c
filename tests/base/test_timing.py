import time

import pytest

from growshrink.base.timing import interleaved_timings, machine


def test_slow_spells_of_the_machine_do_not_count(monkeypatch):
    clock = {"now": 0.0, "calls": 0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])

    def work(seconds):
        clock["calls"] += 1
        slow = 3.0 if clock["calls"] // 200 % 3 == 1 else 1.0  # a third of the time the machine is busy
        clock["now"] += seconds * slow

    times = interleaved_timings(
        {"a": lambda: work(0.002), "b": lambda: work(0.006), "c": lambda: work(0.0001)}, rounds=60
    )
    assert times["b"] / times["a"] == pytest.approx(3.0, rel=0.01)
    assert times["a"] / times["c"] == pytest.approx(20.0, rel=0.01)
    assert times["a"] == pytest.approx(2.0, rel=0.01)  # milliseconds


def test_every_call_is_warm_before_it_is_timed():
    log = []
    interleaved_timings({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, rounds=2)
    assert log[:4] == ["a"] * 4  # three to warm up, one to see how long it takes
    changes = [index for index in range(1, len(log)) if log[index] != log[index - 1]]
    assert len(changes) >= 4  # turns
    assert all(b - a >= 2 for a, b in zip(changes, changes[1:], strict=False))  # one untimed, and those timed


def test_waiting_for_a_core_can_be_left_out():
    def work():
        time.sleep(0.002)
        sum(range(1000))

    assert interleaved_timings({"work": work}, rounds=5)["work"] >= 2.0
    assert interleaved_timings({"work": work}, rounds=5, own_thread=True)["work"] < 1.0


def test_machine():
    about = machine()
    assert about["processor"] and about["cores"] >= 1 and about["threads"] >= 1
