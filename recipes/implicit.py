"""What a layer at equilibrium is worth: implicit nets and branches against explicit ones, for the same training MACs.

    python recipes/implicit.py                           digits, 9 arms, 5 seeds, about 10 minutes on one core
    python recipes/implicit.py --data cifar10 --data-dir D --image-size 16 --epochs 20 --batch-size 128
    python recipes/implicit.py --arms explicit-2 deq tied-4 --seeds 3

--epochs is the length for `explicit-2`, the net with as many parameters as `reducenet20_deq`; every other arm is
trained for the epochs that cost as many MACs. An evaluation of an equilibrium costs what its convolutions cost, and 8
are counted forward and 8 backward. Leaves runs/NAME/ with report.md (read this), report.json and run.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import timm
import torch
from torch import Tensor, nn

import growshrink as gs
from growshrink.algebra import Solver
from growshrink.analysis.stats import paired
from growshrink.base.limits import OneOf
from growshrink.base.writing import write_atomic, write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import DataOptions, LengthOptions, ModelOptions, RunOptions
from growshrink.cli.program import run_program
from growshrink.data.feed import Feed
from growshrink.errors import PlanError
from growshrink.layers import ConvEquilibrium, ImplicitReLU
from growshrink.proofs._profile import training_macs
from growshrink.training import TrainConfig, evaluate
from results import ResultOptions, Results
from trained import fit, num_updates

CONTROL = "explicit-2"
UNROLLED = (1, 2, 4, 6)
#: A model and its arguments; `branch` is grown, vanishes and is fused.
ARMS: dict[str, dict[str, Any]] = {
    "explicit-1": {"model": "reducenet20", "depths": (1, 1, 1)},
    CONTROL: {"model": "reducenet20", "depths": (2, 2, 2)},
    "explicit-3": {"model": "reducenet20"},
    "tied-4": {"model": "reducenet20_deq", "steps": 4},
    "deq": {"model": "reducenet20_deq"},
    "deq-one-step": {"model": "reducenet20_deq", "solver": Solver(gradient="one_step")},
    "mdeq": {"model": "mdeq_tiny"},
    "bottleneck-2": {"model": "reducenet20", "depths": (2, 2, 2), "branch": "bottleneck"},
    "implicit-2": {"model": "reducenet20", "depths": (2, 2, 2), "branch": "implicit"},
}


@dataclass(frozen=True, kw_only=True)
class Args(ResultOptions):
    """Options of implicit."""

    arms: tuple[Annotated[str, OneOf("no such arm", ARMS)], ...] = tuple(ARMS)
    """What is trained; explicit-2 always is."""
    length: LengthOptions = LengthOptions(epochs=30.0, seeds=5)
    training: TrainConfig = TrainConfig(ema_decay=0.0)
    data: DataOptions = pick(DataOptions(), "data", "data_dir", "image_size", "batch_size")
    model: ModelOptions = pick(ModelOptions(model_kwargs=("width=0.5",)), "model_kwargs")
    running: RunOptions = pick(RunOptions(threads=1), "out", "threads", "quiet")


@dataclass
class Row:
    """What an arm costs and reaches; lists have a value for each seed."""

    params: int
    macs: int
    epochs: float
    saved: int
    top1: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    unrolled: list[list[float]] = field(default_factory=list)


def main(args: Args) -> None:
    """Run it; errors of the user's are raised as GrowShrinkError."""
    if args.length.seeds < 2:
        raise PlanError(f"--seeds {args.length.seeds}: must be at least 2.")
    with args.results("implicit") as results:
        print(run(args, results))
        results.finish()
    print(f"Read {results.path / 'report.md'}")


def run(args: Args, results: Results) -> str:
    """Train every arm with every seed, report; returns the report."""
    rows: dict[str, Row] = {}
    feed = args.feed(0)
    for name in dict.fromkeys((CONTROL, *args.arms)):
        rows[name] = row_of(args, name, feed, rows)
    jobs = {f"seed {seed}, {name}": (seed, name) for seed in range(args.length.seeds) for name in rows}
    updates = num_updates(feed, args.length.epochs)  # MACs are equal
    for key in args.jobs(results, list(jobs), make(args, CONTROL, feed), feed, updates):
        seed, name = jobs[key]
        results.append({"key": key, "found": train(args, name, args.feed(seed), seed, rows[name].epochs)})
    for key, (_, name) in jobs.items():
        for column, value in results.done()[key]["found"].items():
            getattr(rows[name], column).append(value)
    write_json(results.path / "report.json", {arm: asdict(row) for arm, row in rows.items()})
    text = report(args, rows)
    write_atomic(results.path / "report.md", text.encode())
    return text


