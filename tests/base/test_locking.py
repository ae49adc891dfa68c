import fcntl
import os
import subprocess
import sys
import types

import pytest

from growshrink.base import locking

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["posix", "windows"])
def system(request, monkeypatch):
    """Locks as here, and as where there is no fcntl: msvcrt locks from the file's position on."""
    if request.param == "windows":

        def lock(descriptor, mode, length):
            flags = fcntl.LOCK_UN if mode == "unlock" else fcntl.LOCK_EX | fcntl.LOCK_NB
            fcntl.lockf(descriptor, flags, length, os.lseek(descriptor, 0, os.SEEK_CUR))

        fake = types.SimpleNamespace(locking=lock, LK_NBLCK="lock", LK_UNLCK="unlock")
        monkeypatch.setitem(sys.modules, "msvcrt", fake)
        monkeypatch.setattr(locking, "fcntl", None)


def test_a_byte_that_another_process_has_is_not_got(system, tmp_path):
    path = tmp_path / "lock"
    path.touch()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), "7"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    descriptor = os.open(path, os.O_RDWR)
    try:
        assert not locking.lock_byte(descriptor, 7, wait=False)
        assert locking.lock_byte(descriptor, 8, wait=False)
        locking.unlock_byte(descriptor, 8)
        other.communicate("")
        assert locking.lock_byte(descriptor, 7)
    finally:
        os.close(descriptor)


def test_a_whole_file_is_locked_and_unlocked(system, tmp_path):
    with open(tmp_path / "lock", "a") as file:
        assert locking.lock_file(file)
        locking.unlock_file(file)
        assert file.closed
    with open(tmp_path / "lock", "a") as file:
        assert locking.lock_file(file)
