"""Dataclasses of plain values: checked field by field by the limits in their types, and taken to JSON and back."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from growshrink.base.limits import fault
from growshrink.errors import GrowShrinkError, PlanError, did_you_mean

T = TypeVar("T")
#: Key that names the class where a field may hold one of several.
KIND = "kind"


class Variant:
    """Base of dataclasses of which a field may hold one of several, named in the class statement.

    `class Exit(Variant)` opens a family, `class Fuse(Exit, kind="fuse")` is one of it; `kind=""` makes another base.
    """

    kinds: ClassVar[dict[str, type[Any]]]
    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str | None = None, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if kind is None:
            cls.kinds = {}
        else:
            cls.kind = kind
            if kind:
                cls.kinds[kind] = cls


def field_types(cls: type) -> dict[str, Any]:
    """Type of each field of a dataclass, limits included."""
    hints = get_type_hints(cls, include_extras=True)
    return {entry.name: hints[entry.name] for entry in fields(cls)}


def check_fields(instance: Any, error: type[GrowShrinkError] = PlanError) -> None:
    """Raise `error` for the first field of a dataclass whose value its type, or a limit in its type, does not allow."""
    for name, hint in field_types(type(instance)).items():
        value = getattr(instance, name)
        if wrong := fault(hint, value):
            raise error(f"{name}={value!r}: {wrong}")


class Checked:
    """Base of dataclasses that check their fields when they are made, and raise `error`."""

    error: ClassVar[type[GrowShrinkError]] = PlanError

    def __post_init__(self) -> None:
        check_fields(self, self.error)


def to_dict(instance: Any) -> Any:
    """Take a dataclass, or anything made of them, to what JSON can hold; the inverse of `from_dict`."""
    if is_dataclass(instance) and not isinstance(instance, type):
        kind = {KIND: instance.kind} if isinstance(instance, Variant) else {}
        return {**kind, **{entry.name: to_dict(getattr(instance, entry.name)) for entry in fields(instance)}}
    if isinstance(instance, Mapping):
        return {key: to_dict(value) for key, value in instance.items()}
    if isinstance(instance, (list, tuple)):
        return [to_dict(value) for value in instance]
    return instance


def from_dict(cls: type[T], values: Any, what: str, error: type[GrowShrinkError] = PlanError) -> T:
    """Make a dataclass from what JSON can hold.

    Where `cls` opens a family (see `Variant`), `values` names one of it under "kind", or is that name alone.

    Args:
        cls: The dataclass; its fields may hold others, tuples of them and mappings to them.
        values: By name of the field.
        what: Name of the whole in messages.
        error: What is raised.

    Raises:
        GrowShrinkError: `error`, for unknown or missing keys and for values that a field cannot have.
    """
    if kinds := _kinds(cls):
        values = {KIND: values} if isinstance(values, str) else values
        if not isinstance(values, Mapping) or not isinstance(name := values.get(KIND), str):
            raise error(f"{what}: must be one of {', '.join(kinds)}, got {values!r}.")
        if name not in kinds:
            raise error(f"{what}: no such {cls.__name__.lower()} {name!r}{did_you_mean(name, kinds)}")
        return from_dict(kinds[name], {key: v for key, v in values.items() if key != KIND}, what, error)
    if not isinstance(values, Mapping):
        raise error(f"{what}: must be an object, got {values!r}.")
    types = field_types(cls)
    for key in values:
        if key not in types:
            raise error(f"{what}: {key!r} is not an option of {cls.__name__}{did_you_mean(str(key), types)}")
    missing = [
        entry.name
        for entry in fields(cls)  # type: ignore[arg-type]
        if entry.name not in values and entry.default is MISSING and entry.default_factory is MISSING
    ]
    if missing:
        raise error(f"{what}: {missing[0]} is missing.")
    within = f"{what}." if what and " " not in what else ""
    made = {key: _make(types[key], value, f"{within}{key}", error) for key, value in values.items()}
    try:
        return cls(**made)
    except error as refused:
        raise error(f"{what}: {refused}") from refused


def _make(hint: Any, value: Any, what: str, error: type[GrowShrinkError]) -> Any:
    """The value of a field; what is no dataclass is left to the dataclass around it to check."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _make(inner[0], value, what, error)
    if origin in (Union, UnionType):
        kinds = [kind for kind in inner if kind is not NoneType]
        return value if value is None or len(kinds) != 1 else _make(kinds[0], value, what, error)
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        return origin(_make(inner[0], each, f"{what}[{index}]", error) for index, each in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {key: _make(inner[1], each, f"{what}.{key}", error) for key, each in value.items()}
    if isinstance(hint, type) and (is_dataclass(hint) or _kinds(hint)):
        return from_dict(hint, value, what, error)
    return value


def _kinds(cls: type) -> Mapping[str, type[Any]]:
    """The family that `cls` opens, by name; empty for every other class."""
    return cls.kinds if issubclass(cls, Variant) and "kinds" in vars(cls) else {}
