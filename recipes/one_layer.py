"""The one-layer net, told truthfully: what a net without activations is worth, and what an in-place ReLU hid.

    python recipes/one_layer.py                          digits, about 2 minutes on 2 cores
    python recipes/one_layer.py --seeds 5
    python recipes/one_layer.py --data cifar10 --data-dir D --epochs 20

Trains three nets side by side on the same batches, with the same vanishing of lam: the activation-free ReduceNet
(linear=True); the same with the activation that the article's code had, lam * relu(x, inplace=True) + (1 - lam) * x,
which is a ReLU at every lam; and the default, which keeps one ReLU a block. The first is collapsed into one matrix, and
compared with linear classifiers fitted to the same pixels directly.

Leaves runs/NAME/ with report.md (read this), report.json, templates.png (one picture per class: the rows of the
matrix), one_layer.safetensors (the matrix), run.json, and the nets; a run that was stopped continues when the same
command is given again.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.base.writing import save_picture, write_atomic, write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import DataOptions, LengthOptions, ModelOptions, RunOptions
from growshrink.cli.program import run_program
from growshrink.data.feed import MemoryFeed, SplitBatches
from growshrink.errors import RunError, did_you_mean
from growshrink.layers.activations import VanishingReLU, vanishing
from growshrink.training import TrainConfig, evaluate
from results import ResultOptions, Results, load_weights
from trained import fit, num_updates

LINEAR, BUGGY, DEFAULT = "no activation (linear=True)", "the in-place bug", "one ReLU a block (default)"
MATRIX = "no activation, collapsed"
#: Numbers of pixels in all training images beyond which scikit-learn's logistic regression takes too long.
MOST_PIXELS = 20_000_000


class InplaceBug(VanishingReLU):
    """The activation at commit f16c096 of the article's code: the first term turns x into relu(x) for the second."""

    def forward(self, x: Tensor) -> Tensor:
        """A ReLU, whatever lam is."""
        return self.lam * F.relu(x, inplace=True) + (1 - self.lam) * x


@dataclass(frozen=True, kw_only=True)
class Args(ResultOptions):
    """Options of one_layer; the model is a ReduceNet that is built grown: reducenet20_x1, _x2, ...

    Nothing is cropped or flipped: nets and classifiers are to see the same pixels.
    """

    length: LengthOptions = LengthOptions(epochs=40.0, deadline=0.6)
    training: TrainConfig = TrainConfig(ema_decay=0.0)
    data: DataOptions = pick(
        DataOptions(crop=0, flip=False), "data", "data_dir", "image_size", "val_fraction", "batch_size"
    )
    model: ModelOptions = ModelOptions(model="reducenet20_x2")
    running: RunOptions = pick(RunOptions(threads=1), "out", "threads", "quiet")


@dataclass
class Row:
    """What a net or a classifier is worth, one value per seed: test top-1 in percent, affinity defect."""

    layers: int
    macs: int
    top1: list[float] = field(default_factory=list)
    defect: list[float] = field(default_factory=list)


def main(args: Args) -> None:
    """Run it; errors of the user's are raised as GrowShrinkError."""
    built_grown = [name for name in timm.list_models("reducenet*") if "_x" in name]
    if (name := args.model.name) not in built_grown:
        raise RunError(f"--model {name}: no ReduceNet that is built grown{did_you_mean(name, built_grown)}")
    with args.results("one-layer") as results:
        print(run(args, results))
        results.finish()
    print(f"Read {results.path / 'report.md'}")


def run(args: Args, results: Results) -> str:
    """Train, collapse, fit, report; returns the table."""
    keys, feed = [f"seed {seed}" for seed in range(args.length.seeds)], args.memory_feed(0)
    updates = 3 * num_updates(feed, args.length.epochs)
    for key in args.jobs(results, keys, args.model.make(feed)[0], feed, updates):
        results.append({"key": key, **run_seed(args, results, keys.index(key))})
    done = [results.done()[key] for key in keys]
    rows = {
        name: Row(row["layers"], row["macs"], *([each["rows"][name][k] for each in done] for k in ("top1", "defect")))
        for name, row in done[0]["rows"].items()
    }
    collapse_error = max(each["collapse_max_rel"] for each in done)
    about = {"collapse_max_rel": collapse_error, "rows": {name: asdict(row) for name, row in rows.items()}}
    write_json(results.path / "report.json", about)
    write_atomic(results.path / "report.md", report(args, rows, collapse_error).encode())
    return table(rows)


