"""Names that options can have: models, optimizers, data sets, branches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import timm

from growshrink.base.limits import OneOf
from growshrink.branches.spec import PRESETS
from growshrink.layers.branch import Branch

#: What `growshrink.data.load_data` knows by name.
DATA_SETS = ("digits", "fashion-mnist", "cifar10", "cifar100", "folder")


def _is_data(name: str) -> bool:
    return name in DATA_SETS or Path(name).expanduser().is_dir()


ModelName = Annotated[str, OneOf("timm knows no such model", timm.list_models, timm.is_model)]
DataName = Annotated[str, OneOf("no such data set, nor is it a folder", lambda: DATA_SETS, lambda name: _is_data(name))]
BranchName = Annotated[str, OneOf("no such branch", lambda: [*Branch.kinds, *PRESETS], joined=True)]
"""A+B for both."""
