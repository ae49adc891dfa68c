"""Names of models."""

from collections.abc import Mapping
from typing import Any


def plain_form(name: str, kwargs: Mapping[str, Any], *, grown: bool) -> tuple[str, dict[str, Any]]:
    """Name and arguments for `timm.create_model` of the plain net that a model, `grown` at birth or not, fuses into."""
    plain_kwargs = {
        key: value for key, value in kwargs.items() if key not in ("expansion", "pretrained", "checkpoint_path")
    }
    return name.split("_x")[0] if grown else name, plain_kwargs
