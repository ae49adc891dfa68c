"""The tensors in whatever a net returns, by name."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from growshrink.errors import GrowShrinkError


def output_leaves(output: Any) -> dict[str, Tensor]:
    """Every floating point tensor in an output by its path, e.g. `[1]`, `['aux']`, `.logits`; a lone tensor is `""`.

    Lists, tuples, dicts, dataclasses and other objects with attributes are looked into, however nested.
    """
    return {path: leaf for path, leaf in _walk(output, "", ()) if leaf.is_floating_point()}


def paired_leaves(a: Any, b: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The leaves of two outputs by path; GrowShrinkError, with the path, unless both have the same, in equal shapes."""
    ours, theirs = output_leaves(a), output_leaves(b)
    for path in (*ours, *theirs):
        shapes = [tuple(leaves[path].shape) if path in leaves else None for leaves in (ours, theirs)]
        if shapes[0] != shapes[1]:
            first, second = ("nothing" if shape is None else f"shape {shape}" for shape in shapes)
            raise GrowShrinkError(f"output{path} of {first} and of {second} cannot be compared.")
    return {path: (ours[path], theirs[path].to(ours[path].device)) for path in ours}


def _walk(value: Any, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    if id(value) in above or isinstance(value, (str, bytes, nn.Module, type)):
        return
    parts: Iterator[tuple[str, Any]]
    if isinstance(value, Mapping):
        parts = ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        parts = ((f"[{index}]", part) for index, part in enumerate(value))
    elif dataclasses.is_dataclass(value):
        parts = ((f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value))
    else:
        parts = ((f".{key}", part) for key, part in getattr(value, "__dict__", {}).items())
    for key, part in parts:
        yield from _walk(part, f"{path}{key}", (*above, id(value)))
