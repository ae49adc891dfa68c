"""What to do with a net after pruning: the arms of lottery ticket against rethinking, at equal budget and paired seeds.

Source: Liu et al., Rethinking the Value of Network Pruning (arXiv:1810.05270): fine-tuning against training the pruned
shape from scratch; Frankle et al. (arXiv:1903.01611) and Renda et al. (arXiv:2003.02389): rewinding; Frankle and Carbin
(arXiv:1803.03635): masks of single weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune

from growshrink import schedules
from growshrink.analysis import stats
from growshrink.analysis.channels import ChannelSpace, Kept, best_channels
from growshrink.analysis.layers import State
from growshrink.analysis.prune import Budget, draw_widths, random_channels, threshold_widths, width_of
from growshrink.base.seeding import generator
from growshrink.data.feed import Feed
from growshrink.errors import AnalysisError
from growshrink.proofs._profile import profile, training_macs
from growshrink.training import TrainConfig, calibrate_bn, evaluate
from growshrink.transforms import fuse, grow
from trained import cosine_trainer, num_updates, reinitialise

#: The arms, and what each does; every one but scratch-b trains for as many epochs as the dense net was trained.
RETRAIN_ARMS = {
    "fine-tune": "the criterion's channels, with their trained weights",
    "rewind": "the criterion's channels, weights and learning rate as they were after a tenth of the dense training",
    "rewind-init": "the criterion's channels, with the weights the dense net started from (the lottery ticket)",
    "scratch-e": "the criterion's widths, newly initialised, equal epochs",
    "scratch-b": "the criterion's widths, newly initialised, as many epochs as cost what the dense training did",
    "random-channels": "the criterion's widths, random channels with their trained weights",
    "random-widths": "random widths of equal MACs, random channels with their trained weights",
    "grown": "as fine-tune, then grown by insert and orepa, trained for the same MACs, fused",
}
#: The same for single weights: the share of the budget stays, of all layers together, the others are 0 (and cost as
#: much as before: dense kernels run).
SPARSE_ARMS = {
    "sparse": "the largest trained weights, with their values",
    "sparse-rewind": "these, with the values and the learning rate that they had after a tenth of the dense training",
    "sparse-init": "these, with the values that the dense net started from (the lottery ticket)",
    "sparse-fresh": "these, newly initialised",
    "sparse-random": "random weights, newly initialised",
    "narrow": "all of a net so narrow, in all layers alike, that it has as many; newly initialised, equal MACs",
}
#: Other arms are compared with this one; without it, with the first that ran.
REFERENCE = "fine-tune"
REWIND_TO = 0.1


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense net at three moments of its training: state_dicts."""

    init: State
    rewind: State
    trained: State


@dataclass(frozen=True, eq=False)
class Start:
    """Where an arm starts: the pruned net, epochs to train, and the share of its schedule that is over already.

    A `grown` net is fused after its training.
    """

    net: nn.Module
    epochs: float
    begin: float = 0.0
    grown: bool = False


def train_dense(
    model: nn.Module, feed: Feed, *, epochs: float, config: TrainConfig, after_update: Callable[[], None] | None = None
) -> Dense:
    """Train a net in place, and keep what arms go back to."""
    init, total = _copy(model), num_updates(feed, epochs)
    _, train_to = cosine_trainer(model, feed, config, total, after_update=after_update)
    train_to(round(REWIND_TO * total))
    rewind = _copy(model)
    train_to(total)
    return Dense(init, rewind, _copy(model))


