"""Components of options that tools share (not a program)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

from growshrink.base.limits import InFile, OutFile, Pixels
from growshrink.cli.options import BatchOptions, ModelName


@dataclass(frozen=True, kw_only=True)
class NetOptions(BatchOptions):
    """Nets, and the images they run on."""

    models: Annotated[tuple[ModelName, ...], tyro.conf.Positional] = ()
    """timm models."""
    pixels: Pixels = 32
    """Side of the images in pixels."""


@dataclass(frozen=True, kw_only=True)
class NetFiles:
    """A net that has been trained already."""

    untrained: InFile | None = None
    """A supernet before training: init.safetensors, or a state_dict alone (.safetensors) of a net grown at birth."""
    trained: InFile | None = None
    """The same net after it: supernet.safetensors, or a state_dict alone."""


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """What is written."""

    group: ClassVar[str] = "running"

    file: OutFile | None = None
    """File of the results."""
