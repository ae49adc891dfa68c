"""runs.jsonl: what is written is read again, and nothing else is."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from records import record_of

from growshrink.cycle.records import Row
from growshrink.errors import RunError
from growshrink.evidence.record import RUNS_FILE, History, Job, RunRecord, append_run, read_plan, read_runs
from program import module_of

replace_run = module_of(Path(__file__).parents[2] / "recipes" / "arm_table.py").replace_run
JOB = Job(arm="plain", seeds=(0, 1), lr=0.1, budget=3.0)
ROW = {
    **{"update": 7, "epoch": 1 / 3, "round": 0, "phase": "base", "train_loss": 1 / 7, "val_top1": 100 / 3},
    **{"val_loss": 2 / 3, "lr": 0.1, "lam": None, "training_macs": 123456789012, "images_per_second": 1e4 / 3},
    **{"seconds": 12.3456789},
}


def test_lines_are_read_as_they_were_written(tmp_path):
    history = History.from_rows([Row(**ROW), Row(**ROW)])
    records = (
        replace(record_of(JOB), rounds=({"top1": {"peak": 1.0}},), history=history),
        record_of(replace(JOB, kind="trial", net="width-1-depth-2", seeds=(100,))),
        replace(record_of(replace(JOB, kind="trial"), val=0.0, test=None), cost=None, diverged="its loss is nan"),
    )
    for record in records:
        append_run(tmp_path, record)
    assert read_runs(tmp_path) == records
    assert (tmp_path / RUNS_FILE).read_bytes().count(b"\n") == 3


def test_histories_are_rounded_but_for_what_pictures_are_drawn_from():
    history = History.from_rows([Row(**ROW)])
    assert history.val_top1 == (100 / 3,) and history.training_macs == (123456789012,) and history.lam == (None,)
    assert history.train_loss == (0.142857,) and history.seconds == (12.3457,)


def test_a_job_has_one_line_whoever_appends_it(tmp_path):
    append_run(tmp_path, record_of(JOB, val=1.0))
    append_run(tmp_path, record_of(JOB, val=2.0))
    assert [record.val for record in read_runs(tmp_path)] == [1.0]
    jobs = [replace(JOB, seeds=(seed,)) for seed in range(20)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda job: append_run(tmp_path, record_of(job)), jobs * 2))
    assert {record.job for record in read_runs(tmp_path)} == {JOB, *jobs}
    assert len(read_runs(tmp_path)) == 21


def test_a_last_line_without_its_end_is_ended(tmp_path):
    (tmp_path / RUNS_FILE).write_text(record_of(JOB).to_line().rstrip("\n"))
    append_run(tmp_path, record_of(replace(JOB, seeds=(2,))))
    assert len(read_runs(tmp_path)) == 2


def test_a_line_is_replaced_and_the_others_keep_their_bytes(tmp_path):
    other = replace(JOB, seeds=(2,))
    for job in (JOB, other, replace(JOB, seeds=(3,))):
        append_run(tmp_path, record_of(job))
    spaced = (tmp_path / RUNS_FILE).read_bytes().replace(b'"format":1', b'"format": 1')
    (tmp_path / RUNS_FILE).write_bytes(spaced)
    replace_run(tmp_path, record_of(other, val=5.0))
    lines, old = (tmp_path / RUNS_FILE).read_bytes().splitlines(), spaced.splitlines()
    assert [lines[0], lines[2]] == [old[0], old[2]] and len(lines) == 3
    assert [record.val for record in read_runs(tmp_path)] == [90.0, 5.0, 90.0]


def test_lines_without_int8_are_read():
    line = record_of(JOB).to_line().replace(',"int8_tensor":null,"int8_channel":null', "")
    assert "int8" not in line and RunRecord.from_line(line) == record_of(JOB)


def _without(*keys):
    def damage(values):
        inner = values
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return json.dumps(values)

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda values: json.dumps(values)[:-40], "."),
        (lambda values: "", "."),
        (lambda values: "[1]", "not a JSON object"),
        (lambda values: "[" * 100_000, "."),
        (
            lambda values: json.dumps({**values, "format": 99}),
            "written in format 99, this version of growshrink reads 1",
        ),
        (lambda values: json.dumps({**values, "weather": "fine"}), "weather"),
        (lambda values: json.dumps({**values, "scores": []}), "not those of the seeds"),
        (lambda values: json.dumps({**values, "cost": None}), "a cost is missing"),
        (
            lambda values: json.dumps({**values, "job": {**values["job"], "lr": "high"}}),
            "lr='high': must be a",
        ),
        (lambda values: json.dumps({**values, "history": {**values["history"], "lr": [0.1]}}), "differ in length"),
        (_without("job", "arm"), "arm"),
        (_without("scores"), "scores"),
        (_without("format"), "format None"),
    ],
)
def test_a_damaged_line_is_refused_in_one_line(tmp_path, damage, words):
    line = record_of(JOB).to_line()
    (tmp_path / RUNS_FILE).write_text(f"{line}{damage(json.loads(line))}\n{line}")
    with pytest.raises(RunError, match=rf"runs.jsonl, line 2: damaged or of another version \(.*{words}") as error:
        read_runs(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "folder", ["plain/budget-6-lr-0.4-seeds-0", "width-0.25-depth-1/plain/budget-10-lr-0.1-seeds-0"]
)
def test_run_folders_of_the_form_before_are_refused_in_one_line(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "seeds.json").write_text("{}")
    for read in (read_runs, read_plan):
        with pytest.raises(RunError, match=r"before runs.jsonl \(growshrink 0.1.0, .*Choose another folder") as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


def test_nothing_is_what_an_empty_folder_says(tmp_path):
    assert read_runs(tmp_path) == () and read_plan(tmp_path) is None
    with pytest.raises(ValueError, match="not those of the seeds"):
        replace(record_of(JOB), job=replace(JOB, seeds=(0,)))
    assert RunRecord.from_line(record_of(JOB).to_line()) == record_of(JOB)
