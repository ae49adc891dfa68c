"""A net read from whatever training left behind, merged into its plain architecture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from safetensors import safe_open
from torch import Tensor, nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.config import Checked
from growshrink.base.copying import copy_net
from growshrink.base.limits import Positive, Share
from growshrink.base.reading import clean_keys, parse_json, read_json, reason
from growshrink.errors import DropError, FuseError, RunError
from growshrink.layers.activations import set_lambda
from growshrink.layers.grown import grown_modules
from growshrink.models.staged import plain_form
from growshrink.runs.folder import PLAIN_FILE
from growshrink.supernet.files import about_weights, load_supernet
from growshrink.transforms import drop, fuse, grow

_BRANCH = ".branches."


@dataclass(frozen=True, eq=False)
class Source:
    """A plain net, and where it comes from; what is unknown is empty or None.

    Attributes:
        plain: The net to deploy, as `timm.create_model(name, **kwargs)` makes it, in eval mode on the CPU.
        grown: The net it was merged from, in eval mode; None if it was plain already, or branches were dropped.
        dynamic: A grown net as it is, with numbers that depend on the data; `plain` then has their means.
        mean: Per channel, of images in [0, 1], like `std`.
        classes: Their names in the order of the outputs.
        data: Name of the data set it was trained on.
    """

    path: Path
    plain: nn.Module
    name: str
    kwargs: Mapping[str, Any]
    input_size: InputSize
    grown: nn.Module | None = None
    dynamic: nn.Module | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()
    data: str | None = None

    @property
    def needs_growshrink(self) -> bool:
        """Whether timm alone does not know the architecture."""
        return not timm.models.model_entrypoint(self.name).__module__.startswith("timm.")


@dataclass(frozen=True, kw_only=True)
class Recipe(Checked):
    """What a state_dict does not say of its net.

    Attributes:
        name: timm model; None where the file has to say it.
        kwargs: Arguments of `timm.create_model`, over what is read off the weights.
        branches: What a grown state_dict was grown with, as for `growshrink.grow`.
        ratio: The ratio it was grown with.
        merge: Merge the branches of a grown net; else leave them out (NetAug's base net).
        dynamic: Write a grown net as it is, too, whatever its lam; merged is what it would be at lam = 0.
        image_size: Pixels, where the file does not say it.
        mean: Per channel, of images in [0, 1], where the file does not say it; by default the model's own.
        std: Per channel, in the same unit.
    """

    error = RunError
    name: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    branches: Sequence[str] = ()
    ratio: float = 2.0
    merge: bool = True
    dynamic: bool = False
    image_size: int | None = None
    mean: tuple[Share, ...] = ()
    std: tuple[Positive, ...] = ()


def read_source(path: Path, recipe: Recipe = Recipe()) -> Source:
    """Read a checkpoint.

    | path | what it is |
    | --- | --- |
    | a folder | of a finished run of recipes/grow_cycle.py or recipes/netaug.py: its `plain.safetensors` |
    | `.safetensors` with what it is in its metadata | `plain.safetensors` or `supernet.safetensors` of such a run |
    | `.safetensors` without | a state_dict, plain or grown, of the timm model `recipe.name` |
    | `.pth`, `.tar`, ... | the same, or a checkpoint of timm's train.py: its averaged weights, if it has them |

    Keys may have the prefixes that DataParallel, DistributedDataParallel, averages and torch.compile put before them.

    Raises:
        RunError: There is no such checkpoint, it is damaged, or does not fit the model.
        FuseError: The branches cannot be merged: lam is not 0.
        DropError: The net has nothing left without them.
    """
    if path.is_dir():
        if not (path / PLAIN_FILE).is_file():
            raise RunError(
                f"{path}: has no {PLAIN_FILE}: not the folder of a finished run of recipes/grow_cycle.py or "
                "recipes/netaug.py. Name a file, or resume the run (--resume)."
            )
        path = path / PLAIN_FILE
    if not path.is_file():
        raise RunError(f"{path}: no such file or folder.")
    tensors, header = read_weights(path)
    kind = header.get("format", "")
    if kind.startswith("growshrink-checkpoint"):
        raise RunError(f"{path}: a checkpoint to resume from. Resume its run (--resume) and export its folder.")
    if kind.startswith("growshrink-supernet"):
        supernet, _, about = load_supernet(path)
        name, kwargs = plain_form(about["name"], about["kwargs"], grown=about.get("grow") is None)
        size = tuple(about["input_size"])
        return _merged(path, supernet, recipe, name=name, kwargs=kwargs, input_size=size, **_of_the_run(path))
    if (known := _of_the_header(path, header, recipe)) is not None:
        plain = _made(known["name"], known["kwargs"], tensors, path)
        return Source(path, plain, data=_of_the_run(path).get("data"), **known)
    return _of_a_state_dict(path, clean_keys(tensors), recipe)


def _of_a_state_dict(path: Path, tensors: dict[str, Tensor], recipe: Recipe) -> Source:
    if recipe.name is None:
        raise RunError(f"{path}: does not say which model it is of: pass --model (and --model-kwargs).")
    try:
        about = about_weights(recipe.name, tensors, recipe.kwargs)
    except (KeyError, IndexError, TypeError) as error:
        raise RunError(
            f"{path}: no state_dict of {recipe.name} as timm names its layers ({error}). Is --model right? Does it "
            "need --model-kwargs num_classes=... in_chans=...?"
        ) from error
    kwargs, size = about["kwargs"], _input_size(about["input_size"], recipe)
    built_grown = bool(grown_modules(_made(recipe.name, kwargs, None, path)))
    name, kwargs = plain_form(recipe.name, kwargs, grown=built_grown)
    cfg: Any = timm.get_pretrained_cfg(name)
    known: dict[str, Any] = {"name": name, "kwargs": kwargs, "input_size": size}
    mean, std = recipe.mean or tuple(cfg.mean), recipe.std or tuple(cfg.std)
    if (recipe.mean or recipe.std) and not len(mean) == len(std) == size[0]:
        raise RunError(f"--mean {recipe.mean} --std {recipe.std}: one value for each of {size[0]} channels is needed.")
    if len(mean) == len(std) == size[0]:
        known |= {"mean": mean, "std": std}
    if built_grown and any(".pointwise." in key for key in tensors):
        grown = _made(recipe.name, about["kwargs"], tensors, path)
        return _merged(path, grown, recipe, **known)
    carriers = sorted({key.partition(_BRANCH)[0] for key in tensors if _BRANCH in key})
    if carriers and recipe.merge:
        if not recipe.branches:
            raise RunError(
                f"{path}: {len(carriers)} convolutions have branches. Say what they were grown with (--branches, "
                "--ratio), or leave them out (--no-merge)."
            )
        net = _made(name, kwargs, None, path)
        grown = grow(net, recipe.branches, ratio=recipe.ratio, where=carriers, input_size=size)
        _load(grown, tensors, path, f"{name} grown with {', '.join(recipe.branches)}, ratio {recipe.ratio:g}")
        return _merged(path, grown, recipe, **known)
    plain = {key: value for key, value in tensors.items() if _BRANCH not in key}
    return Source(path, _made(name, kwargs, plain, path), **known)


def _merged(path: Path, grown: nn.Module, recipe: Recipe, **known: Any) -> Source:
    """The source of a grown net: what is left of it, in a fresh net of the plain architecture."""
    known["input_size"] = _input_size(known["input_size"], recipe)
    grown = grown.eval()
    if recipe.dynamic:
        known["dynamic"] = copy_net(grown)
        set_lambda(grown, 0.0)
    try:
        left = fuse(grown, input_size=known["input_size"]) if recipe.merge else drop(grown)
    except DropError as error:
        raise DropError(f"{path}: {error}") from error
    except FuseError as error:
        raise FuseError(
            f"{path}: {error} If the net without its branches was trained, export it: --no-merge."
        ) from error
    plain = _made(known["name"], known["kwargs"], left.state_dict(), path)
    return Source(path, plain, grown=grown if recipe.merge else None, **known)


def _made(name: str, kwargs: Mapping[str, Any], tensors: Mapping[str, Tensor] | None, path: Path) -> nn.Module:
    """A fresh timm model in eval mode, with these weights; no random stream is moved."""
    with torch.random.fork_rng([]):
        try:
            model = timm.create_model(name, **kwargs)
        except Exception as error:  # models check their arguments in their own ways
            raise RunError(f"{name} with {dict(kwargs)}: {type(error).__name__}: {error}") from error
    if tensors is not None:
        _load(model, tensors, path, name)
    return model.eval()


def _load(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, what: str) -> None:
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    wrong = [f"{key} is missing" for key in wanted if key not in found]
    wrong += [f"{key} is not part of it" for key in found if key not in wanted]
    wrong += [f"{key} has shape {found[key]}, not {own}" for key, own in wanted.items() if found.get(key, own) != own]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise RunError(f"{path}: not the weights of {what}: {wrong[0]}{more}.")
    model.load_state_dict(tensors)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file or timm's checkpoint (the averaged ones), and metadata; RunError if damaged."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        tensors = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # on damaged files torch's unpickler raises whatever it happens to stumble over
        raise RunError(f"{path}: not readable as a checkpoint ({reason(error)}).") from error
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise RunError(f"{path}: holds something else than the tensors of a state_dict.")
    return tensors, {}


def run_of(header: Mapping[str, str]) -> dict[str, Any]:
    """What a run wrote beside its weights: about, classes, input_size, mean, std; ValueError if it is damaged."""
    if "run" in header or "about" not in header:
        return parse_json(header.get("run", "{}"))
    return {key: parse_json(text) for key, text in header.items()}  # before 0.3 each had a key of its own


def _of_the_header(path: Path, header: Mapping[str, str], recipe: Recipe) -> dict[str, Any] | None:
    """What a run wrote beside its weights; None where a file says nothing of its model."""
    try:
        run = run_of(header)
        if "plain_name" not in (about := dict(run.get("about", {}))):
            return None
        known = {key: tuple(run[key]) for key in ("input_size", "mean", "std", "classes")}
        size = _input_size(known["input_size"], recipe)
        return {**known, "input_size": size, "name": about["plain_name"], "kwargs": dict(about["plain_kwargs"])}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path}: its metadata is damaged, or not that of {PLAIN_FILE} of a run ({error!r}).") from error


def _of_the_run(path: Path) -> dict[str, Any]:
    """What the folder around a file knows of the data, where it is that of a run."""
    if not (path.parent / "report.json").is_file():
        return {}
    data = read_json(path.parent / "report.json").get("about", {}).get("data", {})
    known: dict[str, Any] = {key: tuple(data[key]) for key in ("mean", "std") if key in data}
    return known | ({"data": data["name"]} if "name" in data else {})


def _input_size(size: Sequence[int], recipe: Recipe) -> InputSize:
    channels, height, width = size
    return (channels, height, width) if recipe.image_size is None else (channels, recipe.image_size, recipe.image_size)
