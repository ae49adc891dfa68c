"""Claims of the source articles that no other program tests: pairs of small nets, trained alike, over paired seeds.

    python tools/claims.py                                  all of them, on digits
    python tools/claims.py activations --seeds 12
    python tools/claims.py netaug --data cifar10 --data-dir D --epochs 60

| claim       | arms                                                                                              |
| ----------- | ------------------------------------------------------------------------------------------------- |
| activations | blocks of two convolutions: a ReLU behind each, behind the first, behind the second, behind neither |
| order       | each layer as conv, norm, ReLU; norm, ReLU, conv; conv, ReLU, norm                                |
| netaug      | the net that pruning by l1 chose, newly initialised: trained plainly, with NetAug (same MACs)     |
| robust      | reducenet20 trained plainly, with blocks dropped at random, by the sandwich rule (equal updates),   |
|             | then cut to half the MACs untrained: random channels, and how much better those of l1 are         |
| stack       | a net of depthwise 5x5: plain, grown by stack, by bottleneck, by small_kernel (same MACs), fused  |

The MACs of an arm's training are those of the first arm's, so that an arm whose updates cost more has fewer of them;
all other options are the same. The first arm's learning rate is the others': nothing is tuned. Prints the mean test
top-1 of each arm and its difference from the first with Student's 95 % interval, and which difference would have been
seen with a probability of 80 %.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import tyro
from torch import nn

import growshrink as gs
from growshrink.analysis import stats
from growshrink.analysis._rank import jsonable
from growshrink.base.environment import versions
from growshrink.base.writing import write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import DataOptions, LengthOptions, ModelOptions, command
from growshrink.cli.program import run_program
from growshrink.data.feed import MemoryFeed
from growshrink.errors import AnalysisError
from growshrink.layers.widths import WidthSpace
from growshrink.proofs._profile import training_macs
from growshrink.supernet.cost import StepCost
from growshrink.training import TrainConfig, Trainer, calibrate_bn, evaluate

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))

from results import StudyOptions
from trained import num_updates, reinitialise, train_net

Claim = Literal["activations", "order", "netaug", "stack", "robust"]
CLAIMS: tuple[Claim, ...] = get_args(Claim)


@dataclass(frozen=True, kw_only=True)
class Args(StudyOptions):
    """Options of claims; the model is that of netaug and robust, the other nets are made here."""

    claims: Annotated[tuple[Claim, ...], tyro.conf.Positional] = CLAIMS
    """Which of them."""
    length: LengthOptions = pick(LengthOptions(epochs=10.0, seeds=8), "epochs", "seeds")
    data: DataOptions = pick(DataOptions(), "data", "data_dir", "batch_size", "image_size")
    model: ModelOptions = ModelOptions(model="reducenet20")


@dataclass(frozen=True)
class Arm:
    """A net to train, what an update costs an image, and how: `train(net, updates)` returns the net to judge.

    `judge` returns its measures, by default test top-1 and loss.
    """

    net: nn.Module
    macs: float
    train: Callable[[nn.Module, int], nn.Module]
    judge: Callable[[nn.Module], dict[str, float]] | None = None


class Layers(nn.Sequential):
    """A stem and `blocks` of two 3x3 convolutions without skips, from 16 to 64 channels; a stride of 2 from 16 on."""

    def __init__(self, in_channels: int, classes: int, relus: tuple[bool, bool], order: str, blocks: int = 3) -> None:
        layers, channels = list(_layer(in_channels, 16, 1, "conv norm relu", True)), 16
        for block in range(blocks):
            wide = 16 * 2 ** min(2, block)
            layers += _layer(channels, wide, 1 if block == 0 else 2, order, relus[0])
            layers += _layer(wide, wide, 1, order, relus[1])
            channels = wide
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def _layer(inside: int, out: int, stride: int, order: str, relu: bool) -> Iterator[nn.Module]:
    kinds = order.split()
    for kind in kinds:
        if kind == "conv":
            yield nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        elif kind == "norm":
            yield nn.BatchNorm2d(out if kinds.index("conv") < kinds.index("norm") else inside)
        elif relu:
            yield nn.ReLU()


class Depthwise(nn.Sequential):
    """Inverted residuals without skips whose depthwise kernels are 5x5."""

    def __init__(self, in_channels: int, classes: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        for inside, out, stride in ((16, 24, 2), (24, 24, 1), (24, 32, 2)):
            wide = 3 * inside
            layers += [nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
            layers += [nn.Conv2d(wide, wide, 5, stride, 2, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
            layers += [nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))


def main(args: Args) -> None:
    """Run it, or a part of it; errors of the user's are raised as GrowShrinkError."""
    if args.length.seeds < 2:
        raise AnalysisError("needs at least 2 --seeds.")
    with args.results("claims") as results:
        keys = {f"{claim}, seed {seed}": (claim, seed) for claim in args.claims for seed in args.seeds()}
        for key in results.unfinished(list(keys)):
            claim, seed = keys[key]
            results.append({"key": key, "claim": claim, "seed": seed, "test": dict(run(args, claim, seed))})
        records = [results.done()[key] for key in keys]
        summary = {claim: compare([r["test"] for r in records if r["claim"] == claim]) for claim in args.claims}
        about = {"command": command(), "versions": versions(), **args.identity()}
        write_json(results.path / "claims.json", jsonable({"claims": summary, "about": about}))
        results.finish()
        for claim, rows in summary.items():
            print(f"{claim}, {args.length.seeds} seeds:\n{text(rows)}")