def make(args: Args, name: str, feed: Feed) -> nn.Module:
    """The net of an arm, grown where it has a branch."""
    kwargs = {key: value for key, value in ARMS[name].items() if key not in ("model", "branch")}
    kwargs |= {"num_classes": len(feed.classes), "in_chans": feed.input_size[0], **args.model.kwargs}
    net = timm.create_model(ARMS[name]["model"], **kwargs)
    branch = ARMS[name].get("branch")
    return gs.grow(net, branch, input_size=feed.input_size) if branch else net


def row_of(args: Args, name: str, feed: Feed, rows: dict[str, Row]) -> Row:
    """Costs, and the epochs that they leave."""
    net = make(args, name, feed)
    macs = training_macs(net, feed.input_size, feed.train.batch_size)
    epochs = args.length.epochs * (rows[CONTROL].macs / macs if name != CONTROL else 1.0)
    images, _ = feed.train.batch(0)
    return Row(gs.profile(net, feed.input_size).params, macs, epochs, saved_bytes(net.train(), images))


def train(args: Args, name: str, feed: Feed, seed: int, epochs: float) -> dict[str, Any]:
    """Train one net; what it is worth, by the columns of a `Row`."""
    torch.manual_seed(seed)
    net, counter = make(args, name, feed), Evaluations()
    updates = max(20, num_updates(feed, epochs))
    lam = gs.schedules.hold_then_vanish(hold=updates // 2, vanish=updates // 4)
    start = time.process_time()
    with counter:
        net = fit(
            net,
            feed.train,
            args.training,
            updates=updates,
            lam=lam if ARMS[name].get("branch") else gs.schedules.constant(1.0),
            label=f"seed {seed}: {name}",
            progress=not args.running.quiet,
        )
    found: dict[str, Any] = {"seconds": time.process_time() - start, "evaluations": counter.mean}
    if (norm := ImplicitReLU.mean_norm(net)) is not None:
        found["norms"] = norm
    if ARMS[name].get("branch"):
        net = gs.fuse(net, input_size=feed.input_size)
    found["top1"] = evaluate(net, feed.test).top1
    if any(isinstance(m, ConvEquilibrium) and m.steps == 0 for m in net.modules()):
        found["unrolled"] = [evaluate(gs.unroll(net, steps), feed.test).top1 for steps in UNROLLED]
    return found


class Evaluations:
    """Counts the evaluations of every solved system, forward and backward, while it is entered."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    @property
    def mean(self) -> float:
        """Per system; 0 where nothing was solved."""
        return statistics.mean(self.counts) if self.counts else 0.0

    def __enter__(self) -> None:
        original = self._original = Solver.solve

        def counted(solver: Solver, *args: Any, **kwargs: Any) -> Any:
            found = original(solver, *args, **kwargs)
            self.counts.append(len(found.residuals))
            return found

        Solver.solve = counted  # type: ignore[method-assign,assignment]

    def __exit__(self, *_: object) -> None:
        Solver.solve = self._original  # type: ignore[method-assign]


def saved_bytes(net: nn.Module, images: Tensor) -> int:
    """What a forward pass keeps for the backward pass, parameters left out."""
    own = {p.data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        alive = net(images)
    assert isinstance(alive, Tensor)
    return sum(kept.values())


def report(args: Args, rows: dict[str, Row]) -> str:
    """report.md."""
    lines = [
        "| arm | parameters | MACs of an update, of the control's | epochs | CPU s | saved for backward, KiB "
        "| evaluations | top-1 | less the control (95 %) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    control = rows[CONTROL]
    for name, row in rows.items():
        gap = "-"
        if name != CONTROL:
            found = paired(row.top1, control.top1).difference
            gap = f"{found.value:+.2f} ({found.low:+.2f} .. {found.high:+.2f})"
        lines.append(
            f"| {name} | {row.params:,} | {row.macs / control.macs:.2f} | {row.epochs:.1f} "
            f"| {statistics.mean(row.seconds):.1f} | {row.saved / 1024:,.0f} | {statistics.mean(row.evaluations):.1f} "
            f"| {statistics.mean(row.top1):.2f} | {gap} |"
        )
    notes = []
    for name, row in rows.items():
        if row.unrolled:
            means = [statistics.mean(values) for values in zip(*row.unrolled, strict=True)]
            steps = ", ".join(f"{k} steps {value:.2f}" for k, value in zip(UNROLLED, means, strict=True))
            notes.append(f"* `{name}` after explicit steps (`gs.unroll`): {steps}.")
        if row.norms:
            verdict = "" if min(row.norms) >= 0.1 else ": below 0.1, so it has tested nothing"
            notes.append(
                f"* `{name}`: norm of A, from 0.5, at the end {min(row.norms):.2f} .. {max(row.norms):.2f}{verdict}."
            )
    table = "\n".join(lines)
    return f"""# Layers at equilibrium on {args.data.name}

{table}

{chr(10).join(notes)}
* {args.length.seeds} seeds, paired; the control is `{CONTROL}`. Evaluations are means over the solved systems, forward
  and backward; 8 are counted in the MACs.
"""


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from here")
