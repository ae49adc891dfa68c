"""What the updates of a supernet cost, pass by pass."""

import torch

from growshrink.algebra.dataflow import InputSize
from growshrink.base.copying import copy_net
from growshrink.layers.widths import Slots, Width, active_width
from growshrink.proofs._profile import flop_counter, profile, training_macs
from growshrink.supernet.task import NetAugTask


class StepCost:
    """MACs of an update of a `NetAugTask`, an image: of the graphs that are run, forward and backward, all passes.

    A convolution costs what its channels cost, so the cost of a net is that of the base plus so much for each channel
    of each branch, and a few counted nets give the cost of all of them. (Where one branch lies in another, `nest`, each
    width is counted; of a slim net too, whose layers cost what two widths multiply to.)
    """

    def __init__(self, task: NetAugTask, input_size: InputSize) -> None:
        self._task, self._size, self._base = task, input_size, task.space.base
        self._model = copy_net(task.trainable_module).to("meta")
        self._base_macs = self._count(self._base)
        self._nested = any(b.startswith(f"{a}.") for a in self._base for b in self._base)
        self._nested |= bool(Slots(self._model).layers)
        self._per_channel: dict[str, float] = {}
        for name, slot in () if self._nested else Slots(self._model):
            grown = slot.full - self._base[name]
            extra = self._count({**self._base, name: slot.full}) - self._base_macs if grown else 0
            self._per_channel[name] = extra / max(grown, 1)
        self._prefixes: dict[int, int] = {}
        self._asked: int | None = None  # always the full net
        self._teacher = 0 if task.teacher is None else profile(task.teacher.net, input_size).macs

    def of_width(self, width: Width) -> int:
        """Forward and backward of the net at `width`."""
        if self._nested:
            return self._count(width)
        extra = sum(self._per_channel[name] * (value - self._base[name]) for name, value in width.items())
        return self._base_macs + round(extra)

    def of_update(self, update: int) -> int:
        """All passes of one update, an image."""
        passes = self._task.passes(update)
        total = self._teacher + self.of_width(passes.width)
        shared = 0 if passes.start is None else self._prefix(passes.start)
        total += sum(self.of_width(width) - shared for width in passes.augmented)
        if passes.asked is not None and self._task.inplace_distil:
            if self._asked is None:
                with active_width(self._model, passes.asked):
                    self._asked = profile(self._model, self._size).macs
            total += self._asked
        return total

    def total(self, start: int, stop: int) -> int:
        """MACs of all updates from `start` to `stop` (exclusive)."""
        return sum(map(self.of_update, range(start, stop)))

    def mean(self, start: int = 0, stop: int = 1000) -> float:
        """MACs of an average update from `start` to `stop` (exclusive)."""
        return self.total(start, stop) / (stop - start)

    def _count(self, width: Width) -> int:
        with active_width(self._model, width):
            return training_macs(self._model, self._size)

    def _prefix(self, start: int) -> int:
        """Forward and backward, at base width, of what comes before unit number `start` of the chain."""
        if start not in self._prefixes:
            assert self._task.chain is not None
            chain = self._task.chain.of_copy(self._model.train())
            with flop_counter() as counter:
                out = chain.prefix(torch.empty(2, *self._size, device="meta"), start)
                if out.requires_grad:
                    out.sum().backward()
            self._prefixes[start] = counter.get_total_flops() // 4
        return self._prefixes[start]
