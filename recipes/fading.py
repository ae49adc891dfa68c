"""Are the numbers constant? One net with numbers from data: kept, frozen at its means at once, faded, and fused.

    python recipes/fading.py se --data digits                        a minute
    python recipes/fading.py guided --data digits --epochs 90        and channels pruned by what gates used them for

Trains a grown net at lam = 1 for two thirds of --epochs, then prints, for each layer, how much its numbers differ
between images (the mean over them of std(g) / |mean(g)|), and val top-1 three times: of the net as it is, with its
numbers frozen at their means at once, and after the last third, in which lam falls to 0. A net whose numbers hardly
differ says nothing about fading. Where the numbers are factors of channels, the fused net is pruned to half its
multiplications by what they were on average, and judged beside l1 and random nets of the same cost, batch norms
recalibrated (extra `prune`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch import nn

import growshrink as gs
from growshrink.analysis import channel_usage
from growshrink.base.limits import Whole
from growshrink.branches import Modulated
from growshrink.branches.spec import BranchKind
from growshrink.cli.forms import pick
from growshrink.cli.options import DataOptions, LengthOptions, ModelOptions, RunOptions
from growshrink.cli.program import run_program
from growshrink.data.batches import NO_AUGMENT
from growshrink.data.datasets import load_data
from growshrink.data.feed import MemoryFeed
from growshrink.training import TrainConfig, Trainer, evaluate


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of fading."""

    kind: Annotated[BranchKind, tyro.conf.Positional] = "se"
    """Kind of branch."""
    data: DataOptions = pick(DataOptions(), "data", "data_dir")
    model: ModelOptions = ModelOptions(model_kwargs=("width=0.25",))
    rounds: gs.Round = pick(gs.Round(epochs=1, ratio=4.0), "ratio")
    length: LengthOptions = pick(LengthOptions(epochs=60.0), "epochs")
    training: TrainConfig = pick(TrainConfig(lr=0.05, ema_decay=0.0), "lr")
    running: RunOptions = pick(RunOptions(), "seed")
    random: Whole = 20
    """Random nets to judge pruning by; 0 prunes nothing."""


def main(args: Args) -> None:
    """Train and print."""
    seed = args.running.seed
    torch.manual_seed(seed)
    data = load_data(args.data.data or "digits", args.data.data_dir, seed=seed)
    feed = MemoryFeed.of(data, batch_size=64, augment=NO_AUGMENT, seed=seed)
    size, classes = feed.input_size, len(data.classes)
    net, _ = args.model.create(num_classes=classes, in_chans=size[0])
    grown = gs.grow(net, args.kind, ratio=args.rounds.ratio, init="paper", input_size=size)
    trainer = Trainer(grown, args.training, feed.train)
    alive = round(args.length.epochs * feed.train.updates_per_epoch * 2 / 3)
    more = alive // 2
    rate = gs.schedules.cosine(1.0, 0.05, steps=alive + more)
    trainer.train(alive, learning_rate=rate, lam=gs.schedules.constant(1.0))
    for name, spread in spreads(grown, feed.train.batch(0)[0]).items():
        print(f"{name:40s} std(g) / |mean(g)| = {spread:.3f}")
    kept = evaluate(grown, feed.val).top1
    gs.set_lambda(grown, 0.0)
    frozen = evaluate(grown, feed.val).top1
    lam = gs.schedules.cosine(1.0, 0.0, steps=more // 2, begin=alive)
    trainer.train(alive + more, learning_rate=rate, lam=lam)
    plain = gs.fuse(grown, input_size=size)
    print(f"kept {kept:.2f} %, frozen at once {frozen:.2f} %, faded and fused {evaluate(plain, feed.val).top1:.2f} %")
    usage = channel_usage(grown)
    if usage and args.random:
        images = [feed.train.batch(update)[0] for update in range(10)]

        def pruned(**options: object) -> float:
            small = gs.random_prune(plain, macs=0.5, tolerance=0.15, input_size=size, **options)  # type: ignore[arg-type]
            gs.calibrate_bn(small, images)
            return evaluate(small, feed.val).top1

        others = sorted(pruned(seed=seed) for seed in range(args.random))
        by_usage, by_l1 = pruned(criterion=usage), pruned(criterion="l1")
        place = sum(other > by_usage for other in others)
        print(
            f"half the MACs: by usage {by_usage:.2f} %, l1 {by_l1:.2f} %, random {others[0]:.2f} .. {others[-1]:.2f} %"
        )
        print(f"{place} of {len(others)} random nets are better than by usage")


@torch.no_grad()
def spreads(grown: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """How much the numbers of each layer differ between images, by name of the branch."""
    found: dict[str, float] = {}
    hooks = []
    for name, module in grown.named_modules():
        if isinstance(module, Modulated) and hasattr(module, "fade"):

            def note(_: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                found[name] = float((args[0].std(0) / args[0].mean(0).abs().clamp_min(1e-6)).mean())

            hooks.append(module.fade.register_forward_pre_hook(note))
    grown.eval()(images)
    grown.train()
    for hook in hooks:
        hook.remove()
    return found


if __name__ == "__main__":
    run_program(main, Args, __doc__)
