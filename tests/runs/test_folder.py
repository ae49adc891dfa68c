import fcntl
import os
import subprocess
import sys
import threading

import pytest

from growshrink.base.reading import read_json
from growshrink.base.writing import write_json
from growshrink.errors import RunError
from growshrink.runs.folder import MARKER, RunFolder, check_same

#: Another process of ours, without the seconds that importing torch takes; recipes/ tests run two real ones.
CLAIM = """
import fcntl, os, sys
os.makedirs(sys.argv[1], exist_ok=True)
lock = open(sys.argv[1] + "/.lock", "a")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("refused", flush=True)
else:
    print("claimed", flush=True)
    sys.stdin.read()
"""


def claim_elsewhere(path):
    """Another process that claims `path` and holds it until its stdin is closed; and its first words."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline()


def end(process, kill=False):
    if kill:
        process.kill()
    process.communicate()


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def test_two_processes_cannot_have_one_folder_and_a_killed_one_leaves_it(tmp_path):
    path = tmp_path / "run"
    process, words = claim_elsewhere(path)
    assert words == "claimed\n"
    for resume in (False, True):
        with pytest.raises(RunError, match="in use by another run"):
            RunFolder.claim(path, resume=resume)
    end(process, kill=True)
    with RunFolder.claim(path) as folder:  # nothing had been written there
        assert folder.fresh
        other, words = claim_elsewhere(path)
        assert words == "refused\n"
        end(other)
        folder.write_marker("running", {})
    other, words = claim_elsewhere(path)
    assert words == "claimed\n"
    end(other)


def test_a_foreign_folder_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(RunError, match=r"not the folder of a run \(thesis.tex is in it\)"):
            RunFolder.claim(tmp_path, resume=resume)
    assert names(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("status", ["running", "finished"])
def test_a_run_is_taken_over_only_on_request(tmp_path, status):
    with RunFolder.claim(tmp_path / "run") as folder:
        folder.write_marker(status, {"plan": 1})
    before = names(tmp_path / "run")
    with pytest.raises(RunError, match="a finished run" if status == "finished" else "an unfinished run .--resume"):
        RunFolder.claim(tmp_path / "run")
    with RunFolder.claim(tmp_path / "run", resume=True) as folder:
        assert not folder.fresh
        assert folder.finished == (status == "finished")
    assert names(tmp_path / "run") == before


@pytest.mark.parametrize("make", [False, True], ids=["absent", "empty"])
@pytest.mark.parametrize("resume", [False, True])
def test_an_absent_or_empty_folder_is_fresh_and_goes_away_if_nothing_is_written(tmp_path, make, resume):
    path = tmp_path / "deep" / "run"
    if make:
        path.mkdir(parents=True)
    with RunFolder.claim(path, resume=resume) as folder:
        assert folder.fresh and not folder.finished
    assert not path.exists()
    folder.release()  # twice is once
    with pytest.raises(ZeroDivisionError), RunFolder.claim(path) as folder:
        folder.write_marker("running", {})
        raise ZeroDivisionError
    assert names(path) == [".lock", MARKER]


def test_what_a_crash_left_half_written_does_not_make_a_folder_foreign(tmp_path):
    (tmp_path / ".run.json.partial").write_text('{"sta')
    with RunFolder.claim(tmp_path, resume=True) as folder:
        assert folder.fresh


def test_the_lock_of_a_folder_that_vanished_meanwhile_is_worth_nothing(tmp_path, monkeypatch):
    """A second process opens the lock file, the first removes folder and file, the second then locks a deleted file."""
    path = tmp_path / "run"
    first = RunFolder.claim(path)
    real, done = fcntl.flock, []

    def flock(*args):
        if not done:
            done.append(True)
            first.release()
            assert not path.exists()
        return real(*args)

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunFolder.claim(path):
        process, words = claim_elsewhere(path)
        assert words == "refused\n"
        end(process)


@pytest.mark.parametrize("blocker", ["file", "file/below"])
def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path, blocker):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot be used"):
        RunFolder.claim(tmp_path / blocker)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("taken", "resume", "expected"),
    [
        ([], False, "run"),
        ([], True, "run"),
        (["run"], False, "run-2"),
        (["run", "run-2", "run-9"], False, "run-10"),
        (["run-3"], False, "run-4"),
        (["run-x", "runner", "run-2b"], False, "run"),
    ],
    ids=str,
)
def test_the_next_free_name_is_claimed(tmp_path, taken, resume, expected):
    for name in taken:
        (tmp_path / name).mkdir()
    with RunFolder.claim_next(tmp_path, "run", resume=resume) as folder:
        assert folder.path == tmp_path / expected


def test_resume_takes_the_newest(tmp_path):
    for name in ("run[1]", "run[1]-2", "run[1]-10"):
        with RunFolder.claim(tmp_path / name) as folder:
            folder.write_marker("running", {})
    with RunFolder.claim_next(tmp_path, "run[1]", resume=True) as folder:
        assert folder.path.name == "run[1]-10" and not folder.fresh


def test_many_at_once_get_a_folder_each(tmp_path):
    folders, errors = [], []

    def claim():
        try:
            folders.append(RunFolder.claim_next(tmp_path / "runs", "run"))
        except RunError as error:
            errors.append(error)

    threads = [threading.Thread(target=claim) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len({folder.path for folder in folders}) == 12
    for folder in folders:
        folder.release()


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"plan": {"rounds": [1], "seed": 3}}, r"another plan \(seed: 0 then, 3 now\)"),
        ({"plan": {"rounds": [2], "seed": 0}}, r"another plan \(rounds: \[1\] then, \[2\] now\)"),
        ({"plan": {"rounds": [1], "seed": 0}, "updates": 6}, r"another updates \(5 then, 6 now\)"),
        ({"plan": {"rounds": [1], "seed": 0}, "model": "x"}, r"another model \(None then, 'x' now\)"),
    ],
    ids=["deep", "list", "second", "missing"],
)
def test_the_first_difference_is_named(tmp_path, now, words):
    with RunFolder.claim(tmp_path / "run") as folder:
        folder.write_marker("running", {"plan": {"rounds": (1,), "seed": 0}, "updates": 5, "command": "python"})
        check_same(folder.path, {"plan": {"rounds": (1,), "seed": 0}, "updates": 5})
        with pytest.raises(RunError, match=words):
            check_same(folder.path, now)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "\x00"])
def test_what_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "file").write_text(content)
    with pytest.raises(RunError, match="JSON"):
        read_json(tmp_path / "file")
    with pytest.raises(RunError, match="JSON"):
        read_json(tmp_path / "absent")
    write_json(tmp_path / "file", {"a": [1]})
    assert read_json(tmp_path / "file") == {"a": [1]}


def test_a_child_that_outlives_the_process_does_not_hold_the_folder(tmp_path):
    """A worker of a data loader notices after seconds that its parent was killed."""
    wait, go = os.pipe()
    ready, up = os.pipe()
    folder = RunFolder.claim(tmp_path / "run")
    folder.write_marker("running", {})
    if not (child := os.fork()):
        os.close(go)  # so that it ends with this process
        os.write(up, b".")
        os.read(wait, 1)
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(RunError, match="in use by another run"):  # letting go there is not letting go here
        RunFolder.claim(tmp_path / "run", resume=True)
    folder._lock.close()  # what a kill does
    with RunFolder.claim(tmp_path / "run", resume=True):
        os.write(go, b".")
        os.waitpid(child, 0)
