"""Options that programs which train a net have in common, and what follows from them.

A program's `Args` is a dataclass that inherits the groups it wants and adds its own; the names are the command line's.
"""

from __future__ import annotations

import ast
import os
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from growshrink.base.limits import (
    Argument,
    BatchSize,
    Count,
    Device,
    InFolder,
    NotAll,
    NotNegative,
    Pixels,
    Positive,
    Seed,
    Whole,
)
from growshrink.base.ranks import num_ranks, this_rank
from growshrink.cli.limits import DataName, ModelName
from growshrink.data.batches import Augment
from growshrink.data.datasets import DataSet, load_data
from growshrink.data.feed import Feed, MemoryFeed
from growshrink.data.stream import stream_data
from growshrink.errors import RunError, did_you_mean
from growshrink.layers.grown import grown_modules
from growshrink.models.naming import plain_form
from growshrink.runs.folder import RunFolder, claim_together
from growshrink.training.trainer import OptimizerName, TrainConfig


@dataclass(kw_only=True)
class RunOptions:
    """Where a run goes, and on what."""

    out: Path | None = None
    """Folder of the run; by default runs/DATA-MODEL, numbered if taken."""
    resume: bool = False
    """Go on with the run in the folder; starts it if there is none, does nothing if it is finished."""
    save_every: Count | None = None
    """Write a checkpoint after every this many updates too; by default at the ends of epochs and phases."""
    keep: Count = 2
    """How many checkpoints are kept, the newest."""
    seed: Seed = 0
    """Of initial weights, branches, widths, data order and augmentation."""
    device: Device = "cpu"
    """cpu, cuda, cuda:1, mps."""
    tensorboard: bool = False
    """Write TensorBoard event files too."""
    quiet: bool = False
    """No progress bar."""


@dataclass(kw_only=True)
class TrainOptions:
    """How to train."""

    batch_size: BatchSize = 64
    """Images per update."""
    lr: Positive = 0.1
    """Peak learning rate."""
    optimizer: OptimizerName = "sgd"
    """Any optimizer of timm's that keeps its state parameter by parameter (not lamb, adan, kron, adahessian)."""
    weight_decay: NotNegative = 5e-4
    """Not applied to norms and biases."""
    momentum: NotAll = 0.9
    """Of SGD."""
    label_smoothing: NotAll = 0.0
    """In [0, 1)."""
    ema_decay: NotAll = 0.998
    """Of the averaged weights, which are what is judged and deployed; 0 for none."""
    clip_grad: Positive | None = None
    """Largest norm of the gradient."""
    amp: bool = False
    """bfloat16 autocast: about twice as fast where the machine has it."""

    def train_config(self) -> TrainConfig:
        """What the trainer wants to know."""
        return TrainConfig(
            optimizer=self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            label_smoothing=self.label_smoothing,
            ema_decay=self.ema_decay,
            clip_grad=self.clip_grad,
            amp=self.amp,
        )


