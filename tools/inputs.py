"""Components of options that tools share (not a program)."""

from __future__ import annotations

import copy
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
from torch import nn

import growshrink as gs
from growshrink.base.limits import Checkpoint, Count, InFile, OutFile, Pixels
from growshrink.cli.options import BatchOptions, ModelName
from growshrink.data.feed import Feed
from growshrink.errors import RunError
from growshrink.supernet import load_supernet, save_supernet

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))

from results import Results, StudyOptions
from trained import as_supernet, num_updates, train_supernet


@dataclass(frozen=True, kw_only=True)
class NetOptions(BatchOptions):
    """Nets, and the images they run on."""

    models: Annotated[tuple[ModelName, ...], tyro.conf.Positional] = ()
    """timm models."""
    pixels: Pixels = 32
    """Side of the images in pixels."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Options of programs that read a checkpoint."""

    checkpoint: Annotated[Checkpoint, tyro.conf.Positional]
    """Folder of a finished run, or a file with weights."""


@dataclass(frozen=True, kw_only=True)
class NetFiles:
    """A net that has been trained already."""

    untrained: InFile | None = None
    """A supernet before training: init.safetensors, or a state_dict alone (.safetensors) of a net built grown."""
    trained: InFile | None = None
    """The same net after it: supernet.safetensors, or a state_dict alone."""

    def digests(self) -> dict[str, str]:
        """What is in the files that are named."""
        found = {}
        for name, path in vars(self).items():
            if path is not None:
                try:
                    found[name] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
                except OSError as error:
                    raise RunError(f"--{name} {path}: not readable ({error.strerror}).") from error
        return found


def trained_supernet(
    args: StudyOptions, results: Results, feed: Feed, number: int = 0, *, name: str = "", **how: Any
) -> tuple[nn.Module, nn.Module, gs.layers.WidthSpace, dict[str, Any]]:
    """Supernet `number`, before and after training: trained by one process, and left in the folder of the results.

    Args:
        args: Says what and how long.
        results: Results of all processes.
        feed: What it is trained on.
        number: Added to the seed.
        name: Added to the names of the files.
        how: For `train_supernet`.
    """
    seed, epochs = args.running.seed + number, args.length.epochs
    paths = [results.path / f"{part}{name}.safetensors" for part in ("init", "supernet")]
    with results.once(number):
        if not paths[1].exists():
            init, made = args.net(feed, seed)
            space, about = as_supernet(init.cpu(), made, input_size=feed.input_size, seed=seed)
            trained = copy.deepcopy(init).to(args.running.torch_device())
            how |= {"epochs": epochs, "config": args.training, "seed": seed, "train": results.kept(f"supernet{name}")}
            with args.bar(num_updates(feed, epochs), f"supernet {number}") as advance:
                train_supernet(trained, feed, after_update=advance, **how)
            save_supernet(paths[0], init, space, about)
            save_supernet(paths[1], trained, space, about)
    (init, space, about), (trained, _, _) = map(load_supernet, paths)
    return init, trained, space, about


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """What is written."""

    group: ClassVar[str] = "running"

    file: OutFile | None = None
    """File of the results."""


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """What is drawn."""

    group: ClassVar[str] = "running"

    picture: OutFile | None = None
    """File of a picture of the results."""


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """At how many images at a time."""

    batches: tuple[Count, ...] = (128, 32, 8, 1)
    """Batch sizes."""
