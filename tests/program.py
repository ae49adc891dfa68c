"""Running a program in the process of the tests: starting Python and importing torch takes seconds, every time."""

import importlib
import importlib.util
import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from growshrink.cli.forms import parts_of


def run(path: Path, *args: object) -> Any:
    """Run the program at `path` with `args` as its user would; its exit code."""
    threads, interval = torch.get_num_threads(), tqdm.monitor_interval
    argv = [str(path), *map(str, args)]
    try:
        with mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "path", [str(Path(path).parent), *sys.path]):
            with mock.patch.dict(os.environ):
                runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        torch.set_num_threads(threads)
        tqdm.monitor_interval = interval
    return 0


def completed(path: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """The same, with its output, as `subprocess.run` gives it."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(path, *args)
    return subprocess.CompletedProcess([str(path), *map(str, args)], code, out.getvalue(), err.getvalue())


@cache
def module_of(path: Path) -> Any:
    """The module of a program, or of what lies beside one, without running it."""
    spec: Any = importlib.util.spec_from_file_location(f"module_of_{path.stem}", path)
    with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def beside(path: Path) -> Any:
    """The module that lies beside programs, as they import it: what is patched there is patched for them."""
    with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):
        return importlib.import_module(path.stem)


@cache
def args_of(path: Path, name: str = "Args") -> tuple[Any, dict[str, Any]]:
    """The dataclass of a program's options, and the options by name."""
    found = getattr(module_of(path), name)
    return found, {name: option for _, options in parts_of(found).values() for name, option in options.items()}
