"""Results that many processes add to, one line each, and that a crash cannot spoil (not a program).

A folder with run.json (what the run is) and results.jsonl (one record a line, only ever appended to). A process holds a
lock on the number of the record that it computes, which the system releases when the process dies: so nothing is done
twice, and a killed run is resumed where it was.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from growshrink.base.environment import versions
from growshrink.base.locking import lock_byte, unlock_byte
from growshrink.base.progress import progress_bar
from growshrink.base.reading import clean_keys, parse_json, read_json, read_tensors, reason
from growshrink.base.writing import json_line, write_atomic, write_json
from growshrink.cli.forms import pick, plain_options
from growshrink.cli.options import DataOptions, Options, RunOptions, command
from growshrink.data.feed import Feed
from growshrink.errors import RunError
from growshrink.runs.folder import LOCK, MARKER, check_same, difference
from growshrink.training import TrainConfig
from keeping import train_kept

FILE = "results.jsonl"
#: Key of a line's checksum over the rest of it.
DIGEST = "digest"
#: Numbers of locks beyond those of records.
_APPEND, _SETUP = 2**30, 2**30 + 1
#: Seconds between two looks at what others are doing.
_PAUSE = 0.2


class Results(AbstractContextManager["Results"]):
    """The results of one run, which other processes may be working on too.

    Args:
        path: The folder: made, or taken part in.
        identity: What the run is; the same for all that take part.
        about: What else run.json says.

    Attributes:
        damaged: Lines that are not what was written, because a process died in the middle; they are computed again.

    Raises:
        RunError: The folder holds something else, or a run with another identity.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.damaged = 0
        self._done: dict[str, dict[str, Any]] = {}
        self._read_to = 0
        try:
            path.mkdir(parents=True, exist_ok=True)
            entries = {entry.name for entry in path.iterdir()} - {LOCK}
            if entries and MARKER not in entries and not any(name.startswith(f".{MARKER}") for name in entries):
                raise RunError(f"{path}: not empty and not the folder of a run ({min(entries)} is in it).")
            # Opened once: closing any handle on the file would give back all locks of the process.
            self._locks = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"{path}: cannot be used as the folder of a run ({error.strerror}).") from error
        try:
            with self._locked(_SETUP):
                if (path / MARKER).exists():
                    check_same(path, identity)
                else:
                    write_json(path / MARKER, {"status": "running", **identity, **(about or {})})
        except BaseException:
            os.close(self._locks)
            raise

    def done(self) -> dict[str, dict[str, Any]]:
        """Every record there is by its key, those of other processes included."""
        try:
            with open(self.path / FILE, "rb") as file:
                file.seek(self._read_to)
                text = file.read(max(0, os.fstat(file.fileno()).st_size - self._read_to))
        except FileNotFoundError:
            return self._done
        except OSError as error:
            raise RunError(f"{self.path / FILE}: not readable ({error.strerror}).") from error
        whole = text[: text.rfind(b"\n") + 1]
        self._read_to += len(whole)
        for line in whole.splitlines():
            try:
                record = parse_json(line)
                if record.pop(DIGEST) != _digest(record):
                    raise ValueError("not what was written")
                self._done[record["key"]] = record
            except (ValueError, KeyError, TypeError, AttributeError):
                self.damaged += 1
        return self._done

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record, which has a "key"; it is on the disk when this returns."""
        line = json_line({**record, DIGEST: _digest(record)}).encode()
        with self._locked(_APPEND), open(self.path / FILE, "a+b") as file:
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a process died while it wrote a line
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def unfinished(self, keys: Sequence[str], say: Callable[[str], object] | None = None) -> Iterator[str]:
        """Keys to compute and `append` here, one at a time; ends when all of `keys` are done, by whomever.

        All processes have to give the same keys in the same order. What a process that died has left is taken over.
        After each key `say` gets how long the rest will take.
        """
        began, missing = time.monotonic(), len(set(keys) - self.done().keys())
        while True:
            waiting = False
            for number, key in enumerate(keys):
                if key in self._done:
                    continue
                if not lock_byte(self._locks, number, wait=False):  # another process is computing it
                    waiting = True
                    continue
                try:
                    if key not in self.done():  # it may have been finished since we looked
                        yield key
                        if say and (left := len(set(keys) - self.done().keys())):
                            rest = left * (time.monotonic() - began) / max(1, missing - left)
                            say(f"{len(keys) - left} of {len(keys)} done, about {duration(rest)} left")
                finally:
                    unlock_byte(self._locks, number)
            if not waiting and all(key in self.done() for key in keys):
                return
            time.sleep(_PAUSE)

    def finish(self) -> None:
        """Say in run.json that all is done."""
        with self._locked(_SETUP):
            write_json(self.path / MARKER, {**read_json(self.path / MARKER), "status": "finished"})

    def once(self, number: int) -> AbstractContextManager[None]:
        """One process at a time is inside, for each number: to make what all of them need."""
        return self._locked(_SETUP + 1 + number)

    def made_once(self, number: int, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Path:
        """The file of tensors `name`, which one process makes, for all of them."""
        path = self.path / name
        with self.once(number):
            if not path.exists():
                write_atomic(path, save({key: tensor.detach().cpu().contiguous() for key, tensor in make().items()}))
        return path

    def kept(self, name: str) -> Callable[..., Tensor]:
        """`Trainer.train` that continues where a killed process was, by checkpoints in the folder; see `train_kept`."""
        return partial(train_kept, self.path / f"{name}.training")

    @contextmanager
    def _locked(self, number: int) -> Iterator[None]:
        lock_byte(self._locks, number)
        try:
            yield
        finally:
            unlock_byte(self._locks, number)

    def close(self) -> None:
        """Give back all locks."""
        os.close(self._locks)

    def __exit__(self, *raised: object) -> None:
        """Close."""
        self.close()


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json_line(record).encode(), digest_size=8).hexdigest()


def load_weights(model: nn.Module, path: Path, prefix: str = "") -> None:
    """Load a state_dict from a safetensors file, strictly; of its names (`clean_keys`) those below `prefix`.

    RunError: it is no such file, or of another model.
    """
    tensors = clean_keys(read_tensors(path))
    try:
        model.load_state_dict({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
    except RuntimeError as error:
        raise RunError(f"{path}: not the weights of this model ({reason(error)}).") from error


#: Options that do not change what comes out.
RUNNING = ("out", "quiet", "device")
#: Share of the time of a training, without scoring and the optimizer.
SHARE_OF_TRAINING = 0.8


@dataclass(frozen=True, kw_only=True)
class ResultOptions(Options):
    """Options of programs whose results are added to by many processes."""

    def identity(self) -> dict[str, Any]:
        """Say what has to be the same for all processes that work on a run."""
        options = {name: value for name, value in plain_options(self).items() if name not in RUNNING}
        return {"program": Path(sys.argv[0]).stem, "options": options}

    def results(self, program: str, identity: Mapping[str, Any] | None = None) -> Results:
        """The results of the program: in --out, or in runs/PROGRAM-DATA-MODEL, numbered if others are there.

        Where there are some of the same `identity` (by default all options) already, they are continued.
        """
        self.running.set_threads()
        identity = identity or self.identity()
        path, number = self.running.out, 1
        while path is None:
            name = f"{program}-{self.title}" + f"-{number}" * (number > 1)
            marker, number = Path("runs") / name / MARKER, number + 1
            if not marker.parent.exists() or marker.exists() and not difference(read_json(marker), identity):
                path = marker.parent
        return Results(path, identity, {"command": command(), "versions": versions()})

    def say(self, text: str) -> None:
        """A line on stderr, unless --quiet."""
        if not self.running.quiet:
            print(f"{Path(sys.argv[0]).stem}: {text}.", file=sys.stderr, flush=True)

    def jobs(self, results: Results, keys: Sequence[str], net: nn.Module, feed: Feed, updates: float) -> Iterator[str]:
        """Keys to compute (see `Results.unfinished`), of so many updates each; says how long they will take."""
        self.announce(net, feed, updates * len(set(keys) - results.done().keys()))
        yield from results.unfinished(keys, self.say)

    def announce(self, net: nn.Module, feed: Feed, updates: float) -> None:
        """Say how long so many updates of `net` take on this machine, by a few that are timed on a copy.

        A forward pass alone counts a third.
        """
        if updates and not self.running.quiet:
            seconds = self.step_seconds(net, feed)
            about = duration(updates * seconds / SHARE_OF_TRAINING)
            self.say(f"about {about} on this machine ({updates:,.0f} updates of {1e3 * seconds:.3g} ms)")

    @contextmanager
    def bar(self, updates: int, what: str) -> Iterator[Callable[[], None]]:
        """Show a progress bar; what is to be called after each update."""
        with progress_bar(total=updates, what=what, show=not self.running.quiet) as bar:
            yield bar.update


@dataclass(frozen=True, kw_only=True)
class StudyOptions(ResultOptions):
    """Options of programs that analyse nets."""

    training: TrainConfig = pick(TrainConfig(ema_decay=0.0), "lr", "weight_decay")
    data: DataOptions = pick(DataOptions(), "data", "data_dir", "batch_size")
    running: RunOptions = pick(RunOptions(), "out", "seed", "device", "quiet")

    def seeds(self) -> list[int]:
        """Return the seeds of all nets."""
        return list(range(self.running.seed, self.running.seed + self.length.seeds))

    def net(self, feed: Feed, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """Make the model with a seed, on the device."""
        torch.manual_seed(seed)
        model, about = self.model.make(feed)
        return model.to(self.running.torch_device()), about


def duration(seconds: float) -> str:
    """A time in one unit: 40 s, 12 min, 3.4 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{max(1.0, seconds):.0f} s"
