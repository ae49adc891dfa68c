"""What all programs do alike: options in, one line and an exit code out."""

import errno
import inspect
import io
import itertools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import tyro

from growshrink.base.progress import PlainLines
from growshrink.base.stopping import Stopped, handled
from growshrink.cli.forms import form_of, read_form
from growshrink.errors import GrowShrinkError, RunError

T = TypeVar("T")

#: Exit code for everything that a user, or the machine, can put right.
REFUSED = 2
#: What a disk does, whatever the program; other errors of the system's are mistakes of ours, and keep their traceback.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def run_program(
    main: Callable[[T], int | None], args: Callable[..., T], doc: str | None, *, go_on: str = ""
) -> NoReturn:
    """Run a program on the options of its command line, and exit.

    Exit codes: what `main` returns (None is 0); 2 for bad options, a `GrowShrinkError` or a disk that is full or
    broken; 130 after Ctrl-C and 143 after SIGTERM. All but the first come with one line on stderr, in which `go_on`
    says how an interrupted run is continued.
    """
    stream: Any = sys.stderr if sys.stderr.isatty() else PlainLines(sys.stderr)
    with redirect_stderr(stream), guarded(go_on):
        sys.exit(main(read_options(args, doc)) or 0)


def read_options(args: Callable[..., T], doc: str | None, words: Sequence[str] | None = None) -> T:
    """The options of a command line (by default this process's), all within their limits; RunError for others.

    `args` is a dataclass of the options (see `growshrink.cli.forms`), or a union of several, each a program of its own;
    `doc` is what --help says before what the dataclass says of itself.
    """
    forms = {form_of(cls): cls for cls in get_args(args) or (args,)}
    about = "" if len(forms) > 1 else inspect.cleandoc(args.__doc__ or "")
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            form: Any = tyro.cli(reduce(or_, forms), description=f"{doc or ''}\n{about}", args=words)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise RunError(_one_line(complaint.getvalue())) from end
    return read_form(forms[type(form)], form)


def _one_line(box: str) -> str:
    """What tyro says is wrong, out of its box and without the help that follows."""
    lines = [line.strip("│| ") for line in box.splitlines() if line[:1] in "│|"]
    wrong = itertools.takewhile(lambda line: not line.startswith(("Argument helptext", "For full helptext")), lines)
    text = " ".join(line for line in wrong if line.strip("─-"))
    return f"{text or ' '.join(box.split())} (--help has the options)"


@contextmanager
def guarded(go_on: str = "") -> Iterator[None]:
    """Leave by `sys.exit`, with one line on stderr, where an error or a signal ends the block; see `run_program`."""
    name = Path(sys.argv[0]).stem

    def leave(code: int, text: str) -> NoReturn:
        print(f"{name}: {' '.join(text.split())}", file=sys.stderr)  # one line, whatever is quoted in it
        sys.exit(code)

    def interrupted(stopped: Stopped) -> NoReturn:
        what = str(stopped) or ("interrupted" if stopped.exit_code == 130 else "terminated")
        leave(stopped.exit_code, f"{what}; {go_on}." if go_on else f"{what}.")

    try:
        with handled() as came:
            try:
                yield
            except SystemExit as end:
                if not end.code and (number := came()):  # another script has caught it
                    interrupted(Stopped(number))
                raise
            if number := came():
                interrupted(Stopped(number))
    except KeyboardInterrupt as error:  # Python's own, where there is no handler of ours
        interrupted(error if isinstance(error, Stopped) else Stopped(signal.SIGINT))
    except GrowShrinkError as error:
        leave(REFUSED, str(error))
    except OSError as error:
        if error.errno not in _DISK:
            raise
        leave(REFUSED, f"{error.filename or 'output'}: cannot be written ({error.strerror}).")
