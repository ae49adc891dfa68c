"""Grown nets as files: what was grown with what beside the tensors, in one safetensors file."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.copying import copy_net
from growshrink.base.limits import checked
from growshrink.base.reading import clean_keys, parse_json, read_tensors, reason
from growshrink.base.writing import write_atomic
from growshrink.branches import BranchSpec
from growshrink.errors import GrowError, RunError
from growshrink.layers.grown import Grown, grown_modules
from growshrink.transforms._grow import grow

_FORMAT = "growshrink-grown-1"


@checked(GrowError)
def save_grown(model: nn.Module, path: str | Path, *, branches_only: bool = False) -> None:
    """Write a grown net so that `load_grown` can grow a plain one alike.

    Args:
        model: A net that `grow` has grown.
        path: A safetensors file; JSON in its head says which layers carry which branches.
        branches_only: Leave the plain net's tensors out, which have not changed: a small file, as LoRA's adapters are.

    Raises:
        GrowError: There are no branches, or some that `grow` has not made.

    >>> gs.save_grown(gs.grow(net, "lora"), folder / "grown.safetensors", branches_only=True)
    """
    grown = {name: layer for name, layer in grown_modules(model).items() if isinstance(layer, Grown)}
    specs: dict[str, list[Any]] = {
        name: [getattr(branch, "spec", None) for branch in layer.branches] for name, layer in grown.items()
    }
    if not specs or len(specs) < len(grown_modules(model)) or not all(all(found) for found in specs.values()):
        raise GrowError("save_grown is for nets that growshrink.grow has grown: save the state_dict of this one.")
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in clean_keys(model.state_dict()).items()}
    if branches_only:
        tensors = {key: value for key, value in tensors.items() if ".branches." in key}
    names = clean_keys({f"{name}.x": None for name in specs})
    known = {key[:-2]: [asdict(s) for s in found] for key, found in zip(names, specs.values(), strict=True) if found}
    header = {"format": _FORMAT, "grown": json.dumps(known), "branches_only": json.dumps(branches_only)}
    write_atomic(Path(path), save(tensors, header))


@checked(GrowError)
def load_grown(
    model: nn.Module, path: str | Path, *, inplace: bool = False, input_size: InputSize | None = None
) -> nn.Module:
    """Grow a plain net as the one in a file was, and give it the file's tensors.

    Args:
        model: The plain net; of a file with branches only, with the weights they were trained on.
        path: A file of `save_grown`.
        inplace: Work on `model` itself; otherwise on a deep copy.
        input_size: `(C, H, W)` the data flow is observed with; None takes the model's own.

    Raises:
        RunError: The file is damaged, or of another net (which may then be grown, where `inplace`).
        GrowError: A layer cannot be grown so.

    >>> gs.save_grown(gs.grow(net, "lora"), folder / "grown.safetensors")
    >>> grown = gs.load_grown(net, folder / "grown.safetensors")
    """
    header: dict[str, str] = {}
    tensors = read_tensors(Path(path), header.update)
    if header.get("format") != _FORMAT:
        raise RunError(f"{path}: not a file of growshrink.save_grown.")
    model = model if inplace else copy_net(model)
    try:
        layers = parse_json(header["grown"])
        alike: dict[str, list[str]] = {}
        for name, specs in layers.items():
            alike.setdefault(json.dumps(specs), []).append(name)
        for specs, names in alike.items():
            branch = [BranchSpec(**spec) for spec in parse_json(specs)]
            grow(model, branch, where=names, inplace=True, input_size=input_size)
        found: Any = model.load_state_dict(tensors, strict=False)
        wanted = [key for key in found.missing_keys if ".branches." in key or header["branches_only"] == "false"]
        if unknown := [*found.unexpected_keys, *wanted]:
            raise RunError(f"{unknown[0]} is not in both")
    except GrowError:
        raise
    except Exception as error:  # what a file says may be anything
        raise RunError(f"{path}: not the grown form of this model ({reason(error)}).") from error
    return model
