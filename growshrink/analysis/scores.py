"""Scores of subnets under one interface: a new one is one function here.

@score("mine")
def mine(bench: Bench, index: Index) -> Floats:
    ...one number for each row of index, higher is better, NaN where there is none
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.analysis._angle import AngleScores, AngleTable, Floats, Index
from growshrink.data.feed import Feed
from growshrink.layers.activations import VanishingReLU
from growshrink.layers.widths import Slots
from growshrink.training import calibrate_bn, evaluate

#: What goes by this name is drawn, not scored.
RANDOM = "random"
#: Images of the minibatch of the scores that need no training.
BATCH = 128


@dataclass(frozen=True, eq=False)
class Bench:
    """What scores may look at. None of it is modified by a score.

    Attributes:
        init: The supernet as it was initialised.
        trained: The supernet, trained.
        table: Its angle table.
        feed: Training batches and the val split; no score sees the test split.
        num_calibration: Training batches that batch norm statistics are taken from, the same for every subnet.
        progress: Wraps what takes long, e.g. with a progress bar.
    """

    init: nn.Module
    trained: nn.Module
    table: AngleTable
    feed: Feed
    num_calibration: int = 8
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter

    def minibatch(self) -> tuple[Tensor, Tensor]:
        """The same training images and labels every time, at least `BATCH` of them if there are as many."""
        batches = self.feed.train
        num = min(-(-BATCH // batches.batch_size), batches.updates_per_epoch)
        images, labels = zip(*(batches.batch(update) for update in range(num)), strict=True)
        return torch.cat(images)[:BATCH], torch.cat(labels)[:BATCH]

    def calibration(self) -> list[Tensor]:
        """Images that batch norm statistics are taken from."""
        return [self.feed.train.batch(update)[0] for update in range(self.num_calibration)]


ScoreFunction = Callable[[Bench, Index], Floats]
SCORES: dict[str, ScoreFunction] = {}
#: Scores that are columns of the table: millions a second.
FAST = ("angle", "null", "excess", "params", "macs")


def score(name: str) -> Callable[[ScoreFunction], ScoreFunction]:
    """Make a function a score that goes by `name`."""

    def register(function: ScoreFunction) -> ScoreFunction:
        assert name not in SCORES, f"there is a score {name!r} already"
        SCORES[name] = function
        return function

    return register


def _of_table(name: str) -> ScoreFunction:
    def read(bench: Bench, index: Index) -> Floats:
        scores: AngleScores = bench.table.score(index)
        return np.asarray(getattr(scores, name), dtype=np.float64)

    return read


for _name in FAST:
    score(_name)(_of_table(_name))


@score("naswot")
def naswot(bench: Bench, index: Index) -> Floats:
    r"""How differently the untrained subnet's ReLUs react to the images of a batch: :math:`\log|\det K|`.

    :math:`K_{ij}` is the number of units that are both on or both off for images i and j. Batch statistics are used,
    an untrained net has no others.

    Source: Mellor et al., Neural Architecture Search without Training (arXiv:2006.04647).
    """
    images, _ = bench.minibatch()

    def of(net: nn.Module) -> float:
        kernel = torch.zeros(len(images), len(images), dtype=torch.float64)

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            on = (args[0].flatten(1) > 0).float()  # counts stay below 2**24: exact
            kernel.add_((on @ on.T + (1 - on) @ (1 - on).T).cpu())

        hooks = [m.register_forward_pre_hook(add) for m in net.modules() if isinstance(m, (nn.ReLU, VanishingReLU))]
        with torch.no_grad():
            net(images)
        for hook in hooks:
            hook.remove()
        sign, value = torch.linalg.slogdet(kernel)
        return float(value) if sign > 0 else np.nan  # two images that no unit tells apart

    return _each(bench, bench.init, index, of, train=True)


@score("grad_norm")
def grad_norm(bench: Bench, index: Index) -> Floats:
    """Norm of the loss's gradient by each kernel of the untrained subnet, added up.

    Source: Abdelfattah et al., Zero-Cost Proxies for Lightweight NAS (arXiv:2101.08134).
    """
    images, labels = bench.minibatch()

    def of(net: nn.Module) -> float:
        kernels = [p for p in net.parameters() if p.ndim >= 2]
        loss = F.cross_entropy(net(images), labels)
        gradients = torch.autograd.grad(loss, kernels, allow_unused=True)
        return float(sum(g.norm() for g in gradients if g is not None))

    return _each(bench, bench.init, index, of, train=True)


@score("supernet_accuracy")
def supernet_accuracy(bench: Bench, index: Index) -> Floats:
    """Val top-1, in percent, with the weights of the trained supernet and recalibrated batch norms.

    Every subnet gets its statistics from the same images. (Without that, agreement with the truth is near 0.)

    Source: Guo et al., Single Path One-Shot NAS (arXiv:1904.00420).
    """
    batches = bench.calibration()

    def of(net: nn.Module) -> float:
        calibrate_bn(net, batches)
        return evaluate(net, bench.feed.val).top1

    return _each(bench, bench.trained, index, of, train=False)


def _each(bench: Bench, model: nn.Module, index: Index, of: Callable[[nn.Module], float], *, train: bool) -> Floats:
    """`of` a copy of `model` at each of the widths; statistics that it leaves behind do not matter."""
    with _replica(model, train) as (net, slots):
        values = []
        for row in bench.progress(index):
            slots.set(bench.table.width(row))
            values.append(of(net))
    return np.array(values, dtype=np.float64)


@contextmanager
def _replica(model: nn.Module, train: bool) -> Iterator[tuple[nn.Module, Slots]]:
    net = copy.deepcopy(model).train(train)
    with torch.random.fork_rng(devices=[]):  # dropout
        torch.default_generator.manual_seed(0)
        yield net, Slots(net)
