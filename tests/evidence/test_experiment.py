"""Arms on equal budgets: what is run, what it costs, what is said of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from records import record_of
from safetensors.torch import save_file

from growshrink.analysis.stats import Estimate
from growshrink.cycle import lay_out
from growshrink.cycle.costs import Costs
from growshrink.data.batches import Augment
from growshrink.data.datasets import load_data
from growshrink.data.feed import MemoryFeed
from growshrink.errors import DivergedError, PlanError
from growshrink.evidence.arms import ARMS, PLAIN, Arm
from growshrink.evidence.experiment import Experiment
from growshrink.evidence.record import RUNS_FILE, ArmComparison, Tuning, chosen_lr, read_runs, trials_of
from growshrink.proofs._profile import training_macs
from growshrink.training import TrainConfig
from nets import net
from program import module_of
from sampled import sampled

table = module_of(Path(__file__).parents[2] / "recipes" / "arm_table.py")
jobs = module_of(Path(__file__).parents[2] / "recipes" / "jobs.py")
TOLERANCE, _side_by_side, matched_epochs = jobs.TOLERANCE, jobs._side_by_side, jobs.matched_epochs
feed_of, jobs_of, run_job = jobs.feed_of, jobs.jobs_of, jobs.run_job
stackable, differs = jobs.stackable, jobs.differs
markdown, rows_of, verdict = table.markdown, table.rows_of, table.verdict

TINY = Experiment(
    data="digits",
    model_kwargs={"width": 0.125},
    pool=2,
    budget=6.0,
    seeds=(0, 1),
    batch_size=64,
    flip=False,
    config=TrainConfig(lr=0.05, ema_decay=0.9),
    arms=("plain", "distil"),
    own_arms={
        "short": Arm.from_dict({"about": "one of its own", "rounds": [{"epochs": 1.0, "hold": 0.2, "ratio": 1.0}]})
    },
)


def teachers_of(arm):
    """The net twice as wide, where another net is to teach."""
    others = [n for n, entry in enumerate(arm.rounds, 1) if entry.teacher is not None and entry.teacher.is_net]
    return {number: net(in_chans=1, width=0.5) for number in others}


@pytest.mark.parametrize("name", sampled(ARMS, (PLAIN, "cycles-2-peak", "drop-layers", "distil-wide")))
def test_every_arm_fits_its_budget(name):
    data = load_data("digits")
    feed = MemoryFeed.of(data, batch_size=64, augment=Augment(crop=0, flip=False))
    arm = ARMS[name]
    model, teachers = net(arm.model("reducenet20"), in_chans=1), teachers_of(arm)
    plain = net(in_chans=1)
    longest = 900 if any(entry.guide for entry in arm.rounds) else 90  # a guide costs some 40 updates of the plain net
    updates = longest * feed.train.updates_per_epoch
    budget = updates * feed.train.batch_size * training_macs(plain, feed.input_size)
    epochs = matched_epochs(arm, model, feed, budget, teachers=teachers)
    assert epochs == pytest.approx(longest) if not (arm.rounds or arm.gradients) else 0 < epochs <= longest
    plan = arm.plan(epochs, 0)
    phases = lay_out(plan, feed.train.updates_per_epoch, built_grown=arm.expansion > 0)
    assert phases.total > 0 and arm.about
    if any(entry.teacher is not None and entry.teacher.of == "wider" for entry in arm.rounds):
        costs = Costs(model, plan, feed.train, feed.input_size, teachers)
        share = sum(phase.macs(costs) for phase in phases.all if phase.apart) / (phases.macs(costs) / 64)
        assert share == pytest.approx(0.25, abs=0.01)  # of the MACs; the arm says it in updates


def test_an_arm_has_an_optimizer_of_its_own_and_is_then_stacked_or_not_by_it():
    experiment = Experiment(data="digits", arms=("plain", "plain-muon", "distil-wide"), config=TrainConfig(lr=0.2))
    muon = experiment.arm("plain-muon").trained(experiment.config, 0.4)
    assert (muon.optimizer, muon.lr, muon.momentum) == ("nmuon", pytest.approx(0.04), 0.95)
    assert experiment.arm("plain").trained(experiment.config, 0.4) == replace(experiment.config, lr=0.4)
    assert [stackable(experiment, name) for name in experiment.arms] == [True, False, True]
    own = Arm(about="x", base=1.0, config={"clip_grad": 1.0})
    assert not stackable(replace(experiment, own_arms={"own": own}, arms=("plain", "own")), "own")


def test_teachers_side_by_side_say_what_each_says(tmp_path):
    """Wider ones are made for each seed, given ones are read from a folder of each seed."""
    experiment = replace(
        TINY, arms=("plain", "distil-wide", "distil-given"), given=str(tmp_path / "{seed}.safetensors")
    )
    feeds = [feed_of(experiment, seed, None, torch.device("cpu")) for seed in (0, 1)]
    for seed in (0, 1):
        header = {"plain_name": "reducenet20", "plain_kwargs": {"width": 0.25, "in_chans": 1, "num_classes": 10}}
        given = net(in_chans=1, width=0.25, seed=seed + 5).state_dict()
        parts = {key: json.dumps(list(getattr(feeds[0], key))) for key in ("classes", "input_size", "mean", "std")}
        save_file(given, tmp_path / f"{seed}.safetensors", {"about": json.dumps(header), **parts})
    for name in ("distil-wide", "distil-given"):
        arm = experiment.arm(name)
        stack = _side_by_side(experiment, arm, feeds, (0, 1), tmp_path)[2][1]
        apart = [_side_by_side(experiment, arm, [feed], (seed,), tmp_path)[2][1] for seed, feed in enumerate(feeds)]
        images = [torch.randn(3, *feeds[0].input_size) for _ in feeds]
        with torch.no_grad():
            expected = torch.stack([each.eval()(x) for each, x in zip(apart, images, strict=True)], 1).flatten(0, 1)
            found = stack.eval()(torch.cat(images, 1))
        assert not torch.allclose(expected[::2], expected[1::2])
        torch.testing.assert_close(found, expected)
        assert arm.plan(1.0, 1, experiment.given).rounds[0].teacher.of in ("wider", str(tmp_path / "1.safetensors"))


def test_a_budget_that_no_length_meets_is_refused():
    feed = MemoryFeed.of(load_data("digits"), batch_size=64, augment=Augment(crop=0, flip=False))
    with pytest.raises(PlanError, match="too few for hold"):
        matched_epochs(ARMS["cycles-3"], net(in_chans=1), feed, 1e8)


def rates(experiment, records=()):
    return chosen_lr(experiment.comparison, records)


def do(experiment, job, out):
    """Do a run, and return its line."""
    run_job(experiment, job, out, data_dir=None, device="cpu", progress=False)
    return next(record for record in read_runs(out) if record.job == job)


def test_tuning_trials_are_as_many_for_every_arm_and_choose_on_the_val_split():
    experiment = Experiment(data="digits", arms=("plain", "dbb"), tuning=Tuning(lr=(0.1, 0.2, 0.4), budget=3))
    trials = trials_of(experiment.comparison)
    assert [sum(job.arm == arm for job in trials) for arm in experiment.arms] == [3, 3]
    best = {"plain": 0.4, "dbb": 0.1}
    records = [
        record_of(job, val=90.0 + (job.lr == best[job.arm]), test=99.0 - 9 * (job.lr == best[job.arm]))
        for job in trials
    ]
    assert rates(experiment, records) == best
    assert {job.lr for job in jobs_of(experiment, best, stack=True)} == {0.4, 0.1}


def test_seeds_are_stacked_unless_a_peak_is_to_be_judged():
    experiment = Experiment(data="digits", arms=("plain", "never-shrunk"))
    lr = rates(experiment)
    assert [job.seeds for job in jobs_of(experiment, lr, stack=True)] == [(0, 1, 2), (0,), (1,), (2,)]
    assert [job.seeds for job in jobs_of(experiment, lr, stack=False)] == [(0,), (1,), (2,)] * 2


def test_only_seeds_that_an_arm_lacks_are_trained():
    experiment = Experiment(data="digits", arms=("plain", "dbb"))
    lr = rates(experiment)
    done = [record_of(job) for job in jobs_of(experiment, lr, stack=False) if job.arm == "plain" and job.seeds != (1,)]
    more = replace(experiment, seeds=(0, 1, 2, 3))
    left = [(job.arm, job.seeds) for job in jobs_of(more, lr, done, stack=True)]
    assert left == [("plain", (1, 3)), ("dbb", (0, 1, 2, 3))]
    stacked = [record_of(job) for job in jobs_of(experiment, lr, stack=True)]
    assert jobs_of(experiment, lr, stacked, stack=False) == []


def test_runs_are_made_once_cost_their_budget_and_are_told_of(tmp_path):
    experiment = TINY
    jobs = jobs_of(experiment, rates(experiment), stack=True)
    for number, job in enumerate(jobs, start=1):
        record = do(experiment, job, tmp_path)
        assert abs(record.cost.macs / record.cost.budget - 1) <= TOLERANCE
        before = (tmp_path / RUNS_FILE).stat().st_mtime_ns
        do(experiment, job, tmp_path)
        assert (tmp_path / RUNS_FILE).stat().st_mtime_ns == before and len(read_runs(tmp_path)) == number
        assert record.seeds == (0, 1)
        report = json.loads((tmp_path / job.folder / "report.json").read_text())
        assert report["about"]["job"]["arm"] == job.arm and record.versions == report["about"]["versions"]
        assert report["final"]["top1"] == pytest.approx(sum(score.test for score in record.scores) / 2)
        assert list(record.rounds) == report["rounds"] and record.plan == report["about"]["plan"]
        log = [json.loads(line) for line in (tmp_path / job.folder / "log.jsonl").read_text().splitlines()]
        assert record.history.val_top1 == tuple(row["val_top1"] for row in log)
        assert record.history.train_loss == pytest.approx([row["train_loss"] for row in log], rel=1e-5)
    records = read_runs(tmp_path)
    rows = rows_of(experiment.comparison, records)
    assert [row.arm for row in rows] == ["plain", "distil"]
    a, b = ([score.test for score in record.scores] for record in records)
    assert rows[1].difference.value == pytest.approx(sum(b) / 2 - sum(a) / 2)
    page = markdown(rows, experiment.comparison, "python x")
    assert page.count("\n| ") == 3 and "**distil**" in page and "python x" in page


@pytest.mark.parametrize(
    ("difference", "word"),
    [
        (Estimate(1.0, 0.1, 1.9), "better (+1.00, +0.10 .. +1.90)"),
        (Estimate(-1.0, -1.9, -0.1), "worse (-1.00"),
        (Estimate(0.5, -0.1, 1.1), "not told apart (+0.50"),
        (None, "too few seeds"),
    ],
)
def test_verdicts(difference, word):
    assert verdict("dbb", difference).startswith(word)
    assert "compared with" in verdict(PLAIN, None)


@pytest.mark.parametrize(
    ("norms", "words"),
    [
        ((0.5, 0.31), "; norm of A, from 0.5, at the end 0.31 .. 0.50"),
        ((0.5, 0.05), "; norm of A, from 0.5, at the end 0.05 .. 0.50, below 0.1: the arm has tested nothing"),
        ((None, None), ""),
    ],
)
def test_an_arm_at_equilibrium_reports_the_norm_of_a(norms, words):
    jobs = jobs_of(TINY, rates(TINY), stack=False)
    records = [record_of(job) for job in jobs[:2]]
    own = [job for job in jobs if job.arm == "distil"]
    records += [replace(record_of(j), rounds=({"recurrence": norm},)) for j, norm in zip(own, norms, strict=True)]
    rows = rows_of(TINY.comparison, records)
    assert rows[0].verdict == "what the others are compared with"
    assert rows[1].verdict == f"not told apart (+0.00, +0.00 .. +0.00){words}"


def test_a_verdict_says_when_it_needs_the_noise_of_all_arms():
    own, sharper, vague = Estimate(0.5, -0.1, 1.1), Estimate(0.5, 0.1, 0.9), Estimate(0.5, -0.3, 1.3)
    assert verdict("dbb", own, sharper).startswith("better by the noise of all arms, not told apart by its own seeds")
    assert verdict("dbb", own, sharper).endswith("(+0.50, +0.10 .. +0.90)")
    assert verdict("dbb", own, vague) == verdict("dbb", own)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data": "digits", "arms": ["plain", "dbd"]}, "no arm 'dbd'; did you mean dbb"),
        ({"data": "digits", "arms": ["dbb"]}, "'plain' must be among them"),
        ({"data": "digits", "seeds": []}, "at least one"),
        ({"data": "digits", "seeds": [1, 1]}, "none twice"),
        ({"data": "digits", "budget": 0}, "budget=0"),
        ({"data": "digits", "bugdet": 3}, "'bugdet' is not an option.*did you mean budget"),
        ({"data": "digits", "tuning": {"lr": [0.1], "budget": 2, "seeds": [0]}}, "others than the experiment's"),
        ({"data": "digits", "tuning": {"lrs": [0.1]}}, "lrs"),
        ({"data": "digits", "config": {"learning_rate": 1}}, "learning_rate"),
        ({"data": "digits", "own_arms": {"x": {"base": 0.5}}}, "sum to 0.5, not 1"),
        ({"data": "digits", "own_arms": {"x": {"base": 1.0, "config": {"momentun": 1}}}}, "did you mean momentum"),
        ({"data": "digits", "own_arms": {"x": {"base": 1.0, "config": {"lr": 1}}}}, "the learning rate is the exp"),
        ({"data": "digits", "arms": ["plain", "distil-given"]}, "given: arm 'distil-given' needs the path"),
        ({"data": "digits", "own_arms": {"x": {"base": 1.0, "why": 1}}}, "why"),
        ({}, "data"),
    ],
    ids=str,
)
def test_plans_that_cannot_be_are_refused(values, words):
    with pytest.raises(PlanError, match=words):
        Experiment.from_dict(values)


def test_an_experiment_goes_through_json_and_back():
    assert Experiment.from_dict(TINY.to_json()) == TINY
    tuned = replace(TINY, tuning=Tuning(lr=(0.1, 0.2), budget=3))
    for experiment in (TINY, tuned):
        assert ArmComparison.from_plan(experiment.to_json()) == experiment.comparison


@pytest.mark.parametrize(
    ("key", "words"), [("data", "data is missing"), ("seeds", "seeds is missing"), ("config", "lr=None: must be")]
)
def test_a_plan_without_what_a_table_needs_is_refused(key, words):
    plan = TINY.to_json()
    del plan[key]
    with pytest.raises(PlanError, match=words):
        ArmComparison.from_plan(plan)


def test_more_arms_seeds_and_rates_are_the_same_experiment_and_nothing_else_is():
    kept = TINY.to_json()
    assert differs(replace(TINY, arms=("plain", "dbb"), seeds=(0, 1, 2)), kept) is None
    assert differs(replace(TINY, arms=("plain", "dbb"), batch_size=32), kept) == "batch_size"
    assert "short" in differs(replace(TINY, own_arms={"short": ARMS["dbb"]}), kept)
    assert differs(replace(TINY, own_arms={**TINY.own_arms, "new": ARMS["dbb"]}), kept) is None
    tuned = replace(TINY, tuning=Tuning(lr=(0.1, 0.2), budget=1.0))
    assert differs(tuned, kept) is None
    more = replace(TINY, tuning=Tuning(lr=(0.05, 0.1, 0.2), budget=1.0))
    assert (differs(more, tuned.to_json()), differs(tuned, more.to_json())) == (None, "tuning")
    assert differs(TINY, tuned.to_json()) == "tuning"
    assert differs(replace(TINY, tuning=Tuning(lr=(0.1, 0.2), budget=2.0)), tuned.to_json()) == "tuning"
    del kept["tuning"]  # written before there was such a thing
    assert differs(TINY, kept) is None


def test_what_is_decided_for_a_whole_run_is_not_decided_for_several_nets_at_once():
    listening = Arm.from_dict({"rounds": [{"epochs": 1.0, "control": "closed_loop"}]})
    experiment = replace(TINY, arms=("plain", "listening"), own_arms={"listening": listening})
    assert [stackable(experiment, arm) for arm in experiment.arms] == [True, False]
    for config in (TrainConfig(clip_grad=1.0), TrainConfig(optimizer="muon")):
        assert not stackable(replace(experiment, config=config), "plain")


def test_a_trial_that_diverges_has_lost(tmp_path):
    experiment = replace(TINY, arms=("plain",), tuning=Tuning(lr=(1e9, 0.05), budget=1.0))
    trials = trials_of(experiment.comparison)
    lost, _ = (do(experiment, job, tmp_path) for job in trials)
    assert lost.diverged and lost.val == 0.0 and lost.cost is None
    assert rates(experiment, read_runs(tmp_path)) == {"plain": 0.05}
    with pytest.raises(DivergedError):
        do(experiment, replace(trials[0], kind="run", seeds=(0,)), tmp_path)


def test_trials_of_the_experiments_own_seeds_are_its_runs(tmp_path, monkeypatch):
    experiment = replace(TINY, arms=("plain",), budget=1.0, tuning=Tuning(lr=(1e9, 0.05), budget=1.0, seeds=(0, 1)))
    _, trial = (do(experiment, job, tmp_path) for job in trials_of(experiment.comparison))
    monkeypatch.setattr(jobs, "run_cycle", None)
    (job,) = jobs_of(experiment, rates(experiment, read_runs(tmp_path)), read_runs(tmp_path), stack=True)
    record = do(experiment, job, tmp_path)
    assert job.kind == "run" and record == replace(trial, job=job)
    with pytest.raises(PlanError, match=r"tuning\.seeds"):
        replace(experiment, budget=2.0)


def test_a_run_that_was_ended_before_it_was_scored_is_scored(tmp_path):
    job = jobs_of(TINY, rates(TINY), stack=True)[0]
    before = do(TINY, job, tmp_path)
    (tmp_path / RUNS_FILE).unlink()
    after = do(TINY, job, tmp_path)
    assert after.scores == before.scores and after.history == before.history


def test_without_a_finished_trial_the_rate_is_the_configs():
    experiment = replace(TINY, tuning=Tuning(lr=(0.1, 0.2), budget=3))
    assert set(rates(experiment).values()) == {TINY.config.lr}


@pytest.mark.exhaustive
def test_sampled_widths_of_several_nets_side_by_side_cost_their_budget(tmp_path):
    experiment = replace(TINY, arms=("plain", "lazy-distil"), model_kwargs={"width": 0.375}, seeds=(0, 1, 2))
    job = jobs_of(experiment, rates(experiment), stack=True)[1]
    record = do(experiment, job, tmp_path)
    assert abs(record.cost.macs / record.cost.budget - 1) <= TOLERANCE and len(record.scores) == 3
