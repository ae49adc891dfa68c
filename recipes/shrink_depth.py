"""Turn the depth knob: give up activations where that buys the most time on this machine, and merge what remains.

    python recipes/shrink_depth.py                       digits, reducenet20, a few minutes on 2 cores
    python recipes/shrink_depth.py --data cifar10 --data-dir D --epochs 60 --shrink-epochs 30 --targets 0.8 0.6 0.5
    python recipes/shrink_depth.py --seeds 3 --latency-batch 16
    python recipes/shrink_depth.py --model mobilenetv2_050 --data DIR --image-size 64 --shrink-epochs 10

Trains the net, times it with each run of neighbouring blocks (of a net that is no ReduceNet: of neighbouring
convolutions with nothing but norms and activations between) merged (on this machine; kept in ~/.cache/growshrink),
measures what giving up the activations of each run does to the loss, and finds the best cut for every target by dynamic
programming. For each cut it continues from the trained net: just those activations vanish, and their blocks are merged
exactly, into a larger kernel or (slim) into a 3x3, whichever the clock prefers. Next to each stands what the same
shape reaches when it is trained plainly, from scratch, for the same compute.

Leaves runs/NAME/ with report.md (read this), report.json, pareto.png, merged-N.safetensors, run.json, and the nets.
A run that was stopped continues when the same command is given again.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

import growshrink as gs
from growshrink.base.limits import PartOf, Positive
from growshrink.base.writing import save_picture, write_atomic, write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import LengthOptions, RunOptions, TimingOptions
from growshrink.cli.program import run_program
from growshrink.data.datasets import CACHE
from growshrink.data.feed import Feed
from growshrink.depth.segments import Cut, Segment, links_of, merge_cut, uncut, vanish_cut
from growshrink.errors import PlanError
from growshrink.proofs._profile import training_macs
from growshrink.schedules.functions import Schedule
from growshrink.training import TrainConfig, evaluate
from knob import DepthPlan, depth_frontier, measure_plans, plain_at_depth, plan_depth, segment_harms
from latency import Latencies, measure_latencies
from results import ResultOptions, Results, load_weights
from trained import fit, num_updates

#: The key of what was timed and chosen.
CUTS = "cuts"


@dataclass(frozen=True, kw_only=True)
class Args(ResultOptions):
    """Options of shrink_depth; the model is a plain ReduceNet, or any net with convolutions in a row."""

    targets: tuple[PartOf, ...] = (0.9, 0.8, 0.65, 0.5)
    """Latencies to reach, as shares of the net's own."""
    shrink_epochs: Positive = 20.0
    """Epochs of the training in which activations vanish, of which --deadline is a share. From half of --lr."""
    schedule: Literal["cosine", "closed-loop"] = "cosine"
    """How lam falls."""
    remeasure: bool = False
    """Measure latencies even where this machine has been measured before, and do not keep them."""
    timing: TimingOptions = TimingOptions()
    length: LengthOptions = LengthOptions(epochs=30.0, deadline=0.5)
    training: TrainConfig = TrainConfig(ema_decay=0.0)
    running: RunOptions = pick(RunOptions(threads=1), "out", "threads", "quiet")


@dataclass
class Row:
    """What a cut has come to. Accuracies are test top-1 in percent, one per seed."""

    name: str
    cut: Cut
    predicted_ms: float
    ms: float
    share: float  # of the time of the net as it is, measured in the same turns
    error: float  # of the predicted share, relatively
    macs: int = 0
    knob: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)


def main(args: Args) -> None:
    """Run it; errors of the user's are raised as GrowShrinkError."""
    if not args.timing.turns:
        raise PlanError("--turns 0: must be at least 1.")
    net = args.model.make(args.feed(0))[0]
    uncut(net)  # refuses a net that it cannot turn, before any training
    chains = links_of(net)
    tell(not args.running.quiet, "\n".join(f"stages.{i}: {', '.join(k.conv for k in c)}" for i, c in enumerate(chains)))
    with args.results("depth") as results:
        rows, hardware = run(args, results)
        write_report(args, results.path, rows, hardware)
        results.finish()
    print(f"{table(rows)}\nRead {results.path / 'report.md'}")


