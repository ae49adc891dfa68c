"""Slim nets: one supernet of deployed widths, the net for a budget out of it, and a width for every image.

    python recipes/slim.py                                        digits, a few minutes on 2 cores
    python recipes/slim.py --seeds 5 --epochs 60 --retrain        also trains every chosen shape from scratch
    python recipes/slim.py --seeds 5 --depth                      also stochastic depth, and SkipNet's gates
    python recipes/slim.py --data cifar10 --data-dir D --epochs 60 --batch-size 128 --lr 0.2

For each seed a slim supernet is trained (`--mode`: sandwich is US-Net's, levels a slimmable net's). At each budget of
MACs there are, all chosen on the val split and judged on the test split: the uniform width, AutoSlim's greedy path (by
loss per MAC saved, and as published), OFA's evolutionary search (as many evaluations as the path took), and random
widths of equal MACs. The plain net of the uniform width, trained alone for as many epochs, is the control; --retrain
trains each chosen shape (one of the random ones) from scratch as well. Then, on the levels: what choosing a level for
each image could bring (oracle; that of another seed, and of seeds of one width, say how much of it is luck), what a
confidence cascade and gates trained on the val split do bring, against a random mix at equal MACs. See gating.py.

Every seed is a line of DIR/results.jsonl; a killed recipe continues when started again. Tables: DIR/slim.json, and the
screen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np

import growshrink as gs
from gating import block_units, depth, luck, policies
from growshrink.analysis import WidthScore, stats
from growshrink.analysis._rank import jsonable
from growshrink.analysis.prune import Budget, SlimSpace, cost_of, draw_widths, width_of
from growshrink.base.environment import versions
from growshrink.base.limits import Count, NotNegative, OneOf, Positive
from growshrink.base.writing import write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import DataOptions, LengthOptions, ModelOptions, command
from growshrink.cli.program import run_program
from growshrink.errors import AnalysisError, PlanError, did_you_mean
from growshrink.training import evaluate
from results import Results, StudyOptions
from trained import num_updates, reinitialise, train_net, train_supernet

#: Widths. The nets that are looked for have at most the MACs of those at one level; the two ends are one net each.
LEVELS = (0.25, 0.5, 0.75, 1.0)
#: Tolerance on the MACs of random widths, which lie on both sides.
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
    after: tuple[str, ...] = ("stages.0",)
    """Where gates are: one place (DS-Net), or several (RNP, in a net whose units have widths of their own)."""
    gate_epochs: Positive = 10.0
    """Length of a gate's training, the net frozen, in epochs of the supernet's."""
    prices: tuple[NotNegative, ...] = (0.01, 0.03, 0.1)
    """Weights of the MACs in the gates' losses: a gate is trained with each."""
    depth: bool = False
    """Also train with stochastic depth, and gates around the blocks."""
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
    known = dict(plain.named_modules())
    for name in args.after:  # before anything is made and trained
        if name not in known:
            raise PlanError(f"--after {name}: no such module{did_you_mean(name, known)}")
    if args.depth:
        block_units(gs.slim(plain, (1.0,), blocks=True, input_size=feed.input_size))  # refuses other nets
    model = gs.slim(plain, LEVELS, input_size=feed.input_size).to(args.running.torch_device())
    space, table = gs.width_space(model), SlimSpace(model, feed.input_size)
    gs.route(
        model, space, after=args.after, seed=seed, input_size=feed.input_size
    )  # refuses what is no unit, and another order, too
    train_supernet(model, feed, epochs=args.length.epochs, config=args.training, mode=args.mode, seed=seed)
    batches = [feed.train.batch(update)[0] for update in range(args.calibration)]
    score = WidthScore(model, batches, lambda net: -evaluate(net, feed.val).loss)
    test = WidthScore(model, batches, lambda net: evaluate(net, feed.test).top1)

    def macs(width: Mapping[str, int]) -> int:
        return cost_of(table, width)[1]

    full, rows = macs(space.full), list[dict[str, Any]]()
    uniform = space.all_levels
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
            if args.retrain or arm == "uniform":
                net = gs.cut(model, widths[0], input_size=feed.input_size)
                reinitialise(net, seed)
                train_net(net, feed, epochs=args.length.epochs, config=args.training)
                row["alone"] = evaluate(net, feed.test).top1
            rows.append(row)
    options = {"updates": num_updates(feed, args.gate_epochs), "size": args.data.batch_size, "seed": seed}
    record = {"seed": seed, "rows": rows} | policies(model, space, feed, batches, args.after, args.prices, **options)
    if args.depth:
        train = partial(train_supernet, feed=feed, epochs=args.length.epochs, config=args.training, seed=seed)
        make = lambda: args.net(feed, seed)[0]  # noqa: E731
        record["depth"] = depth(make, train, feed, batches, args.prices, **options)
    return record


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


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and differences from the uniform width (paired)."""
    found: dict[str, Any] = {"arms": []}
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
    images = [[record["policies"][number] for record in records] for number in range(len(records[0]["policies"]))]
    found["policies"] = over_mix([*images, *luck([record["table"] for record in records]).values()])
    if depths := [record["depth"] for record in records if "depth" in record]:
        drops = [[depth["drops"][number] for depth in depths] for number in range(len(depths[0]["drops"]))]
        for own in drops:
            line = {"last": own[0]["last"], "macs": own[0]["macs"], "test": [one["test"] for one in own]}
            if len(own) > 1 and own is not drops[0]:
                line["over_plain"] = stats.paired(line["test"], [one["test"] for one in drops[0]]).difference
            found.setdefault("drops", []).append(line)
        names = dict.fromkeys(policy["name"] for depth in depths for policy in depth["policies"])
        every = [[p for depth in depths for p in depth["policies"] if p["name"] == name] for name in names]
        found["blocks"] = over_mix([own for own in every if len(own) == len(depths)])
    return found


def over_mix(policies: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Means of policies over seeds, with intervals over the seeds of what they have over the random mix."""
    return [
        {
            "name": own[0]["name"],
            "macs": float(np.mean([policy["macs"] for policy in own])),
            "top1": [policy["top1"] for policy in own],
            "over_mix": stats.paired([policy["over_mix"][0] for policy in own], [0.0] * len(own)).difference
            if len(own) > 1
            else own[0]["over_mix"],
        }
        for own in policies
    ]


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
    for title, key in (("a width for every image", "policies"), ("blocks for every image", "blocks")):
        if key in rows:
            lines += ["", f"{title:29s} {'MACs':>6s} {'test top-1':>10s} {'over the random mix':>24s}"]
        for row in rows.get(key, ()):
            lines.append(
                f"{row['name']:29s} {row['macs']:6.3f} {np.mean(row['top1']):10.2f} {interval(row['over_mix']):>24s}"
            )
    if "drops" in rows:
        lines += ["", f"{'last block runs in':>18s} {'MACs':>6s} {'test top-1':>10s} {'over plain':>22s}"]
    for row in rows.get("drops", ()):
        lines.append(f"{row['last']:18.2f} {row['macs']:6.3f} {np.mean(row['test']):10.2f} "
                     f"{interval(row.get('over_plain')):>22s}".rstrip())  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from here")
