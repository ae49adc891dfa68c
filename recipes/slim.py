"""Slim nets: one supernet of deployed widths, the net for a budget out of it, and a width for every image.

    python recipes/slim.py                                        digits, a few minutes on 2 cores
    python recipes/slim.py --seeds 5 --epochs 60 --retrain        also trains every chosen shape from scratch
    python recipes/slim.py --data cifar10 --data-dir D --epochs 60 --batch-size 128 --lr 0.2

For each seed a slim supernet is trained (`--mode`: sandwich is US-Net's, levels a slimmable net's). At each budget of
MACs there are, all chosen on the val split and judged on the test split: the uniform width, AutoSlim's greedy path (by
loss per MAC saved, and as published), OFA's evolutionary search (as many evaluations as the path took), and random
widths of equal MACs. The plain net of the uniform width, trained alone for as many epochs, is the control; --retrain
trains each chosen shape from scratch as well. Then, on the levels: what choosing a level for each image could bring
(oracle), what a confidence cascade and a trained gate do bring, against a random mix at equal MACs.

Every seed is a line of DIR/results.jsonl; a killed recipe continues when started again. Tables: DIR/slim.json, and the
screen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn

import growshrink as gs
from growshrink.analysis import WidthScore, headroom, stats
from growshrink.analysis._rank import jsonable
from growshrink.analysis.prune import Budget, SlimSpace, cost_of, draw_widths, width_of
from growshrink.analysis.results import Results
from growshrink.analysis.trained import num_updates, train_net, train_supernet
from growshrink.base.environment import versions
from growshrink.base.limits import Count, OneOf, Positive
from growshrink.base.seeding import reinitialise
from growshrink.base.writing import write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import DataOptions, LengthOptions, ModelOptions, StudyOptions, command
from growshrink.cli.program import run_program
from growshrink.data.feed import MemoryFeed, ScoringBatches
from growshrink.errors import AnalysisError, PlanError
from growshrink.training import evaluate

#: Widths. The nets that are looked for have at most the MACs of those at one level; the two ends are one net each.
LEVELS = (0.25, 0.5, 0.75, 1.0)
#: Of the MACs of random widths, which lie on both sides.
TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Args(StudyOptions):
    """Options of slim."""

    mode: Annotated[str, OneOf("no such mode", ("levels", "sandwich", "single"))] = "levels"
    """How the widths are trained together; see growshrink.NetAugTask."""
    draws: Count = 10
    """Random widths at each budget."""
    calibration: Count = 4
    """Training batches that statistics are taken from."""
    gate_epochs: Positive = 10.0
    """Epochs of the gate's training, the net frozen."""
    price: Positive = 0.3
    """Weight of the MACs in the gate's loss."""
    retrain: bool = False
    """Train every chosen shape from scratch, for as many epochs as the supernet."""
    length: LengthOptions = pick(LengthOptions(seeds=1, epochs=40.0), "seeds", "epochs")
    data: DataOptions = pick(DataOptions(val_fraction=0.3), "data", "data_dir", "val_fraction", "batch_size")
    model: ModelOptions = ModelOptions(model="reducenet20")


def main(args: Args) -> None:
    """Run it, or a part of it; errors of the user's are raised as GrowShrinkError."""
    if not args.data.val_fraction:
        raise PlanError("--val-fraction 0: widths are chosen on the val split.")
    with Results(args.running.out or Path("runs") / f"slim-{args.title}", args.identity()) as results:
        keys = {f"seed {seed}": seed for seed in args.seeds()}
        for key in results.unfinished(list(keys)):
            results.append({"key": key, **run_seed(args, keys[key])})
        records = [results.done()[key] for key in keys]
        summary = {"rows": summarise(records), "about": {"command": command(), "versions": versions()}}
        write_json(results.path / "slim.json", jsonable(summary))
        results.finish()
    print(text(summary))
    print(f"{results.path / 'slim.json'} has the figures, results.jsonl every seed.")