def run(args: Args, claim: Claim, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Train the arms of a claim: test top-1 and loss of each."""
    feed = args.memory_feed(seed)
    makers = {"activations": activations, "order": order, "netaug": netaug, "stack": stack, "robust": robust}
    arms = makers[claim](args, feed, seed)
    budget = None
    for name, arm in arms.items():
        budget = budget or num_updates(feed, args.length.epochs) * arm.macs
        trained = arm.train(arm.net, max(1, round(budget / arm.macs)))
        if arm.judge is not None:
            yield name, arm.judge(trained)
        else:
            score = evaluate(trained, feed.test)
            yield name, {"top1": score.top1, "loss": score.loss}


def plainly(args: Args, feed: MemoryFeed, net: nn.Module) -> Arm:
    """Train a net as it is."""
    return Arm(net, training_macs(net, feed.input_size), partial(_train, args, feed))


def _train(args: Args, feed: MemoryFeed, net: nn.Module, updates: int) -> nn.Module:
    epochs = updates / feed.train.updates_per_epoch
    train_net(net, feed, epochs=epochs, config=replace(args.training, amp=False))
    return net


def activations(args: Args, feed: MemoryFeed, seed: int) -> dict[str, Arm]:
    """How many ReLUs does a block need?"""
    places = {"both": (True, True), "the first": (True, False), "the second": (False, True), "neither": (False, False)}
    return {name: _layers(args, feed, seed, relus) for name, relus in places.items()}


def order(args: Args, feed: MemoryFeed, seed: int) -> dict[str, Arm]:
    """In which order do convolution, norm and ReLU come?"""
    orders = ("conv norm relu", "norm relu conv", "conv relu norm")
    return {order: _layers(args, feed, seed, (True, True), order) for order in orders}


def _layers(args: Args, feed: MemoryFeed, seed: int, relus: tuple[bool, bool], order: str = "conv norm relu") -> Arm:
    torch.manual_seed(seed)
    return plainly(args, feed, Layers(feed.input_size[0], feed.data.num_classes, relus, order))


def netaug(args: Args, feed: MemoryFeed, seed: int) -> dict[str, Arm]:
    """Does NetAug help a net whose widths were searched for?"""
    dense, _ = args.net(feed, seed)
    train_net(dense, feed, epochs=args.length.epochs, config=args.training)
    chosen = gs.random_prune(dense, macs=0.5, tolerance=0.15, criterion="l1", input_size=feed.input_size)
    reinitialise(chosen, seed)
    grown = gs.grow(chosen, "bottleneck", ratio=4.0, seed=seed, input_size=feed.input_size)
    task = gs.NetAugTask(
        grown, nn.CrossEntropyLoss(), verbose=False, mode="lazy", seed=seed, input_size=feed.input_size
    )
    cost = StepCost(task, feed.input_size).mean(0, 64)

    def train(net: nn.Module, updates: int) -> nn.Module:
        train_net(net, feed, epochs=updates / feed.train.updates_per_epoch, config=args.training, task=task)
        task.detach()
        return gs.drop(net)

    return {"plain": plainly(args, feed, chosen), "netaug": Arm(grown, cost, train)}


def stack(args: Args, feed: MemoryFeed, seed: int) -> dict[str, Arm]:
    """Are two 3x3 worth more beside a 5x5 than a bottleneck, or than one 3x3?"""
    torch.manual_seed(seed)
    plain = Depthwise(feed.input_size[0], feed.data.num_classes)
    arms = {"plain": plainly(args, feed, plain)}
    for kind in ("stack", "bottleneck", "small_kernel"):
        where = lambda name, module: getattr(module, "kernel_size", None) == (5, 5)  # noqa: E731
        grown = gs.grow(plain, kind, ratio=1.0, where=where, seed=seed, input_size=feed.input_size)
        arms[kind] = Arm(grown, training_macs(grown, feed.input_size), partial(_vanish, args.training, feed))
    return arms


def _vanish(config: TrainConfig, feed: MemoryFeed, net: nn.Module, updates: int) -> nn.Module:
    trainer = Trainer(net, replace(config, ema_decay=0.0), feed.train)
    lam = gs.schedules.hold_then_vanish(hold=updates // 2, vanish=updates // 4)
    trainer.train(updates, learning_rate=gs.schedules.cosine(1.0, 0.0, updates), lam=lam)
    calibrate_bn(net, trainer.recent_images(20))
    return gs.fuse(net, input_size=feed.input_size)


def robust(args: Args, feed: MemoryFeed, seed: int) -> dict[str, Arm]:
    """Does a criterion matter less on a net that was trained to lose parts of itself?"""
    model, _ = args.net(feed, seed)
    macs = training_macs(model, feed.input_size)
    slim = partial(gs.slim, model, input_size=feed.input_size)
    nets: dict[str, tuple[nn.Module, str, WidthSpace | None]] = {"plain": (model, "", None)}
    nets["stochastic depth"] = (blocks := slim(blocks=True), "single", gs.width_space(blocks).stochastic_depth())
    nets["sandwich"] = (widths := slim(), "sandwich", gs.width_space(widths))
    judge = partial(_pruned, feed)
    return {
        name: Arm(net, macs, partial(_sampled, args, feed, mode, space), judge)
        for name, (net, mode, space) in nets.items()
    }


def _sampled(
    args: Args, feed: MemoryFeed, mode: str, space: WidthSpace | None, net: nn.Module, updates: int
) -> nn.Module:
    task, criterion = None, nn.CrossEntropyLoss()
    if space is not None:
        task = gs.NetAugTask(net, criterion, verbose=False, mode=mode, space=space, input_size=feed.input_size)
    train_net(net, feed, epochs=updates / feed.train.updates_per_epoch, config=args.training, task=task)
    if task is None or space is None:
        return net
    task.detach()
    return gs.cut(net, gs.width_space(net).full, input_size=feed.input_size)


def _pruned(feed: MemoryFeed, net: nn.Module) -> dict[str, float]:
    def top1(criterion: str, seed: int = 0) -> float:
        options: dict[str, Any] = {"macs": 0.5, "tolerance": 0.15, "input_size": feed.input_size}
        pruned = gs.random_prune(net, criterion=criterion, seed=seed, **options)
        calibrate_bn(pruned, (feed.train.batch(update)[0] for update in range(8)))
        return evaluate(pruned, feed.test).top1

    calibrate_bn(net, (feed.train.batch(update)[0] for update in range(8)))
    random = float(np.mean([top1("random", number) for number in range(8)]))
    return {"unpruned": evaluate(net, feed.test).top1, "random": random, "l1 less random": top1("l1") - random}


def compare(tests: list[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Each arm's scores by seed, and their differences from the first arm's."""
    names = list(tests[0])
    measures = list(tests[0][names[0]])
    rows: dict[str, Any] = {n: {m: [test[n][m] for test in tests] for m in measures} for n in names}
    for name in names[1:]:
        for measure in measures:
            found = stats.paired(rows[name][measure], rows[names[0]][measure])
            sd = float(np.std(np.subtract(rows[name][measure], rows[names[0]][measure]), ddof=1))
            seen = stats.detectable(sd, len(tests))
            rows[name][f"{measure}_difference"] = {"difference": found.difference, "p": found.p, "detectable": seen}
    return rows


def text(rows: Mapping[str, Any]) -> str:
    """The comparison as a table."""
    lines = []
    for name, row in rows.items():
        lines.append(f"  {name}")
        for measure in (key for key in row if not key.endswith("_difference")):
            digits = 4 if measure == "loss" else 2
            line = f"    {measure:16s} {np.mean(row[measure]):.{digits}f}"
            if f"{measure}_difference" in row:
                found = row[f"{measure}_difference"]
                value, low, high = (f"{x:+.{digits}f}" for x in found["difference"])
                line += f", less the first {value} ({low}, {high}), sees {found['detectable']:.{digits}f}"
            lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from here")
