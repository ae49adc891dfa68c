"""A finished net that a supernet learns from."""

from __future__ import annotations

from typing import Any

import torch
from timm.task import DistillationTeacher
from torch import Tensor, nn


class OuterTeacher(nn.Module):
    """Logits of a finished net, always in eval mode.

    A module is fed what the student is fed; timm's `DistillationTeacher`, or a pretrained timm model by its name, gets
    its own normalisation, the `pretrained_cfg` of the student saying how its images were normalised.
    """

    def __init__(
        self, teacher: nn.Module | str, student: nn.Module, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        if isinstance(teacher, str):
            like: dict[str, Any] = {key: getattr(student, key) for key in ("num_classes", "in_chans")}
            teacher = DistillationTeacher(teacher, **like, device=device, dtype=dtype)
        self._teacher = teacher.eval().requires_grad_(False)
        cfg = getattr(student, "pretrained_cfg", None) or {}
        for key in ("mean", "std"):
            value = cfg.get(key)
            known = isinstance(teacher, DistillationTeacher) and value is not None
            buffer = teacher.get_buffer(f"{key}_kd").clone() if known else None
            if buffer is not None:
                buffer.copy_(torch.tensor(value, dtype=buffer.dtype).view_as(buffer))
            self.register_buffer(key, buffer, persistent=False)
        self.mean: Tensor | None
        self.std: Tensor | None

    @property
    def net(self) -> nn.Module:
        """The teacher's own net."""
        inner = self._teacher
        return inner.model if isinstance(inner, DistillationTeacher) else inner

    def train(self, mode: bool = True) -> OuterTeacher:
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The student's images `(N, C, H, W)` -> logits `(N, num_classes)`."""
        if isinstance(self._teacher, DistillationTeacher):
            x = self._teacher.normalize_input(x, self.mean, self.std)
        return self._teacher(x)
