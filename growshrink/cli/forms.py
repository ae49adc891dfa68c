"""A command line out of a dataclass.

The fields of the dataclass are options. A field that holds another dataclass is a component: the fields of that one
are options too, a group of their own in --help. A field of a component that holds a dataclass is one option again, in a
compact form: its kind, or the value of its first field, then FIELD=VALUE for what is not the default.

    --lr 0.2 --exit fuse,accept_within=0.5 --teacher none

Help is taken from the docstrings of the fields, limits from their types (`growshrink.base.limits`).
"""

import ast
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import cache, reduce
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from growshrink.base.config import KIND, field_types, from_dict, to_dict
from growshrink.base.limits import Limit, NoOption, OneOf, fault
from growshrink.errors import GrowShrinkError, RunError

T = TypeVar("T")
_PICKED = "picked"
#: Field that takes what is no field, in the compact form.
_MORE = "kwargs"
#: A comma that does not stand in brackets.
_COMMA = re.compile(r",(?![^(\[]*[)\]])")


def given(*names: str) -> bool:
    """Whether any of these options was typed on the command line of this process."""
    typed = {word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for word in sys.argv[1:]}
    return not typed.isdisjoint(names)


def pick(default: Any, *names: str) -> Any:
    """Field for a component of which `names` are options; the other fields stay as `default` has them."""
    assert {entry.name for entry in fields(default)}.issuperset(names), names
    return field(default=default, metadata={_PICKED: names})


@dataclass(frozen=True)
class Option:
    """An option of a program: a field `name` that the class `owner` declares, its type with limits, its default.

    `compact` is the class of its values, where they are given in the compact form.
    """

    name: str
    owner: type
    hint: Any
    default: Any
    compact: type | None = None

    @property
    def doc(self) -> str:
        """What the class says of the field."""
        return _docs(self.owner).get(self.name, "")

    def spell(self, value: Any) -> str:
        """Write the option with a value as a command line has it."""
        name = "" if tyro.conf.Positional in _marks(self.hint) else f"--{self.name.replace('_', '-')} "
        return name + shown(value)

    def read(self, value: Any) -> Any:
        """Return what the field gets; RunError if its type, or a limit in it, does not allow the value."""
        if self.compact is not None:
            optional = NoneType in get_args(self.hint) and value.lower() == "none"
            return None if optional else _from_compact(self.compact, value, self.spell(value))
        if wrong := fault(self.hint, value):
            raise RunError(f"{self.spell(value)}: {wrong}")
        return value

    def form(self) -> tuple[str, Any, Any]:
        """Make the field of the form: limits stay out, `read` has them."""
        hint, default, doc = get_type_hints(self.owner)[self.name], self.default, self.doc
        metavar = "|".join(_known_names(self.hint)) or None
        if default is not None and get_origin(hint) in (Union, UnionType):  # what has another default cannot be None
            hint = reduce(or_, (each for each in get_args(hint) if each is not NoneType))
        if self.compact is not None:
            doc += " " + " | ".join([*_alternatives(self.compact), *["none"] * (NoneType in get_args(self.hint))])
            hint, default, metavar = str, "none" if default is None else shown(default), "KIND[,FIELD=VALUE ...]"
        for each in (tyro.conf.arg(help=doc, prefix_name=False, metavar=metavar), *_marks(self.hint)):
            hint = Annotated[hint, each]
        return self.name, hint, field() if default is MISSING else field(default=default)


def parts_of(cls: type) -> dict[str, tuple[Any, dict[str, Option]]]:
    """The components of a dataclass by name, each as it is by default and with its options; own options under ""."""
    types, own = field_types(cls), dict[str, Option]()
    parts: dict[str, tuple[Any, dict[str, Option]]] = {"": (None, own)}
    for entry in fields(cls):
        if _class_of(types[entry.name]) is None:
            own[entry.name] = Option(entry.name, _owner(cls, entry.name), types[entry.name], entry.default)
            continue
        part, inner = entry.default, field_types(type(entry.default))
        options = {
            name: Option(name, _owner(type(part), name), hint, getattr(part, name), _class_of(hint))
            for name, hint in inner.items()
            if name in entry.metadata.get(_PICKED, inner)
            and not any(isinstance(each, NoOption) for each in getattr(hint, "__metadata__", ()))
        }
        parts[entry.name] = part, options
    return parts


def form_of(cls: type) -> type:
    """Make the dataclass that tyro fills and `read_form` reads: what `cls` has, its components as forms too."""
    entries = []
    for name, (default, options) in parts_of(cls).items():
        inner = [option.form() for option in options.values()]
        if name:
            part = _make_form(type(default), inner)
            inner = [(name, Annotated[part, tyro.conf.arg(name=getattr(default, "group", name))], field())]
        entries += inner
    return _make_form(cls, entries)


