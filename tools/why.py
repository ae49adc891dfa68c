"""Why an arm pays or not: what the nets of an experiment's finished runs are like, arm by arm.

    python tools/why.py docs/evidence/NAME --data-dir DIR --out OUT

Needs the run folders (runs/ in the experiment's). Writes why.md and why.png:

* loss and top-1 on the images trained on, as they are, and on the test split; the gap is between the two top-1;
* the largest eigenvalue of the Hessian of the training loss (power iteration on 1,000 training images, norms in eval
  mode);
* on how many test images student and teacher agree, where a checkpoint of the run holds a wider plain net as its
  teacher;
* retention of the last round, where the run has one;
* the mean absolute weight at each position of the 3x3 kernels, over the layer's mean: ACNet (arXiv:1908.03930) has it
  that centres weigh more, and branches add to that.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import timm
import torch
import tyro
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.base.limits import Count, InFolder
from growshrink.base.reading import read_json
from growshrink.base.writing import save_picture, write_atomic
from growshrink.cli.forms import pick
from growshrink.cli.options import DataOptions, RunOptions
from growshrink.cli.program import run_program
from growshrink.data.batches import eval_batches
from growshrink.data.datasets import DataSet, Split
from growshrink.errors import RunError
from growshrink.evidence.experiment import Experiment, data_of, deployed_nets
from growshrink.evidence.record import PLAN_FILE, RunRecord, chosen_lr, read_runs, runs_of, unstack_state

#: Prefix of a teacher's tensors in a checkpoint.
TEACHER = "/teacher/"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of why."""

    runs: Annotated[InFolder, tyro.conf.Positional]
    """Folder of an experiment, with its run folders."""
    data: DataOptions = pick(DataOptions(), "data_dir")
    running: RunOptions = pick(RunOptions(), "out")
    hessian_images: Count = 1000
    """Training images that the Hessian is taken on."""
    iterations: Count = 20
    """Steps of the power iteration."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is found of one net; `kernel` is `(3, 3)`, None without such kernels."""

    train_loss: float
    test_loss: float
    train_top1: float
    test_top1: float
    eigenvalue: float
    agreement: float | None
    retention: float | None
    kernel: Tensor | None

    @property
    def gap(self) -> float:
        """Top-1 on what it was trained on less that on the test split."""
        return self.train_top1 - self.test_top1


def main(args: Args) -> None:
    """Look at every net, write the page."""
    out = args.running.out
    if out is None:
        raise RunError("--out: name the folder for why.md and why.png.")
    if not (args.runs / PLAN_FILE).is_file():
        raise RunError(f"{args.runs}: holds no experiment (there is no {PLAN_FILE} in it).")
    experiment = Experiment.from_dict(read_json(args.runs / PLAN_FILE))
    records = read_runs(args.runs)
    findings = {}
    for arm, runs in runs_of(experiment.comparison, chosen_lr(experiment.comparison, records), records).items():
        found = [each for run in runs for each in look(args, experiment, run)]
        if found:
            findings[arm] = found
    if not findings:
        raise RunError(f"{args.runs}: has no finished run.")
    out.mkdir(parents=True, exist_ok=True)
    kernels = {arm: [each.kernel for each in found if each.kernel is not None] for arm, found in findings.items()}
    means = {arm: torch.stack(own).mean(0) for arm, own in kernels.items() if own}
    draw_kernels(means, out / "why.png")
    write_atomic(out / "why.md", page_of(findings, experiment).encode())
    print(f"Read {out / 'why.md'}")


def look(args: Args, experiment: Experiment, run: RunRecord) -> list[Finding]:
    """Measure the net of each seed of a run."""
    found = []
    for number, seed in enumerate(run.seeds):
        data = data_of(experiment, seed, args.data.data_dir)
        net = deployed_nets(experiment, run.job, args.runs, data)[number]
        teacher = teacher_of(experiment, run, args.runs / run.job.folder, data, number)
        train, test = (logits_of(net, data, split) for split in (data.train, data.test))
        answers = None if teacher is None else logits_of(teacher, data, data.test)[0].argmax(1)
        few = Split(data.train.images[: args.hessian_images], data.train.labels[: args.hessian_images])
        retentions = [entry["retention"] for entry in run.rounds if entry.get("retention") is not None]
        found.append(
            Finding(
                train_loss=float(F.cross_entropy(*train)),
                test_loss=float(F.cross_entropy(*test)),
                train_top1=top1(*train),
                test_top1=top1(*test),
                eigenvalue=top_eigenvalue(net, *batch_of(data, few), iterations=args.iterations),
                agreement=None if answers is None else top1(test[0], answers),
                retention=retentions[-1] if retentions else None,
                kernel=mean_kernel(net),
            )
        )
    return found


def batch_of(data: DataSet, split: Split) -> tuple[Tensor, Tensor]:
    """A split as one batch, not augmented."""
    return next(iter(eval_batches(split, batch_size=len(split.labels), mean=data.mean, std=data.std)))


@torch.no_grad()
def logits_of(net: nn.Module, data: DataSet, split: Split) -> tuple[Tensor, Tensor]:
    """Outputs `(N, K)` and labels `(N,)`."""
    batches = eval_batches(split, batch_size=512, mean=data.mean, std=data.std)
    logits, labels = zip(*((net(images_NCHW), labels_N) for images_NCHW, labels_N in batches), strict=True)
    return torch.cat(logits), torch.cat(labels)


