"""Supernets on disk: weights in a safetensors file, the width space and what makes the net beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from growshrink.errors import RunError, near
from growshrink.training.checkpoints import write_atomic
from growshrink.training.weights import clean_keys
from growshrink.transforms import grow
from growshrink.widths import WidthSpace, width_space

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


def load_supernet(
    path: Path, *, name: str | None = None, kwargs: Mapping[str, Any] | None = None
) -> tuple[nn.Module, WidthSpace, dict[str, Any]]:
    """The net, its width space, and what was written `about` it; the inverse of `save_supernet`.

    Args:
        path: What `save_supernet` wrote; or, with `name`, a state_dict alone of a net that is grown at birth.
        name: The timm model that a state_dict alone is of. Its classes and input channels are read off the weights,
            its space is `width_space(model)`.
        kwargs: What else `timm.create_model` needs for it.

    Raises:
        RunError: The file is no such file, is damaged, or does not fit the net it says it is of.
        WidthError: Its width space is none, or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        if header.get("format") == _FORMAT:
            about = json.loads(header["about"])
        elif name is None:
            raise RunError(
                f"{path}: not a supernet of this version of growshrink, nor is it said which model it is of."
            )
        else:
            tensors = clean_keys(tensors)
            about = about_weights(name, tensors, kwargs or {})
        with torch.random.fork_rng([]):  # weights that the file replaces
            model = timm.create_model(about["name"], **about["kwargs"])
        if about.get("grow") is not None:
            grow(model, **about["grow"], inplace=True, input_size=tuple(about["input_size"]))
        model.load_state_dict(tensors)
        space_json = header["width_space"] if "about" in header else None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(
            f"{path}: not a whole supernet ({(str(error) or type(error).__name__).splitlines()[0]})."
        ) from error
    space = width_space(model) if space_json is None else WidthSpace.from_json(space_json)
    space.check(model)
    return model, space, about


def about_weights(name: str, tensors: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to know about a state_dict alone of the timm model `name`, in the form of `load_supernet`.

    Classes and input channels are read off the weights, unless `kwargs` has them.
    """
    if not timm.is_model(name):
        raise RunError(f"{name}: timm knows no such model{near(name, timm.list_models())}")
    cfg: Any = timm.get_pretrained_cfg(name)
    layers = {"num_classes": (cfg.classifier, 0), "in_chans": (cfg.first_conv, 1)}
    found = {
        key: tensors[f"{_first(layer)}.weight"].shape[dim] for key, (layer, dim) in layers.items() if key not in kwargs
    }
    known = {**found, **kwargs}
    return {"name": name, "kwargs": known, "grow": None, "input_size": [known["in_chans"], *cfg.input_size[1:]]}


def _first(names: str | Sequence[str]) -> str:
    return names if isinstance(names, str) else names[0]
