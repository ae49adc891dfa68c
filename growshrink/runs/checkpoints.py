"""Checkpoints: one safetensors file each, tensors beside a JSON header, written so that a crash leaves no half file.

Nothing is ever unpickled. A nested state (dicts with string keys, tensors, and what JSON can hold) is flattened into
named tensors and one JSON document in the file's metadata, beside a digest of both (safetensors has none).
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from growshrink.base.reading import parse_json, read_tensors
from growshrink.base.writing import write_atomic
from growshrink.errors import RunError

_FORMAT = "growshrink-checkpoint-2"
_TENSOR = "__tensor__"
_NAME = re.compile(r"checkpoint-(\d{9})\.safetensors")


def save_checkpoint(folder: Path, update: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `state` as the checkpoint of `update` and remove all but the newest `keep`; RunError where it cannot be."""
    tensors: dict[str, Tensor] = {}
    document = json.dumps(_flatten(state, "", tensors))
    path = folder / f"checkpoint-{update:09d}.safetensors"
    content = save(tensors, {"format": _FORMAT, "state": document, "digest": _digest(document, tensors)})
    try:
        write_atomic(path, content)
    except RunError as error:
        raise RunError(f"{error} {len(find_checkpoints(folder))} older checkpoints are kept; make room.") from error
    for old in find_checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` was given, tensors on the CPU; RunError for a damaged file, or another."""
    header: dict[str, str] = {}
    tensors = read_tensors(path, header.update)
    if header.get("format") != _FORMAT:
        raise RunError(f"{path}: not a checkpoint of this version of growshrink.")
    try:
        whole = header["digest"] == _digest(header["state"], tensors)
        state = _unflatten(parse_json(header["state"]), tensors) if whole else None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: damaged ({type(error).__name__}: {error}).") from error
    if not isinstance(state, dict):
        raise RunError(f"{path}: damaged (it is not what was written).")
    return state


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, newest first."""
    return sorted((p for p in folder.glob("checkpoint-*.safetensors") if _NAME.fullmatch(p.name)), reverse=True)


def newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, or None if there is none at all.

    Raises:
        RunError: There are checkpoints, and all of them are damaged.
    """
    found = find_checkpoints(folder)
    for path in found:
        try:
            return path, load_checkpoint(path)
        except RunError as error:
            warn(f"{error} Trying the one before.")
    if found:
        raise RunError(f"{folder}: its checkpoints ({len(found)}) are all damaged; choose another folder.")
    return None


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        return {key: _flatten(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_flatten(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _unflatten(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    return value


def _digest(document: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(document.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def random_state() -> dict[str, Any]:
    """State of torch's global generators (dropout and drop path draw from them; our batches do not)."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if len(state.get("cuda", ())) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])
