"""What the machine decides: bfloat16 or not, by timed steps."""

import time

import pytest
import torch

from growshrink.base import timing
from growshrink.training import choosing
from nets import net

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seconds", "on", "words"),
    [
        ((0.1, 0.4), False, "0.25 times as fast"),
        ((0.3, 0.1), True, "3.00 times as fast"),
        ((0.11, 0.1), False, "1.10 times"),
    ],
)
def test_bfloat16_is_taken_where_it_is_worthwhile_faster(monkeypatch, seconds, on, words):
    def timed(calls, **how):
        for call in calls.values():
            call()
        return dict(zip(calls, seconds, strict=True))

    monkeypatch.setattr(choosing, "interleaved_timings", timed)
    model, state = net(drop_rate=0.5), torch.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found, sentence = choosing.choose_speed(model, (3, 8, 8), 4, CPU, "amp")
    assert found is on and words in sentence and f": {'on' if on else 'off, as it is below 1.2'} (" in sentence
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_runs_in_the_type_it_is_asked_for():
    types = []
    for amp in (False, True):
        model = net()
        model.get_classifier().register_forward_hook(lambda module, args, out: types.append(out.dtype))
        choosing.training_step(model, (3, 8, 8), 4, CPU, amp=amp)()
    assert types == [torch.float32, torch.bfloat16]


def test_long_calls_take_turns_and_end_in_time(monkeypatch):
    monkeypatch.setattr(timing, "LONG", 0.0)
    order = []
    calls = {name: lambda name=name: order.append(name) or time.sleep(0.001) for name in "ab"}
    found = timing.interleaved_timings(calls, device=CPU, rounds=3)
    assert order == list("ab" * 4) and set(found) == {"a", "b"} and all(value >= 1.0 for value in found.values())
    order.clear()
    timing.interleaved_timings(calls, device=CPU, rounds=100, at_most=0.0)
    assert order == list("ab" * 2)


def test_compiling_is_timed_on_a_device_that_gains_by_it(monkeypatch):
    names = []
    monkeypatch.setattr(choosing, "training_step", lambda *args, **how: names.append(how) or (lambda: None))
    monkeypatch.setattr(choosing, "interleaved_timings", lambda calls, **how: {"as ever": 0.3, "compile": 0.1})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert choosing.choose_speed(net(), (3, 8, 8), 4, CPU, "compile")[0] is False and not names
    on, sentence = choosing.choose_speed(net(), (3, 8, 8), 4, torch.device("cuda"), "compile", amp=True)
    assert on and sentence.startswith("a step compiled is 3.00 times as fast on a GPU: on (--compile on")
    assert names == [{"amp": True}, {"amp": True, "compile": True}]
