"""Limits that stand in the types of fields and options: what a value can be, and what is wrong with one that cannot.

    ratio: Positive = 4.0
    seeds: tuple[Seed, ...] = (0,)

A dataclass checks itself with `growshrink.base.config.check_fields`, a function its arguments with `checked`, a program
its options with `growshrink.cli.program.run_program`.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from inspect import signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from growshrink.errors import GrowShrinkError, check_model, describe, did_you_mean

P = ParamSpec("P")
T = TypeVar("T")
_hints = cache(get_type_hints)

#: Upper limit of a number that has no other.
MANY = 10**9
#: Upper limit of `Ratio`.
MOST_RATIO = 10_000


class Limit:
    """Something in the type of an option that knows what the option can be."""

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, to follow its name; None if nothing is."""
        raise NotImplementedError


@dataclass(frozen=True)
class Interval(Limit):
    """A number from `low` to `high`, so never NaN; with `above`, `below` not these themselves."""

    low: float
    high: float = MANY
    above: bool = False
    below: bool = False

    def fault(self, value: float) -> str | None:
        if self.low <= value <= self.high and not (
            self.above and value == self.low or self.below and value == self.high
        ):
            return None
        least = f"must be {'above' if self.above else 'at least'} {self.low:,}"
        return f"{least} and {'below' if self.below else 'at most'} {self.high:,}."


@dataclass(frozen=True)
class OneOf(Limit):
    """A name that is known, or, `joined`, several with plus signs between.

    `what` is said of one that is not, `names` are those there are, or what tells them when they are needed; `known`
    says whether a name is, by default whether it is one of these.
    """

    what: str
    names: Callable[[], Iterable[str]] | Iterable[str]
    known: Callable[[str], bool] | None = None
    joined: bool = False

    def fault(self, value: str) -> str | None:
        names = list(self.names() if callable(self.names) else self.names)
        for name in value.split("+") if self.joined else [value]:
            if not (self.known(name) if self.known is not None else name in names):
                return f"{self.what}{did_you_mean(name, names)}"
        return None


@dataclass(frozen=True)
class ExistingPath(Limit):
    """The path of something to be read: a `file`, a `folder`, or either."""

    file: bool = False
    folder: bool = False

    def fault(self, value: Path) -> str | None:
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
class Writable(Limit):
    """The path of a `file` or a folder to be written: above it there are folders only, as far as there is anything."""

    file: bool = False

    def fault(self, value: Path) -> str | None:
        try:
            if self.file and value.is_dir():
                return "a folder, must be a file."
            first = next(path for path in (value, *value.parents) if path.exists())
            if first.is_dir() or self.file and first == value:
                return None
        except (OSError, ValueError) as error:
            return f"cannot be written ({error})."
        return f"cannot be used as a folder, {first} is a file."


@dataclass(frozen=True)
class Parsed(Limit):
    """A text that `parse` takes without one of `errors`; `what` says what it is otherwise."""

    parse: Callable[[str], object]
    what: str
    errors: type[Exception]

    def fault(self, value: str) -> str | None:
        try:
            self.parse(value)
        except self.errors as error:
            return f"{self.what} ({str(error).splitlines()[0]})."
        return None


@dataclass(frozen=True)
class NoOption:
    """A mark in the type of a field that programs make no option of: they decide it themselves."""