def run_seed(args: Args, results: Results, seed: int) -> dict[str, Any]:
    """What the nets and the classifiers of a seed are worth; the pictures are of the first."""
    feed = args.memory_feed(seed)
    found = {name: train(args, results, name, feed, seed) for name in (LINEAR, BUGGY, DEFAULT)}
    exact = copy.deepcopy(found[LINEAR]).double()
    error = gs.compare(exact, gs.collapse(exact, feed.input_size), input_size=feed.input_size).max_rel
    found[MATRIX] = gs.collapse(found[LINEAR], feed.input_size)
    found |= fit_directly(feed)
    if seed == 0:
        pictures = {name: net for name, net in found.items() if isinstance(net, nn.Sequential)}
        write_atomic(results.path / "one_layer.safetensors", save(dict(pictures[MATRIX].state_dict())))
        draw(results.path / "templates.png", pictures, feed)
    rows = {
        name: {
            "layers": sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in net.modules()),
            "macs": gs.profile(net, feed.input_size).macs,
            "top1": evaluate(net, feed.test).top1,
            "defect": gs.depth.affinity_defect(net, feed.input_size),
        }
        for name, net in found.items()
    }
    return {"collapse_max_rel": error, "rows": rows}


def train(args: Args, results: Results, name: str, feed: MemoryFeed, seed: int) -> nn.Module:
    """One of the three nets, trained, and fused where that is possible."""
    torch.manual_seed(seed)
    kwargs = (*args.model.model_kwargs, f"linear={name != DEFAULT}")
    net, _ = replace(args.model, model_kwargs=kwargs).make(feed)
    if name == BUGGY:
        for place, _ in list(vanishing(net)):
            net.set_submodule(place, InplaceBug())
        net.set_submodule("stem.act", InplaceBug())  # the article's stem had one too
    updates = num_updates(feed, args.length.epochs)
    lam = gs.schedules.hold_then_vanish(hold=updates // 5, vanish=round(args.length.deadline * updates) - updates // 5)
    label, progress = f"seed {seed}: {name}", not args.running.quiet
    file = f"net-{seed}-{(LINEAR, BUGGY, DEFAULT).index(name)}.safetensors"

    def made() -> Mapping[str, Tensor]:
        how: dict[str, Any] = {"label": label, "progress": progress, "train": results.kept(file)}
        return fit(net, feed.train, args.training, updates=updates, lam=lam, **how).state_dict()

    load_weights(net, results.made_once(seed, file, made))
    net.eval()
    return net if name == BUGGY else gs.fuse(net, input_size=feed.input_size)


def fit_directly(feed: MemoryFeed) -> dict[str, nn.Module]:
    """Linear classifiers of the same pixels; how strongly they are regularised is chosen on the val split."""
    x_ND, y_N = pixels(feed, "train")
    found: dict[str, nn.Module] = {}
    candidates = least_squares(x_ND, y_N, len(feed.classes), penalties=(1e-4, 1e-3, 1e-2, 1e-1, 1.0))
    found["least squares, fitted directly"] = best_of(candidates, feed)
    if x_ND.numel() <= MOST_PIXELS:
        candidates = [logistic(x_ND, y_N, strength) for strength in (1e-3, 1e-2, 1e-1, 1.0)]
        found["logistic regression (scikit-learn)"] = best_of(candidates, feed)
    return found


def pixels(feed: MemoryFeed, split: str) -> tuple[Tensor, Tensor]:
    """Normalised images of a split as float64 vectors, and their labels."""
    batches = SplitBatches(getattr(feed.data, split), 4096, feed.mean, feed.std, "cpu")
    images, labels = zip(*batches, strict=True)
    return torch.cat(images).flatten(1).double(), torch.cat(labels)


def least_squares(x_ND: Tensor, y_N: Tensor, num_classes: int, penalties: Sequence[float]) -> list[nn.Sequential]:
    """Ridge regressions of one-hot labels; penalties are relative to the mean variance of a pixel."""
    mean_D, target_NK = x_ND.mean(0), F.one_hot(y_N, num_classes).double()
    centred_ND = x_ND - mean_D
    gram_DD, moment_DK = centred_ND.T @ centred_ND, centred_ND.T @ target_NK
    ridge_DD = torch.eye(len(gram_DD), dtype=torch.float64) * gram_DD.diagonal().mean()
    weights_KD = [torch.linalg.solve(gram_DD + penalty * ridge_DD, moment_DK).T for penalty in penalties]
    return [one_layer(weight_KD, target_NK.mean(0) - weight_KD @ mean_D) for weight_KD in weights_KD]


def logistic(x_ND: Tensor, y_N: Tensor, strength: float) -> nn.Sequential:
    """scikit-learn's multinomial logistic regression."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near enough
        fitted = LogisticRegression(C=strength, max_iter=1000).fit(x_ND.numpy(), y_N.numpy())
    return one_layer(torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_))


def one_layer(weight_KD: Tensor, bias_K: Tensor) -> nn.Sequential:
    """Flatten and a linear layer with these numbers, in float32."""
    linear = nn.Linear(weight_KD.shape[1], weight_KD.shape[0])
    linear.load_state_dict({"weight": weight_KD, "bias": bias_K})
    return nn.Sequential(nn.Flatten(), linear).eval()


def best_of(candidates: list[nn.Sequential], feed: MemoryFeed) -> nn.Sequential:
    """The best on the val split."""
    return max(candidates, key=lambda net: evaluate(net, feed.val).top1)


def table(rows: dict[str, Row]) -> str:
    """The rows in Markdown."""
    lines = ["| | layers | MACs | affinity defect | test top-1 |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row.layers} | {row.macs:,} | {max(row.defect):.1e} | {spread(row.top1)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and, of several seeds, range."""
    text = f"{statistics.mean(values):.2f} %"
    return text if len(values) == 1 else f"{text} ({min(values):.2f} .. {max(values):.2f})"


def report(args: Args, rows: dict[str, Row], collapse_error: float) -> str:
    """report.md."""
    mean = {name: statistics.mean(row.top1) for name, row in rows.items()}
    fitted = max((name for name in rows if name not in (LINEAR, BUGGY, DEFAULT, MATRIX)), key=mean.__getitem__)
    verdict = "does not beat" if mean[LINEAR] <= mean[fitted] else "is above"
    return f"""# One layer: {args.model.name} on {args.data.name}

{table(rows)}

![the rows of the matrix](templates.png)

* The net without activations is a linear classifier, whatever its depth: collapsed, one matrix gives its outputs to
  {collapse_error:.1e} (float64). With {mean[LINEAR]:.2f} % it **{verdict}** the best linear classifier fitted to the
  same pixels directly ({fitted}, {mean[fitted]:.2f} %).
* The in-place bug keeps every activation alive: its lam is 0, and its affinity defect {max(rows[BUGGY].defect):.2f}.
  What it reaches, {mean[BUGGY]:.2f} %, is what a net with ReLUs reaches; such a number says nothing about a net that
  fuses into one layer. growshrink.fuse refuses it.
* One ReLU a block, the default: {mean[DEFAULT]:.2f} %. That is what an activation is worth here.
* {args.length.seeds} seed(s); the affinity defect is the largest of them. No augmentation: all see the same pixels.
"""


def draw(path: Path, nets: dict[str, nn.Sequential], feed: MemoryFeed) -> None:
    """The rows of the matrices as pictures."""
    from matplotlib.figure import Figure

    classes = len(feed.classes)
    shape = (len(nets), classes)
    figure = Figure(figsize=(1.1 * classes, 1.4 * len(nets)), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    for line, (name, net) in zip(axes, nets.items(), strict=True):
        for axis, row, label in zip(line, net.get_parameter("1.weight").detach(), feed.classes, strict=True):
            template_HWC = row.reshape(feed.input_size).permute(1, 2, 0).numpy()
            scale = float(abs(template_HWC).max())
            if template_HWC.shape[2] == 3:
                axis.imshow(0.5 + template_HWC / (2 * scale))
            else:
                axis.imshow(template_HWC.mean(2), cmap="RdBu_r", vmin=-scale, vmax=scale)
            axis.set(xticks=[], yticks=[], xlabel=label)
        line[0].set_title(name, loc="left", fontsize=8)
    signs = (
        "grey pixels do not count"
        if feed.input_size[0] == 3
        else "a bright pixel counts for the class where red, against it where blue"
    )
    figure.suptitle(f"weights of each class: {signs}", fontsize=10)
    save_picture(figure, path, dpi=120)


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from here")
