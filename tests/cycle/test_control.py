import json

import pytest
import torch

from growshrink.cycle import Teacher, lay_out
from growshrink.cycle.plan import CyclePlan, Round

#: base 2 updates; each round: hold 40, vanish 100, settle 60.
SHARES = {"epochs": 200, "hold": 0.2, "vanish": 0.5, "settle": 0.3}


def phases(*controls, **kwargs):
    rounds = tuple(Round(**SHARES, control=control, **kwargs) for control in controls)
    return lay_out(CyclePlan(base_epochs=2, rounds=rounds), 1)


def follow(control, losses, start=0):
    values = []
    for update, loss in enumerate(losses, start):
        values.append(control(update))
        control.observe(torch.tensor(loss))
    return values


def test_only_the_round_that_asks_for_it_is_controlled():
    plan = phases("schedule", "closed_loop")
    values = follow(plan.lam_control(), [1.0] * plan.total)
    assert values[:202] == [plan.lam(update) for update in range(202)]
    assert values[202:243] == [1.0] * 41
    assert values[267] == pytest.approx(0.5)  # nothing objects: down in half the time of the vanishing
    assert values[295:] == [0.0] * (plan.total - 295)


def test_it_waits_for_the_loss_and_is_0_when_the_vanishing_is_over():
    plan = phases("closed_loop", "closed_loop")
    rising = [1.0 + 0.1 * update for update in range(plan.total)]
    values = follow(plan.lam_control(), rising)
    for start in (2, 202):
        assert values[start : start + 41] == [1.0] * 41 and values[start + 139] > 0.05
        assert values[start + 140 : start + 200] == [0.0] * 60


@pytest.mark.parametrize(("of", "waits"), [(None, True), ("peak", False), ("previous", False)])
def test_losses_without_the_teacher_are_not_compared_with_those_it_has_part_in(of, waits):
    plan = phases("closed_loop", teacher=of and Teacher(of))
    values = follow(plan.lam_control(), [1.0] * 42 + [9.0] * 160)
    assert (values[100] > 0.8) == waits


def test_a_state_in_json_is_all_there_is():
    plan = phases("closed_loop", "closed_loop")
    losses = [1.0 + 0.5 * (update // 13 % 2) for update in range(plan.total)]
    whole = follow(plan.lam_control(), losses)
    for cut in (30, 77, 260):
        first = plan.lam_control()
        values = follow(first, losses[:cut])
        second = plan.lam_control()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert values + follow(second, losses[cut:], start=cut) == whole