@dataclass(kw_only=True)
class DataOptions:
    """What is trained on what."""

    data: DataName = "digits"
    """digits, fashion-mnist, cifar10, cifar100, or a folder train/CLASS/*, test/CLASS/* of images."""
    data_dir: InFolder | None = None
    """Where the data set lies (digits need none; fashion-mnist is looked for in Debian's package)."""
    model: ModelName = "reducenet20"
    """Any timm model."""
    model_kwargs: tuple[Argument, ...] = ()
    """KEY=VALUE arguments for timm.create_model, e.g. width=0.5 drop_path_rate=0.05."""
    image_size: Pixels | None = None
    """Resize the images of a folder to this many pixels."""
    stream: bool = False
    """Decode a folder that does not fit into memory as it is needed, with timm's loader (needs --image-size)."""
    val_fraction: NotAll = 0.1
    """Share of the training images that rounds are judged by; the test set is read once, at the end."""
    crop: Whole | None = None
    """Pad by this many pixels and crop at random; by default an eighth of the image."""
    flip: bool | None = None
    """Mirror at random; by default except for digits."""
    cutout: Whole = 0
    """Side in pixels of a square blanked at random."""

    def load_feed(self, *, batch_size: int, seed: int, device: torch.device, progress: bool) -> Feed:
        """Batches of the data set."""
        ranks: dict[str, Any] = {"rank": this_rank(), "world_size": num_ranks()}
        if self.stream:
            if self.image_size is None:
                raise RunError("--stream needs --image-size.")
            return stream_data(
                self.data_dir or Path(self.data),
                batch_size=batch_size,
                image_size=self.image_size,
                val_fraction=self.val_fraction,
                seed=seed,
                device=device,
                **ranks,
            )
        data: DataSet = load_data(
            self.data,
            self.data_dir,
            val_fraction=self.val_fraction,
            seed=seed,
            image_size=self.image_size,
            progress=progress,
        )
        crop = data.input_size[1] // 8 if self.crop is None else self.crop
        flip = self.data != "digits" if self.flip is None else self.flip
        augment = Augment(crop=crop, flip=flip, cutout=self.cutout)
        return MemoryFeed.of(data, batch_size=batch_size, augment=augment, seed=seed, device=device, **ranks)

    def make_model(self, feed: Feed) -> tuple[nn.Module, dict[str, Any]]:
        """The model for this data, and how to make it, and its plain form, again."""
        if not timm.is_model(self.model):
            raise RunError(
                f"--model {self.model}: timm knows no such model{did_you_mean(self.model, timm.list_models())}"
            )
        kwargs = {"num_classes": len(feed.classes), "in_chans": feed.input_size[0], **parse_kwargs(self.model_kwargs)}
        try:
            model = timm.create_model(self.model, **kwargs)
        except Exception as error:  # models check their arguments in their own ways
            raise RunError(f"--model {self.model} with {kwargs}: {type(error).__name__}: {error}") from error
        plain_name, plain_kwargs = plain_form(self.model, kwargs, grown=bool(grown_modules(model)))
        return model, {"name": self.model, "kwargs": kwargs, "plain_name": plain_name, "plain_kwargs": plain_kwargs}


#: Options that change what the net is fed with: a run is resumed with the same only.
OF_THE_DATA = ("image_size", "stream", "val_fraction", "crop", "flip", "cutout")


@dataclass(kw_only=True)
class Options(RunOptions, TrainOptions, DataOptions):
    """All of them."""

    @staticmethod
    def of(args: Any, **values: Any) -> Options:
        """The options that `args`, a program's own dataclass, has by the same names; `values` go before."""
        known = {field.name for field in fields(Options)}
        return Options(**{**{name: value for name, value in vars(args).items() if name in known}, **values})

    def claim(self, prefix: str = "") -> RunFolder:
        """The folder of the run, `prefix` before its name by default; claimed before anything else is done."""

        def claim() -> RunFolder:
            if self.out is not None:
                return RunFolder.claim(self.out, resume=self.resume)
            name = f"{prefix}{Path(self.data).resolve().name}-{self.model}".replace("/", "-")
            return RunFolder.claim_next(Path("runs"), name, resume=self.resume)

        return claim_together(claim)

    def torch_device(self) -> torch.device:
        """The device, if it is there."""
        try:
            device = torch.device(self.device)
            if device.type == "cuda" and device.index is None:  # torchrun's number of the process on this machine
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
                torch.cuda.set_device(device)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise RunError(f"--device {self.device}: not to be had here ({str(error).splitlines()[0]}).") from error
        return device

    def make_feed(self, device: torch.device) -> Feed:
        """Batches of the data set."""
        return self.load_feed(batch_size=self.batch_size, seed=self.seed, device=device, progress=not self.quiet)

    def about(self, model_about: dict[str, Any]) -> dict[str, Any]:
        """What a run writes down about itself."""
        return {
            "command": shlex.join(["python", *sys.argv]),
            "seed": self.seed,
            "model": model_about,
            "options": {name: getattr(self, name) for name in OF_THE_DATA},
        }


def parse_kwargs(pairs: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE strings as arguments; values are Python literals, or strings."""
    kwargs = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise RunError(f"--model-kwargs {pair}: must be KEY=VALUE.")
        try:
            kwargs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            kwargs[key] = text
    return kwargs
