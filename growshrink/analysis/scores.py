"""Scores of subnets under one interface: a new one is one function here.

@score("mine")
def mine(bench: Bench, index: Index) -> Floats:
    ...one number for each row of index, higher is better, NaN where there is none
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.analysis._angle import AngleTable, Floats, Index
from growshrink.base.copying import copy_net
from growshrink.data.feed import Feed
from growshrink.layers.activations import VanishingReLU
from growshrink.layers.widths import Slots
from growshrink.schedules.functions import constant
from growshrink.training import TrainConfig, Trainer, calibrate_bn, evaluate

#: What goes by this name is drawn, not scored.
RANDOM = "random"
#: Images of the minibatch of the scores that need no training.
BATCH = 128
#: Updates that `early_loss` makes.
EARLY = 20


@dataclass(frozen=True, eq=False)
class Bench:
    """What scores may look at, and must not modify; not the test split of `feed`.

    Batch norm statistics of every subnet are taken from the same `num_calibration` training batches.
    """

    init: nn.Module
    trained: nn.Module
    table: AngleTable
    feed: Feed
    num_calibration: int = 8

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


def _of_table(bench: Bench, index: Index, name: str) -> Floats:
    return np.asarray(getattr(bench.table.score(index), name), dtype=np.float64)


SCORES.update({name: partial(_of_table, name=name) for name in FAST})


@score("naswot")
def naswot(bench: Bench, index: Index) -> Floats:
    r"""How differently the untrained subnet's ReLUs react to the images of a batch: :math:`\log|\det K|`.

    :math:`K_{ij}` is the number of units that are both on or both off for images i and j.

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
        gradients = torch.autograd.grad(F.cross_entropy(net(images), labels), kernels, allow_unused=True)
        return float(sum(g.norm() for g in gradients if g is not None))

    return _each(bench, bench.init, index, of, train=True)


@score("jacob_cov")
def jacob_cov(bench: Bench, index: Index) -> Floats:
    r"""How little the gradients of the untrained subnet's outputs by its images are correlated with each other.

    .. math:: -\sum_i \left[\log(\sigma_i + k) + 1 / (\sigma_i + k)\right], \quad k = 10^{-5}

    with the eigenvalues of the matrix of correlations of :math:`\partial \sum_c f_c(x_i) / \partial x_i`.

    Source: Mellor et al., Neural Architecture Search without Training (arXiv:2006.04647v1, eq. 3 and 4).
    """
    images, _ = bench.minibatch()

    def of(net: nn.Module) -> float:
        x = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(x).sum(), x)
        spectrum = torch.linalg.eigvalsh(gradient.flatten(1).double().corrcoef()).clamp_min(0) + 1e-5
        return -float((spectrum.log() + 1 / spectrum).sum())

    return _each(bench, bench.init, index, of, train=True)


@score("early_loss")
def early_loss(bench: Bench, index: Index) -> Floats:
    """The training loss over the first `EARLY` updates of the subnet alone, added up, and negated: how fast it learns.

    Trained with the defaults of `TrainConfig`, at the full learning rate.

    Source: Ru et al., Speedy Performance Estimation for Neural Architecture Search (arXiv:2006.04492).
    """

    def of(net: nn.Module) -> float:
        trainer = Trainer(copy_net(net), TrainConfig(ema_decay=0.0), bench.feed.train)
        return -EARLY * float(trainer.train(EARLY, learning_rate=constant(1.0), lam=constant(1.0)))

    return _each(bench, bench.init, index, of, train=True)


@score("supernet_accuracy")
def supernet_accuracy(bench: Bench, index: Index) -> Floats:
    """Val top-1, in percent, with the weights of the trained supernet and batch norms recalibrated on the same images.

    Source: Guo et al., Single Path One-Shot NAS (arXiv:1904.00420).
    """
    batches = bench.calibration()

    def of(net: nn.Module) -> float:
        calibrate_bn(net, batches)
        return evaluate(net, bench.feed.val).top1

    return _each(bench, bench.trained, index, of, train=False)


def _each(bench: Bench, model: nn.Module, index: Index, of: Callable[[nn.Module], float], *, train: bool) -> Floats:
    """`of` a copy of `model` at each of the widths; statistics that it leaves behind do not matter."""
    net = copy_net(model).train(train)
    slots, values = Slots(net), []
    with torch.random.fork_rng(devices=[]):  # dropout
        torch.default_generator.manual_seed(0)
        for row in index:
            slots.set(bench.table.width(row))
            values.append(of(net))
    return np.array(values, dtype=np.float64)
