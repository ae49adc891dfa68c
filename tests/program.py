"""Running a program in the process of the tests."""

import runpy
import sys
from pathlib import Path


def run(path, *args):
    """Run the program at `path` with `args` as its user would; its exit code."""
    argv, sys.argv = sys.argv, [str(path), *map(str, args)]
    folders, sys.path = sys.path, [str(Path(path).parent), *sys.path]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv
        sys.path = folders
    return 0