def top1(logits_NK: Tensor, labels_N: Tensor) -> float:
    """Percent."""
    return 100.0 * float((logits_NK.argmax(1) == labels_N).double().mean())


def top_eigenvalue(net: nn.Module, images_NCHW: Tensor, labels_N: Tensor, *, iterations: int) -> float:
    """Find the eigenvalue of largest size of the Hessian of the mean cross-entropy, by power iteration.

    The net is taken as it is, so in eval mode norms are constants. Hessian times vector by double backward
    (Pearlmutter, Neural Computation 6, 1994).
    """
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    loss = F.cross_entropy(net(images_NCHW), labels_N)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    random = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=random, dtype=p.dtype) for p in parameters]
    value = 0.0
    for _ in range(iterations):
        length = torch.sqrt(sum(((v**2).sum() for v in vector), torch.zeros(())))
        vector = [v / length for v in vector]
        product = torch.autograd.grad(gradients, parameters, vector, retain_graph=True)
        value = float(sum((v * p).sum() for v, p in zip(vector, product, strict=True)))
        vector = list(product)
    return value


def mean_kernel(net: nn.Module) -> Tensor | None:
    """Mean absolute weight of each position `(3, 3)`, over the mean of its layer, on average over the layers."""
    kernels = [
        (kernel := module.weight.detach().abs().mean((0, 1))) / kernel.mean()
        for module in net.modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    return torch.stack(kernels).mean(0) if kernels else None


def teacher_of(experiment: Experiment, run: RunRecord, folder: Path, data: DataSet, number: int) -> nn.Module | None:
    """Read the teacher of the net with that number from the newest checkpoint that holds a wider plain net as one."""
    for path in sorted(folder.glob("checkpoint-*.safetensors"), reverse=True):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(TEACHER)]  # noqa: SIM118 - no mapping
            state = {name.removeprefix(TEACHER): file.get_tensor(name) for name in names}
        if not state:
            continue
        own = unstack_state(state, len(run.seeds))[number]
        kwargs = {**experiment.model_kwargs, "num_classes": len(data.classes), "in_chans": data.input_size[0]}
        for factor in (2.0, 1.5, 3.0, 4.0):
            net = timm.create_model(experiment.model, **{**kwargs, "width": factor * kwargs.get("width", 1.0)})
            expected = net.state_dict()
            if own.keys() == expected.keys() and all(own[key].shape == expected[key].shape for key in own):
                net.load_state_dict(own)
                return net.eval()
    return None


def page_of(findings: dict[str, list[Finding]], experiment: Experiment) -> str:
    """The table, means over the seeds."""
    lines = [
        "# Why it pays or not",
        "",
        f"{experiment.model} on {experiment.data}, {experiment.budget:g} epochs' worth of the plain net; means (and "
        "deviations) over the seeds. Training images as they are, without augmentation. Sharpness: the largest "
        "eigenvalue of the Hessian of the training loss. Agreement: test images on which student and teacher say the "
        "same. Retention: (fused - before) / (peak - before). Centre: mean absolute weight in the middle of the 3x3 "
        "kernels over that of all nine.",
        "",
        "| arm | seeds | train loss | test loss | train top-1 | test top-1 | gap | sharpness | agreement | retention | "
        "centre |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, found in findings.items():
        columns = [mean_of([getattr(each, name) for each in found], digits) for name, digits in COLUMNS]
        centre = mean_of([None if each.kernel is None else float(each.kernel[1, 1]) for each in found], 2)
        lines.append(f"| {arm} | {len(found)} | {' | '.join(columns)} | {centre} |")
    return "\n".join([*lines, "", "![mean absolute kernels](why.png)", ""])


#: Attributes of a `Finding`, and digits.
COLUMNS = (
    *(("train_loss", 3), ("test_loss", 3), ("train_top1", 2), ("test_top1", 2), ("gap", 2)),
    *(("eigenvalue", 1), ("agreement", 1), ("retention", 2)),
)


def mean_of(values: Sequence[float | None], digits: int) -> str:
    """Mean of those that are there, and their standard deviation."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    spread = f" ({statistics.stdev(there):.{digits}f})" if len(there) > 1 else ""
    return f"{statistics.mean(there):.{digits}f}{spread}"


def draw_kernels(kernels: dict[str, Tensor], path: Path) -> None:
    """A square of nine for each arm, in one scale of colours."""
    from matplotlib.figure import Figure

    columns = min(4, len(kernels)) or 1
    rows = -(-len(kernels) // columns) or 1
    figure = Figure(figsize=(2.6 * columns, 2.9 * rows), layout="constrained")
    high = max((float(kernel.max()) for kernel in kernels.values()), default=1.0)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, (arm, kernel) in zip(axes, kernels.items(), strict=False):
        axis.imshow(kernel.numpy(), cmap="viridis", vmin=0.0, vmax=high)
        axis.set_title(arm, fontsize="medium")
        for row in range(3):
            for column in range(3):
                value = float(kernel[row, column])
                colour = "black" if value > 0.7 * high else "white"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    figure.suptitle("mean absolute weight by position, over the kernel's mean", fontsize="medium")
    save_picture(figure, path)


if __name__ == "__main__":
    run_program(main, Args, __doc__)
