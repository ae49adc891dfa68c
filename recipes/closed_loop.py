"""Does it pay to let the training loss decide how fast lam falls? The closed loop against a cosine, at equal budget.

    python recipes/closed_loop.py                        digits, reducenet20_x2, 5 seeds, a few minutes on 2 cores
    python recipes/closed_loop.py --model vanillanet_5_x1 --epochs 30 --seeds 10

For each seed the same net is trained twice on the same batches, for the same number of updates, with the same learning
rates, and lam 0 from the same update on: once lam falls by a cosine, once by gs.ClosedLoop. Both are fused. What counts
is the paired difference of their test accuracies, with its 95 % interval (Student's t).

Leaves runs/NAME/ with report.md, report.json, lam.png and run.json.
"""

from __future__ import annotations

import shlex
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import tyro
from scipy.stats import t as student

import growshrink as gs
from growshrink.cycle.result import versions
from growshrink.errors import PlanError, RunError, near
from growshrink.training import Augment, MemoryFeed, RunFolder, TrainConfig, evaluate, fit, load_data
from growshrink.training.checkpoints import write_atomic
from growshrink.training.folder import write_json


@dataclass(kw_only=True)
class Args:
    """Options of closed_loop."""

    data: str = "digits"
    """digits, fashion-mnist, cifar10, cifar100, or a folder train/CLASS/*, test/CLASS/* of images."""
    data_dir: Path | None = None
    """Where the data set lies (digits need none)."""
    model: str = "reducenet20_x2"
    """A net that is grown at birth: reducenet20_x1, vanillanet_5_x1, ..."""
    width: float = 0.5
    """Multiplier of its channels."""
    epochs: float = 30.0
    """Of each training."""
    deadline: float = 0.7
    """Share of the training after which lam is 0, for both."""
    tolerance: float = 0.05
    """Of the closed loop: how far the smoothed loss may be above its lowest, relatively."""
    batch_size: int = 64
    """Images per update."""
    lr: float = 0.1
    """Peak learning rate."""
    seeds: int = 5
    """How many pairs; at least 2."""
    threads: int = 1
    """Of torch."""
    out: Path | None = None
    """Folder of the run; by default runs/DATA-MODEL-closed-loop, numbered if taken."""
    quiet: bool = False
    """No progress bars."""


class RecordedLoop(gs.ClosedLoop):
    """A closed loop that remembers its lam by update."""

    def __init__(self, deadline: int, *, tolerance: float) -> None:
        super().__init__(deadline, tolerance=tolerance)
        self.curve: dict[int, float] = {}

    def __call__(self, update: int) -> float:
        """See `ClosedLoop`."""
        value = super().__call__(update)
        self.curve[update] = value
        return value


def main(args: Args) -> None:
    """Run it; errors of the user's are raised as GrowShrinkError."""
    if args.seeds < 2 or args.epochs <= 0 or not 0 < args.deadline < 1:
        raise PlanError("--seeds must be at least 2, --epochs above 0, and --deadline between 0 and 1.")
    known = timm.list_models(["reducenet*_x*", "vanillanet*_x*"])
    if args.model not in known:
        raise RunError(f"--model {args.model}: no net that is grown at birth{near(args.model, known)}")
    torch.set_num_threads(args.threads)
    name = f"{Path(args.data).resolve().name}-{args.model}-closed-loop"
    with RunFolder.claim(args.out) if args.out else RunFolder.claim_next(Path("runs"), name) as folder:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()}
        record = {"command": shlex.join(["python", *sys.argv]), "options": options, "versions": versions()}
        folder.write_marker("running", record)
        print(run(args, folder.path))
        folder.write_marker("finished", record)


def run(args: Args, path: Path) -> str:
    """All pairs, and what they say."""
    top1: dict[str, list[float]] = {"cosine": [], "closed loop": []}
    curves: list[dict[int, float]] = []
    for seed in range(args.seeds):
        data = load_data(args.data, args.data_dir, seed=seed, progress=not args.quiet)
        augment = Augment(crop=data.input_size[1] // 8, flip=args.data != "digits")
        feed = MemoryFeed.of(data, batch_size=args.batch_size, augment=augment, seed=seed)
        updates = max(1, round(args.epochs * feed.train.updates_per_epoch))
        zero_at = max(1, round(args.deadline * updates))
        loop = RecordedLoop(zero_at, tolerance=args.tolerance)
        for name, lam in (("cosine", gs.schedules.cosine(1.0, 0.0, steps=zero_at)), ("closed loop", loop)):
            torch.manual_seed(seed)
            net = fit(
                timm.create_model(
                    args.model, num_classes=len(feed.classes), in_chans=feed.input_size[0], width=args.width
                ),
                feed.train,
                TrainConfig(lr=args.lr, ema_decay=0.0),
                updates=updates,
                lam=lam,
                label=f"seed {seed}: {name}",
                progress=not args.quiet,
            )
            top1[name].append(evaluate(gs.fuse(net, input_size=feed.input_size), feed.test).top1)
        curves.append(loop.curve)
    cosine = gs.schedules.cosine(1.0, 0.0, steps=zero_at)
    draw(path / "lam.png", curves, {update: cosine(update) for update in range(updates)})
    write_json(path / "report.json", {"top1": top1, "difference": difference(top1), "updates": updates})
    text = report(args, top1)
    write_atomic(path / "report.md", text.encode())
    return text


def difference(top1: dict[str, list[float]]) -> tuple[float, float, float]:
    """Mean of the paired differences, closed loop less cosine, and the ends of its 95 % interval."""
    pairs = [a - b for a, b in zip(top1["closed loop"], top1["cosine"], strict=True)]
    mean = statistics.mean(pairs)
    half = float(student.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return mean, mean - half, mean + half


def report(args: Args, top1: dict[str, list[float]]) -> str:
    """report.md."""
    mean, low, high = difference(top1)
    verdict = "better" if low > 0 else "worse" if high < 0 else "not told apart from it"
    rows = "\n".join(
        f"| {name} | {statistics.mean(values):.2f} | {', '.join(f'{value:.2f}' for value in values)} |"
        for name, values in top1.items()
    )
    return f"""# Closed loop against cosine: {args.model} on {args.data}

| lam | test top-1 of the fused net, mean | by seed |
|---|---|---|
{rows}

Closed loop less cosine: {mean:+.2f} points, 95 % interval {low:+.2f} .. {high:+.2f} ({args.seeds} seeds, paired): the
closed loop is **{verdict}**. {args.epochs:g} epochs each, lam 0 after {args.deadline:.0%} of them at the latest.

![lam by update](lam.png)
"""


def draw(path: Path, curves: list[dict[int, float]], cosine: dict[int, float]) -> None:
    """Lam by update."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(list(cosine), list(cosine.values()), "k--", label="cosine")
    for seed, curve in enumerate(curves):
        axes.plot(list(curve), list(curve.values()), lw=0.8, label=f"closed loop, seed {seed}")
    axes.set(xlabel="update", ylabel="lam")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except gs.GrowShrinkError as error:
        print(f"closed_loop: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("closed_loop: interrupted.", file=sys.stderr)
        sys.exit(130)
