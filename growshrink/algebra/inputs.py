"""What a net is run on to look at it: images, or example inputs; and the tensors in whatever it returns, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from growshrink.errors import GrowShrinkError, check_size

InputSize = tuple[int, int, int]
#: One size, or every size at which a model takes another path.
InputSizes = InputSize | Sequence[InputSize]
ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""One batch: the only argument of a net, a tuple of its positional arguments, or a dict of its keyword arguments."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call of a net."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        """The same with `function` of every floating point tensor."""

        def of(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        return Arguments(*tree_map(of, (self.args, dict(self.kwargs))))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Arguments:
        """On a device, the floating point tensors in `dtype`."""
        moved = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs))
        return Arguments(*moved).map(lambda tensor: tensor.to(dtype))

    def run(self, model: Any) -> Any:
        """What `model` gives for a copy of it (some nets normalise their input in place)."""
        copies = self.map(Tensor.clone)
        return model(*copies.args, **copies.kwargs)


@dataclass(frozen=True)
class Inputs:
    """What a net is run on: images of a `size`, which may be a guess, or the batch `examples`.

    `others` are further inputs, at which the net takes other paths.
    """

    size: InputSize | None = None
    examples: Arguments | None = None
    guessed: bool = False
    others: tuple[Inputs, ...] = ()

    def each(self) -> tuple[Inputs, ...]:
        """It, and the others."""
        return self, *self.others

    def batch(self, num: int, dtype: torch.dtype = torch.float64, *, seed: int | None = 0) -> Arguments:
        """A batch on the CPU: `num` images of noise (zeros where `seed` is None), or the examples as they are.

        Examples that hold one value everywhere (zeros, ones), which would prove little, are replaced by noise.
        """
        random = None if seed is None else torch.Generator().manual_seed(seed)

        def noise(shape: Sequence[int]) -> Tensor:
            return torch.zeros(*shape) if random is None else torch.randn(*shape, dtype=torch.float64, generator=random)

        if self.examples is None:
            assert self.size is not None
            return Arguments((noise((num, *self.size)).to(dtype),))
        batch = self.examples.to("cpu", dtype)
        return batch.map(lambda t: noise(t.shape).to(dtype) if t.numel() and bool((t == t.flatten()[0]).all()) else t)

    def num_images(self, num: int) -> int:
        """How many images (sequences, vectors) `batch(num)` holds: the length of its first tensor."""
        if self.examples is None:
            return num
        tensors = (t for t in tree_leaves((self.examples.args, dict(self.examples.kwargs))) if isinstance(t, Tensor))
        return next((len(t) for t in tensors if t.dim()), 1)

    def __str__(self) -> str:
        if self.size is None:
            return "the example inputs"
        return "x".join(map(str, self.size)) + ", a guess (pass input_size or example_inputs)" * self.guessed


InputLike = InputSizes | Inputs | None


def given_inputs(input_size: InputLike, example_inputs: ExampleInputs | None = None) -> Inputs | None:
    """What a caller gave of the two; None is neither, GrowShrinkError both or something else."""
    if example_inputs is None:
        if input_size is None or isinstance(input_size, Inputs):
            return input_size
        several = isinstance(input_size, Sequence) and any(isinstance(size, Sequence) for size in input_size)
        sizes: Sequence[Any] = input_size if several else [input_size]
        for size in sizes:
            check_size(size)
        return Inputs(size=sizes[0], others=tuple(Inputs(size=size) for size in sizes[1:]))
    if input_size is not None:
        raise GrowShrinkError("input_size and example_inputs were both given: they say the same, pass one of them.")
    if isinstance(example_inputs, Mapping):
        return Inputs(examples=Arguments((), example_inputs))
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(args)):
        raise GrowShrinkError("example_inputs must be a batch: a tensor, a tuple of them, or a dict of arguments.")
    return Inputs(examples=Arguments(args))


def output_leaves(output: Any) -> dict[str, Tensor]:
    """Every floating point tensor in an output, however nested, by its path: `[1]`, `['aux']`, `.logits`, or `""`."""
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
