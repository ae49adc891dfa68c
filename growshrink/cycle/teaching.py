"""The teacher of a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.config import Checked
from growshrink.base.limits import OneOf, Positive, SomeOrAll
from growshrink.layers.swaps import expand_online
from growshrink.proofs import profile
from growshrink.training.distil import TeacherNet

TEACHERS = ("peak", "previous")


@dataclass(frozen=True)
class Teacher(Checked):
    """A net that the one in training learns from, from the end of the hold on.

    Attributes:
        of: "peak", this round's grown net, averaged and with its learning rate annealed; or "previous", the net that
            the round began with.
        weight: Of the teacher's loss; the labels get the rest.
        asked: Share of the updates with a teacher in which it is asked, at least an epoch's whatever the share. After
            these the same images come again, changed and batched as they were, with the answers it gave: its forward
            is paid once an answer (Shen and Xing, FKD, arXiv:2112.01528). The answers stay on the device.
        temperature: Of both softmaxes of the teacher's loss (Hinton et al., arXiv:1503.02531).
    """

    of: Annotated[str, OneOf("no such teacher", TEACHERS)] = "peak"
    weight: SomeOrAll = 0.5
    asked: SomeOrAll = 1.0
    temperature: Positive = 3.0

    @property
    def is_peak(self) -> bool:
        """Whether it is the round's own grown net, which is annealed for it at the end of the hold."""
        return self.of == "peak"

    @property
    def is_start(self) -> bool:
        """Whether it is the net that the round begins with."""
        return self.of == "previous"


@dataclass(frozen=True)
class Lessons:
    """When the teacher of a round is asked.

    Attributes:
        start: The first update with a teacher.
        number: In how many updates from there on it is asked.
        teacher: Which.
    """

    start: int
    number: int
    teacher: Teacher

    def asked(self, start: int, stop: int) -> int:
        """In how many of the updates from `start` to `stop` it is asked."""
        return max(0, min(stop, self.start + self.number) - max(start, self.start))


class Teaching:
    """Whom the net in training learns from, and what that costs.

    Args:
        input_size: `(C, H, W)`.

    Attributes:
        net: The teacher, in eval mode; None where there is none.
    """

    def __init__(self, input_size: InputSize) -> None:
        self.net: nn.Module | None = None
        self._size = input_size
        self._teacher: TeacherNet | None = None
        self._forward_macs = 0

    def set_teacher(self, net: nn.Module | None) -> None:
        """A copy of `net` teaches from now on; None ends the teaching."""
        self._teacher = None
        self.net = None if net is None else expand_online(net).eval().requires_grad_(False)
        if self.net is not None:
            self._forward_macs = profile(self.net, self._size).macs

    def during(self, lessons: Lessons | None) -> TeacherNet | None:
        """The teacher of a phase: always the same one in a round, as it remembers what it has answered."""
        if self.net is None or lessons is None:
            return None
        if self._teacher is None:
            plan = lessons.teacher
            repeat = (lessons.start, lessons.number) if plan.asked < 1 else None
            self._teacher = TeacherNet(self.net, plan.weight, plan.temperature, repeat)
        return self._teacher

    def macs(self, lessons: Lessons | None, start: int, stop: int) -> int:
        """MACs of its forward passes for one image in each of the updates from `start` to `stop`.

        Answers that are asked for once more after a resume are not counted again: they belong to no plan.
        """
        if self.net is None or lessons is None:
            return 0
        return lessons.asked(start, stop) * self._forward_macs
