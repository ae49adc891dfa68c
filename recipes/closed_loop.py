"""Does it pay to let the training loss decide how fast lam falls? The closed loop against a cosine, at equal budget.

    python recipes/closed_loop.py                        digits, reducenet20_x2, 5 seeds, a few minutes on 2 cores
    python recipes/closed_loop.py --model vanillanet_5_x1 --epochs 30 --seeds 10

For each seed the same net is trained twice on the same batches, for the same number of updates, with the same learning
rates, and lam 0 from the same update on: once lam falls by a cosine, once by gs.schedules.ClosedLoop. Both are fused.
What counts is the paired difference of their test accuracies, with its 95 % interval (Student's t).

Leaves runs/NAME/ with report.md, report.json, lam.png and run.json, and results.jsonl with a line for each net: a run
that was stopped continues when the same command is given again.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from scipy.stats import t as student

import growshrink as gs
from growshrink.base.limits import NotNegative
from growshrink.base.writing import save_picture, write_atomic, write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import LengthOptions, ModelOptions, RunOptions
from growshrink.cli.program import run_program
from growshrink.errors import PlanError, RunError, did_you_mean
from growshrink.training import TrainConfig, evaluate
from results import ResultOptions, Results
from trained import fit, num_updates

COSINE, LOOP = "cosine", "closed loop"


@dataclass(frozen=True, kw_only=True)
class Args(ResultOptions):
    """Options of closed_loop; the model is a net that is built grown: reducenet20_x1, vanillanet_5_x1, ..."""

    loss_tolerance: NotNegative = 0.05
    """Closed loop: how far the smoothed loss may be above its lowest, relatively."""
    length: LengthOptions = LengthOptions(epochs=30.0, seeds=5)
    training: TrainConfig = TrainConfig(ema_decay=0.0)
    model: ModelOptions = ModelOptions(model="reducenet20_x2", model_kwargs=("width=0.5",))
    running: RunOptions = pick(RunOptions(threads=1), "out", "threads", "quiet")


class RecordedLoop(gs.schedules.ClosedLoop):
    """A closed loop that remembers its lam by update."""

    def __init__(self, deadline: int, *, tolerance: float) -> None:
        super().__init__(deadline, tolerance=tolerance)
        self.curve: list[float] = []

    def __call__(self, update: int) -> float:
        """See `ClosedLoop`."""
        value = super().__call__(update)
        if update == len(self.curve):
            self.curve.append(value)
        return value

    def state_dict(self) -> dict[str, Any]:
        """See `ClosedLoop`."""
        return {**super().state_dict(), "curve": self.curve}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ClosedLoop`."""
        super().load_state_dict(state)
        self.curve = list(state["curve"])


def main(args: Args) -> None:
    """Run it; errors of the user's are raised as GrowShrinkError."""
    if args.length.seeds < 2:
        raise PlanError(f"--seeds {args.length.seeds}: must be at least 2.")
    known = timm.list_models(["reducenet*_x*", "vanillanet*_x*"])
    if args.model.model not in known:
        raise RunError(f"--model {args.model.name}: no net that is built grown{did_you_mean(args.model.name, known)}")
    with args.results("closed-loop") as results:
        print(run(args, results))
        results.finish()


def run(args: Args, results: Results) -> str:
    """All pairs, and what they say."""
    jobs = {f"seed {seed}, {name}": (seed, name) for seed in range(args.length.seeds) for name in (COSINE, LOOP)}
    feed = args.feed(0)
    updates = num_updates(feed, args.length.epochs)
    zero_at = max(1, round(args.length.deadline * updates))
    cosine = gs.schedules.cosine(1.0, 0.0, steps=zero_at)
    for key in args.jobs(results, list(jobs), args.model.make(feed)[0], feed, updates):
        seed, name = jobs[key]
        feed, loop = args.feed(seed), RecordedLoop(zero_at, tolerance=args.loss_tolerance)
        torch.manual_seed(seed)
        net = fit(
            args.model.make(feed)[0],
            feed.train,
            args.training,
            updates=updates,
            lam=cosine if name == COSINE else loop,
            label=key,
            progress=not args.running.quiet,
            train=results.kept(key),
        )
        score = evaluate(gs.fuse(net, input_size=feed.input_size), feed.test).top1
        results.append({"key": key, "top1": score, "curve": loop.curve})
    done = {jobs[key]: record for key, record in results.done().items()}
    seeds = range(args.length.seeds)
    top1 = {name: [done[seed, name]["top1"] for seed in seeds] for name in (COSINE, LOOP)}
    draw(results.path / "lam.png", [done[seed, LOOP]["curve"] for seed in seeds], [cosine(u) for u in range(updates)])
    write_json(results.path / "report.json", {"top1": top1, "difference": difference(top1), "updates": updates})
    text = report(args, top1)
    write_atomic(results.path / "report.md", text.encode())
    return text


def difference(top1: dict[str, list[float]]) -> tuple[float, float, float]:
    """Mean of the paired differences, closed loop less cosine, and the ends of its 95 % interval."""
    pairs = [a - b for a, b in zip(top1[LOOP], top1[COSINE], strict=True)]
    mean = statistics.mean(pairs)
    half = float(student.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return mean, mean - half, mean + half


def report(args: Args, top1: dict[str, list[float]]) -> str:
    """report.md."""
    (mean, low, high), length = difference(top1), args.length
    verdict = "better" if low > 0 else "worse" if high < 0 else "not told apart from it"
    rows = "\n".join(
        f"| {name} | {statistics.mean(values):.2f} | {', '.join(f'{value:.2f}' for value in values)} |"
        for name, values in top1.items()
    )
    return f"""# Closed loop against cosine: {args.model.name} on {args.data.name}

| lam | test top-1 of the fused net, mean | by seed |
|---|---|---|
{rows}

Closed loop less cosine: {mean:+.2f} points, 95 % interval {low:+.2f} .. {high:+.2f} ({length.seeds} seeds, paired): the
closed loop is **{verdict}**. {length.epochs:g} epochs each, lam 0 after {length.deadline:.0%} of them at the latest.

![lam by update](lam.png)
"""


def draw(path: Path, curves: list[list[float]], cosine: list[float]) -> None:
    """Lam by update."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 3.5), layout="constrained")).subplots()
    axes.plot(cosine, "k--", label=COSINE)
    for seed, curve in enumerate(curves):
        axes.plot(curve, lw=0.8, label=f"{LOOP}, seed {seed}")
    axes.set(xlabel="update", ylabel="lam")
    axes.legend(fontsize=7)
    save_picture(figure, path, dpi=120)


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from here")
