"""What all programs do alike: exit codes, one line for an error, signals."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from tqdm import tqdm

import growshrink
from growshrink.base import stopping
from growshrink.base.progress import progress_bar
from growshrink.base.stopping import Stopped, finishing, handled
from growshrink.cli.program import guarded, run_program
from growshrink.errors import RunError

ROOT = Path(__file__).parents[2]


@dataclass
class Args:
    number: int = 0


def outcome(main, capsys, monkeypatch, *words, **kwargs):
    monkeypatch.setattr(sys, "argv", ["somewhere/tool.py", *words])
    with pytest.raises(SystemExit) as end:
        run_program(main, Args, "Doc.", **kwargs)
    return end.value.code or 0, capsys.readouterr().err


def fail(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "line"),
    [
        (lambda args: None, 0, ""),
        (lambda args: args.number, 3, ""),
        (fail(RunError("two\nlines  of it")), 2, "tool: two lines of it\n"),
        (fail(OSError(errno.ENOSPC, "No space left on device", "a/b")), 2, "tool: a/b: cannot be written (No space"),
        (fail(KeyboardInterrupt()), 130, "tool: interrupted; go on.\n"),
    ],
)
def test_exit_codes(capsys, monkeypatch, main, code, line):
    found, err = outcome(main, capsys, monkeypatch, "--number", "3", go_on="go on")
    assert found == code and err.startswith(line) and err.count("\n") == bool(line)


def test_bars_write_no_codes_into_files(capsys, monkeypatch):
    def main(args):
        with tqdm(total=3, mininterval=0) as outer, tqdm(total=2, position=1, leave=False, mininterval=0) as inner:
            inner.update(), outer.update(3)
            outer.write("a word", file=sys.stderr)
        for _ in progress_bar(range(1000), "ours"):
            pass

    _, err = outcome(main, capsys, monkeypatch)
    assert "\x1b" not in err and "\r" not in err and "3/3" in err and "\na word\n" in err and "ours" not in err
    monkeypatch.setattr("growshrink.base.progress.PAUSE", 0.0)
    _, err = outcome(main, capsys, monkeypatch)
    assert "\x1b" not in err and "\r" not in err and "ours: 100%" in err


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool.py"])
    for error in (ZeroDivisionError(), OSError(errno.EBADF, "bad")):
        with pytest.raises(type(error)):
            run_program(fail(error), Args, "Doc.")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_program_with_one_line(capsys, monkeypatch, number, code):
    before = [signal.getsignal(n) for n in stopping.SIGNALS]

    def main(args):
        os.kill(os.getpid(), number)
        raise AssertionError("not reached")

    found, err = outcome(main, capsys, monkeypatch)
    assert found == code and err == f"tool: {'interrupted' if code == 130 else 'terminated'}.\n"
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == before


@pytest.mark.parametrize("leave", [lambda: None, lambda: sys.exit(0)])
def test_a_signal_that_a_script_swallowed_still_tells_the_exit_code(capsys, leave):
    with pytest.raises(SystemExit) as end, guarded():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            leave()
    assert end.value.code == 143 and capsys.readouterr().err.endswith("terminated.\n")


def test_the_first_signal_waits_for_what_is_finishing_and_the_second_does_not():
    with handled(), pytest.raises(Stopped) as stopped:
        with finishing() as wanted:
            assert wanted() is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert wanted() == signal.SIGTERM
            with pytest.raises(Stopped):
                os.kill(os.getpid(), signal.SIGINT)
            after = True
    assert after and stopped.value.exit_code == 143


def test_a_library_leaves_signals_alone():
    before = [signal.getsignal(n) for n in stopping.SIGNALS]
    with finishing() as wanted:
        assert [signal.getsignal(n) for n in stopping.SIGNALS] == before and wanted() is None


def test_children_and_workers():
    """A forked child dies of SIGTERM and ignores Ctrl-C; a shielded worker survives both, once."""
    script = """
        import os, signal, sys, time
        from growshrink.base.stopping import finishing, handled, shield_worker

        def child(signals, shielded):
            ready, told = os.pipe()
            pid = os.fork()
            if not pid:
                if shielded:
                    shield_worker()
                os.write(told, b".")
                time.sleep(0.2)
                os._exit(7)
            os.read(ready, 1)
            for number in signals:
                os.kill(pid, number)
                time.sleep(0.02)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        with handled(), finishing():
            cases = [("I", False), ("T", False), ("ITI", True), ("TT", True)]
            names = {"I": signal.SIGINT, "T": signal.SIGTERM}
            print([child([names[c] for c in letters], shielded) for letters, shielded in cases])
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(growshrink.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "[7, -15, 7, -15]\n", done.stderr


def test_every_program_ends_by_the_guard():
    programs = [p for folder in ("recipes", "tools") for p in sorted((ROOT / folder).glob("*.py"))]
    for path in programs:
        text = path.read_text()
        if "tyro" in text or "dataclass" in text:
            _, main, end = text.partition('if __name__ == "__main__":')
            assert not main or "run_program(" in end or "guarded(" in end, path
