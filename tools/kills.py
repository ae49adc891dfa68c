"""Kill a training run with SIGKILL at random moments, resume it, and see whether it ends as if nothing had happened.

    python tools/kills.py                 100 kills of recipes/grow_cycle.py on digits, some minutes on one core
    python tools/kills.py --kills 10 --fresh

One run is left alone. Then runs with the same options are started, killed, started with --resume, killed, ... until
they finish, over and over, until as many kills as asked for have landed in a process at work (past its start-up, and
past reading its checkpoint). A kill counts as survived if the run it hit ends with the weights, the growth log and the
history of the undisturbed one, bit for bit. The run is small but has all of it: two rounds, vanishing, fuses, a
teacher, an average, dropout, a round that may be undone, and a checkpoint every few updates.

Start-up costs more than such a run, so by default every attempt is a fork of one process that has imported everything
and has started no thread; --fresh starts real processes. Prints the count and leaves runs/kills/kills.json.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401 - this and the next are for the forks
import sklearn.datasets  # noqa: F401
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import growshrink as gs
from growshrink.base.environment import versions
from growshrink.base.limits import Count, Positive
from growshrink.base.progress import progress_bar
from growshrink.base.reading import read_json
from growshrink.base.writing import PARTIAL, write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import RunOptions
from growshrink.cli.program import run_program
from growshrink.cycle import lay_out
from growshrink.errors import RunError
from growshrink.runs.checkpoints import find_checkpoints
from growshrink.runs.folder import MARKER, PLAIN_FILE

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "grow_cycle.py"
#: The run. Settling takes 50 updates a round whatever its length, so it cannot be much shorter.
OPTIONS = (
    *("--model-kwargs", "width=0.25", "drop_rate=0.2", "--ratio", "1", "--where", "2.conv", "--batch-size", "64"),
    *("--epochs", "8", "--hold", "0.15", "--vanish", "0.1", "--teacher", "peak", "--exit", "fuse,accept_within=1"),
    *("--save-every", "5", "--quiet"),
)
#: What may differ from run to run.
TIMES = ("seconds", "images_per_second")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of kills."""

    kills: Count = 100
    """How many kills."""
    spread: Positive = 0.2
    """A process is killed within this share of the time that the undisturbed run took, from the moment on that it is at
    work; uniformly drawn."""
    fresh: bool = False
    """Start a new process for every attempt."""
    running: RunOptions = pick(RunOptions(), "out", "seed", "quiet")


