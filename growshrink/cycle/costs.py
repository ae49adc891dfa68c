"""What the nets of a plan cost, before anything is trained; the phases make a sum of it (`Phases.macs`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.copying import copy_net
from growshrink.cycle.plan import CyclePlan
from growshrink.cycle.records import plain_net
from growshrink.data.feed import UpdateBatches
from growshrink.layers.activations import set_lambda
from growshrink.layers.grown import grown_modules
from growshrink.proofs._profile import profile, training_macs
from growshrink.transforms import collapse_online, collapse_report, grow


@dataclass(frozen=True)
class NetCost:
    """A net, and its MACs of an image: forward and backward, and forward alone."""

    net: nn.Module
    train: int
    forward: int

    @staticmethod
    def of(net: nn.Module, input_size: InputSize) -> NetCost:
        """Counted on the meta device."""
        return NetCost(net, training_macs(net, input_size), profile(net, input_size).macs)


class Costs:
    """The nets of a run and their costs, made once; layouts of any length are then counted at once.

    Args:
        model: As it would be given to `run_cycle`.
        plan: Its rounds; their lengths do not matter.
        batches: Of the run; only their size is looked at.
        input_size: `(C, H, W)`.
        teachers: Nets of `teacher_nets`.

    Attributes:
        first: The net the run begins with.
        plain: The plain net.
        grown: Of each round, in order.
        teachers: Of the rounds that another net teaches, by number.
        input_size: `(C, H, W)`.
        batch_size: Images per update.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: CyclePlan,
        batches: UpdateBatches,
        input_size: InputSize,
        teachers: Mapping[int, nn.Module] | None = None,
    ) -> None:
        self.input_size = input_size
        self.batch_size = batches.batch_size
        plain = plain_net(model, input_size)
        self.first = NetCost.of(model, input_size)
        self.plain = NetCost.of(plain, input_size)
        made: dict[tuple[object, ...], NetCost] = {}
        self.grown: list[NetCost] = []
        for number, entry in enumerate(plan.rounds):
            key = (number == 0 and bool(grown_modules(model)), entry.branch, entry.ratio, entry.where)
            if key not in made:
                made[key] = self.first
                if not entry.branch:
                    made[key] = self.plain
                elif not key[0]:
                    net = grow(plain, entry.branch, ratio=entry.ratio, where=entry.where, input_size=input_size)
                    made[key] = NetCost.of(net, input_size)
            self.grown.append(made[key])
        self.teachers = {number: NetCost.of(net, input_size) for number, net in (teachers or {}).items()}

    def online(self, grown: NetCost, lam: float) -> int:
        """MACs of an image in an update in which the branches that are linear at `lam` run merged."""
        net = copy_net(grown.net)
        set_lambda(net, lam)
        if any(row.merged for row in collapse_report(net).rows):
            collapse_online(net, choose="always", inplace=True)
        return training_macs(net, self.input_size, self.batch_size)