def run(args: Args, results: Results) -> tuple[list[Row], str]:
    """Train, choose, shrink, merge, compare; the machine too."""
    feed = args.feed(0)
    first, more = num_updates(feed, args.length.epochs), num_updates(feed, args.shrink_epochs)
    untrained = args.model.make(feed)[0]
    each = 2 * more + first + first / (1 + len(args.targets))  # of all seeds, as if every target had a cut of its own
    for key in args.jobs(results, [CUTS], untrained, feed, each * args.length.seeds * (1 + len(args.targets))):
        latencies, chosen = choose(args, trained_net(args, results, args.feed(0), 0), feed)
        results.append({"key": key, "hardware": latencies.hardware, "rows": [asdict(row) for row in chosen]})
    about = results.done()[CUTS]
    rows = [Row(**{**row, "cut": tuple(Segment(*segment) for segment in row["cut"])}) for row in about["rows"]]
    jobs = {f"seed {s}: {row.name}": (s, n) for s in range(args.length.seeds) for n, row in enumerate(rows)}
    for key in args.jobs(results, list(jobs), untrained, feed, each):
        seed, number = jobs[key]
        results.append({"key": key, **shrink(args, results, seed, number, rows[number])})
    for key, (_, number) in jobs.items():
        found = results.done()[key]
        rows[number].macs = found["macs"]
        rows[number].knob.append(found["knob"])
        rows[number].plain.append(found["plain"])
    return rows, about["hardware"]


def trained_net(args: Args, results: Results, feed: Feed, seed: int) -> nn.Module:
    """The net of a seed, which all of its cuts begin with."""
    torch.manual_seed(seed)
    model, name = args.model.make(feed)[0], f"net-{seed}.safetensors"
    how: dict[str, Any] = {"progress": not args.running.quiet, "train": results.kept(name)}

    def made() -> Mapping[str, Tensor]:
        updates = num_updates(feed, args.length.epochs)
        return fit(model, feed.train, args.training, updates=updates, label=f"seed {seed}: the net", **how).state_dict()

    load_weights(model, results.made_once(seed, name, made))
    return model.eval()


def shrink(args: Args, results: Results, seed: int, number: int, row: Row) -> dict[str, Any]:
    """Give up the activations of a cut and merge its blocks; beside it the same shape, trained plainly."""
    feed, config, aloud = args.feed(seed), args.training, not args.running.quiet
    size, label = feed.input_size, f"seed {seed}: {row.name}"
    first, more = num_updates(feed, args.length.epochs), num_updates(feed, args.shrink_epochs)
    model = trained_net(args, results, feed, seed)
    shrunk: nn.Module = vanish_cut(model, row.cut)
    cost = first * training_macs(model, size) + more * training_macs(shrunk, size)
    lam = schedule_of(args, more) if row.cut != uncut(model) else gs.schedules.constant(0.0)
    train = partial(fit, batches=feed.train, progress=aloud)
    again = replace(config, lr=config.lr / 2)
    shrunk = train(shrunk, config=again, updates=more, lam=lam, label=label, train=results.kept(f"{label}, knob"))
    exact = copy.deepcopy(shrunk).double().eval()
    gs.assert_equivalent(exact, merge_cut(exact, row.cut, input_size=size), input_size=size)
    merged = merge_cut(shrunk, row.cut, input_size=size)
    if seed == 0:
        state = {k: v.contiguous() for k, v in merged.state_dict().items()}
        write_atomic(results.path / f"merged-{number}.safetensors", save(state))
    torch.manual_seed(seed)
    plain: nn.Module = plain_at_depth(model, row.cut)
    label, same_cost = f"{label}, plainly", round(cost / training_macs(plain, size))
    plain = train(plain, config=config, updates=same_cost, label=label, train=results.kept(label))
    found = {"knob": evaluate(merged, feed.test).top1, "plain": evaluate(plain, feed.test).top1}
    tell(aloud, f"{label}: test top-1 {found['plain']:.2f} %, by the knob {found['knob']:.2f} %")
    return {"macs": gs.profile(merged, size).macs, **found}


def choose(args: Args, model: nn.Module, feed: Feed) -> tuple[Latencies, list[Row]]:
    """The latency table, and a cut for every target that can be met (the net as it is comes first)."""
    timing, aloud = args.timing, not args.running.quiet
    options: dict[str, Any] = {"batch_size": timing.latency_batch, "rounds": timing.turns}
    cache = None if args.remeasure else CACHE / "latency"
    latencies = measure_latencies(
        model, feed.input_size, longest=timing.longest, cache=cache, progress=aloud, **options
    )
    tell(aloud, f"{latencies.hardware}: {latencies.net_ms:.3f} ms{' (from the table)' * latencies.cached}")
    batches = [feed.train.batch(update)[0] for update in range(20)]
    loss: Callable[[nn.Module], float] = lambda net: evaluate(net, feed.val).loss  # noqa: E731
    harms = segment_harms(model, batches, loss, longest=timing.longest, progress=aloud)
    frontier = depth_frontier(latencies, harms)
    plans = [DepthPlan(uncut(model), latencies.net_ms, 0.0)]
    for share in sorted(args.targets, reverse=True):
        try:
            plan = plan_depth(latencies, harms, target_ms=share * latencies.net_ms)
        except PlanError:
            plan = frontier[0]
            tell(aloud, f"no cut takes {share:.2f} of the time; the fastest: {plan.ms / latencies.net_ms:.2f}")
        if plan.cut not in [known.cut for known in plans]:
            plans.append(plan)
    measured = measure_plans(model, plans, latencies, feed.input_size, **options)
    if slower := [str(plan) for plan in plans if plan not in [m.plan for m in measured]]:
        tell(aloud, f"measured slower than the net, and left out: {', '.join(slower)}")
    return latencies, [Row(str(m.plan), m.plan.cut, m.plan.ms, m.ms, m.share, m.error) for m in measured]


