"""What a plan costs is known before it is run, to the MAC; and the ways a round may start and end."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from small import BATCH, CONFIG, SIZE, Feed, shorten_settle, small

import growshrink as gs
from growshrink.cycle import Choose, Drop, NetAug, Rewind, Teacher, lay_out
from growshrink.cycle.costs import Costs
from growshrink.errors import PlanError
from growshrink.layers import recompute
from growshrink.proofs._profile import training_macs
from growshrink.schedules.functions import cosine
from growshrink.training import Trainer
from sampled import sampled

PLANS = {
    "plain": [],
    "previous, then peak": [{"teacher": Teacher("previous")}, {"teacher": Teacher("peak")}],
    "fuse": [{}],
    "at equilibrium": [{"branch": ("implicit",)}],
    "two kinds": [{}, {"branch": ("insert", "nest")}],
    "linear, as in the paper": [{"branch": ("expandnet",), "linear": True, "init": "paper"}],
    "guided": [{"branch": ("guided", "guided_kernel"), "ratio": 4.0, "guide": "test_byobnet"}],
    "online": [{"branch": ("expandnet", "insert"), "online": True}],
    "online, linear": [{"branch": ("dbb",), "online": True, "linear": True, "teacher": Teacher("peak")}],
    "drop": [{"exit": Drop(), "hold": 0.5, "vanish": 0.0, "settle": 0.0}],
    "teach": [{"exit": Rewind(), "hold": 0.5, "vanish": 0.0, "settle": 0.0, "teacher": Teacher("peak")}],
    "asked for a while": [
        {"exit": Rewind(), "hold": 0.3, "vanish": 0.0, "settle": 0.0, "teacher": Teacher("peak", asked=0.3)},
        {"teacher": Teacher("previous", asked=0.5)},
        {"teacher": Teacher("peak", asked=0.01)},
    ],
    "lazy, peak": [{"widths": NetAug("lazy"), "exit": Drop(), "teacher": Teacher("peak")}],
    "netaug, previous": [{"widths": NetAug("netaug"), "teacher": Teacher("previous")}],
}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    shorten_settle(monkeypatch)
    monkeypatch.setattr("growshrink.cycle.report.draw_curves", lambda result: False)


def plan_of(name, **values):
    rounds = tuple(gs.Round(epochs=6, **entry) for entry in PLANS[name])
    return gs.CyclePlan(rounds=rounds, base_epochs=1, **values)


def run(path, plan, **kwargs):
    torch.manual_seed(5)
    return gs.run_cycle(small(outputs=4), Feed.make(), plan, out_dir=path, config=CONFIG, **kwargs)


@pytest.mark.parametrize("name", sampled(PLANS, ("plain", "fuse", "online", "teach", "netaug, previous")))
def test_the_cost_is_known_before(tmp_path, name):
    plan, feed = plan_of(name), Feed.make()
    result = run(tmp_path / "run", plan)
    phases = lay_out(plan, feed.train.updates_per_epoch)
    assert phases.macs(Costs(small(outputs=4), plan, feed.train, SIZE)) == result.training_macs
    assert gs.CyclePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert list(result.model.state_dict()) == list(small(outputs=4).state_dict())


def test_what_is_run_again_is_paid_for(tmp_path, monkeypatch):
    plan, feed = plan_of("fuse"), Feed.make()
    plain = run(tmp_path / "kept", plan)
    monkeypatch.setattr(f"{__name__}.CONFIG", replace(CONFIG, recompute=True))
    again = run(tmp_path / "recomputed", plan)
    with recompute():
        costs = Costs(small(outputs=4), plan, feed.train, SIZE)
    assert lay_out(plan, feed.train.updates_per_epoch).macs(costs) == again.training_macs > plain.training_macs
    weights = again.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.model.state_dict().items())


def test_a_guide_is_paid_for():
    rounds = tuple(
        gs.Round(epochs=1, branch=("guided", "guided_kernel"), guide=name) for name in ("test_byobnet", None)
    )
    plain = small(outputs=4)
    costs = Costs(plain, gs.CyclePlan(rounds=rounds), Feed.make().train, SIZE)
    twins = [gs.grow(plain, entry.branch, guide=entry.guide, input_size=SIZE) for entry in rounds]
    assert [cost.train for cost in costs.grown] == [training_macs(twin, SIZE, BATCH) for twin in twins]
    assert costs.grown[0].train > 2 * costs.grown[1].train


def test_a_taught_net_goes_on_where_it_was_and_learns_from_the_peak(tmp_path):
    plan = plan_of("teach")
    phases = lay_out(plan, 4)
    assert [(phase.name, phase.start, phase.stop) for phase in phases.all] == [
        ("base", 0, 4),
        ("prepare", 4, 16),
        ("tail", 16, 28),
    ]
    quiet = lay_out(gs.CyclePlan(rounds=plan.rounds, base_epochs=1, rewarm=0), 4).learning_rate
    own = cosine(1.0, 0.0, steps=16)  # of the plain net: 4 updates before it grew, 12 after
    assert [quiet(update) for update in (0, 3, 16, 27)] == [own(update) for update in (0, 3, 4, 15)]
    assert quiet(4) == 1.0 and quiet(15) < 0.02  # of its teacher
    assert [change.kind for change in run(tmp_path / "run", plan).growth_log] == ["grow", "rewind"]
    assert "merged nothing" in (tmp_path / "run" / "report.md").read_text()


def test_a_taught_net_begins_with_the_weights_it_grew_from(tmp_path, monkeypatch):
    seen = []
    train = Trainer.train

    def spy(trainer, stop, **kwargs):
        values = (trainer.model.conv1.weight, trainer.best.conv1.weight)
        seen.append((trainer.update, kwargs["teacher"], copy.deepcopy(values)))
        return train(trainer, stop, **kwargs)

    monkeypatch.setattr(Trainer, "train", spy)
    run(tmp_path / "run", plan_of("teach"))
    _, _, before = next(entry for entry in seen if entry[0] == 4)
    _, teacher, after = next(entry for entry in seen if entry[0] == 16)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    assert teacher is not None and gs.get_lambda(teacher.model) and set(gs.get_lambda(teacher.model).values()) == {1.0}
    assert all(entry[1] is None for entry in seen if entry[0] < 16)


def test_linear_from_the_start_and_the_papers_start(tmp_path):
    plan = plan_of("linear, as in the paper")
    phases = lay_out(plan, 4)
    assert {phases.lam(update) for update in range(phases.total)} == {0.0}
    log = run(tmp_path / "run", plan).growth_log
    assert log[0].init == "paper"


def test_dropped_branches_leave_the_kernel_as_it_was_trained(tmp_path):
    record = run(tmp_path / "run", plan_of("drop")).rounds[0]
    assert record.top1.fused == record.top1.dropped and record.max_rel == 0.0


def test_restarts_lead_the_learning_rate_back_up():
    plan = gs.CyclePlan(rounds=(), base_epochs=10, restarts=(5.0,), rewarm=4)
    rates = [lay_out(plan, 10).learning_rate(update) for update in range(100)]
    assert rates[50] < rates[49] / 3 < rates[55] and rates[:50] == [
        lay_out(gs.CyclePlan(rounds=(), base_epochs=10, rewarm=4), 10).learning_rate(update) for update in range(50)
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"exit": Rewind(), "teacher": Teacher("peak")}, "exit='rewind': needs vanish=0"),
        ({"exit": Rewind(), "vanish": 0.0, "settle": 0.0}, "exit='rewind': needs"),
        ({"exit": Choose()}, "exit='choose': only a round with sampled widths"),
        ({"init": "papre"}, "init='papre'.*did you mean paper"),
        ({"linear": True, "control": "closed_loop"}, "linear=True"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(values, words):
    with pytest.raises(PlanError, match=words):
        gs.Round(epochs=1, **values)


@pytest.mark.parametrize("restarts", [(-1.0,), ("a",), [1.0]])
def test_restarts_are_epochs(restarts):
    with pytest.raises(PlanError, match="restarts="):
        gs.CyclePlan(rounds=(), base_epochs=1, restarts=restarts)


def test_a_net_grown_at_birth_has_no_pupil(tmp_path):
    with pytest.raises(PlanError, match="rewind"):
        gs.run_cycle(small(outputs=4, built_grown=True), Feed.make(), plan_of("teach"), out_dir=tmp_path / "run")
