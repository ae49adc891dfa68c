"""SIGTERM and Ctrl-C: what trains finishes its update and saves, everything else stops where it is.

The handlers are a program's to install (`handled`, by way of `growshrink.cli.program`); a library leaves signals alone.
Where none are installed, `finishing` does nothing and Ctrl-C is the KeyboardInterrupt it always was.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The process was asked to stop, and did; a KeyboardInterrupt, which nothing that catches errors catches."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What to leave with."""
        return 128 + self.number


class _Requests:
    """The signals of this process: `came` is the first; while `finishing` is at work (`waiting`) it is only noted."""

    def __init__(self) -> None:
        self.came: int | None = None
        self.waiting = False
        self._owner = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked child has inherited this
            if number == signal.SIGTERM:  # Ctrl-C reaches the whole group, and what becomes of it is the parent's say
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        again = self.came is not None
        self.came = self.came or number
        if again or not self.waiting:
            raise Stopped(number)


_requests: _Requests | None = None


@contextmanager
def handled() -> Iterator[Callable[[], int | None]]:
    """Turn SIGINT and SIGTERM into `Stopped` for as long as this lasts; yields what tells the signal that came."""
    global _requests
    if threading.current_thread() is not threading.main_thread():  # where Python has no handlers
        yield lambda: None
        return
    mine, outer = _Requests(), _requests
    before: dict[int, Any] = {number: signal.signal(number, mine) for number in SIGNALS}
    _requests = mine
    try:
        yield lambda: mine.came
    finally:
        _requests = outer
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def finishing() -> Iterator[Callable[[], int | None]]:
    """Only note the first signal for as long as this lasts; a second one stops the process at once.

    Yields what tells the signal that came, or None. The caller saves; the end of the block raises `Stopped`.
    """
    requests = _requests
    if requests is None:
        yield lambda: None
        return
    requests.waiting = True
    try:
        yield lambda: requests.came
    finally:
        requests.waiting = False
    if requests.came is not None:
        raise Stopped(requests.came)


def shield_worker() -> None:
    """To be called in a data loader's worker: leave it to the parent to stop it.

    Ctrl-C in a terminal, and torchrun's SIGTERM, go to the whole process group, but the parent needs its batch to
    finish the update. A second SIGTERM ends the worker: PyTorch, and Python at exit, send one to a worker that hangs.
    """

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, first)