def run_seed(args: Args, seed: int) -> dict[str, Any]:
    """Everything of one seed."""
    feed = args.memory_feed(seed)
    plain, about = args.net(feed, seed)
    model = gs.slim(plain, LEVELS, input_size=feed.input_size).to(args.running.torch_device())
    space, table = gs.width_space(model), SlimSpace(model, feed.input_size)
    train_supernet(model, feed, epochs=args.length.epochs, config=args.training, mode=args.mode, seed=seed)
    batches = [feed.train.batch(update)[0] for update in range(args.calibration)]
    score = WidthScore(model, batches, lambda net: -evaluate(net, feed.val).loss)
    test = WidthScore(model, batches, lambda net: evaluate(net, feed.test).top1)

    def macs(width: Mapping[str, int]) -> int:
        return cost_of(table, width)[1]

    full, rows = macs(space.full), list[dict[str, Any]]()
    uniform = [space.level(i / (len(LEVELS) - 1)) for i in range(len(LEVELS))]
    budgets = [macs(width) / full for width in uniform]
    paths = {name: gs.allocate(model, space, macs=budgets[0], score=score, per_mac=name == "greedy",
                               input_size=feed.input_size) for name in ("greedy", "greedy as published")}  # fmt: skip
    evaluations = len(score.known) // 2
    for level, width, budget in zip(LEVELS, uniform, budgets, strict=True):
        arms: dict[str, list[dict[str, int]]] = {"uniform": [width]}
        if level not in (LEVELS[0], LEVELS[-1]):
            drawn = draw_widths(table, Budget(budget, TOLERANCE), args.draws, seed=seed).index
            arms["random"] = [width_of(table, row) for row in drawn]
            arms |= {name: [path.within(budget).width] for name, path in paths.items()}
            arms["evolution"] = [evolve(space, score, macs, budget * full, evaluations, seed)]
        for arm, widths in arms.items():
            row = {"level": level, "arm": arm, "macs": float(np.mean([macs(w) for w in widths])) / full}
            row["test"] = float(np.mean([test(w) for w in widths]))
            if args.retrain and arm != "random" or arm == "uniform":
                net = gs.cut(model, widths[0], input_size=feed.input_size)
                reinitialise(net, seed)
                train_net(net, feed, epochs=args.length.epochs, config=args.training)
                row["alone"] = evaluate(net, feed.test).top1
            rows.append(row)
    return {"seed": seed, "rows": rows, "policies": policies(args, model, space, feed, seed)}


