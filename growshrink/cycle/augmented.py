"""A round whose middle widths are sampled: NetAug in the place of plain training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.config import Checked
from growshrink.base.copying import copy_net
from growshrink.base.limits import NotNegative, OneOf, Share
from growshrink.base.ranks import this_rank
from growshrink.cycle.records import Grew, LeftBy, TriedWidth
from growshrink.cycle.surgery import CALIBRATION_BATCHES
from growshrink.layers.widths import Width, WidthSpace, set_width, width_space
from growshrink.supernet import NetAugTask, WidthChoice, save_supernet
from growshrink.supernet.cost import StepCost
from growshrink.supernet.passes import MODES, NUM_AUGMENTED
from growshrink.training.calibrate import calibrate_bn
from growshrink.training.trainer import Trainer


@dataclass(frozen=True)
class NetAug(Checked):
    """How middle widths are sampled while the net is grown (NetAug, Cai et al., arXiv:2110.08890).

    Attributes:
        mode: Mode of `NetAugTask`.
        alpha: Weight of the loss of the augmented net, on average over updates; None gives its loss, in the updates
            that have one, the weight of the base's.
        inplace_distil: Share of the base net's loss that comes from the augmented net's logits; None is the mode's own.
    """

    mode: Annotated[str, OneOf("no such mode", MODES)] = "netaug"
    alpha: NotNegative | None = None
    inplace_distil: Share | None = None


class Augmentation:
    """The sampled widths of a round, for as long as the structure and the teacher stay as they are.

    `task` computes the gradients, `space` are the widths it draws from, `cost` counts MACs, an image's, of all passes
    and the teacher; the net is grown from update `span[0]` to `span[1]`.
    """

    def __init__(self, trainer: Trainer, task: NetAugTask, span: tuple[int, int], input_size: InputSize) -> None:
        self.task = task.attach(trainer.optimizer)
        self.space: WidthSpace = task.space
        self._span = span
        if trainer.ema is not None:
            set_width(trainer.ema, self.space.base)
        self.cost = StepCost(task, input_size)

    def judged(self, trainer: Trainer) -> nn.Module:
        """The net to score while training: the one to judge, with statistics of its own where no update has any."""
        if NUM_AUGMENTED[self.task.mode]:
            return trainer.best
        return recalibrated(trainer, self.space.base)  # `single` trains no base net

    def describe(self, exit: str, width: Width, choice: WidthChoice | None) -> LeftBy:
        """What the round's record says of widths that were left at `width`."""
        task = self.task
        tried = choice.candidates if choice is not None else ()
        return LeftBy(
            mode=task.mode,
            every=task.every,
            inplace_distil=task.inplace_distil,
            nets=self.space.size,
            step_macs=self.cost.mean(*self._span),
            exit=exit,
            width=name_width(width, self.space),
            candidates=[TriedWidth(width=name_width(c.width, self.space), top1=c.score) for c in tried],
        )


def recalibrated(trainer: Trainer, width: Width) -> nn.Module:
    """A copy of the net to be judged at `width`, with statistics of its own."""
    net = copy_net(trainer.best)
    set_width(net, width)
    calibrate_bn(net, trainer.recent_images(CALIBRATION_BATCHES))
    return net


def save_net(path: Path, model: nn.Module, model_about: Mapping[str, Any], grew: Grew, input_size: InputSize) -> None:
    """Write a supernet of the run, grown as `grew` says, if `model_about` says how to make its model."""
    if "name" not in model_about or this_rank() > 0:
        return
    grow = {"branch": grew.branches, "ratio": grew.ratio, "where": grew.names, "seed": grew.seed}
    about: dict[str, Any] = {"input_size": list(input_size), "grow": grow if grew.names else None}
    about |= {key: model_about[f"plain_{key}" if grew.names else key] for key in ("name", "kwargs")}
    save_supernet(path, model, width_space(model), about)


def name_width(width: Width, space: WidthSpace) -> str | dict[str, int]:
    """A width by the name of its level, where it has one."""
    for index in (0, *range(space.diversity, 0, -1)):  # a space of few choices has equal levels
        if width == space.level(index / space.diversity):
            return {0: "base", space.diversity: "full"}.get(index, f"level {index} of {space.diversity}")
    return dict(width)
