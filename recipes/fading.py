"""Are the numbers constant? Nets with numbers from data: kept, frozen at their means at once, faded, and fused.

    python recipes/fading.py                                        digits, five kinds, five seeds
    python recipes/fading.py guided --seeds 1 --random 20           and channels pruned by what gates used them for

Trains a grown net at lam = 1 for two thirds of --epochs, then tells, for each layer, how much its numbers differ
between images (the mean over them of std(g) / |mean(g)|), and val top-1 three times: of the net as it is, with its
numbers frozen at their means at once, and after the last third, in which lam falls to 0. A net whose numbers hardly
differ says nothing about fading. Where the numbers are factors of channels, --random prunes the fused net to half its
multiplications by what they were on average, and judges it beside l1 and random nets of the same cost, batch norms
recalibrated (extra `prune`).

Every net is a line of DIR/results.jsonl; a killed recipe continues when started again. What is printed is in
DIR/fading.json too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import nn

import growshrink as gs
from growshrink.analysis import channel_usage, stats
from growshrink.base.environment import versions
from growshrink.base.limits import Whole
from growshrink.base.writing import write_json
from growshrink.branches import Modulated
from growshrink.branches.spec import BranchKind
from growshrink.cli.forms import pick
from growshrink.cli.options import LengthOptions, ModelOptions, command
from growshrink.cli.program import run_program
from growshrink.data.feed import MemoryFeed
from growshrink.training import Trainer, evaluate
from results import StudyOptions

STATES = ("kept", "frozen at once", "faded and fused")


@dataclass(frozen=True, kw_only=True)
class Args(StudyOptions):
    """Options of fading."""

    kinds: Annotated[tuple[BranchKind, ...], tyro.conf.Positional] = (
        "se",
        "condconv",
        "dynamic_conv",
        "weightnet",
        "guided",
    )
    """Kinds of branches, each in nets of its own."""
    random: Whole = 0
    """Random nets to judge pruning by; 0 prunes nothing."""
    model: ModelOptions = ModelOptions(model_kwargs=("width=0.25",))
    rounds: gs.Round = pick(gs.Round(epochs=1, ratio=4.0), "ratio")
    length: LengthOptions = pick(LengthOptions(epochs=60.0, seeds=5), "epochs", "seeds")


def main(args: Args) -> None:
    """Run it, or a part of it; errors of the user's are raised as GrowShrinkError."""
    with args.results("fading") as results:
        keys = {f"{kind}, seed {seed}": (kind, seed) for kind in args.kinds for seed in args.seeds()}
        for key in results.unfinished(list(keys)):
            kind, seed = keys[key]
            results.append({"key": key, **run(args, kind, seed)})
        by_kind = {kind: [results.done()[f"{kind}, seed {seed}"] for seed in args.seeds()] for kind in args.kinds}
        about = {"command": command(), "versions": versions(), **args.identity()}
        write_json(results.path / "fading.json", {"kinds": by_kind, "about": about})
        results.finish()
        for kind, records in by_kind.items():
            print(text(kind, records))


def run(args: Args, kind: str, seed: int) -> dict[str, Any]:
    """Train one net, and judge it."""
    feed = args.memory_feed(seed)
    size = feed.input_size
    net, _ = args.net(feed, seed)
    grown = gs.grow(net, kind, ratio=args.rounds.ratio, init="paper", seed=seed, input_size=size)
    trainer = Trainer(grown, args.training, feed.train)
    alive = round(args.length.epochs * feed.train.updates_per_epoch * 2 / 3)
    more = alive // 2
    rate = gs.schedules.cosine(1.0, 0.05, steps=alive + more)
    trainer.train(alive, learning_rate=rate, lam=gs.schedules.constant(1.0))
    found: dict[str, Any] = {"spreads": spreads(grown, feed.train.batch(0)[0])}
    top1 = [evaluate(grown, feed.val).top1]
    gs.set_lambda(grown, 0.0)
    top1.append(evaluate(grown, feed.val).top1)
    lam = gs.schedules.cosine(1.0, 0.0, steps=more // 2, begin=alive)
    trainer.train(alive + more, learning_rate=rate, lam=lam)
    plain = gs.fuse(grown, input_size=size)
    found |= zip(STATES, (*top1, evaluate(plain, feed.val).top1), strict=True)
    if args.random and (usage := channel_usage(grown)):
        found["pruned"] = pruned(plain, usage, feed, args.random)
    return found


@torch.no_grad()
def spreads(grown: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """How much the numbers of each layer differ between images, by name of the branch; 0 where all are the same."""
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


def pruned(plain: nn.Module, usage: dict[str, Any], feed: MemoryFeed, num: int) -> dict[str, Any]:
    """Val top-1 at half the multiplications: by usage, by l1, and of random nets."""
    images = [feed.train.batch(update)[0] for update in range(10)]

    def top1(**options: Any) -> float:
        small = gs.random_prune(plain, macs=0.5, tolerance=0.3, input_size=feed.input_size, **options)
        gs.calibrate_bn(small, images)
        return evaluate(small, feed.val).top1

    others = sorted(top1(seed=seed) for seed in range(num))
    return {"usage": top1(criterion=usage), "l1": top1(criterion="l1"), "random": others}


def text(kind: str, records: Sequence[dict[str, Any]]) -> str:
    """What came out of a kind, over its seeds."""
    lines = [f"{kind}, {len(records)} seeds:"]
    for name in records[0]["spreads"]:
        lines.append(f"  {name:40s} std(g) / |mean(g)| = {np.mean([r['spreads'][name] for r in records]):.3f}")
    kept = [record["kept"] for record in records]
    for state in STATES:
        values = [record[state] for record in records]
        line = f"  {state:16s} {np.mean(values):.2f} %"
        if state != "kept" and len(values) > 1:
            line += ", less kept {:+.2f} ({:+.2f} .. {:+.2f})".format(*stats.paired(values, kept).difference)
        lines.append(line)
    for found in (record["pruned"] for record in records if "pruned" in record):
        better, random = sum(other > found["usage"] for other in found["random"]), found["random"]
        lines.append(
            f"  half the MACs: by usage {found['usage']:.2f} %, l1 {found['l1']:.2f} %, random {random[0]:.2f} .. "
            f"{random[-1]:.2f} %; {better} of {len(random)} random nets are better than by usage"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="the same command continues from here")
