"""Feature pyramids, explicit and at equilibrium, on a detection task that needs one: digits of three sizes.

    python recipes/implicit_fpn.py                       6 necks, 3 seeds, about 20 minutes on one core
    python recipes/implicit_fpn.py --necks fpn implicit --seeds 5
    python recipes/implicit_fpn.py --backbone resnet18 --backbone-kwargs output_stride=32

Two to four digits of 8, 16 and 32 pixels lie on a noisy canvas of 64x64, made by a function of the seed. Each level of
the pyramid finds the digits of one size: a heat map for each class, highest at the centres (CenterNet, Zhou et al.,
arXiv:1904.07850). A detection counts where its box overlaps an unclaimed one of its class by more than half. --epochs
is the length for the neck `fpn`; the others are trained for the epochs that cost as many MACs. The neck `single` has
only the coarsest map, for all sizes: where it does not fail on the smallest digits, the task tells nothing.

`FPN` and `ImplicitFPN` take the maps of any timm model with features_only=True. Leaves runs/NAME/ with report.md,
report.json, canvas.png and run.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.analysis.stats import paired
from growshrink.base.limits import Argument, Count, OneOf
from growshrink.base.progress import progress_bar
from growshrink.base.writing import save_picture, write_atomic, write_json
from growshrink.cli.forms import pick, read_pairs
from growshrink.cli.options import BatchOptions, LengthOptions, ModelName, RunOptions, command
from growshrink.cli.program import run_program
from growshrink.errors import PlanError
from growshrink.layers import ConvEquilibrium
from growshrink.proofs._profile import training_macs
from growshrink.training import TrainConfig

CANVAS, SIZES, CLASSES = 64, (8, 16, 32), 10


class FPN(nn.Module):
    """The maps of a backbone, finest first -> maps of `width` channels: laterals, a path downwards, a 3x3 for each.

    Source: Lin et al., Feature Pyramid Networks (arXiv:1612.03144, section 3).
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(laterals(channels, width))
        self.outs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """`(N, C_l, H_l, W_l)` -> `(N, width, H_l, W_l)`."""
        merged = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for level in reversed(range(len(maps) - 1)):
            merged[level] = merged[level] + F.interpolate(merged[level + 1], merged[level].shape[2:])
        return [F.relu(out(x)) for out, x in zip(self.outs, merged, strict=True)]


class ImplicitFPN(nn.Module):
    """The same maps -> those that one fusing layer, fed with its own output, settles at; `steps` of it are explicit.

    The parameters of an `FPN`. Source: Wang et al., Implicit Feature Pyramid Network (arXiv:2012.13563), P = G(P + B);
    the layer is a `ConvEquilibrium`, a contraction by construction.
    """

    def __init__(self, channels: Sequence[int], width: int, steps: int | None = None) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(laterals(channels, width))
        self.equilibrium = ConvEquilibrium(width, len(channels), steps=steps)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """`(N, C_l, H_l, W_l)` -> `(N, width, H_l, W_l)`."""
        found: list[Tensor] = self.equilibrium([lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)])
        return found


class SingleScale(nn.Module):
    """The coarsest map alone, through a lateral and a 3x3."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(laterals(channels[-1:], width)[0], nn.Conv2d(width, width, 3, padding=1), nn.ReLU())

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """As an `FPN`, but one map."""
        return [self.body(maps[-1])]


def laterals(channels: Sequence[int], width: int) -> list[nn.Sequential]:
    """1x1 and BN for each map."""
    return [nn.Sequential(nn.Conv2d(c, width, 1, bias=False), nn.BatchNorm2d(width)) for c in channels]


NECKS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "fpn": FPN,
    "single": SingleScale,
    "one-step": lambda channels, width: ImplicitFPN(channels, width, steps=1),
    "tied-3": lambda channels, width: ImplicitFPN(channels, width, steps=3),
    "untied-3": lambda channels, width: gs.unroll(ImplicitFPN(channels, width), 3, untie=True),
    "implicit": ImplicitFPN,
}
CONTROL = "fpn"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of implicit_fpn."""

    necks: tuple[Annotated[str, OneOf("no such neck", NECKS)], ...] = tuple(NECKS)
    """What is trained; fpn always is."""
    backbone: ModelName = "reducenet20"
    """Any timm model with features_only, of which the last three maps are taken."""
    backbone_kwargs: tuple[Argument, ...] = ("width=0.5", "stem_stride=2")
    """KEY=VALUE arguments for timm.create_model."""
    width: Count = 24
    """Channels of the pyramid."""
    images: Count = 2000
    """Canvases of an epoch; a quarter as many for the test."""
    length: LengthOptions = pick(LengthOptions(epochs=15.0, seeds=3), "epochs", "seeds")
    batches: BatchOptions = BatchOptions(batch_size=32)
    training: TrainConfig = pick(TrainConfig(optimizer="adamw", lr=3e-3), "lr")
    running: RunOptions = pick(RunOptions(threads=1), "out", "threads", "quiet")


