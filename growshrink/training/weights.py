"""The keys of a state_dict, without what wrappers put before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def clean_keys(state: Mapping[str, T]) -> dict[str, T]:
    """The same state_dict under the keys of the net inside.

    `nn.DataParallel`, `DistributedDataParallel` and timm's `ModelEmaV3` put `module.` before every key,
    `torch.compile(net)` puts `_orig_mod.`, before the part that was compiled; in any order and number.

    >>> clean_keys({"module._orig_mod.stem.weight": 1, "module._orig_mod.head._orig_mod.bias": 2})
    {'stem.weight': 1, 'head.bias': 2}
    """
    cleaned = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while cleaned and all(key.startswith("module.") for key in cleaned):
        cleaned = {key.removeprefix("module."): value for key, value in cleaned.items()}
    return cleaned
