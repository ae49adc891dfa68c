"""Random generators that are named by what they are for, so that any of them can be made again at any time."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone; torch's global generator is neither read nor moved.

    They are hashed: draws for two purposes, or of seeds 0, 1, 2, ..., have nothing in common. `purpose` is what the
    numbers are drawn for, `numbers` are for example a seed and an epoch.

    >>> draws = [torch.randint(1000, (3,), generator=generator("order", 0, epoch)).tolist() for epoch in (4, 4, 5)]
    >>> draws[0] == draws[1], draws[1] == draws[2]
    (True, False)
    """
    digest = hashlib.blake2b(repr((purpose, *map(int, numbers))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@contextmanager
def own_randomness(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed every global random stream, of a CUDA `device` too; afterwards they are where they were."""
    python, numpys = random.getstate(), np.random.get_state()
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpys)