def schedule_of(args: Args, updates: int) -> Schedule:
    """Lam over the shrinking: down from the beginning, 0 from the share --deadline on."""
    zero_at = max(1, round(args.length.deadline * updates))
    if args.schedule == "cosine":
        return gs.schedules.hold_then_vanish(hold=0, vanish=zero_at)
    return gs.schedules.ClosedLoop(zero_at)


def tell(aloud: bool, text: str) -> None:
    """A line of progress."""
    if aloud:
        print(text, file=sys.stderr, flush=True)


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| merged | ms, measured | of the net | ms, predicted | MACs | test top-1, knob | the same, trained plainly |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.ms:.3f} | {row.share:.2f} | {row.predicted_ms:.3f} | {row.macs:,} | "
        f"{spread(row.knob)} | {spread(row.plain)} |"
        for row in rows
    ]
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and, of several seeds, range."""
    text = f"{statistics.mean(values):.2f} %"
    return text if len(values) == 1 else f"{text} ({min(values):.2f} .. {max(values):.2f})"


def write_report(args: Args, path: Path, rows: list[Row], hardware: str) -> None:
    """report.md, report.json, pareto.png."""
    errors = [abs(row.error) for row in rows]
    report: dict[str, Any] = {
        "hardware": hardware,
        "worst_prediction_error": max(errors),
        "rows": [{**asdict(row), "cut": [list(segment) for segment in row.cut]} for row in rows],
    }
    write_json(path / "report.json", report)
    wins = sum(k > p for row in rows[1:] for k, p in zip(row.knob, row.plain, strict=True))
    pairs = sum(len(row.knob) for row in rows[1:])
    text = f"""# The depth knob: {args.model.name} on {args.data.name}

{table(rows)}

![accuracy against latency](pareto.png)

* Latencies: lowest deciles of turns taken together, {args.timing.latency_batch} image(s) at a time, on
  {hardware}. Predictions are at most {100 * max(errors):.0f} % off
  (as shares of the net's time). Cuts that were measured slower than the net have been left out before any training.
* Turning the knob was better than training the same shape plainly for the same training MACs in {wins} of {pairs}
  comparisons over {args.length.seeds} seed(s). Differences below the spread of the seeds mean nothing.
* lam fell by the {args.schedule} schedule. Every merged net was compared with the net it comes from in float64, and
  equals it to 1e-10.
* A net is made again from report.json: `merge_cut(vanish_cut(timm.create_model("{args.model.name}", ...), cut), cut)`
  with lam 0 (growshrink.depth.segments), then `load_state_dict` of merged-N.safetensors.
"""
    write_atomic(path / "report.md", text.encode())
    draw(path / "pareto.png", rows, f"{args.model.name} on {args.data.name}, batch {args.timing.latency_batch}")


def draw(path: Path, rows: list[Row], title: str) -> None:
    """Accuracy against measured latency."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    ordered = sorted(rows, key=lambda row: row.ms)
    for key, label, style in (("knob", "depth knob", "o-"), ("plain", "trained plainly at this depth", "s--")):
        found = [(row.ms, statistics.mean(getattr(row, key)), getattr(row, key)) for row in ordered]
        bars = [[mean - min(seeds) for _, mean, seeds in found], [max(seeds) - mean for _, mean, seeds in found]]
        axes.errorbar([ms for ms, *_ in found], [mean for _, mean, _ in found], bars, fmt=style, capsize=3, label=label)
    axes.axvline(rows[0].ms, color="grey", lw=0.8, ls=":", label="the net as trained")
    if (num := len(rows[0].knob)) > 1:
        axes.plot([], [], " ", label=f"bars: range over {num} seeds")
    axes.set(xlabel="measured latency, ms per batch", ylabel="test top-1, %", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    save_picture(figure, path, dpi=120)


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from here")
