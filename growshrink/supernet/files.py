"""Supernets on disk: weights in a safetensors file, the width space and what makes the net beside them."""

import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from growshrink.base.reading import clean_keys, parse_json, read_tensors, reason
from growshrink.base.writing import write_atomic
from growshrink.errors import RunError, did_you_mean
from growshrink.layers.widths import WidthSpace, width_space
from growshrink.transforms import grow

_FORMAT = "growshrink-supernet-1"
#: Pixels along a side at most.
MOST_SIDE = 4096
MOST_LEVELS = 64
#: What makes the net of a plain one, by its key in `about`, and the options of that; growshrink.analysis adds "slim".
MAKERS: dict[str, tuple[Callable[..., object], str]] = {"grow": (grow, "branch, ratio, where, seed and init")}
#: Arguments of timm's that fetch weights from elsewhere begin so.
_FOREIGN = ("pretrained", "checkpoint", "cache_dir", "hf", "features_only", "scriptable")


def save_supernet(path: Path, model: nn.Module, space: WidthSpace, about: Mapping[str, Any]) -> None:
    """Write a grown or slim net, everything in its state_dict, and its width space, atomically.

    `about` tells how to make a net of its structure: `name` and `kwargs` for `timm.create_model`, `grow` for
    `growshrink.grow` (None if it is built grown) or `slim` for `growshrink.slim`, `input_size` (C, H, W); all is kept.
    """
    header = {"format": _FORMAT, "width_space": space.to_json(), "about": json.dumps(dict(about))}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(path, save(tensors, header))


def load_supernet(
    path: Path, *, name: str | None = None, kwargs: Mapping[str, Any] | None = None
) -> tuple[nn.Module, WidthSpace, dict[str, Any]]:
    """The net, its width space, and what was written `about` it; the inverse of `save_supernet`.

    A state_dict alone is loaded into the timm model `name`, built grown, made with `kwargs`; its classes and input
    channels are read off the weights, its space is `width_space(model)`.

    Raises:
        RunError: The file is no such file, is damaged, or does not fit the net it says it is of.
        WidthError: Its width space is none, or of another model.
    """
    header: dict[str, str] = {}
    try:
        tensors = read_tensors(path, header.update)
        if header.get("format") == _FORMAT:
            about = _checked(parse_json(header["about"]))
        elif name is None:
            raise RunError(f"{path}: not a supernet of this version of growshrink, nor is its model named.")
        else:
            tensors = clean_keys(tensors)
            about = about_weights(name, tensors, kwargs or {})
        with torch.random.fork_rng([]):  # weights that the file replaces
            _check_shapes(about, tensors)
            model = _make(about)
        model.load_state_dict(tensors)
        space_json = header["width_space"] if "about" in header else None
    except RunError as error:
        said = str(error).removeprefix(f"{path}: ")
        start = "" if said.startswith("not a ") else "not a whole supernet, "
        raise RunError(f"{path}: {start}{said}") from error
    except Exception as error:  # what a model makes of arguments that a file names is the model's affair
        raise RunError(f"{path}: not a whole supernet ({reason(error)}).") from error
    space = width_space(model) if space_json is None else WidthSpace.from_json(space_json)
    space.check(model)
    return model, space, about


def _checked(about: Any) -> dict[str, Any]:
    """What a file says about its net, as far as it may be followed: RunError for anything but a model and its shape."""
    if not (isinstance(about, dict) and isinstance(about["kwargs"], dict) and isinstance(about["name"], str)):
        raise RunError(f"a supernet of {about!r}: needs a name, and kwargs.")
    if not timm.is_model(about["name"]):
        raise RunError(f"a supernet of {about['name']!r}: timm knows no such model.")
    if foreign := [key for key in about["kwargs"] if key.startswith(_FOREIGN)]:
        raise RunError(f"a supernet of {about['name']} with {foreign[0]}: weights come from the file, and no other.")
    size = about["input_size"]
    if not (isinstance(size, list) and len(size) == 3 and all(type(n) is int and 0 < n <= MOST_SIDE for n in size)):
        raise RunError(f"a supernet for images of {size!r}: must be three whole numbers up to {MOST_SIDE}.")
    for key, (_, known) in MAKERS.items():
        given = about.get(key, {}) or {}
        if not isinstance(given, dict) or not given.keys() <= set(re.split(", | and ", known)):
            raise RunError(f"a supernet made by {key} with {given!r}: needs {known}.")
    if isinstance(where := (about.get("grow") or {}).get("where"), str):
        raise RunError(f"a supernet grown where {where!r} matches: needs a list of names.")
    if len((about.get("slim") or {}).get("levels", ())) > MOST_LEVELS:
        raise RunError(f"a slim net of more than {MOST_LEVELS} levels.")
    return about


def _make(about: Mapping[str, Any]) -> nn.Module:
    model = timm.create_model(about["name"], **about["kwargs"])
    for key, (make, _) in MAKERS.items():
        if about.get(key) is not None:
            make(model, **about[key], inplace=True, input_size=tuple(about["input_size"]))
    return model


def _check_shapes(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """RunError unless the net would have these tensors; made without memory, and with few modules that have none."""
    most, found = 1000 + 10 * len(tensors), itertools.count()

    def count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        if next(found) > most:
            raise RunError(f"a net of {about['name']} with more than {most} modules, for {len(tensors)} tensors.")

    hook = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            model = _make({**about, "slim": None})  # which leaves the keys, and looks at values
    except NotImplementedError:  # a model that looks at its own values while it is made
        return
    finally:
        hook.remove()
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in [*expected, *(key for key in tensors if not key.rpartition(".")[2].startswith("slim_"))]:
        there, wanted = tuple(tensors[key].shape) if key in tensors else "nothing", expected.get(key, "nothing")
        if there != wanted:
            raise RunError(f"{key}: {there} in the file, {wanted} in the net it is said to be of.")


def about_weights(name: str, tensors: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What is known about a state_dict alone of the timm model `name`, as `load_supernet` returns it."""
    if not timm.is_model(name):
        raise RunError(f"{name}: timm knows no such model{did_you_mean(name, timm.list_models())}")
    cfg: Any = timm.get_pretrained_cfg(name)
    known = dict(kwargs)
    for key, names, dim in (("num_classes", cfg.classifier, 0), ("in_chans", cfg.first_conv, 1)):
        layer = names if isinstance(names, str) else names[0]
        if key not in known:
            known[key] = tensors[f"{layer}.weight"].shape[dim]
    return {"name": name, "kwargs": known, "grow": None, "input_size": [known["in_chans"], *cfg.input_size[1:]]}
