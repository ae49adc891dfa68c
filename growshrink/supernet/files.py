"""Supernets on disk: weights in a safetensors file, the width space and what makes the net beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from growshrink.errors import RunError
from growshrink.training.checkpoints import write_atomic
from growshrink.transforms import grow
from growshrink.widths import WidthSpace

_FORMAT = "growshrink-supernet-1"


def save_supernet(path: Path, model: nn.Module, space: WidthSpace, about: Mapping[str, Any]) -> None:
    """Write a grown net.

    Args:
        path: A .safetensors file; written anew or replaced, never half.
        model: The net, of which everything in its state_dict is kept.
        space: Its width space.
        about: How to make a net of its structure: `name` and `kwargs` for `timm.create_model`, `grow` for
            `growshrink.grow` (None if it is grown at birth), `input_size` (C, H, W). What else there is, is kept.
    """
    header = {"format": _FORMAT, "width_space": space.to_json(), "about": json.dumps(dict(about))}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(path, save(tensors, header))


def load_supernet(path: Path) -> tuple[nn.Module, WidthSpace, dict[str, Any]]:
    """The net, its width space, and what was written `about` it; the inverse of `save_supernet`.

    Raises:
        RunError: The file is no such file, is damaged, or does not fit the net it says it is of.
        WidthError: Its width space is none, or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise RunError(f"{path}: not a supernet of this version of growshrink.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        about = json.loads(header["about"])
        with torch.random.fork_rng([]):  # weights that the file replaces
            model = timm.create_model(about["name"], **about["kwargs"])
        if about.get("grow") is not None:
            grow(model, **about["grow"], inplace=True, input_size=tuple(about["input_size"]))
        model.load_state_dict(tensors)
        space_json = header["width_space"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(
            f"{path}: not a whole supernet ({(str(error) or type(error).__name__).splitlines()[0]})."
        ) from error
    space = WidthSpace.from_json(space_json)
    space.check(model)
    return model, space, about