def evolve(
    space: gs.layers.WidthSpace,
    score: Callable[[Mapping[str, int]], float],
    macs: Callable[[Mapping[str, int]], int],
    most: float,
    evaluations: int,
    seed: int,
    population: int = 20,
) -> dict[str, int]:
    """OFA's evolutionary search within a budget: half of each generation mutated, half crossed, from the best quarter.

    Source: Cai et al., Once for All (arXiv:1908.09791), section 4, after Real et al. (arXiv:1802.01548).
    """
    random = np.random.default_rng(seed)

    def valid(make: Callable[[], dict[str, int]]) -> dict[str, int]:
        for _ in range(10_000):
            if macs(width := make()) <= most:
                return width
        raise AnalysisError("no width within the budget was found.")

    def drawn() -> dict[str, int]:
        bias = random.random() ** 2  # budgets far below the middle are rare among uniform draws
        return {
            n: int(v[min(len(v) - 1, int(random.random() * (1 + bias * len(v))))]) for n, v in space.choices.items()
        }

    def mutated(best: Sequence[dict[str, int]]) -> dict[str, int]:
        parent = best[int(random.integers(len(best)))]
        return {n: int(random.choice(v)) if random.random() < 0.2 else parent[n] for n, v in space.choices.items()}

    def crossed(best: Sequence[dict[str, int]]) -> dict[str, int]:
        one, two = (best[int(random.integers(len(best)))] for _ in range(2))
        return {n: one[n] if random.random() < 0.5 else two[n] for n in one}

    known: dict[tuple[int, ...], float] = {}
    for _ in range(population):
        first = valid(drawn)
        known[tuple(first.values())] = score(first)
    names = list(space.choices)
    for _ in range(max(0, evaluations // population - 1)):
        best = [dict(zip(names, key, strict=True)) for key in sorted(known, key=lambda k: -known[k])[: population // 4]]
        for number in range(population):
            child = valid(partial(mutated, best) if number % 2 else partial(crossed, best))
            known[tuple(child.values())] = score(child)
    return dict(zip(names, max(known.items(), key=lambda item: item[1])[0], strict=True))


def policies(
    args: Args, model: nn.Module, space: gs.layers.WidthSpace, feed: MemoryFeed, seed: int
) -> list[dict[str, Any]]:
    """A width for every image, after the first stage: oracle, cascade and trained gate, on the test split."""
    batches = [feed.train.batch(update)[0] for update in range(args.calibration)]
    routed = gs.route(model, space, after="stages.0", seed=seed, input_size=feed.input_size)
    routed.calibrate(batches)
    routed.model.requires_grad_(False).eval()
    optimizer = torch.optim.Adam(routed.gates.parameters(), 3e-3)
    for update in range(num_updates(feed, args.gate_epochs)):
        images, labels = feed.train.batch(update)
        optimizer.zero_grad()
        routed.loss(images, labels, price=args.price).backward()
        optimizer.step()
    right, sure, gate = levels_on(routed, feed.test)
    cost = np.array(routed.costs[0]) + routed.fixed
    found = headroom(right, cost, confidence=sure, gates={"gate": gate}, shared=routed.fixed, seed=seed)
    return [asdict(policy) for policy in found]


@torch.no_grad()
def levels_on(routed: Any, split: ScoringBatches) -> tuple[Any, Any, Any]:
    """Which choice is right on which image `(N, M)`, how sure each is, and what the gate takes `(N,)`."""
    right, sure, gate = [], [], []
    routed.eval()
    for images, labels in split:
        logits, chosen = routed.every_choice(images)
        right.append((logits.argmax(2) == labels[:, None]).cpu())
        sure.append(logits.softmax(2).amax(2).cpu())
        gate.append(chosen.argmax(1).cpu())
    return torch.cat(right).numpy(), torch.cat(sure).numpy(), torch.cat(gate).numpy()


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and differences from the uniform width (paired)."""
    found: dict[str, Any] = {"arms": [], "policies": []}
    rows = [record["rows"] for record in records]
    for number, first in enumerate(rows[0]):
        own = [seed[number] for seed in rows]
        base = [next(r for r in seed if r["level"] == first["level"] and r["arm"] == "uniform") for seed in rows]
        line: dict[str, Any] = {
            "level": first["level"],
            "arm": first["arm"],
            "macs": float(np.mean([r["macs"] for r in own])),
        }
        for key in ("test", "alone"):
            if key in first:
                line[key] = [r[key] for r in own]
        if len(own) > 1 and first["arm"] != "uniform":
            line["over_uniform"] = stats.paired(line["test"], [b["test"] for b in base]).difference
        if len(own) > 1 and first["arm"] == "uniform":
            line["shared_less_alone"] = stats.paired(line["test"], line["alone"]).difference
        found["arms"].append(line)
    for number, first in enumerate(records[0]["policies"]):
        own = [record["policies"][number] for record in records]
        over = [p["over_mix"][0] for p in own]
        policy: dict[str, Any] = {
            "name": first["name"],
            "macs": float(np.mean([p["macs"] for p in own])),
            "top1": [p["top1"] for p in own],
        }
        policy["over_mix"] = stats.paired(over, [0.0] * len(own)).difference if len(own) > 1 else own[0]["over_mix"]
        found["policies"].append(policy)
    return found


def text(summary: Mapping[str, Any]) -> str:
    """The tables."""

    def interval(value: Any) -> str:
        return "" if value is None else "{:+.2f} ({:+.2f}, {:+.2f})".format(*value)

    rows = summary["rows"]
    lines = [f"{'width':>5s} {'chosen by':20s} {'MACs':>6s} {'test top-1':>10s} {'alone':>7s} {'over uniform':>22s} "
             f"{'less alone':>22s}"]  # fmt: skip
    for row in rows["arms"]:
        alone = f"{np.mean(row['alone']):7.2f}" if "alone" in row else " " * 7
        lines.append(
            f"{row['level']:5.2f} {row['arm']:20s} {row['macs']:6.3f} {np.mean(row['test']):10.2f} {alone} "
            f"{interval(row.get('over_uniform')):>22s} {interval(row.get('shared_less_alone')):>22s}".rstrip()
        )
    lines += ["", f"{'a width for every image':24s} {'MACs':>6s} {'test top-1':>10s} {'over the random mix':>24s}"]
    for row in rows["policies"]:
        lines.append(
            f"{row['name']:24s} {row['macs']:6.3f} {np.mean(row['top1']):10.2f} {interval(row['over_mix']):>24s}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from here")