def start_arm(
    arm: str,
    model: nn.Module,
    dense: Dense,
    feed: Feed,
    *,
    criterion: str,
    budget: Budget,
    epochs: float,
    seed: int,
    least: float = 0.1,
) -> Start:
    """The net an arm (of `RETRAIN_ARMS` or `SPARSE_ARMS`) begins with, for one criterion of `ChannelSpace.importance`.

    `model` is a net of the dense architecture, whose weights change; `epochs` those of the dense training.
    """
    if arm not in (known := RETRAIN_ARMS | SPARSE_ARMS):
        raise AnalysisError(f"{arm}: no such arm; there are {', '.join(known)}.")
    model.load_state_dict(dense.trained)
    if arm in SPARSE_ARMS:
        return _start_sparse(arm, model, dense, feed, budget.macs, epochs, seed)
    space = ChannelSpace(model, feed.input_size, least=least)
    importance = space.importance(criterion, feed.train.batch(0))
    widths = threshold_widths(space, importance, budget)
    if arm == "random-widths":
        widths = width_of(space, draw_widths(space, budget, 1, seed=seed).index[0])
    at_random = arm.startswith("random-")
    kept: Kept = random_channels(space, widths, seed) if at_random else best_channels(importance, widths)
    model.load_state_dict({"rewind": dense.rewind, "rewind-init": dense.init}.get(arm, dense.trained))
    net = space.cut(kept)  # the space cuts `model` as it is now
    if arm.startswith("scratch-"):
        reinitialise(net, seed)
    if arm == "scratch-b":
        epochs *= profile(model, feed.input_size).macs / profile(net, feed.input_size).macs
    if arm == "grown":
        plain = training_macs(net, feed.input_size)
        net = grow(net, ["insert", "orepa"], seed=seed, input_size=feed.input_size)
        return Start(net.train(), epochs * plain / training_macs(net, feed.input_size), grown=True)
    return Start(net.train(), epochs, REWIND_TO if arm == "rewind" else 0.0)


def _start_sparse(
    arm: str, model: nn.Module, dense: Dense, feed: Feed, share: float, epochs: float, seed: int
) -> Start:
    """The net of an arm of `SPARSE_ARMS`, from the dense net as trained; masks are those of `torch.nn.utils.prune`."""
    kernels = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    total = sum(kernel.weight.numel() for kernel in kernels)
    if arm == "narrow":
        space = ChannelSpace(model, feed.input_size, least=0.01)
        wanted = profile(model, feed.input_size).params - round((1 - share) * total)
        shares = np.linspace(0.01, 1.0, 400)[:, None]
        rows = [np.abs(np.asarray(c) - shares * c[-1]).argmin(1) for c in space.choices.values()]
        index = np.stack(rows, axis=1)
        row = index[np.abs(space.cost(index)[0] - wanted).argmin()]
        net = space.cut(random_channels(space, width_of(space, row), seed))
        reinitialise(net, seed)
        return Start(net.train(), epochs * profile(model, feed.input_size).macs / profile(net, feed.input_size).macs)
    random = generator("weights", seed)
    importance = {
        (kernel, "weight"): torch.rand(kernel.weight.shape, generator=random).to(kernel.weight)
        if arm == "sparse-random"
        else kernel.weight.detach().abs()
        for kernel in kernels
    }
    model.load_state_dict({"sparse-rewind": dense.rewind, "sparse-init": dense.init}.get(arm, dense.trained))
    if arm in ("sparse-fresh", "sparse-random"):
        reinitialise(model, seed)
    prune.global_unstructured(importance, prune.L1Unstructured, importance, amount=round((1 - share) * total))
    return Start(model.train(), epochs, REWIND_TO if arm == "sparse-rewind" else 0.0)


