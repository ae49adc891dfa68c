"""The nets of finished runs: read back by seed, quantised, and what other experiments start from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_experiment import TINY, do, rates

from growshrink.errors import RunError
from growshrink.evidence.arms import Arm
from growshrink.evidence.experiment import data_of, deployed_nets
from growshrink.evidence.record import RUNS_FILE, read_runs
from growshrink.export import Source
from growshrink.training import Score
from growshrink.training._evaluate import evaluate
from nets import net
from program import module_of

table = module_of(Path(__file__).parents[2] / "recipes" / "arm_table.py")
jobs = module_of(Path(__file__).parents[2] / "recipes" / "jobs.py")
feed_of, jobs_of, keep_plan, load_start_ = jobs.feed_of, jobs.jobs_of, jobs.keep_plan, jobs.load_start_
exporting = module_of(Path(__file__).parents[2] / "tools" / "exporting.py")
add_int8, markdown, rows_of = table.add_int8, table.markdown, table.rows_of

SOURCE = replace(TINY, arms=("plain",), budget=2.0, model_kwargs={"width": 0.125, "skip": False})
TUNED = replace(
    SOURCE,
    images=300,
    arms=("plain", "from-scratch"),
    own_arms={
        "plain": Arm(about="fine-tuned", base=1.0, init="source/plain"),
        "from-scratch": Arm(about="from scratch", base=1.0, model_kwargs={"skip": True}),
    },
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a finished experiment: two nets, trained side by side."""
    out = tmp_path_factory.mktemp("experiments") / "source"
    keep_plan(SOURCE, out)
    for job in jobs_of(SOURCE, rates(SOURCE), stack=True):
        do(SOURCE, job, out)
    return out


def by_float(source, data):
    """Float scores in the place of int8's, so that each net has to be the one of its line."""
    feed = feed_of(SOURCE, 0, None, torch.device("cpu"))
    top1 = evaluate(source.plain, feed.test).top1
    assert data.input_size == source.input_size and not source.plain.training
    return {"per-tensor": Score(top1 - 1, 0.0), "per-channel": Score(top1, 0.0)}


def test_each_line_gets_the_int8_of_its_own_nets_once(source, monkeypatch):
    monkeypatch.setattr(table, "int8_scores", by_float)
    before = (source / RUNS_FILE).read_bytes()
    assert "int8" not in markdown(rows_of(SOURCE.comparison, read_runs(source)), SOURCE.comparison, "")
    add_int8(SOURCE, source, None)
    (record,) = read_runs(source)
    assert len(set(score.test for score in record.scores)) == 2  # else they could be each other's
    assert [score.int8_channel for score in record.scores] == [score.test for score in record.scores]
    monkeypatch.setattr(table, "int8_scores", None)  # what is there is not taken again
    add_int8(SOURCE, source, None)
    (row,) = rows_of(SOURCE.comparison, [record])
    assert row.int8 == pytest.approx((row.top1 - 1, row.top1))
    assert f"| {row.top1 - 1:.2f} / {row.top1:.2f} |" in markdown([row], SOURCE.comparison, "")
    (source / RUNS_FILE).write_bytes(before)


@pytest.mark.exhaustive
def test_int8_is_what_the_exporter_reports(source, tmp_path):
    before = (source / RUNS_FILE).read_bytes()
    add_int8(SOURCE, source, None)
    (record,) = read_runs(source)
    data = data_of(SOURCE, 1, None)
    plain = deployed_nets(SOURCE, record.job, source, data)[1]
    kwargs = {**SOURCE.model_kwargs, "in_chans": 1, "num_classes": 10}
    about = Source(tmp_path, plain, SOURCE.model, kwargs, data.input_size, mean=data.mean, std=data.std)
    for granularity, top1 in (("per-tensor", "int8_tensor"), ("per-channel", "int8_channel")):
        options = exporting.ExportOptions(int8=granularity, pt2=False, rounds=0)
        found = exporting.export(about, tmp_path, options, data=data)["int8"]["scores"]["int8"]["top1"]
        assert found == getattr(record.scores[1], top1)
    (source / RUNS_FILE).write_bytes(before)


def test_another_experiment_starts_from_the_net_of_its_seed_with_a_head_of_its_own(source):
    (record,) = read_runs(source)
    trained = deployed_nets(SOURCE, record.job, source, data_of(SOURCE, 0, None))
    for seed, expected in ((1, trained[1]), (7, trained[0])):
        fresh = net("reducenet20", seed=3, width=0.125, skip=False, in_chans=1)
        fresh.reset_classifier(7)
        head = fresh.head.fc.weight.clone()
        load_start_(fresh, "source/plain", seed, source.parent / "fine-tuned")
        own, state = fresh.state_dict(), expected.state_dict()
        assert torch.equal(own.pop("head.fc.weight"), head)
        del own["head.fc.bias"]
        assert all(torch.equal(own[key], state[key]) for key in own) and len(own) == len(state) - 2


@pytest.mark.parametrize(
    ("init", "width", "words"),
    [
        ("nowhere/plain", 0.125, "holds no experiment. Run that one first"),
        ("source/distil", 0.125, "has no finished run of the arm 'distil'"),
        ("source/plain", 0.25, "those of another net"),
    ],
)
def test_starts_that_are_not_there_are_refused(source, init, width, words):
    with pytest.raises(RunError, match=words):
        load_start_(net("reducenet20", width=width, in_chans=1), init, 0, source.parent / "fine-tuned")


@pytest.mark.exhaustive
def test_transfer_in_two_stages(source):
    out = source.parent / "fine-tuned"
    tuned, scratch = (do(TUNED, job, out) for job in jobs_of(TUNED, rates(TUNED), stack=True))
    assert min(score.test for score in tuned.scores) > max(score.test for score in scratch.scores) + 10
    (record,) = read_runs(source)
    with pytest.raises(RunError, match="weights of a finished run are missing"):
        deployed_nets(SOURCE, replace(record.job, lr=9.0), source, data_of(SOURCE, 0, None))
