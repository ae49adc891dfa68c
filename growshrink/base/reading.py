"""Untrusted files, JSON and safetensors: read within bounds, or refused in one line.

Sizes declared in a file are checked against its length, nothing is unpickled, and every fault is a `RunError`.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from growshrink.errors import RunError

T = TypeVar("T")

#: Bytes of a JSON file at most: what it says may take 20 times as much memory.
MOST_JSON = 16 << 20
#: Bytes of the JSON at the head of a safetensors file at most (a growth log and a history are in it).
MOST_HEADER = 64 << 20


def read_bytes(path: Path, most: int = MOST_JSON) -> bytes:
    """The content of a file; RunError if it cannot be read or is longer than `most`, however long (a device, say)."""
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise RunError(f"{path}: not readable ({reason(error)}).") from error
    if len(content) > most:
        raise RunError(f"{path}: longer than {most:,} bytes, so it is not what it is taken for.")
    return content


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, with a ValueError for everything that is wrong."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; RunError if it is none."""
    try:
        value = parse_json(read_bytes(path))
    except ValueError as error:
        if isinstance(error, RunError):
            raise RunError(f"{error} It should be JSON.") from error
        raise RunError(f"{path}: not readable as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: not a JSON object.")
    return value


def read_tensors(path: Path, check: Callable[[dict[str, str]], None] = lambda header: None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    `check` is shown the metadata in the file's head first, and may raise. RunError: it is no such file, or damaged.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MOST_HEADER:
            raise RunError(f"{path}: damaged, not a safetensors file (a header of {length:,} bytes).")
        with safe_open(path, framework="pt") as file:
            check(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except RunError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise RunError(f"{path}: damaged, not a whole safetensors file ({reason(error)}).") from error


def clean_keys(state: Mapping[str, T]) -> dict[str, T]:
    """The same state_dict under the keys of the net inside.

    `nn.DataParallel`, `DistributedDataParallel` and timm's `ModelEmaV3` put `module.` before every key,
    `torch.compile(net)` puts `_orig_mod.`, before the part that was compiled; in any order and number.

    >>> clean_keys({"module._orig_mod.stem.weight": 1, "module._orig_mod.head._orig_mod.bias": 2})
    {'stem.weight': 1, 'head.bias': 2}
    """
    cleaned = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while cleaned and all(key.startswith("module.") for key in cleaned):
        cleaned = {key.removeprefix("module."): value for key, value in cleaned.items()}
    return cleaned


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