@dataclass
class Row:
    """What a neck costs and reaches; average precision in percent by size, one list for each seed."""

    params: int
    macs: int
    epochs: float
    precision: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Canvases:
    """Images `(N, 1, 64, 64)`, and the objects of each: rows of class, index of the size, y and x of the centre."""

    images: Tensor
    objects: list[Tensor]


class Detector(nn.Module):
    """Backbone, neck, and one 1x1 a level: heat maps `(N, sizes, 10, H, W)` of what the level is to find."""

    def __init__(self, args: Args, neck: str) -> None:
        super().__init__()
        kwargs = {"in_chans": 1, **read_pairs(args.backbone_kwargs, "--backbone-kwargs")}
        whole: Any = timm.create_model(args.backbone, features_only=True, **kwargs)
        levels = len(whole.feature_info)
        indices = tuple(range(levels))[-len(SIZES) :]
        backbone: Any = timm.create_model(args.backbone, features_only=True, out_indices=indices, **kwargs)
        self.backbone, self.neck = backbone, NECKS[neck](backbone.feature_info.channels(), args.width)
        self.sizes = [list(range(len(SIZES)))] if neck == "single" else [[index] for index in range(len(SIZES))]
        heads = [nn.Conv2d(args.width, CLASSES * len(sizes), 1) for sizes in self.sizes]
        for head in heads:
            assert head.bias is not None
            nn.init.constant_(head.bias, -4.0)  # centres are rare
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits of the heat maps of each level."""
        maps = self.neck(self.backbone(x))
        return [head(z).unflatten(1, (-1, CLASSES)) for head, z in zip(self.heads, maps, strict=True)]


def make_canvases(count: int, seed: int, *, test: bool) -> Canvases:
    """Digits of scikit-learn, of the first 1,200 or, for the test, of the others, without overlap."""
    from sklearn.datasets import load_digits

    data = load_digits()
    digits, labels = torch.from_numpy(data.images / 16).float(), torch.from_numpy(data.target)
    random = torch.Generator().manual_seed(2 * seed + test)
    pool = torch.arange(1200, len(digits)) if test else torch.arange(1200)

    def draw(stop: int) -> int:
        return int(torch.randint(stop, (), generator=random))

    images = 0.15 * torch.rand(count, 1, CANVAS, CANVAS, generator=random)
    objects = []
    for image in images:
        taken, rows = torch.zeros(CANVAS, CANVAS, dtype=torch.bool), []
        for _ in range(2 + draw(3)):
            digit = int(pool[draw(len(pool))])
            for _ in range(100):
                index = draw(len(SIZES))
                side = SIZES[index]
                y, x = draw(CANVAS - side + 1), draw(CANVAS - side + 1)
                if not taken[y : y + side, x : x + side].any():
                    taken[y : y + side, x : x + side] = True
                    image[0, y : y + side, x : x + side] += F.interpolate(
                        digits[digit][None, None], (side, side), mode="bilinear"
                    )[0, 0]
                    rows.append([float(labels[digit]), index, y + side / 2, x + side / 2])
                    break
        objects.append(torch.tensor(rows))
    return Canvases((images - 0.2) / 0.3, objects)


def targets(objects: Sequence[Tensor], sizes: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Heat maps `(N, sizes, 10, H, W)`: 1 at the centre, falling off over a sixth of the digit's side."""
    height, width = shape
    stride = CANVAS / height
    heat = torch.zeros(len(objects), len(sizes), CLASSES, height, width)
    ys, xs = torch.arange(height)[:, None], torch.arange(width)
    for own, rows in zip(heat, objects, strict=True):
        for label, index, y, x in rows.tolist():
            if index in sizes:
                place = own[list(sizes).index(int(index)), int(label)]
                cy, cx = int(y / stride), int(x / stride)
                spread = max(SIZES[int(index)] / stride / 6, 0.3)
                blob = torch.exp(-((ys - cy) ** 2 + (xs - cx) ** 2) / (2 * spread**2))
                torch.maximum(place, blob, out=place)
    return heat


