"""The teacher of a round."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import timm
from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.config import Checked
from growshrink.base.limits import NotAll, OneOf, Positive, SomeOrAll
from growshrink.base.ranks import this_rank
from growshrink.errors import PlanError
from growshrink.layers.swaps import expand_online
from growshrink.proofs import profile
from growshrink.training.distil import TeacherNet

#: Nets of the run itself.
OWN = ("peak", "previous")
TEACHERS = (*OWN, "wider", "given")


def _is_teacher(name: str) -> bool:
    return name in TEACHERS or timm.is_model(name) or "\0" not in name and Path(name).expanduser().exists()


TeacherName = Annotated[str, OneOf("no such teacher", TEACHERS, _is_teacher)]


@dataclass(frozen=True)
class Teacher(Checked):
    """A net that the one in training learns from.

    A net of the run's own teaches from the end of the hold on, another net from the start of the round on.

    Attributes:
        of: "peak", this round's grown net, averaged and with its learning rate annealed; "previous", the net that the
            round began with; "wider", the run's plain net with its argument `width` multiplied by `kwargs["width"]` (2
            where that is missing); "given", a net that `run_cycle` is handed; any model of timm's; or the path of a
            run's folder or of its plain.safetensors.
        weight: Weight of the teacher's loss; the labels get the rest.
        asked: Share of the updates with a teacher in which it is asked, at least an epoch's whatever the share. After
            these the same images come again, changed and batched as they were, with the answers it gave: its forward
            is paid once an answer (Shen and Xing, FKD, arXiv:2112.01528). What does not fit into memory goes to a file.
        temperature: Temperature of both softmaxes of the teacher's loss (Hinton et al., arXiv:1503.02531).
        share: Share of the round's updates that train another net first, with a learning rate of its own from its peak
            to 0, before it teaches; 0 where it is trained.
        kwargs: Arguments of the model, for one of timm's or "wider". `checkpoint_path` names a file of weights (see
            `read_source`), `pretrained` has timm fetch them.
    """

    of: TeacherName = "peak"
    weight: SomeOrAll = 0.5
    asked: SomeOrAll = 1.0
    temperature: Positive = 3.0
    share: NotAll = 0.0
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.is_net and (self.share or self.kwargs):
            raise PlanError(f"share={self.share!r}, kwargs={dict(self.kwargs)!r}: teacher {self.of!r} has none.")
        finished = self.of == "given" or self.is_file or self.kwargs.keys() & {"pretrained", "checkpoint_path"}
        if self.is_net and not self.share and not finished:
            raise PlanError(f"share=0: teacher {self.of!r} would not be trained; give it a share, or weights.")

    @property
    def is_peak(self) -> bool:
        """Whether it is the round's own grown net, which is annealed for it at the end of the hold."""
        return self.of == "peak"

    @property
    def is_net(self) -> bool:
        """Whether it is another net than the run's."""
        return self.of not in OWN

    @property
    def is_file(self) -> bool:
        """Whether it is read from a run's folder, or from what such a folder holds."""
        return self.of not in TEACHERS and not timm.is_model(self.of)


@dataclass(frozen=True)
class Lessons:
    """When the teacher of a round is asked: in `number` updates from `start` on, the first with a teacher."""

    start: int
    number: int
    teacher: Teacher

    def asked(self, start: int, stop: int) -> int:
        """In how many of the updates from `start` to `stop` it is asked."""
        return max(0, min(stop, self.start + self.number) - max(start, self.start))


class Teaching:
    """Whom the net in training learns from, and what that costs; `net` is the teacher, in eval mode, or None.

    The run's folder takes answers that do not fit into memory.
    """

    def __init__(self, input_size: InputSize, folder: Path) -> None:
        self.net: nn.Module | None = None
        self._size = input_size
        self._file = folder / f"answers-{this_rank()}.bin"
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
            self._teacher = TeacherNet(self.net, plan.weight, plan.temperature, repeat, self._file)
        return self._teacher

    def macs(self, lessons: Lessons | None, start: int, stop: int) -> int:
        """MACs of an image through it in the updates from `start` to `stop`; answers lost by a resume do not count."""
        if self.net is None or lessons is None:
            return 0
        return lessons.asked(start, stop) * self._forward_macs