def run_arm(
    start: Start, feed: Feed, config: TrainConfig, *, after_update: Callable[[], None] | None = None
) -> dict[str, float]:
    """Train an arm in the data order of the dense training; val and test top-1, parameters, MACs, and MACs spent.

    `nonzero` is the number of the parameters that are not 0.
    """
    net, total = start.net, num_updates(feed, start.epochs)
    trainer, train_to = cosine_trainer(net, feed, config, total, after_update=after_update)
    trainer.update = round(start.begin * total)
    updates = total - trainer.update
    if start.grown:
        lam = schedules.hold_then_vanish(hold=total // 2, vanish=total // 4)
        rate = schedules.cosine(1.0, 0.0, total)
        trainer.train(total, learning_rate=rate, lam=lam, after_update=after_update)
    else:
        train_to(total)
    for module in net.modules():
        if prune.is_pruned(module) and hasattr(module, "weight_mask"):
            prune.remove(module, "weight")
    spent = updates * feed.train.batch_size * training_macs(net, feed.input_size)
    if start.grown:
        calibrate_bn(net, trainer.recent_images(20))
        net = fuse(net, input_size=feed.input_size)
    return {
        "val": evaluate(net, feed.val).top1,
        "test": evaluate(net, feed.test).top1,
        **asdict(profile(net, feed.input_size)),
        "nonzero": sum(int(parameter.count_nonzero()) for parameter in net.parameters()),
        "updates": updates,
        "training_macs": spent,
    }


def best_rates(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The learning rate of each arm with the best mean val top-1 over the tuning seeds; of equals the smaller."""
    found: dict[str, dict[float, list[float]]] = {}
    for record in records:
        found.setdefault(record["arm"], {}).setdefault(record["lr"], []).append(record["val"])
    return {arm: max(sorted(by_rate), key=lambda lr: np.mean(by_rate[lr])) for arm, by_rate in found.items()}


def compare_arms(records: Sequence[Mapping[str, Any]], dense: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Test top-1 of every arm, and its difference from `REFERENCE` over paired seeds, corrected for their number.

    `records` has one for each arm and seed, `dense` the `test` and `training_macs` of each seed's dense net, in order.
    """
    seeds = sorted({int(record["seed"]) for record in records})
    present = {record["arm"] for record in records}
    arms = [arm for arm in RETRAIN_ARMS | SPARSE_ARMS if arm in present]
    reference = REFERENCE if REFERENCE in arms else arms[0]
    rows: dict[str, Any] = {}
    for arm in arms:
        runs = [next(r for r in records if r["arm"] == arm and r["seed"] == seed) for seed in seeds]
        row = rows[arm] = {"lr": runs[0]["lr"], **_means(runs, "training_macs", "macs", "nonzero")}
        row["sd"] = float(np.std(row["test"], ddof=1)) if len(seeds) > 1 else None
    tests = [row for arm, row in rows.items() if arm != reference] if len(seeds) > 1 else []
    for row in tests:
        found = stats.paired(row["test"], rows[reference]["test"])
        row |= {"difference": found.difference, "p": found.p, "effect": found.effect}
    for row, p in zip(tests, stats.holm([row["p"] for row in tests]), strict=True):
        row["p_holm"] = p
    return {"seeds": seeds, "reference": reference, "arms": rows, "dense": _means(dense, "training_macs")}


def format_comparison(summary: Mapping[str, Any]) -> str:
    """The comparison as a table."""
    dense, seeds = summary["dense"], summary["seeds"]
    less = f"less {summary['reference']}"
    lines = [
        f"{'arm':16s} {'lr':>6s} {'test top-1 (sd)':>17s} {less:>26s} {'p (Holm)':>9s} {'training':>9s} {'nonzero':>9s}"
    ]
    full = f"{dense['mean']:.2f} %"
    lines.append(f"{'dense':16s} {'':>6s} {full:>17s} {'':>26s} {'':>9s} {1:9.2f}")
    for arm, row in summary["arms"].items():
        sd = "" if row["sd"] is None else f" ({row['sd']:.2f})"
        difference, p = "", ""
        if "difference" in row:
            value, low, high = row["difference"]
            difference, p = f"{value:+.2f} ({low:+.2f}, {high:+.2f})", f"{row['p_holm']:.3f}"
        cost = row["training_macs"] / dense["training_macs"]
        mean = f"{row['mean']:.2f} %{sd}"
        lines.append(
            f"{arm:16s} {row['lr']:6g} {mean:>17s} {difference:>26s} {p:>9s} {cost:9.2f} {row['nonzero']:9,.0f}"
        )
    return "\n".join(lines) + (
        f"\n{len(seeds)} seeds, paired; Student's 95 % intervals, exact sign-flip tests: no p below "
        f"{2 / 2 ** len(seeds):.3f} before correction. training: MACs over the dense training's, which all but scratch "
        "at given widths need besides."
    )


def _means(runs: Sequence[Mapping[str, Any]], *names: str) -> dict[str, Any]:
    test = [run["test"] for run in runs]
    return {"test": test, "mean": float(np.mean(test)), **{n: float(np.mean([run[n] for run in runs])) for n in names}}


def _copy(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