def focal_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """Loss of CenterNet (arXiv:1904.07850, eq. 1), alpha 2 and beta 4."""
    p, log_p, log_q = logits.sigmoid(), F.logsigmoid(logits), F.logsigmoid(-logits)
    centre = heat == 1
    loss = torch.where(centre, (1 - p) ** 2 * log_p, (1 - heat) ** 4 * p**2 * log_q)
    return -loss.sum() / centre.sum().clamp_min(1)


def main(args: Args) -> None:
    """Run it; errors of the user's are raised as GrowShrinkError."""
    if args.length.seeds < 2:
        raise PlanError(f"--seeds {args.length.seeds}: must be at least 2.")
    args.running.set_threads()
    with args.running.claim("digits-implicit-fpn") as folder:
        folder.write_marker("running", {"command": command()})
        rows: dict[str, Row] = {}
        for seed in range(args.length.seeds):
            train, test = (make_canvases(args.images // n, seed, test=n > 1) for n in (1, 4))
            if not rows:
                draw_canvases(folder.path / "canvas.png", train)
            for name in dict.fromkeys((CONTROL, *args.necks)):
                train_one(args, name, seed, train, test, rows)
                write_json(folder.path / "report.json", {neck: asdict(row) for neck, row in rows.items()})
        text = report(args, rows)
        write_atomic(folder.path / "report.md", text.encode())
        folder.write_marker("finished", {"command": command()})
    print(f"{text}\nRead {folder.path / 'report.md'}")


def train_one(args: Args, name: str, seed: int, train: Canvases, test: Canvases, rows: dict[str, Row]) -> None:
    """Train a detector, and note what it reaches."""
    torch.manual_seed(seed)
    net, batch_size, lr = Detector(args, name), args.batches.batch_size, args.training.lr
    if name not in rows:
        macs = training_macs(net, (1, CANVAS, CANVAS), batch_size)
        epochs = args.length.epochs * (rows[CONTROL].macs / macs if rows else 1.0)
        rows[name] = Row(sum(p.numel() for p in net.parameters()), macs, epochs)
    row = rows[name]
    updates = max(2, round(row.epochs * len(train.objects) / batch_size))
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-4)
    rate = gs.schedules.cosine(lr, 0.0, updates)
    order = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for update in progress_bar(range(updates), f"seed {seed}: {name}", show=not args.running.quiet):
        optimizer.param_groups[0]["lr"] = rate(update)
        chosen = torch.randint(len(train.objects), (batch_size,), generator=order)
        objects = [train.objects[n] for n in chosen.tolist()]
        loss = torch.zeros(())
        for logits, sizes in zip(net(train.images[chosen]), net.sizes, strict=True):
            loss = loss + focal_loss(logits, targets(objects, sizes, logits.shape[-2:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    row.seconds.append(time.process_time() - start)
    row.precision.append(average_precisions(net.eval(), test))


@torch.no_grad()
def average_precisions(net: Detector, canvases: Canvases, most: int = 20) -> list[float]:
    """Mean over the classes of the average precision at IoU 0.5, in percent, for each size.

    scikit-learn's, of the detections, times the share of objects that are detected: what it knows of are detections
    only. (torchmetrics' needs pycocotools, a compiled package, for the matching below.)
    """
    from sklearn.metrics import average_precision_score

    scores: dict[tuple[int, int], list[tuple[float, bool]]] = {}
    totals: dict[tuple[int, int], int] = {}
    for begin in range(0, len(canvases.objects), 100):
        objects = canvases.objects[begin : begin + 100]
        for logits, sizes in zip(net(canvases.images[begin : begin + 100]), net.sizes, strict=True):
            heat = logits.sigmoid().flatten(0, 1)
            peaks = (heat * (heat == F.max_pool2d(heat, 3, 1, 1))).view(logits.shape)
            stride = CANVAS / logits.shape[-2]
            for n, rows in enumerate(objects):
                for place, index in enumerate(sizes):
                    found = peaks[n, place].flatten().topk(most)
                    width = logits.shape[-1]
                    detections = []
                    for score, at in zip(found.values.tolist(), found.indices.tolist(), strict=True):
                        label, (y, x) = at // width**2, divmod(at % width**2, width)
                        detections.append((score, label, (y + 0.5) * stride, (x + 0.5) * stride))
                    match(detections, rows[rows[:, 1] == index], index, scores, totals)
    result = []
    for index in range(len(SIZES)):
        values = []
        for label in range(CLASSES):
            total, own = totals.get((index, label), 0), scores.get((index, label), [])
            if total:
                hits = sum(hit for _, hit in own)
                ap = average_precision_score([hit for _, hit in own], [s for s, _ in own]) if hits else 0.0
                values.append(100 * float(ap) * hits / total)
        result.append(statistics.mean(values))
    return result


def match(
    detections: list[tuple[float, int, float, float]],
    truth: Tensor,
    index: int,
    scores: dict[tuple[int, int], list[tuple[float, bool]]],
    totals: dict[tuple[int, int], int],
) -> None:
    """Assign the detections of an image, best first, to objects of one size; boxes have that size's side."""
    for label in truth[:, 0].tolist():
        totals[index, int(label)] = totals.get((index, int(label)), 0) + 1
    free, side = truth.tolist(), SIZES[index]
    for score, label, y, x in detections:
        hit = None
        for row in free:
            overlap = max(0.0, side - abs(row[2] - y)) * max(0.0, side - abs(row[3] - x))
            if int(row[0]) == label and overlap / (2 * side**2 - overlap) > 0.5:
                hit = row
        if hit is not None:
            free.remove(hit)
        scores.setdefault((index, label), []).append((score, hit is not None))


def report(args: Args, rows: dict[str, Row]) -> str:
    """report.md."""
    names = " | ".join(f"{size} px" for size in SIZES)
    lines = [
        f"| neck | parameters | MACs of an update, of fpn's | epochs | CPU s | {names} | mean | less fpn (95 %) |",
        "|---" * (7 + len(SIZES)) + "|",
    ]
    means = {name: [statistics.mean(values) for values in row.precision] for name, row in rows.items()}
    for name, row in rows.items():
        gap = "-"
        if name != CONTROL:
            found = paired(means[name], means[CONTROL]).difference
            gap = f"{found.value:+.1f} ({found.low:+.1f} .. {found.high:+.1f})"
        by_size = " | ".join(f"{statistics.mean(values):.1f}" for values in zip(*row.precision, strict=True))
        lines.append(
            f"| {name} | {row.params:,} | {row.macs / rows[CONTROL].macs:.2f} | {row.epochs:.1f} "
            f"| {statistics.mean(row.seconds):.0f} | {by_size} | {statistics.mean(means[name]):.1f} | {gap} |"
        )
    table = "\n".join(lines)
    return f"""# Feature pyramids on digits of three sizes

{table}

![some canvases](canvas.png)

* Average precision at IoU 0.5 in percent, mean over ten classes, by size; {args.length.seeds} seeds, paired.
* `single` has the coarsest map alone: the gap of its first column to the others' is what fusion can be worth here.
"""


def draw_canvases(path: Path, canvases: Canvases) -> None:
    """Some images with their boxes."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(8, 2.2), layout="constrained")
    for axis, image, rows in zip(figure.subplots(1, 4), canvases.images, canvases.objects, strict=False):
        axis.imshow(image[0].numpy(), cmap="gray")
        for label, index, y, x in rows.tolist():
            side = SIZES[int(index)]
            axis.add_patch(Rectangle((x - side / 2 - 0.5, y - side / 2 - 0.5), side, side, fill=False, color="orange"))
            axis.text(x - side / 2, y - side / 2 - 1, str(int(label)), color="orange", fontsize=7)
        axis.set(xticks=[], yticks=[])
    save_picture(figure, path, dpi=120)


if __name__ == "__main__":
    run_program(main, Args, __doc__)