def main(args: Args) -> int:
    """Kill, compare, print; 1 if a run did not end as the undisturbed one."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    tqdm.monitor_interval = 0  # a thread
    seed = args.running.seed
    with (
        args.running.claim("kills") as folder,
        progress_bar(total=args.kills, unit="kill", show=not args.running.quiet) as bar,
    ):
        folder.write_marker("running", {"options": OPTIONS, "seed": seed, "fresh": args.fresh})
        with Attempt(folder.path / "undisturbed", fresh=args.fresh) as alone:
            began = alone.wait_until_at_work()
            alone.wait()
        whole = time.perf_counter() - began
        expected = outcome(alone.path)
        draw, kills, runs = random.Random(seed), list[dict[str, Any]](), list[dict[str, Any]]()
        while len(kills) < args.kills:
            path = folder.path / f"run-{len(runs) + 1}"
            before = len(kills)
            for kill in run_killed(path, args.fresh, lambda: draw.uniform(0, args.spread * whole), args.kills - before):
                kills.append(kill)
                bar.update()
            equal = outcome(path) == expected
            runs.append({"kills": len(kills) - before, "equal": equal})
            if equal:
                shutil.rmtree(path)
            survived = sum(run["kills"] for run in runs if run["equal"])
            figures = {"kills": len(kills), "survived": survived, "seconds_undisturbed": whole}
            about = {"spread": args.spread, "fresh": args.fresh, "seed": seed, "options": OPTIONS}
            write_json(
                folder.path / "kills.json", {**figures, "runs": runs, "each": kills, **about, "versions": versions()}
            )
        folder.write_marker("finished", about)
    where = ", ".join(f"{count} {place}" for place, count in Counter(kill["place"] for kill in kills).most_common())
    writing = sum(bool(kill["writing"]) for kill in kills)
    print(f"phase of the newest checkpoint at the kill: {where}; {writing} in the middle of writing a file")
    print(f"{survived} of {len(kills)} kills survived: final weights, growth log and history equal, {len(runs)} runs")
    print(f"Read {folder.path / 'kills.json'}")
    return int(survived < len(kills))


def run_killed(path: Path, fresh: bool, delay: Callable[[], float], most: int) -> Iterator[dict[str, Any]]:
    """One run to its end, killed at most so many times after a delay each; where it was when it was."""
    for _ in range(most):
        with Attempt(path, fresh=fresh) as attempt:
            attempt.wait_until_at_work()
            seconds = delay()
            if not attempt.kill_after(seconds):
                attempt.wait()
                return
        yield {"run": path.name, "delay": seconds, **state_of(path)}
    with Attempt(path, fresh=fresh) as attempt:
        attempt.wait()


class Attempt:
    """A process that runs the recipe in the folder `path`, from the start or from where the last one was killed."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path = path
        self._code: int | None = None
        argv = [str(RECIPE), *OPTIONS, "--resume", "--out", str(path)]
        path.mkdir(parents=True, exist_ok=True)
        self._file = path / ("log.jsonl" if (path / MARKER).exists() else MARKER)
        self._inode = inode(self._file)
        self._log = path.parent / f"{path.name}.log"
        with open(self._log, "ab") as log:
            if fresh:
                process = subprocess.Popen([sys.executable, *argv], stdout=log, stderr=log)
                process.returncode = 0  # it is waited for here
                self._pid = process.pid
            else:
                self._pid = fork(argv, log.fileno())

    def __enter__(self) -> Attempt:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave no process behind."""
        if not self._over():
            self.kill_after(0)

    def wait_until_at_work(self) -> float:
        """Return when the process trains, or is over; that moment on the performance counter.

        A run that begins writes its marker then, and one that continues writes its history again.
        """
        while not self._over() and inode(self._file) in (None, self._inode):
            time.sleep(0.001)
        return time.perf_counter()

    def kill_after(self, seconds: float) -> bool:
        """Kill it then; whether it was still there to be killed."""
        end = time.perf_counter() + seconds
        while not self._over():
            if (rest := end - time.perf_counter()) <= 0:
                os.kill(self._pid, signal.SIGKILL)
                self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
                return self._code == -signal.SIGKILL
            time.sleep(min(rest, 0.05))
        return False

    def wait(self) -> None:
        """Until it is over; RunError if it has failed."""
        while not self._over():
            time.sleep(0.01)
        if self._code:
            tail = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RunError(f"{self.path}: not resumed, exit code {self._code}: {' '.join(tail)}")

    def _over(self) -> bool:
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None


def inode(path: Path) -> int | None:
    """The number of a file, which is another one once it was replaced; None if there is none."""
    with suppress(FileNotFoundError):
        return path.stat().st_ino
    return None


def fork(argv: list[str], output: int) -> int:
    """Run a Python program in a fork of this process; the fork's number."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:  # their locks would be held in the fork for ever
        raise RunError(f"{threads} threads are running here, so that forking is not safe: use --fresh.")
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code: Any = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)  # where a program finds its parts
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()  # the interpreter, which would do it, does not end here
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def state_of(path: Path) -> dict[str, Any]:
    """Where a killed run was: the newest checkpoint's update and phase, and what was half written."""
    found = find_checkpoints(path)
    update = int(found[0].stem.split("-")[1]) if found else 0
    place, history = "base", path / "log.jsonl"
    if found and history.exists() and (rows := history.read_text().splitlines()[:1]):  # else the first epoch
        row, about = json.loads(rows[0]), read_json(path / MARKER)
        phases = lay_out(gs.CyclePlan.from_dict(about["plan"]), round(row["update"] / row["epoch"]))
        place = phases.at(min(update, phases.total - 1)).name if update < phases.total else "end"
    return {"update": update, "place": place, "writing": [p.name for p in path.iterdir() if p.name.endswith(PARTIAL)]}


def outcome(path: Path) -> dict[str, Any]:
    """What a run has come to, but for the time it took."""
    rows = map(json.loads, (path / "log.jsonl").read_text().splitlines())
    return {
        "weights": {
            name: (str(tensor.dtype), tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            for name, tensor in load_file(path / PLAIN_FILE).items()
        },
        "growth_log": read_json(path / "growth_log.json"),
        "history": [{key: value for key, value in row.items() if key not in TIMES} for row in rows],
    }


if __name__ == "__main__":
    run_program(main, Args, __doc__)