Count = Annotated[int, Interval(1)]
BatchSize = Annotated[int, Interval(1, 2**20)]
Whole = Annotated[int, Interval(0)]
Seed = Annotated[int, Interval(0, 2**62)]
Threads = Annotated[int, Interval(1, 1024)]
Pixels = Annotated[int, Interval(1, 65536)]
Positive = Annotated[float, Interval(0, above=True)]
NotNegative = Annotated[float, Interval(0)]
Ratio = Annotated[float, Interval(0, MOST_RATIO, above=True)]
"""Middle width of a branch over the output channels of its layer."""
Share = Annotated[float, Interval(0, 1)]
SomeOrAll = Annotated[float, Interval(0, 1, above=True)]
PartOf = Annotated[float, Interval(0, 1, above=True, below=True)]
"""A share that is neither nothing nor all."""
NotAll = Annotated[float, Interval(0, 1, below=True)]
Device = Annotated[
    str, Parsed(lambda name: torch.device("cpu" if name == "auto" else name), "not to be had here", RuntimeError)
]
"""A device as torch spells it; whether it is there, only its use tells."""
Argument = Annotated[
    str, OneOf("must be KEY=VALUE", list, lambda text: "=" in text and text.partition("=")[0].isidentifier())
]
Regex = Annotated[str, Parsed(re.compile, "not a regular expression", re.error)]
InFile = Annotated[Path, ExistingPath(file=True)]
InFolder = Annotated[Path, ExistingPath(folder=True)]
OutFile = Annotated[Path, Writable(file=True)]
OutFolder = Annotated[Path, Writable()]
Checkpoint = Annotated[Path, ExistingPath(file=True, folder=True)]


def check_value(name: str, value: Any, hint: Any, error: type[GrowShrinkError]) -> None:
    """Raise `error` for an argument that its type, or a limit in it, does not allow; numbers of numpy and torch are."""
    if hint is nn.Module:
        check_model(value)
    if wrong := fault(hint, value.item() if getattr(value, "shape", None) == () else value):
        raise error(f"{name}={describe(value)}: {wrong}")


def checked(error: type[GrowShrinkError], **limits: Any) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function raise `error` for an argument that its annotation, or its type in `limits`, does not allow."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        names = list(signature(function).parameters)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            hints = _hints(function, include_extras=True) | limits
            for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
                if name in hints and name not in ("input_size", "example_inputs"):  # growshrink.algebra.inputs does
                    check_value(name, value, hints[name], error)
            return function(*args, **kwargs)

        return call

    return decorate


def fault(hint: Any, value: Any) -> str | None:
    """Say what is wrong with a value of that type, to follow its name; None if nothing is.

    >>> fault(Share, 0.5), fault(Share | None, None), fault(Share, "0.5"), fault(Share, 1.5)
    (None, None, 'must be a finite number.', 'must be at least 0 and at most 1.')
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = (limit.fault(value) for limit in inner[1:] if isinstance(limit, Limit))
        return fault(inner[0], value) or next(filter(None, limits), None)
    if origin in (Union, UnionType):
        faults = [fault(kind, value) for kind in sorted(inner, key=lambda kind: kind is NoneType)]
        known = dict.fromkeys(wrong for wrong in faults if wrong and wrong != "must be None.")
        alike = all(wrong.startswith("must be ") for wrong in known)
        said = f"must be {' or '.join(wrong[8:-1] for wrong in known)}." if alike else next(iter(known))
        return None if None in faults else said
    if origin is Literal:
        return None if value in inner else f"no such choice{did_you_mean(str(value), map(str, inner))}"
    wrong = _fault_of_class(origin or hint, value)
    if wrong or not inner:
        return wrong
    if origin is Mapping:
        return next((f"{key}: {why}" for key, each in value.items() if (why := fault(inner[1], each))), None)
    items = value if origin in (tuple, list, Sequence, Iterable) and isinstance(value, (tuple, list)) else ()
    return next(filter(None, (fault(inner[0], each) for each in items)), None)


def _fault_of_class(cls: Any, value: Any) -> str | None:
    if cls is NoneType:
        return None if value is None else "must be None."
    if cls is Any or getattr(cls, "_is_protocol", False):
        return None
    if cls is bool:
        return None if isinstance(value, bool) else "must be true or false."
    if cls is int:
        return None if isinstance(value, int) and not isinstance(value, bool) else "must be a whole number."
    if cls is float:  # an int may be larger than any float
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if number and abs(value) <= sys.float_info.max else "must be a finite number."
    if cls in (Sequence, Iterable):  # an array, a tensor, a data set
        own = hasattr(value, "__getitem__") and not isinstance(value, Mapping) or isinstance(value, cls)
        return None if own and not isinstance(value, str) else "must be a sequence."
    name = {str: "text", Mapping: "a mapping", nn.Module: "an nn.Module", Callable: "a function"}.get(cls)
    return None if isinstance(value, cls) else f"must be {name or 'a ' + cls.__name__}."
