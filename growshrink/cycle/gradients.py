"""Plain training with maps on the gradients: growth at the plain net's cost, in a run without rounds.

A new source of maps is one class statement, `class Mine(MapSource, kind="mine")`, as a new exit is.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, cast

import torch
from torch import nn

from growshrink.algebra.dataflow import InputSize
from growshrink.base.config import Checked, Variant
from growshrink.base.limits import Count, Interval, Share
from growshrink.base.ranks import run_on_rank0
from growshrink.branches.base import Chain
from growshrink.branches.spec import BranchKind, BranchSpec
from growshrink.cycle.running import Run
from growshrink.errors import PlanError
from growshrink.layers.branch import Branch
from growshrink.proofs._profile import profile, training_macs
from growshrink.schedules import constant, cosine
from growshrink.training.gradient_maps import GradientMaps, compile_gradients, pixel_maps
from growshrink.training.trainer import Trainer
from growshrink.transforms import collapse_online, grow


@dataclass(frozen=True, kw_only=True)
class MapSource(Checked, Variant, ABC):
    """Where the maps come from."""

    def looks(self, updates: int) -> tuple[int, ...]:
        """Updates, of so many, after which `renew` is called too; it is called at the start in any case."""
        return ()

    @abstractmethod
    def renew(self, run: Run, seed: int) -> None:
        """Map the trainer's gradients from now on."""

    @abstractmethod
    def macs(self, net: nn.Module, input_size: InputSize, batch_size: int, updates: int) -> int:
        """Training MACs of an image that `renew` takes in a run of so many updates."""


@dataclass(frozen=True, kw_only=True)
class FromBranches(MapSource, kind="branches"):
    """Maps that training `branch` apart would amount to; the net starts with the branches' own starts added to it.

    Attributes:
        branch: Kinds, in their forms without norms; see `BranchSpec`.
        search: Updates, over those of the run, that train the branches first, with scales, by a learning rate of their
            own and merged into their kernels; the scales are then kept, and all weights are as before. (A run that is
            stopped during it starts again.) 0 leaves the scales at 1.

    Source: RepOptimizers (Ding et al., arXiv:2205.15242), where the scales are searched on other data.
    """

    branch: tuple[BranchKind, ...] = ("repvgg",)
    search: Share = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = [kind for spec in self._specs() for kind in spec.kinds]
        if self.search and (other := [kind for kind in kinds if not issubclass(Branch.kinds[kind], Chain)]):
            raise PlanError(f"search={self.search!r}: a branch of kind {other[0]!r} has no scale to search for.")

    def renew(self, run: Run, seed: int) -> None:
        grown = grow(run.trainer.model, self._specs(), init="paper", seed=seed, input_size=run.size)
        if updates := self._searched(run.total):
            config = replace(run.config, ema_decay=0.0)
            trainer = Trainer(_scaled_online(grown, run.size), config, run.feed.train, run.loss)
            rate = cosine(1.0, 0.0, updates)
            while trainer.update < updates:
                trainer.train(trainer.update + 1, learning_rate=rate, lam=constant(1.0))
                run.saving.due(trainer.update)
                run.saving.leave_if_asked("in the search for scales, which starts again")
            for scale, found in zip(_scales(grown), _scales(trainer.model), strict=True):
                scale.weight.copy_(found.weight.detach())
        plain, maps = compile_gradients(grown, inplace=True, input_size=run.size)
        for net in run.trainer.nets:
            net.load_state_dict(plain.state_dict())
        run.trainer.map_gradients(maps)

    def macs(self, net: nn.Module, input_size: InputSize, batch_size: int, updates: int) -> int:
        if not self._searched(updates):
            return 0
        grown = _scaled_online(grow(net, self._specs(), init="paper", input_size=input_size), input_size)
        return self._searched(updates) * training_macs(grown, input_size, batch_size)

    def _specs(self) -> list[BranchSpec]:
        return [BranchSpec(kind=kind, norm=None) for kind in self.branch]

    def _searched(self, updates: int) -> int:
        return round(self.search * updates)


@dataclass(frozen=True, kw_only=True)
class FromPixels(MapSource, kind="pixels"):
    """Maps by how far neighbouring pixels of each layer's input depend on each other; see `pixel_maps`.

    Attributes:
        every: Share of the run after which they are measured again.
        batches: Number of batches of training images, on which they are measured.
    """

    every: Annotated[float, Interval(0, 1, above=True)] = 0.05
    batches: Count = 2

    def looks(self, updates: int) -> tuple[int, ...]:
        step = max(1, round(self.every * updates))
        return tuple(range(step, updates, step))

    def renew(self, run: Run, seed: int) -> None:
        trainer = run.trainer
        images = torch.cat([trainer.batches.batch(trainer.update + index)[0] for index in range(self.batches)])
        state = run_on_rank0(lambda: pixel_maps(trainer.model, images).state_dict())
        trainer.map_gradients(GradientMaps.from_state_dict(state))

    def macs(self, net: nn.Module, input_size: InputSize, batch_size: int, updates: int) -> int:
        return self.batches * profile(net, input_size).macs


def _scales(grown: nn.Module) -> list[nn.Conv2d]:
    return [cast(nn.Conv2d, branch.path.scale) for branch in grown.modules() if isinstance(branch, Chain)]


def _scaled_online(grown: nn.Module, input_size: InputSize) -> nn.Module:
    """A copy whose scales are trained, and whose branches run as part of their kernels."""
    online = collapse_online(grown, choose="always", input_size=input_size)
    for scale in _scales(online):
        value = scale._buffers.pop("weight")
        scale.register_parameter("weight", nn.Parameter(cast(torch.Tensor, value).clone()))
    return online
