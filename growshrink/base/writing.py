"""Files written so that a crash at any moment leaves the old content or the new."""

import contextlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growshrink.errors import RunError

PARTIAL = ".partial"


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new, and nothing between.

    Raises:
        RunError: The disk is full or broken, or the folder cannot be written to; only the old content is there, if any.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({error.strerror or error}, {len(content):,} bytes).") from error


def check_unwritten(option: str, path: Path | None) -> None:
    """RunError for a file that exists, or whose folder does not: before what is to be written has been computed."""
    if path is not None and path.exists():
        raise RunError(f"{option} {path}: exists; choose another name or remove it.")
    if path is not None and not path.absolute().parent.is_dir():
        raise RunError(f"{option} {path}: the folder {path.parent} does not exist.")


def save_picture(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write a figure of matplotlib's like `write_atomic`, in the format that the name says."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format=path.suffix[1:] or None)
    write_atomic(path, content.getvalue())


def json_line(value: Mapping[str, Any]) -> str:
    """One line of a JSONL file."""
    return json.dumps(value) + "\n"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object, indented, atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())
