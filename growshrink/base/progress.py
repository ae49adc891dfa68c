"""Progress on stderr: bars on a terminal, a line now and then in a file."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

#: Seconds between two lines of a bar that is written into a file.
PAUSE = 30.0


class PlainLines:
    """A stream into a file or a pipe, without codes that move a cursor; what overwrites a line begins a new one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text as lines."""
        return self._stream.write(re.sub(r"\r[ \r]*", "\n", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def progress_bar(items: Iterable[Any] | None = None, what: str = "", *, show: bool = True, **more: Any) -> Any:
    """A tqdm on stderr around `items`, or of a `total`; in a file a line every `PAUSE` seconds, without codes.

    Args:
        items: What is counted; None where `update` is called.
        what: Label.
        show: Show one at all.
        more: For tqdm: total, unit, smoothing, ...
    """
    terminal = sys.stderr.isatty()
    rarely = {} if terminal else {"mininterval": PAUSE, "delay": PAUSE}
    stream = sys.stderr if terminal else PlainLines(sys.stderr)
    more = {"unit": "update", "leave": False, "dynamic_ncols": True, "file": stream, **rarely, **more}
    return tqdm(items, what or None, disable=not show, **more)
