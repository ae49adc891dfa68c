"""What the options of programs can be: limits that stand in their types, checked before a program does anything.

    ratio: Positive = 4.0
    seeds: tuple[Seed, ...] = (0,)

`growshrink.cli.program.run_program` checks them; whatever lies beyond is refused in one line, whichever program it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Protocol, get_args, get_origin, get_type_hints, runtime_checkable

import timm
import torch
from timm.optim import list_optimizers

from growshrink.branches.spec import MOST_RATIO, PRESETS
from growshrink.errors import RunError, did_you_mean
from growshrink.layers.branch import Branch

#: Where nothing else limits a number, this does: nothing is ever done so often, or so long.
MANY = 10**9
#: What `growshrink.training.load_data` knows by name.
DATA_SETS = ("digits", "fashion-mnist", "cifar10", "cifar100", "folder")


@runtime_checkable
class Limit(Protocol):
    """Something in the type of an option that knows what the option can be."""

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, to follow its name; None if nothing is."""
        ...


@dataclass(frozen=True)
class Interval:
    """A number in an interval, so never NaN.

    Attributes:
        low: The least.
        high: The greatest.
        above: Whether `low` itself is too little.
        below: Whether `high` itself is too much.
    """

    low: float
    high: float = MANY
    above: bool = False
    below: bool = False

    def fault(self, value: float) -> str | None:
        """See `Limit`."""
        if self.low <= value <= self.high and not (
            self.above and value == self.low or self.below and value == self.high
        ):
            return None
        least = f"must be {'above' if self.above else 'at least'} {self.low:,}"
        return f"{least} and {'below' if self.below else 'at most'} {self.high:,}."


@dataclass(frozen=True)
class OneOf:
    """A name that is known.

    Attributes:
        what: What to say of a name that is not.
        names: The names, or what tells them when they are needed.
        known: Whether a name is known; by default those in `names` are.
        joined: Split the value at plus signs: each part is a name.
    """

    what: str
    names: Callable[[], Iterable[str]] | Iterable[str]
    known: Callable[[str], bool] | None = None
    joined: bool = False

    def fault(self, value: str) -> str | None:
        """See `Limit`."""
        names = list(self.names() if callable(self.names) else self.names)
        for name in value.split("+") if self.joined else [value]:
            if not (self.known(name) if self.known is not None else name in names):
                return f"{self.what}{did_you_mean(name, names)}"
        return None


@dataclass(frozen=True)
class ExistingPath:
    """The path of something to be read.

    Attributes:
        file: Whether it may be a file.
        folder: Whether it may be a folder.
    """

    file: bool = False
    folder: bool = False

    def fault(self, value: Path) -> str | None:
        """See `Limit`."""
        what = " or ".join(name for name, may in (("file", self.file), ("folder", self.folder)) if may)
        try:
            path = value.expanduser()
            if not path.exists():
                return f"there is no such {what}."
            if (path.is_dir() and self.folder) or (not path.is_dir() and self.file):
                return None
        except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL in it, a user there is not
            return f"not a {what} ({error})."
        return f"must be a {what}."


@dataclass(frozen=True)
class Writable:
    """The path of something to be written: above it there are folders only, as far as there is anything.

    Attributes:
        file: Whether it is a file that is written, not a folder.
    """

    file: bool = False

    def fault(self, value: Path) -> str | None:
        """See `Limit`."""
        try:
            if self.file and value.is_dir():
                return "a folder, must be a file."
            first = next(path for path in (value, *value.parents) if path.exists())
            if first.is_dir() or self.file and first == value:
                return None
        except (OSError, ValueError) as error:
            return f"cannot be written ({error})."
        return f"cannot be made, {first} is a file."


@dataclass(frozen=True)
class KeyValue:
    """An argument for a function, as KEY=VALUE."""

    def fault(self, value: str) -> str | None:
        """See `Limit`."""
        key, equals, _ = value.partition("=")
        return None if equals and key.isidentifier() else "must be KEY=VALUE."


@dataclass(frozen=True)
class Pattern:
    """A regular expression."""

    def fault(self, value: str) -> str | None:
        """See `Limit`."""
        try:
            re.compile(value)
        except re.error as error:
            return f"not a regular expression ({error})."
        return None


@dataclass(frozen=True)
class DeviceName:
    """A device as torch spells it; whether it is there, only its use tells."""

    def fault(self, value: str) -> str | None:
        """See `Limit`."""
        try:
            torch.device(value)
        except RuntimeError as error:
            return f"not to be had here ({str(error).splitlines()[0]})."
        return None


Count = Annotated[int, Interval(1)]
BatchSize = Annotated[int, Interval(1, 2**20)]
Whole = Annotated[int, Interval(0)]
Seed = Annotated[int, Interval(0, 2**62)]
Threads = Annotated[int, Interval(1, 1024)]
Pixels = Annotated[int, Interval(1, 65536)]
Positive = Annotated[float, Interval(0, above=True)]
Multiplier = Annotated[float, Interval(0, 100, above=True)]
Operations = Annotated[float, Interval(0, 10**15, above=True)]
NotNegative = Annotated[float, Interval(0)]
Ratio = Annotated[float, Interval(0, MOST_RATIO, above=True)]
Share = Annotated[float, Interval(0, 1)]
SomeOrAll = Annotated[float, Interval(0, 1, above=True)]
PartOf = Annotated[float, Interval(0, 1, above=True, below=True)]
"""A share that is neither nothing nor all."""
NotAll = Annotated[float, Interval(0, 1, below=True)]
ModelName = Annotated[str, OneOf("timm knows no such model", timm.list_models, timm.is_model)]
OptimizerName = Annotated[str, OneOf("timm knows no such optimizer", list_optimizers)]
Device = Annotated[str, DeviceName()]
DataName = Annotated[str, OneOf("no such data set, nor is it a folder", lambda: DATA_SETS, lambda name: _is_data(name))]
Argument = Annotated[str, KeyValue()]
Regex = Annotated[str, Pattern()]
BranchName = Annotated[str, OneOf("no such branch", lambda: [*Branch.kinds, *PRESETS], joined=True)]
"""A+B for both."""
InFile = Annotated[Path, ExistingPath(file=True)]
InFolder = Annotated[Path, ExistingPath(folder=True)]
OutFile = Annotated[Path, Writable(file=True)]
OutFolder = Annotated[Path, Writable()]
Checkpoint = Annotated[Path, ExistingPath(file=True, folder=True)]


def _is_data(name: str) -> bool:
    return name in DATA_SETS or Path(name).expanduser().is_dir()


def check_limits(args: Any) -> None:
    """RunError for the first option of `args`, a program's dataclass, that lies beyond the limits in its type."""
    hints = get_type_hints(type(args), include_extras=True)
    for field in fields(args):
        if fault := _fault(hints[field.name], value := getattr(args, field.name)):
            raise RunError(f"--{field.name.replace('_', '-')} {_shown(value)}: {fault}")


def _fault(hint: Any, value: Any) -> str | None:
    """What is wrong with a value of that type."""
    if value is None:
        return None
    kinds = get_args(hint)
    if get_origin(hint) is Annotated:
        for limit in kinds[1:]:
            if isinstance(limit, Limit) and (fault := limit.fault(value)):
                return fault
        return _fault(kinds[0], value)
    if get_origin(hint) is tuple:
        return next((fault for each in value if (fault := _fault(kinds[0], each))), None)
    if NoneType in kinds:
        return next((fault for kind in kinds if (fault := _fault(kind, value))), None)
    return None


def _shown(value: Any) -> str:
    """As on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
