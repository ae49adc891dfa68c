"""A width, or which blocks run, for every image: how gates are trained, and what they bring. A part of slim.py.

Gates are trained on the val split, which the supernet has not fit, and judged on the test split. Ways to train them:
the exact expectation of `growshrink.Routed.loss`; Gumbel's noise; DS-Net's labels (Li et al., arXiv:2103.13258: the
narrowest choice where that is right, else the widest, beside Gumbel's); REINFORCE, as SkipNet (Wang et al.,
arXiv:1711.09485) and RNP (Lin et al., NIPS 2017) have it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.analysis import WidthScore, headroom
from growshrink.analysis.prune import SlimSpace, cost_of
from growshrink.data.feed import Feed, ScoringBatches
from growshrink.errors import PlanError
from growshrink.layers.widths import WidthSpace
from growshrink.training import evaluate

GateLoss = Callable[[Any, Tensor, Tensor, float], Tensor]
#: Share of the updates in which the last block runs, in stochastic depth; 1 is the plain net.
LAST = (1.0, 0.8, 0.5)
#: Resamples of the images where the interval is taken over seeds.
FEW = 10


def exact(routed: Any, images: Tensor, labels: Tensor, price: float) -> Tensor:
    """The expectation over all paths."""
    return routed.loss(images, labels, price=price, exact=True)


def gumbel(routed: Any, images: Tensor, labels: Tensor, price: float) -> Tensor:
    """A path drawn by Gumbel's noise, gradients straight through."""
    return routed.loss(images, labels, price=price, exact=False)


def labelled(routed: Any, images: Tensor, labels: Tensor, price: float) -> Tensor:
    """DS-Net's: the same, and the gate's cross-entropy to the narrowest choice where it is right, else the widest."""
    seen: list[Tensor] = []
    with routed.gates[0].register_forward_hook(lambda gate, args, out: seen.append(out)):
        loss = gumbel(routed, images, labels, price)
    with torch.no_grad():
        right = routed.always(0)(images).argmax(1) == labels
    return loss + F.cross_entropy(seen[0], torch.where(right, 0, seen[0].shape[1] - 1))


def reinforce(routed: Any, images: Tensor, labels: Tensor, price: float) -> Tensor:
    """The log-probability of a drawn path times its loss, less the mean loss of the other images."""
    with choosing(routed, sample=True) as gates, torch.no_grad():
        losses = F.cross_entropy(routed(images), labels, reduction="none") + price * spent(routed, gates)
    rest = (losses.sum() - losses) / max(1, len(losses) - 1)
    return ((losses - rest) * sum(gate.log_probability() for gate in gates)).mean()


#: Ways to train gates; the first and the third are for gates at one place, or with few paths.
GATES: dict[str, GateLoss] = {"exact": exact, "gumbel": gumbel, "labels": labelled, "reinforce": reinforce}


