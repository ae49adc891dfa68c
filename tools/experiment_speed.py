"""How fast the experiment trains: images/s of its loop, of timm's loader and loop, and of the original ReduceNet's.

    python tools/experiment_speed.py                          reducenet20 at half width, 32x32, about 4 minutes
    python tools/experiment_speed.py --threads 1 --stacked 5

All train the same net with SGD in batches of 128, crop and flip; they take turns, each turn a pass over the images, and
each pair of turns gives a ratio (see benchmark.py).

ours      as recipes/compare.py does: images in memory, bfloat16, an average of the weights, all seeds side by side as
          one net with grouped convolutions; an image counts once for every seed that is trained on it
one seed  the same with a single net
timm      a PNG folder, timm's create_loader with 2 workers, and the loop of its train.py in its default float32
original  the settings of ReduceNet's own training script: torchvision's transforms in a DataLoader with 4 workers over
          images in memory, float32, the loss read after every update
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from PIL import Image
from timm.utils import AverageMeter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from growshrink.base.limits import Count
from growshrink.base.timing import Call
from growshrink.cli.forms import pick
from growshrink.cli.options import ModelOptions
from growshrink.cli.program import run_program
from growshrink.data.batches import Augment
from growshrink.data.datasets import DataSet, Split
from growshrink.data.feed import MemoryFeed
from growshrink.schedules.functions import constant
from growshrink.training import TrainConfig, Trainer
from inputs import NetOptions
from loaders import MEAN, STD, png_folder, random_split, timm_loader
from paired import PairOptions, TimedArgs, channels_last, conditions, load
from side_by_side import StackedFeed, stack_nets

BATCH = 128
CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Args(TimedArgs):
    """Options of experiment_speed; what is trained is reducenet20."""

    stacked: Count = 3
    """Nets side by side."""
    images: Count = 4096
    """In a pass."""
    model: ModelOptions = pick(ModelOptions(model_kwargs=("width=0.5",)), "model_kwargs")
    nets: NetOptions = pick(NetOptions(), "pixels")
    pairs: PairOptions = pick(PairOptions(seconds=60.0), "seconds", "quick")


def main(args: Args) -> int:
    """Measure and print."""
    count = 2 * BATCH if args.pairs.quick else max(BATCH, args.images // BATCH * BATCH)
    bench = args.bench(5)
    before, side = load(), args.nets.pixels
    split = random_split(count, side)
    with tempfile.TemporaryDirectory(prefix="growshrink-speed-") as folder:
        png_folder(split, folder, bench)
        ours = our_loop(args, split, args.stacked)
        rows = [
            bench.compare(f"speed: {name}", ours, call, images=(args.stacked * count, count))
            for name, call in {
                "one seed": our_loop(args, split, 1),
                "timm": timm_loop(args, timm_loader(folder, BATCH, side)),
                "original": original_loop(args, split),
            }.items()
        ]
    print(f"{'ours over':12s} {'ours':>9s} {'theirs':>9s} {'ratio':>6s}  quartiles      (images/s)")
    for row in rows:
        print(f"{row.what:12s} {row.a:9,.0f} {row.b:9,.0f} {row.ratio:6.2f}  {row.q1:.2f} .. {row.q3:.2f}")
    settings = f"reducenet20, {' '.join(args.model.model_kwargs)}, {side} pixels, {args.stacked} seeds side by side"
    print(f"\n{settings}; {conditions(before)}")
    return 0


def our_loop(args: Args, split: Split, seeds: int) -> Call:
    """A pass of the experiment's own loop over `seeds` nets."""
    data = DataSet(
        name="random",
        train=split,
        val=Split(split.images[:2], split.labels[:2]),
        test=Split(split.images[:2], split.labels[:2]),
        classes=tuple(map(str, range(CLASSES))),
        mean=MEAN,
        std=STD,
    )
    augment = Augment(crop=args.nets.pixels // 8, flip=True)
    feeds = [MemoryFeed.of(data, batch_size=BATCH, augment=augment, seed=seed) for seed in range(seeds)]
    nets = [plain_net(args) for _ in feeds]
    feed, net = (StackedFeed(feeds), stack_nets(nets, data.input_size)) if seeds > 1 else (feeds[0], nets[0])
    trainer = Trainer(channels_last(net), TrainConfig(lr=0.01, amp=True), feed.train)

    def turn() -> None:
        stop = trainer.update + feed.train.updates_per_epoch
        float(trainer.train(stop, learning_rate=constant(1.0), lam=constant(0.0)))

    return turn


def timm_loop(args: Args, loader: Iterable[tuple[Tensor, Tensor]]) -> Call:
    """A pass of what timm's train.py does in an epoch, with its defaults."""
    model, losses = plain_net(args).train(), AverageMeter()
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.01, momentum=0.9, weight_decay=2e-5)

    def turn() -> None:
        for index, (images, labels) in enumerate(loader):
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if index % 50 == 0:
                losses.update(loss.item(), len(images))

    return turn


def original_loop(args: Args, split: Split) -> Call:
    """A pass with the settings of the original's script (ohmydroid/reducenet, f16c096)."""
    transform = transforms.Compose(
        [
            transforms.RandomCrop(args.nets.pixels, padding=args.nets.pixels // 8),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    loader = DataLoader(
        InMemory(split, transform), batch_size=BATCH, shuffle=True, num_workers=4, persistent_workers=True
    )
    model = plain_net(args).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def turn() -> None:
        total = correct = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
            correct += float(logits.max(1).indices.eq(labels).sum())

    return turn


class InMemory(Dataset[tuple[Tensor, int]]):
    """Like torchvision's CIFAR10: an array, made into a PIL image and transformed one at a time."""

    def __init__(self, split: Split, transform: Any) -> None:
        self.images, self.labels, self.transform = split.images.numpy(), split.labels.tolist(), transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image `(C, H, W)` and its label."""
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def plain_net(args: Args) -> nn.Module:
    """What all of them train."""
    return args.model.create(num_classes=CLASSES)[0]


if __name__ == "__main__":
    run_program(main, Args, __doc__)