def read_form(cls: type[T], form: Any) -> T:
    """Make a dataclass of its form; RunError, with the option as it is typed, for what it cannot hold."""
    values: dict[str, Any] = {}
    for name, (default, options) in parts_of(cls).items():
        source = getattr(form, name) if name else form
        given = {key: option.read(getattr(source, key)) for key, option in options.items()}
        try:
            values |= {name: replace(default, **given)} if name else given
        except GrowShrinkError as error:  # a component that checks itself says FIELD=VALUE: ...
            key, text = str(error).partition("=")[0], str(error).partition(": ")[2]
            raise RunError(f"{options[key].spell(given[key])}: {text}" if key in options else str(error)) from error
    return cls(**values)


def plain_options(args: Any) -> dict[str, Any]:
    """Take all options of a program to what JSON can hold, by name."""
    values = {
        key: getattr(getattr(args, name) if name else args, key)
        for name, (_, options) in parts_of(type(args)).items()
        for key in options
    }
    return {key: str(value) if isinstance(value, Path) else to_dict(value) for key, value in values.items()}


def shown(value: Any) -> str:
    """Write a value as a command line has it."""
    if isinstance(value, tuple):
        return " ".join(map(shown, value))
    if is_dataclass(value):
        names = {entry.name: getattr(value, entry.name) for entry in fields(value)}
        kind = getattr(value, KIND, None) or names.pop(next(iter(names)))
        changed = (entry.name for entry in fields(value) if entry.name in names and names[entry.name] != entry.default)
        return ",".join([str(kind), *(f"{name}={names[name]}" for name in changed)])
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def read_pairs(pairs: Iterable[str], what: str) -> dict[str, Any]:
    """Read KEY=VALUE strings; values are Python literals (true, false and none too, in any case), or text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise RunError(f"{what}: {pair!r} must be KEY=VALUE.")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return values


def _from_compact(cls: Any, text: str, what: str) -> Any:
    pairs, names = _COMMA.split(text), [entry.name for entry in fields(cls)] if is_dataclass(cls) else []
    if "=" not in pairs[0]:
        pairs[0] = f"{KIND if 'kinds' in vars(cls) else names[0]}={pairs[0]}"
    values = read_pairs(pairs, what)
    if values.get(KIND, "") is None:
        values[KIND] = "none"
    if _MORE in names and (more := {key: values.pop(key) for key in [*values] if key not in names}):
        values[_MORE] = more
    return from_dict(cls, values, what)


def _alternatives(cls: Any) -> list[str]:
    """The compact forms that there are, each with its fields and what they are by default."""
    found = []
    for kind, each in vars(cls).get("kinds", {None: cls}).items():
        entries = list(fields(each))
        if kind is None:
            first = entries.pop(0).name
            kind = "|".join(_known_names(field_types(each)[first])) or first.upper()
        shown_as = {entry.name: f"{entry.name}={entry.default}" for entry in entries} | {_MORE: "ARGUMENT=..."}
        found.append("".join([kind, *(f"[,{shown_as[entry.name]}]" for entry in entries)]))
    return found


def _marks(hint: Any) -> list[Any]:
    """What a type says to tyro."""
    return [each for each in getattr(hint, "__metadata__", ()) if not isinstance(each, Limit)]


def _known_names(hint: Any) -> tuple[str, ...]:
    """The names that an option can have, where these are few."""
    for inner in get_args(hint) if get_origin(hint) in (Annotated, Literal) else ():
        if isinstance(inner, OneOf) and not callable(inner.names) and len(names := tuple(inner.names)) <= 8:
            return names
    return get_args(hint) if get_origin(hint) is Literal else ()


def _class_of(hint: Any) -> type | None:
    """The dataclass, or the base of several, that a field may hold."""
    for inner in (hint, *get_args(hint)):
        if isinstance(inner, type) and (is_dataclass(inner) or "kinds" in vars(inner)):
            return inner
    return None


def _owner(cls: type, name: str) -> type:
    return next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", ()))


@cache
def _docs(cls: type) -> dict[str, str]:
    """Docstrings of the fields that a class declares, below them or under "Attributes:"."""
    found = docstring_parser.parse_from_object(cls).params
    return {each.arg_name: " ".join((each.description or "").split()) for each in found}


def _make_form(cls: type, entries: list[tuple[str, Any, Any]]) -> type:
    form = make_dataclass(cls.__name__, entries, kw_only=True)
    form.__doc__ = (cls.__doc__ or "").split("\n\n")[0]
    return form
