"""What a run begins with: weights, and a plan that fits the images there are (for grow_cycle.py; not a program)."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.models
from torch import Tensor, nn

from growshrink.base.limits import Checkpoint
from growshrink.base.ranks import this_rank
from growshrink.base.reading import clean_keys, read_json
from growshrink.cli.options import DataOptions, ModelOptions
from growshrink.cycle import CyclePlan, lay_out
from growshrink.cycle.source import read_weights, run_of
from growshrink.data.datasets import SOURCES
from growshrink.data.feed import Feed
from growshrink.data.folders import class_counts
from growshrink.errors import PlanError, RunError
from growshrink.layers.grown import grown_modules
from growshrink.models.staged import plain_form
from growshrink.runs.folder import PLAIN_FILE


@dataclass(frozen=True, kw_only=True)
class StartOptions(ModelOptions):
    """The net, and the weights it starts with."""

    pretrained: bool = False
    """Start with timm's weights of the model, which are downloaded once; the head is new."""
    init: Checkpoint | None = None
    """Start with the weights in a file (safetensors, or a checkpoint of timm's) or in the folder of a finished run."""

    @property
    def tunes(self) -> bool:
        """Whether weights are tuned that were trained before."""
        return self.pretrained or self.init is not None or ":" in self.name

    def make(self, feed: Feed) -> tuple[nn.Module, dict[str, Any]]:
        """See `ModelOptions.make`; a model's name may be hf-hub:NAME or local-dir:FOLDER."""
        if not self.tunes:
            return super().make(feed)
        found: dict[str, Any] = {"num_classes": len(feed.classes), "in_chans": feed.input_size[0]}
        if self.init is None:
            found["pretrained"] = True
        model, kwargs = self.create(**found)
        name, notes = self.name, ["the head is new" if self.init is None else "all weights were found"]
        if ":" in name:
            kwargs = {**_saved_arguments(name), **kwargs}
            cfg: Any = model.pretrained_cfg
            name = cfg["architecture"]
        weights = {"from": self.name if self.init is None else str(self.init)}
        if self.init is not None:
            path = self.init / PLAIN_FILE if self.init.is_dir() else self.init
            notes = start_from(model, path, feed.classes) or notes
            weights["digest"] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        if not this_rank():
            print(f"{weights['from']}: {'; '.join(notes)}.", file=sys.stderr)
        kwargs = {key: value for key, value in kwargs.items() if key != "pretrained"}
        plain_name, plain_kwargs = plain_form(name, kwargs, grown=bool(grown_modules(model)))
        about = {"name": name, "kwargs": kwargs, "plain_name": plain_name, "plain_kwargs": plain_kwargs}
        return model, {**about, "weights": weights}


def _saved_arguments(name: str) -> dict[str, Any]:
    """The arguments that a model's folder, or its place on a hub, gives to timm."""
    source, _, where = name.partition(":")
    if source == "local-dir":
        return dict(read_json(Path(where) / "config.json").get("model_args") or {})
    return dict(timm.models.load_model_config_from_hf(where)[2] or {})


def start_from(model: nn.Module, path: Path, classes: Sequence[str] = ()) -> list[str]:
    """Load weights into a timm model as far as they fit.

    A head for other classes (another number of them, or other names where the file knows them) is left as it was made.
    First layers that take another number of channels get the mean over the channels, scaled so that a grey image does
    not change what comes out.

    Returns:
        Sentences on what was not simply loaded.

    Raises:
        RunError: Anything else does not fit; the model is left as it was.
    """
    tensors, header = read_weights(path)
    tensors, wanted, notes = clean_keys(tensors), model.state_dict(), list[str]()
    about = getattr(model, "pretrained_cfg", None) or {}
    heads, stems = (
        tuple(f"{name}." for name in ([names] if isinstance(names, str) else names or ()))
        for names in (about.get("classifier"), about.get("first_conv"))
    )
    try:
        trained_on = tuple(run_of(header).get("classes", ())) if "format" not in header else ()
    except (ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: its metadata is damaged ({error}).") from error
    new_head = bool(classes and trained_on and trained_on != tuple(classes))
    loaded: dict[str, Tensor] = {}
    for key, value in wanted.items():
        found = tensors.get(key)
        if key.startswith(heads) and (new_head or found is None or found.shape != value.shape):
            new_head = True
        elif found is not None and found.shape == value.shape:
            loaded[key] = found
        elif found is not None and key.startswith(stems) and found.ndim > 2 and found[:, 0].shape == value[:, 0].shape:
            loaded[key] = found.mean(1, keepdim=True).expand_as(value) * (found.shape[1] / value.shape[1])
            notes.append(f"{key} took {found.shape[1]} channels, and takes {value.shape[1]} now")
        else:
            what = "is missing" if found is None else f"has shape {tuple(found.shape)}, not {tuple(value.shape)}"
            raise RunError(f"{path}: not the weights of this model: {key} {what}.")
    if odd := [key for key in tensors if key not in wanted and not key.startswith(heads)]:
        advice = "a grown net: fuse it first" if any(".branches." in key for key in odd) else "of another model"
        raise RunError(f"{path}: {odd[0]} is not part of this model; the file is {advice}.")
    if new_head:  # all of it: no part of the old one is left beside parts of the new one
        loaded = {key: value for key, value in loaded.items() if not key.startswith(heads)}
        notes.append(
            f"the head ({', '.join(name[:-1] for name in heads)}) is new, for {len(classes) or 'other'} classes"
        )
    model.load_state_dict(loaded, strict=False)
    return notes


def images_folder(data: DataOptions) -> Path | None:
    """The folder of class folders, where the data are one."""
    if data.name in SOURCES:
        return data.data_dir if data.name == "folder" else None
    return Path(data.name).expanduser()


def updates_per_epoch(data: DataOptions) -> int | None:
    """Updates of an epoch, counted by file names, before anything is decoded; None for what is no folder."""
    folder = images_folder(data)
    if folder is None:
        return None
    counts = class_counts(folder)
    picked = (counts * data.val_fraction).round().clamp(min=1).minimum(counts - 1) * (data.val_fraction > 0)
    images, ranks = int((counts - picked).sum()), int(os.environ.get("WORLD_SIZE", "1"))
    if images < data.batch_size * ranks:
        raise RunError(
            f"--batch-size {data.batch_size}: {folder} has {images} images to train on, too few for one update of "
            f"{ranks} process(es); at most {images // ranks} fit, {max(1, images // ranks // 8)} are a good start."
        )
    return images // (data.batch_size * ranks)


def least_epochs(plan_of: Callable[[float], CyclePlan], updates: int, *, built_grown: bool = False) -> int | None:
    """The fewest whole epochs of so many updates in which a plan's rounds fit; None if 100,000 are too few."""
    for epochs in itertools.chain(range(1, 1000), range(1000, 100_001, 100)):
        try:
            lay_out(plan_of(float(epochs)), updates, built_grown=built_grown)
        except PlanError:
            continue
        return epochs
    return None
