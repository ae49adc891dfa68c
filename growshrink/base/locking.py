"""Locks on files, which the system takes back when a process dies, however it dies."""

import importlib
import os
import time
import weakref
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows, whose locks are all of the kind of `lock_byte`
    fcntl = None  # type: ignore[assignment]

#: The locked files of this process. Forked children (workers of a data loader) would hold them too, and for a while
#: after it was killed, so that no other process could take the run over.
_locked: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def lock_file(file: IO[str]) -> bool:
    """Lock a file as a whole, for this handle alone; False if another handle has it, in this process or another."""
    if fcntl is None:
        return lock_byte(file.fileno(), 0, wait=False)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not lockf, whose locks belong to the process as a whole
    except BlockingIOError:
        return False
    _locked.add(file)
    return True


def unlock_file(file: IO[str]) -> None:
    """Unlock and close a file."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_UN)  # a child that was forked this moment may still hold it
    file.close()


def lock_byte(descriptor: int, number: int, *, wait: bool = True) -> bool:
    """Lock byte `number` of a file, whether it has one or not; False, never with `wait`, if another process has it.

    Closing any handle on the file may give back all locks of the process on it (POSIX).
    """
    while True:
        try:
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
            else:
                _lock_on_windows(descriptor, number, "LK_NBLCK")
            return True
        except OSError:
            if fcntl is not None and wait:
                raise
            if not wait:
                return False
            time.sleep(0.05)


def unlock_byte(descriptor: int, number: int) -> None:
    """Give back what `lock_byte` got."""
    if fcntl is not None:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, number)
    else:
        _lock_on_windows(descriptor, number, "LK_UNLCK")


def _lock_on_windows(descriptor: int, number: int, mode: str) -> None:
    msvcrt: Any = importlib.import_module("msvcrt")
    os.lseek(descriptor, number, os.SEEK_SET)
    msvcrt.locking(descriptor, getattr(msvcrt, mode), 1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [file.close() for file in _locked])
