"""Arms on equal budgets: what is run, what it costs, what is said of it."""

import json
import math
from dataclasses import replace

import pytest

from growshrink.analysis.stats import Interval
from growshrink.cycle.timeline import Timeline
from growshrink.data.batches import Augment
from growshrink.data.datasets import load_data
from growshrink.data.feed import MemoryFeed
from growshrink.errors import DivergedError, PlanError
from growshrink.evidence.arms import ARMS, PLAIN, Arm
from growshrink.evidence.experiment import (
    SCORES,
    TOLERANCE,
    Experiment,
    Tuning,
    chosen_lr,
    jobs_of,
    matched_epochs,
    read_scores,
    run_job,
    trials_of,
)
from growshrink.evidence.table import bootstrap_interval, markdown, rows_of, verdict
from growshrink.proofs._profile import training_macs
from growshrink.training import TrainConfig
from nets import net
from sampled import sampled

TINY = Experiment(
    data="digits",
    model_kwargs={"width": 0.125},
    pool=2,
    budget=12.0,
    seeds=(0, 1),
    batch_size=64,
    flip=False,
    config=TrainConfig(lr=0.05, ema_decay=0.9),
    arms=("plain", "distil"),
    own_arms={
        "short": Arm.from_dict({"about": "one of its own", "rounds": [{"epochs": 1.0, "hold": 0.2, "ratio": 1.0}]})
    },
)


@pytest.mark.parametrize("name", sampled(ARMS, (PLAIN, "cycles-2-peak", "drop-layers")))
def test_every_arm_fits_its_budget(name):
    data = load_data("digits")
    feed = MemoryFeed.of(data, batch_size=64, augment=Augment(crop=0, flip=False))
    arm = ARMS[name]
    model = net(arm.model("reducenet20"), in_chans=1)
    plain = net(in_chans=1)
    updates = 90 * feed.train.updates_per_epoch
    budget = updates * feed.train.batch_size * training_macs(plain, feed.input_size)
    epochs = matched_epochs(arm, model, feed, budget)
    assert epochs == pytest.approx(90) if not arm.rounds else 0 < epochs < 90
    timeline = Timeline(arm.plan(epochs, 0), feed.train.updates_per_epoch, built_grown=arm.expansion > 0)
    assert timeline.total > 0 and arm.about


def test_a_budget_that_no_length_meets_is_refused():
    feed = MemoryFeed.of(load_data("digits"), batch_size=64, augment=Augment(crop=0, flip=False))
    with pytest.raises(PlanError, match="too few for hold"):
        matched_epochs(ARMS["cycles-3"], net(in_chans=1), feed, 1e8)


def test_tuning_trials_are_as_many_for_every_arm_and_choose_on_the_val_split(tmp_path):
    experiment = Experiment(data="digits", arms=("plain", "dbb"), tuning=Tuning(lr=(0.1, 0.2, 0.4), budget=3))
    trials = trials_of(experiment)
    assert [sum(job.arm == arm for job in trials) for arm in experiment.arms] == [3, 3]
    best = {"plain": 0.4, "dbb": 0.1}
    for job in trials:
        (tmp_path / job.folder).mkdir(parents=True)
        value = {"seed": 100, "val": 90.0 + (job.lr == best[job.arm]), "test": 99.0 - 9 * (job.lr == best[job.arm])}
        (tmp_path / job.folder / SCORES).write_text(json.dumps({"seeds": [value]}))
    assert chosen_lr(experiment, tmp_path) == best
    assert {job.lr for job in jobs_of(experiment, best, stack=True)} == {0.4, 0.1}


def test_seeds_are_stacked_unless_a_peak_is_to_be_judged():
    experiment = Experiment(data="digits", arms=("plain", "never-shrunk"))
    lr = chosen_lr(experiment, None)
    assert [job.seeds for job in jobs_of(experiment, lr, stack=True)] == [(0, 1, 2), (0,), (1,), (2,)]
    assert [job.seeds for job in jobs_of(experiment, lr, stack=False)] == [(0,), (1,), (2,)] * 2


def test_runs_are_made_once_cost_their_budget_and_are_told_of(tmp_path):
    experiment = TINY
    jobs = jobs_of(experiment, chosen_lr(experiment, tmp_path), stack=True)
    for job in jobs:
        run_job(experiment, job, tmp_path, data_dir=None, device="cpu", progress=False)
        run = json.loads((tmp_path / job.folder / SCORES).read_text())
        assert abs(run["macs"] / run["budget"] - 1) <= TOLERANCE
        before = (tmp_path / job.folder / SCORES).stat().st_mtime_ns
        run_job(experiment, job, tmp_path, data_dir=None, device="cpu", progress=False)
        assert (tmp_path / job.folder / SCORES).stat().st_mtime_ns == before
        assert [score["seed"] for score in read_scores(tmp_path, job)] == [0, 1]
        report = json.loads((tmp_path / job.folder / "report.json").read_text())
        assert report["about"]["versions"] and report["about"]["job"]["arm"] == job.arm
        assert report["final"]["top1"] == pytest.approx(sum(s["test"] for s in read_scores(tmp_path, job)) / 2)
    rows = rows_of(experiment, jobs, tmp_path)
    assert [row.arm for row in rows] == ["plain", "distil"]
    a, b = ([score["test"] for score in read_scores(tmp_path, job)] for job in jobs)
    assert rows[1].difference.value == pytest.approx(sum(b) / 2 - sum(a) / 2)
    page = markdown(rows, experiment, "python x")
    assert page.count("\n| ") == 3 and "**distil**" in page and "python x" in page


