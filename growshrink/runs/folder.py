"""The folder of a run: claimed by one process, never overwritten silently."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from growshrink.base.locking import lock_file, unlock_file
from growshrink.base.ranks import num_ranks, run_on_rank0
from growshrink.base.reading import read_json
from growshrink.base.writing import PARTIAL, write_json
from growshrink.errors import RunError

MARKER = "run.json"
#: Format of run folders: plans, logs and checkpoints. 1 was that of growshrink 0.1.
FORMAT = 2
LOCK = ".lock"
#: The deployed net of a finished run.
PLAIN_FILE = "plain.safetensors"


class RunFolder(AbstractContextManager["RunFolder"]):
    """A claimed folder. A context manager: the claim ends with it, and with the process, however that ends.

    Nothing had been written to `path` before if it is `fresh`; the run in it had come to its end if it is `finished`.
    """

    def __init__(self, path: Path, lock: IO[str] | None, *, fresh: bool, finished: bool) -> None:
        self.path, self.fresh, self.finished, self._lock = path, fresh, finished, lock

    @staticmethod
    def claim(path: Path, *, resume: bool = False) -> RunFolder:
        """Make the folder, or take over the run in it if `resume`.

        RunError if it holds something else, or without `resume` a run, or is in use by another process.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(path)  # before anything is written there
            lock = _lock(path)
        except OSError as error:
            raise RunError(f"{path}: cannot be used as the folder of a run ({error.strerror}).") from error
        try:
            _refuse_foreign(path)
            if not _entries(path):
                return RunFolder(path, lock, fresh=True, finished=False)
            for entry in path.iterdir():
                if entry.name.endswith(PARTIAL):  # of a process that was killed while it wrote
                    entry.unlink()
            marker = read_json(path / MARKER)
            finished = marker.get("status") == "finished"
            if not resume:
                state = "a finished run" if finished else "an unfinished run (--resume continues it)"
                raise RunError(f"{path}: holds {state}. Nothing is overwritten: choose another folder with --out.")
            _refuse_old(path, marker)
            return RunFolder(path, lock, fresh=False, finished=finished)
        except BaseException:
            lock.close()
            raise

    @staticmethod
    def claim_next(parent: Path, name: str, *, resume: bool = False) -> RunFolder:
        """Claim `parent/name`, or `parent/name-2`, ... the first that is free; with `resume` the newest there is."""
        numbered = re.compile(re.escape(name) + "(?:-([0-9]+))?")
        newest = max((int(m[1] or 1) for p in parent.glob("*") if (m := numbered.fullmatch(p.name))), default=0)
        if resume:
            return RunFolder.claim(_numbered(parent, name, newest or 1), resume=True)
        number = newest + 1
        while True:
            path = _numbered(parent, name, number)
            try:
                path.mkdir(parents=True)
            except FileExistsError:  # another process was faster
                number += 1
                continue
            except OSError as error:
                raise RunError(f"{path}: cannot be made ({error.strerror}).") from error
            return RunFolder.claim(path)

    def write_marker(self, status: str, values: Mapping[str, Any]) -> None:
        """Record what the run is; `status` is "running" or "finished"."""
        if self._lock is not None:
            write_json(self.path / MARKER, {"status": status, "format": FORMAT, **values})

    def release(self) -> None:
        """End the claim; a folder in which nothing was written disappears."""
        if self._lock is None or self._lock.closed:
            return
        if self.fresh and [entry.name for entry in self.path.iterdir()] == [LOCK]:
            with contextlib.suppress(OSError):  # another process has just put something there
                (self.path / LOCK).unlink()
                self.path.rmdir()
        unlock_file(self._lock)

    def __exit__(self, *raised: object) -> None:
        self.release()


def claim_together(claim: Callable[[], RunFolder]) -> RunFolder:
    """What `claim` returns; on several ranks rank 0 claims the folder, and the others hear of it and write nothing."""
    if num_ranks() == 1:
        return claim()
    claimed: list[RunFolder] = []

    def tell() -> tuple[str, bool, bool]:
        folder = claim()
        claimed.append(folder)
        return str(folder.path), folder.fresh, folder.finished

    path, fresh, finished = run_on_rank0(tell)
    return claimed[0] if claimed else RunFolder(Path(path), None, fresh=fresh, finished=finished)


def check_same(path: Path, identity: Mapping[str, Any]) -> None:
    """RunError unless the run in the folder `path` was started with `identity`, naming the first difference."""
    if found := difference(read_json(path / MARKER), identity):
        raise RunError(
            f"{path}: the run in it has another {found}. "
            "Resume with the options it was started with, or choose another folder with --out."
        )


def difference(written: Mapping[str, Any], identity: Mapping[str, Any]) -> str | None:
    """The first key of `identity` that has another value in `written`, with both; None if there is none."""
    for key, value in json.loads(json.dumps(identity)).items():
        if written.get(key) != value:
            return f"{key} ({_difference(written.get(key), value)})"
    return None


def _lock(path: Path) -> IO[str]:
    """The lock file of a folder, open and locked; RunError if another process has it."""
    while True:
        lock = open(path / LOCK, "a")  # held for as long as the run
        if not lock_file(lock):
            lock.close()
            raise RunError(f"{path}: in use by another run. Wait for it, or choose another folder with --out.")
        try:
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path / LOCK)):
                return lock
        except FileNotFoundError:
            path.mkdir(parents=True, exist_ok=True)
        lock.close()  # it was locked after its owner had removed it: a lock on nothing


def _entries(path: Path) -> list[str]:
    """What is in a folder, but for the lock and what a crash left half written."""
    return sorted(p.name for p in path.iterdir() if p.name != LOCK and not p.name.endswith(PARTIAL))


def _refuse_old(path: Path, marker: Mapping[str, Any]) -> None:
    if marker.get("format") != FORMAT:
        versions = marker.get("versions")
        version = versions.get("growshrink") if isinstance(versions, Mapping) else None
        raise RunError(
            f"{path}: a run of growshrink {version or '(unknown version)'}, whose run folders this version cannot "
            "resume. Finish it with that version, or choose another folder with --out."
        )


def _refuse_foreign(path: Path) -> None:
    found = _entries(path)
    if found and MARKER not in found:
        raise RunError(f"{path}: not empty and not the folder of a run ({found[0]} is in it).")


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        missing = object()  # a key that is not there, and one that is null
        key = next(key for key in {**old, **new} if old.get(key, missing) != new.get(key, missing))
        return f"{key}: {_difference(old.get(key), new.get(key))}"
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        index = next(index for index in range(len(old)) if old[index] != new[index])
        if isinstance(old[index], dict):
            return f"[{index}]: {_difference(old[index], new[index])}"
    return f"{old!r} then, {new!r} now"


def _numbered(parent: Path, name: str, number: int) -> Path:
    return parent / (name if number == 1 else f"{name}-{number}")
