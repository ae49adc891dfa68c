import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from growshrink.errors import RunError
from program import beside

results_module = beside(Path(__file__).parents[2] / "recipes" / "results.py")
FILE, Results = results_module.FILE, results_module.Results
KEYS = [f"subnet {i}" for i in range(40)]


def work(path, mark, pause=0.0, keys=KEYS):
    with Results(path, {"what": "test"}) as results:
        for key in results.unfinished(keys):
            time.sleep(pause)
            results.append({"key": key, "by": mark})


def lines(path):
    return [json.loads(line) for line in (path / FILE).read_text().splitlines()]


def start(*args):
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process


def test_processes_share_the_work_and_nothing_is_done_twice(tmp_path):
    processes = [start(tmp_path / "run", mark, 0.01) for mark in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = lines(tmp_path / "run")
    assert sorted(record["key"] for record in found) == sorted(KEYS)
    assert len({record["by"] for record in found}) > 1


def test_killed_processes_lose_nothing_that_was_appended(tmp_path):
    path = tmp_path / "run"
    for _ in range(2):
        process = start(path, "killed", 0.02)
        before = len(lines(path)) if (path / FILE).exists() else 0
        while not (path / FILE).exists() or len(lines(path)) < before + 5:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    survived = lines(path)
    assert 10 <= len(survived) < len(KEYS)
    work(path, "after")
    found = lines(path)
    assert found[: len(survived)] == survived and [r["key"] for r in found] == KEYS


def test_a_living_process_takes_over_what_a_dying_one_had_begun(tmp_path):
    path = tmp_path / "run"
    process = start(path, "killed", 60.0, KEYS[:1])  # holds the first key, and never finishes it
    while not (path / "run.json").exists():
        time.sleep(0.005)
    time.sleep(0.1)
    other = start(path, "other", 0.0, KEYS[:3])
    while not (path / FILE).exists() or len(lines(path)) < 2:
        time.sleep(0.005)
    assert other.is_alive() and {r["key"] for r in lines(path)} == set(KEYS[1:3])
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    other.join(60)
    assert {r["key"] for r in lines(path)} == set(KEYS[:3]) and other.exitcode == 0


def test_half_a_line_is_healed_and_told(tmp_path):
    path = tmp_path / "run"
    work(path, "first", keys=KEYS[:2])
    with open(path / FILE, "ab") as file:
        file.write(b'{"key": "subnet 2", "b')
    with Results(path, {"what": "test"}) as results:
        computed = []
        for key in results.unfinished(KEYS[:4]):
            computed.append(key)
            results.append({"key": key, "by": "second"})
        assert computed == KEYS[2:4]  # each once: the half line has not swallowed the next
    with Results(path, {"what": "test"}) as results:
        assert set(results.done()) == set(KEYS[:4]) and results.damaged == 1
        assert results.done()["subnet 2"]["by"] == "second"


def test_a_finished_run_says_so_and_can_be_opened_again(tmp_path):
    with Results(tmp_path / "run", {"what": "test"}) as results:
        results.finish()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    Results(tmp_path / "run", {"what": "test"}).close()


def test_other_options_and_foreign_folders_are_refused(tmp_path):
    work(tmp_path / "run", "first", keys=KEYS[:1])
    with pytest.raises(RunError, match=r"another what \('test' then, 'other' now\)"):
        Results(tmp_path / "run", {"what": "other"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"not the folder of a run \(thesis.tex"):
        Results(tmp_path / "mine", {"what": "test"})
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match="cannot be used"):
        Results(tmp_path / "mine" / "thesis.tex" / "run", {"what": "test"})
