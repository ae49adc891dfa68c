"""Plain training with maps on the gradients: growth at the plain net's cost, in a run without rounds.

A new source of maps is one class statement, `class Mine(Gradients, kind="mine")`, as a new exit is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, cast

import torch
from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.config import Variant, check_fields
from growshrink.base.limits import Count, Interval
from growshrink.base.ranks import run_on_rank0
from growshrink.branches.base import Chain
from growshrink.branches.spec import BranchKind, BranchSpec
from growshrink.cycle.running import Run
from growshrink.errors import PlanError
from growshrink.proofs._profile import profile, training_macs
from growshrink.schedules import constant, cosine
from growshrink.training.gradient_maps import GradientMaps, compile_gradients
from growshrink.training.pixels import pixel_maps
from growshrink.training.trainer import Trainer
from growshrink.transforms import collapse_online, grow


@dataclass(frozen=True, kw_only=True)
class Gradients(Variant, ABC):
    """Where the maps come from."""

    def __post_init__(self) -> None:
        check_fields(self)

    def looks(self, updates: int) -> tuple[int, ...]:
        """Updates, of so many, after which `renew` is called too; it is called at the start in any case."""
        return ()

    @abstractmethod
    def renew(self, run: Run, seed: int) -> None:
        """Map the trainer's gradients from now on."""

    def macs(self, net: nn.Module, input_size: InputSize, batch_size: int, updates: int) -> int:
        """Training MACs of an image that `renew` takes in a run of so many updates."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Branches(Gradients, kind="branches"):
    """Maps that training `branch` apart would amount to; the net starts with the branches' own starts added to it.

    Attributes:
        branch: Kinds, in their forms without norms; see `BranchSpec`.
    """

    branch: tuple[BranchKind, ...] = ("repvgg",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.specs()

    def specs(self) -> list[BranchSpec]:
        """What is grown."""
        return [BranchSpec(kind=kind, norm=None) for kind in self.branch]

    def grown(self, net: nn.Module, input_size: InputSize, seed: int = 0) -> nn.Module:
        """A copy of `net` with the branches."""
        return grow(net, self.specs(), init="paper", seed=seed, input_size=input_size)

    def renew(self, run: Run, seed: int) -> None:
        """See `Gradients.renew`."""
        self.start(run, self.grown(run.trainer.model, run.size, seed))

    def start(self, run: Run, grown: nn.Module) -> None:
        """Begin with the weights and maps of `grown`."""
        plain, maps = compile_gradients(grown, inplace=True, input_size=run.size)
        for net in run.trainer.nets:
            net.load_state_dict(plain.state_dict())
        run.trainer.map_gradients(maps)


@dataclass(frozen=True, kw_only=True)
class Search(Branches, kind="search"):
    """`Branches` with scales that are found first: trained with the branches, which are then thrown away.

    The branches train merged into their kernels, by a learning rate of their own; a run that is stopped meanwhile
    starts again.

    Attributes:
        share: Updates of the search over those of the run behind it.

    Source: the hyper-search of RepOptimizers (Ding et al., arXiv:2205.15242, section 3.3), there on other data.
    """

    share: Annotated[float, Interval(0, 1, above=True)] = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if other := [kind for spec in self.specs() for kind in spec.kinds if not issubclass(Chain.kinds[kind], Chain)]:
            raise PlanError(f"branch: a branch of kind {other[0]!r} has no scale to search for.")

    def grown(self, net: nn.Module, input_size: InputSize, seed: int = 0) -> nn.Module:
        """See `Branches.grown`; the scales are trainable, and one convolution runs the branches."""
        grown = super().grown(net, input_size, seed)
        for scale in _scales(grown):
            value = scale.weight
            del scale.weight
            scale.weight = nn.Parameter(value.clone())
        return collapse_online(grown, choose="always", inplace=True, input_size=input_size)

    def renew(self, run: Run, seed: int) -> None:
        """See `Gradients.renew`."""
        updates, config = self._updates(run.total), replace(run.config, ema_decay=0.0)
        searched = Trainer(self.grown(run.trainer.model, run.size, seed), config, run.feed.train)
        rate = cosine(1.0, 0.0, updates)

        def due() -> bool:
            return run.saving.due(searched.update)

        while searched.update < updates:
            searched.train(updates, learning_rate=rate, lam=constant(1.0), stop_early=due)
            run.saving.leave_if_asked("in the search for scales, which starts again")
        grown = super().grown(run.trainer.model, run.size, seed)
        for scale, found in zip(_scales(grown), _scales(searched.model), strict=True):
            scale.weight.copy_(found.weight.detach())
        self.start(run, grown)

    def macs(self, net: nn.Module, input_size: InputSize, batch_size: int, updates: int) -> int:
        """See `Gradients.macs`."""
        return self._updates(updates) * training_macs(self.grown(net, input_size), input_size, batch_size)

    def _updates(self, updates: int) -> int:
        return max(1, round(self.share * updates))


@dataclass(frozen=True, kw_only=True)
class Pixels(Gradients, kind="pixels"):
    """Maps by how far neighbouring pixels of each layer's input depend on each other; see `pixel_maps`.

    Attributes:
        every: Share of the run after which they are measured again.
        batches: Of training images, on which they are measured.
    """

    every: Annotated[float, Interval(0, 1, above=True)] = 0.05
    batches: Count = 2

    def looks(self, updates: int) -> tuple[int, ...]:
        """See `Gradients.looks`."""
        step = max(1, round(self.every * updates))
        return tuple(range(step, updates, step))

    def renew(self, run: Run, seed: int) -> None:
        """See `Gradients.renew`."""
        trainer = run.trainer
        images = torch.cat([trainer.batches.batch(trainer.update + index)[0] for index in range(self.batches)])
        state = run_on_rank0(lambda: pixel_maps(trainer.model, images).state_dict())
        trainer.map_gradients(GradientMaps.from_state_dict(state))

    def macs(self, net: nn.Module, input_size: InputSize, batch_size: int, updates: int) -> int:
        """See `Gradients.macs`."""
        return self.batches * profile(net, input_size).macs


def _scales(grown: nn.Module) -> Iterator[nn.Conv2d]:
    return (cast(nn.Conv2d, branch.path.scale) for branch in grown.modules() if isinstance(branch, Chain))