class Choosing(nn.Module):
    """A gate that remembers what it takes for each image, or draws it by its probabilities."""

    def __init__(self, gate: nn.Module, sample: bool) -> None:
        super().__init__()
        self.gate, self.sample = gate, sample

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, M)` that leave no doubt."""
        self.seen, logits = x, self.gate(x)
        self.taken = torch.multinomial(logits.softmax(1), 1)[:, 0] if self.sample else logits.argmax(1)
        return F.one_hot(self.taken, logits.shape[1]).to(logits)

    def log_probability(self) -> Tensor:
        """Log-probability of what was chosen `(N,)`."""
        return self.gate(self.seen).log_softmax(1).gather(1, self.taken[:, None])[:, 0]


@contextmanager
def choosing(routed: Any, *, sample: bool = False) -> Iterator[list[Choosing]]:
    """Let the gates of a routed net remember within a `with`."""
    before, gates = routed.gates, [Choosing(gate, sample) for gate in routed.gates]
    routed.gates = nn.ModuleList(gates)
    try:
        yield gates
    finally:
        routed.gates = before


def spent(routed: Any, gates: Sequence[Choosing]) -> Tensor:
    """MACs of each image of the last batch `(N,)`, over the full net's."""
    costs = (gate.seen.new_tensor(own)[gate.taken] for gate, own in zip(gates, routed.costs, strict=True))
    return sum(costs, gates[0].seen.new_tensor(routed.fixed))


@torch.no_grad()
def judge(routed: Any, split: ScoringBatches) -> tuple[Any, Any, Any]:
    """Whether each image is classified rightly, how surely, and at what cost, `(N,)` each."""
    found = []
    routed.eval()
    for images, labels in split:
        with choosing(routed) as gates:
            logits = routed(images)
        found.append((logits.argmax(1) == labels, logits.softmax(1).amax(1), spent(routed, gates)))
    right, sure, macs = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    return right, sure, macs


def static_nets(routed: Any, split: ScoringBatches) -> tuple[Any, Any, Any]:
    """The same of the nets in it that take the same choice for all images: `(N, M)`, `(N, M)`, `(M,)`."""
    nets = range(max(map(len, routed.costs)))
    right, sure, _ = zip(*(judge(routed.always(net), split) for net in nets), strict=True)
    macs = [routed.fixed + sum(own[min(net, len(own) - 1)] for own in routed.costs) for net in nets]
    return np.stack(right, 1), np.stack(sure, 1), np.array(macs)


def train_gates(
    routed: Any, loss: GateLoss, data: tuple[Tensor, Tensor], *, price: float, updates: int, size: int, seed: int
) -> None:
    """Train new gates, in place, the net frozen, on batches of `size` of images and labels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in routed.gates.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        routed.train().model.requires_grad_(False).eval()
        optimizer = torch.optim.Adam(routed.gates.parameters(), 3e-3)
        for _ in range(updates):
            rows = torch.randperm(len(data[1]))[:size].to(data[1].device)
            optimizer.zero_grad()
            loss(routed, data[0][rows], data[1][rows], price).backward()
            optimizer.step()


def trained_gates(
    routed: Any, ways: Sequence[str], prices: Sequence[float], feed: Feed, *, updates: int, size: int, seed: int
) -> dict[str, Any]:
    """By way and price what gates trained on the val split do on the test split: right or not, and MACs `(2, N)`."""
    images, labels = (torch.cat(parts) for parts in zip(*feed.val, strict=True))
    found = {}
    for way in ways:
        for price in prices:
            options: dict[str, Any] = {"price": price, "updates": updates, "size": size, "seed": seed}
            train_gates(routed, GATES[way], (images, labels), **options)
            right, _, macs = judge(routed, feed.test)
            found[f"{way}, price {price:g}"] = np.stack([right, macs])
    return found


def policies(
    model: nn.Module,
    space: WidthSpace,
    feed: Feed,
    batches: Sequence[Tensor],
    after: Sequence[str],
    prices: Sequence[float],
    **options: Any,
) -> dict[str, Any]:
    """Nets in a row over MACs, oracle, cascade and trained gates on the test split, and which net is right where."""
    seed = options["seed"]
    routed = gs.route(model, space, after=after, seed=seed, input_size=feed.input_size)
    routed.calibrate(batches)
    one = len(after) == 1
    gates = trained_gates(routed, list(GATES) if one else ["gumbel", "reinforce"], prices, feed, **options)
    right, sure, macs = static_nets(routed, feed.test)
    found = headroom(
        right, macs, confidence=sure if one else None, gates=gates, shared=routed.fixed if one else 0.0, seed=seed
    )
    table = {"right": ["".join(map(str, row.astype(int))) for row in right.T], "macs": macs.tolist()}
    return {"policies": [asdict(policy) for policy in found], "table": table}


def luck(tables: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What an oracle has that is no property of the image, by the tables of several seeds: policies, one of each seed.

    The oracle of another seed takes the net that was the cheapest right one there. Seeds of one net: the oracle of as
    many seeds of the widest net as there are nets, at the nets' MACs: they differ by nothing but luck.
    """
    rights = [np.array([[int(c) for c in row] for row in table["right"]]).T for table in tables]
    count, found = rights[0].shape[1], dict[str, list[Any]]()
    for number, (table, right) in enumerate(zip(tables, rights, strict=True)):
        other = rights[(number + 1) % len(rights)]
        choice = np.where(other.any(1), other.argmax(1), 0)
        here = headroom(right, table["macs"], gates={"oracle of another seed": choice}, num=FEW)[-1:]
        if len(rights) >= count:
            alike = np.stack([rights[(number + i) % len(rights)][:, -1] for i in range(count)], 1)
            same = headroom(alike, table["macs"], num=FEW)[-1]
            here.append(type(same)("oracle of seeds of the widest", same.macs, same.top1, same.over_mix))
        for policy in here if len(rights) > 1 else ():
            found.setdefault(policy.name, []).append(asdict(policy))
    return found


def block_units(model: nn.Module) -> tuple[list[str], list[str]]:
    """Units of a net whose blocks are slots, and these blocks; PlanError where they are no units."""
    units = ["stem", *(name for name, _ in model.named_modules() if re.fullmatch(r"stages\.\d+\.\d+", name))]
    blocks = [name for name, values in gs.width_space(model).choices.items() if not values[0]]
    if not set(blocks) <= set(units[1:]):
        raise PlanError("--depth needs a net of blocks stages.N.N, such as reducenet20.")
    return units, blocks


def depth(
    make: Callable[[], nn.Module],
    train: Callable[..., Any],
    feed: Feed,
    batches: Sequence[Tensor],
    prices: Sequence[float],
    **options: Any,
) -> dict[str, Any]:
    """Stochastic depth by its last share, folded; then, on the last of these nets, SkipNet's gates around its blocks.

    The static nets beside the gates are those on the greedy path of blocks, statistics recalibrated.
    """
    size, drops = feed.input_size, []
    for last in LAST:
        model = gs.slim(make(), (1.0,), blocks=True, input_size=size)
        space = gs.width_space(model)
        drawn, table = space.stochastic_depth(last), SlimSpace(model, size)
        train(model, space=drawn, mode="single")
        survival = {name: shares[1] for name, shares in drawn.shares.items()}
        net = gs.cut(model, space.full, survival=survival, input_size=size)
        macs = np.mean([cost_of(table, drawn.sample(0, step))[1] for step in range(300)])
        macs /= cost_of(table, space.full)[1]
        drops.append({"last": last, "macs": float(macs), "test": evaluate(net, feed.test).top1})
    units, blocks = block_units(model)
    score = WidthScore(model, batches, lambda net: -evaluate(net, feed.val).loss)
    least = cost_of(table, space.full | dict.fromkeys(blocks, 0))[1] / cost_of(table, space.full)[1]
    path = gs.allocate(model, space, macs=least * (1 + 1e-9), score=score, input_size=size).steps[::-1]
    right = []
    for step in path:
        net = gs.cut(model, step.width, input_size=size)
        gs.calibrate_bn(net, batches)
        right.append(torch.cat([net.eval()(x).argmax(1) == y for x, y in feed.test]).cpu().numpy())
    after = [units[units.index(name) - 1] for name in blocks]
    routed = gs.route(model, space, after=after, seed=options["seed"], input_size=size)
    routed.calibrate(batches)
    gates = trained_gates(routed, ["gumbel", "reinforce"], prices, feed, **options)
    found = headroom(np.stack(right, 1), [step.cost for step in path], gates=gates, seed=options["seed"])
    return {"drops": drops, "policies": [asdict(policy) for policy in found]}