@pytest.mark.parametrize(
    ("difference", "word"),
    [
        (Interval(1.0, 0.1, 1.9), "better (+1.00, +0.10 .. +1.90)"),
        (Interval(-1.0, -1.9, -0.1), "worse (-1.00"),
        (Interval(0.5, -0.1, 1.1), "not told apart (+0.50"),
        (None, "too few seeds"),
    ],
)
def test_verdicts(difference, word):
    assert verdict("dbb", difference).startswith(word)
    assert "compared with" in verdict(PLAIN, None)


def test_a_verdict_says_when_it_needs_the_noise_of_all_arms():
    own, sharper, vague = Interval(0.5, -0.1, 1.1), Interval(0.5, 0.1, 0.9), Interval(0.5, -0.3, 1.3)
    assert verdict("dbb", own, sharper).startswith("better by the noise of all arms, not told apart by its own seeds")
    assert verdict("dbb", own, sharper).endswith("(+0.50, +0.10 .. +0.90)")
    assert verdict("dbb", own, vague) == verdict("dbb", own)


def test_the_bootstrap_of_equal_differences_is_that_difference():
    assert bootstrap_interval([2.0, 3.0], [1.0, 2.0]) == (1.0, 1.0)
    low, high = bootstrap_interval([1.0, 2.0, 6.0], [0.0, 0.0, 0.0])
    assert 1.0 <= low < 3.0 < high <= 6.0 and not math.isnan(low)


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


def test_more_arms_and_seeds_are_the_same_experiment_and_nothing_else_is():
    kept = TINY.to_json()
    assert replace(TINY, arms=("plain", "dbb"), seeds=(0, 1, 2)).differs(kept) is None
    assert replace(TINY, arms=("plain", "dbb"), batch_size=32).differs(kept) == "batch_size"
    assert "short" in replace(TINY, own_arms={"short": ARMS["dbb"]}).differs(kept)
    assert replace(TINY, own_arms={**TINY.own_arms, "new": ARMS["dbb"]}).differs(kept) is None
    del kept["tuning"]  # written before there was such a thing
    assert TINY.differs(kept) is None


def test_what_is_decided_for_a_whole_run_is_not_decided_for_several_nets_at_once():
    listening = Arm.from_dict({"rounds": [{"epochs": 1.0, "control": "closed_loop"}]})
    experiment = replace(TINY, arms=("plain", "listening"), own_arms={"listening": listening})
    assert [experiment.stackable(arm) for arm in experiment.arms] == [True, False]
    for config in (TrainConfig(clip_grad=1.0), TrainConfig(optimizer="muon")):
        assert not replace(experiment, config=config).stackable("plain")


def test_a_trial_that_diverges_has_lost(tmp_path):
    experiment = replace(TINY, arms=("plain",), tuning=Tuning(lr=(1e30, 0.05), budget=1.0))
    for job in trials_of(experiment):
        run_job(experiment, job, tmp_path, data_dir=None, device="cpu", progress=False)
    assert chosen_lr(experiment, tmp_path) == {"plain": 0.05}
    with pytest.raises(DivergedError):
        job = replace(trials_of(experiment)[0], seeds=(0,))
        run_job(experiment, job, tmp_path, data_dir=None, device="cpu", progress=False)


def test_a_run_that_was_ended_before_it_was_scored_is_scored(tmp_path):
    job = jobs_of(TINY, chosen_lr(TINY, tmp_path), stack=True)[0]
    run_job(TINY, job, tmp_path, data_dir=None, device="cpu", progress=False)
    scores = tmp_path / job.folder / SCORES
    before = read_scores(tmp_path, job)
    scores.unlink()
    run_job(TINY, job, tmp_path, data_dir=None, device="cpu", progress=False)
    assert read_scores(tmp_path, job) == before


def test_without_a_finished_trial_the_rate_is_the_configs(tmp_path):
    experiment = replace(TINY, tuning=Tuning(lr=(0.1, 0.2), budget=3))
    assert set(chosen_lr(experiment, tmp_path).values()) == {TINY.config.lr}


@pytest.mark.exhaustive
def test_sampled_widths_of_several_nets_side_by_side_cost_their_budget(tmp_path):
    experiment = replace(TINY, arms=("plain", "lazy-distil"), model_kwargs={"width": 0.375}, seeds=(0, 1, 2))
    job = jobs_of(experiment, chosen_lr(experiment, tmp_path), stack=True)[1]
    run_job(experiment, job, tmp_path, data_dir=None, device="cpu", progress=False)
    run = json.loads((tmp_path / job.folder / SCORES).read_text())
    assert abs(run["macs"] / run["budget"] - 1) <= TOLERANCE and len(run["seeds"]) == 3
