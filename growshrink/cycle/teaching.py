"""The teacher of a round."""

from __future__ import annotations

from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.cycle.timeline import Segment, Timeline
from growshrink.layers.swaps import expand_online
from growshrink.proofs._profile import profile
from growshrink.training.distil import Teacher


class Teaching:
    """Whom the net in training learns from, and what that costs.

    Args:
        timeline: When a round has a teacher, and how long it is asked.
        input_size: `(C, H, W)`.

    Attributes:
        net: The teacher, in eval mode; None where there is none.
    """

    def __init__(self, timeline: Timeline, input_size: InputSize) -> None:
        self.net: nn.Module | None = None
        self._timeline = timeline
        self._size = input_size
        self._teacher: Teacher | None = None
        self._forward_macs = 0

    def appoint(self, net: nn.Module) -> None:
        """A copy of `net` is the teacher from now on."""
        self.net, self._teacher = expand_online(net).eval().requires_grad_(False), None
        self._forward_macs = profile(self.net, self._size).macs

    def dismiss(self) -> None:
        """There is none any more."""
        self.net = self._teacher = None

    def of(self, segment: Segment) -> Teacher | None:
        """The teacher of a phase: always the same one in a round, as it remembers what it has answered."""
        if self.net is None or segment.phase == "hold":
            return None
        if self._teacher is None:
            plan = self._timeline.plan.rounds[segment.round - 1]
            repeat = self._timeline.questions(segment.round) if plan.distil_asked < 1 else None
            self._teacher = Teacher(self.net, plan.distil_weight, plan.temperature, repeat)
        return self._teacher

    def macs(self, segment: Segment, start: int, stop: int) -> int:
        """Of its forward passes for one image in each of the updates from `start` to `stop` of a phase.

        Answers that are asked for once more after a resume are not counted again: they belong to no plan.
        """
        return self._timeline.asked(segment, start, stop) * self._forward_macs if self.of(segment) is not None else 0
