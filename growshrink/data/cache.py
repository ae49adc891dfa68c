"""Decoded images kept on disk, so that the next start maps them into memory instead of decoding again.

One safetensors file for each folder and image size, in `~/.cache/growshrink/images` (or below `XDG_CACHE_HOME`). It may
be removed at any time. It is replaced by a rename, so several processes may read and write it at once, and it is used
only while names, sizes and modification times of all image files are those it was made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from growshrink.base.reading import parse_json, read_tensors
from growshrink.errors import RunError

#: Seconds of decoding above which the result is kept.
WORTH = 1.0
#: Changes whenever images are decoded in another way.
VERSION = 1


def cache_folder() -> Path:
    """Where decoded images are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "growshrink" / "images"


class DecodeCache:
    """The cache entry of one folder at one image size.

    Attributes:
        path: Its file.
        key: Digest of what it was made from.
    """

    def __init__(self, root: Path, paths: Sequence[str], image_size: int | None) -> None:
        place = hashlib.blake2b(f"{root.resolve()}\n{image_size}".encode(errors="surrogateescape"), digest_size=10)
        self.path = cache_folder() / f"{place.hexdigest()}.safetensors"
        digest = hashlib.blake2b(f"{VERSION}".encode(), digest_size=16)
        for path in paths:
            stat = os.stat(path)
            name = path.removeprefix(str(root)).lstrip(os.sep)
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        self.key = digest.hexdigest()

    def read(self) -> tuple[Tensor, dict[str, Any]] | None:
        """Images, mapped from the file, and what was noted of them; None where there is no entry that holds."""
        found: dict[str, str] = {}
        try:
            images = read_tensors(self.path, found.update)["images"]
            about = parse_json(found["about"])
            return (images, about["notes"]) if about["key"] == self.key else None
        except (RunError, KeyError, TypeError, ValueError):
            return None

    def write(self, images: Tensor, notes: dict[str, Any]) -> None:
        """Keep images (N, H, W, C); on a full or read-only disk nothing happens."""
        about = json.dumps({"key": self.key, "notes": notes})
        with contextlib.suppress(OSError, SafetensorError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                partial = Path(folder) / self.path.name
                save_file({"images": images}, partial, {"about": about})
                os.replace(partial, self.path)
