"""Grow a net, train it, let the extra activations vanish, fuse it back exactly, and do it again.

    python recipes/grow_cycle.py                                    digits, two rounds, well under 3 minutes on 2 cores
    python recipes/grow_cycle.py --data cifar10 --data-dir D --model reducenet20 --epochs 60 --amp
    python recipes/grow_cycle.py --data D --model mobilenetv3_small_050 --branches bottleneck insert+bottleneck
    python recipes/grow_cycle.py --arm orepa-online --epochs 200    a recipe of the experiment's (docs/evidence)
    python recipes/grow_cycle.py --augment lazy --exit choose       with middle widths sampled, as NetAug does
    torchrun --nproc-per-node 2 --max-restarts 3 recipes/grow_cycle.py --resume --out DIR ...      on several processes,
                                                                    started again where one of them dies

Leaves runs/NAME/ with report.md (read this), report.json, curves.png, plain.safetensors (the net to deploy, the keys
and shapes of the plain architecture), growth_log.json, log.jsonl, and run.json (options, versions, seeds).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro

import growshrink as gs
from growshrink.base.limits import InFile, NotNegative, OneOf, Positive, Ratio, Regex, Share, SomeOrAll, Whole
from growshrink.base.ranks import joined, this_rank
from growshrink.base.reading import read_json
from growshrink.cli.limits import BranchName
from growshrink.cli.options import Options
from growshrink.cli.program import run_program
from growshrink.cycle.plan import CONTROLS, DISTIL, EXITS
from growshrink.errors import PlanError
from growshrink.evidence.arms import ARMS
from growshrink.supernet.passes import MODES

ArmName = Annotated[str, OneOf("no such arm", tuple(ARMS))]


@dataclass(kw_only=True)
class Args(Options):
    """Options of grow_cycle."""

    epochs: Positive = 60.0
    """Of the whole run: --base, then rounds of equal length."""
    rounds: Whole = 2
    """How many times to grow and fuse."""
    base: Share = 0.1
    """Share of the epochs before the first round."""
    branches: tuple[BranchName, ...] = ("bottleneck", "insert")
    """What round 1, 2, ... attaches (the last entry is repeated): bottleneck, insert, nest, expandnet, lora, ...;
    A+B attaches both. A model that is grown at birth (reducenet20_x4) is not grown again in round 1."""
    ratio: Ratio = 2.0
    """Middle width of a branch over the output channels of its layer."""
    where: Regex | None = None
    """Regular expression on module names; by default every convolution and linear layer that can be grown exactly."""
    hold: Share = 0.20
    """Share of a round with the branches' activations alive (lam = 1)."""
    vanish: Share = 0.15
    """Share of a round in which lam falls to 0."""
    settle: Share = 0.08
    """Share of a round at lam = 0 before the fuse (at least 50 updates). The rest is trained at plain cost."""
    control: Annotated[str, tyro.conf.arg(metavar="|".join(CONTROLS))] = "schedule"
    """How lam falls: by a schedule, or in a closed_loop as fast as the training loss allows, in the same time."""
    augment: Annotated[str, tyro.conf.arg(metavar="|".join(("none", *MODES)))] = "none"
    """Sample the middle widths while the net is grown (NetAug), in one of these ways; none trains at full width."""
    alpha: NotNegative | None = None
    """Weight of the augmented net's loss, averaged over updates; by default that of the base's where it is there."""
    inplace_distil: Share | None = None
    """Share of the base net's loss that comes from the augmented net's logits of the same update."""
    exit: Annotated[str, tyro.conf.arg(metavar="|".join(EXITS))] = "fuse"
    """How a round ends: merged at full width; branches dropped; with --augment also the best of several widths; or
    teach, which merges nothing: the plain net goes back to where the round began, and learns from what it grew into."""
    distil: Annotated[Literal["none", "peak", "previous"], tyro.conf.arg(metavar="|".join(DISTIL))] = "none"
    """Teacher after the hold: this round's own finished peak, the net the round began with, or none."""
    distil_asked: SomeOrAll = 1.0
    """Share of the updates with a teacher in which it is asked; then the same images come again, with its answers."""
    accept_within: NotNegative | None = None
    """Undo a round, bit for bit, that costs more than this many points of val top-1; by default none is undone."""
    online: bool = False
    """Train linear branches as part of their kernels, at about plain cost, with frozen norms: dbb, expandnet, ... from
    the start, all others while they settle."""
    arm: ArmName | None = None
    """A whole recipe by name, one of those that recipes/compare.py compares (--list lists them), instead of the options
    of the rounds: orepa-online, repvgg, return, lazy-distil, cycles-2, ..."""
    plan: InFile | None = None
    """A JSON file with a whole plan (see run.json of any run), instead of the options of the rounds."""


def main(args: Args) -> None:
    """Run it; errors of the user's are raised as GrowShrinkError."""
    plan, config = make_plan(args), args.train_config()  # before there is a folder, or data are decoded
    with joined(args.device), args.claim() as folder:
        if folder.finished:
            print(f"{folder.path} is finished: {folder.path / 'report.md'}")
            return
        device = args.torch_device()
        torch.manual_seed(args.seed)
        feed = args.make_feed(device)
        model, model_about = args.make_model(feed)
        result = gs.run_cycle(
            model,
            feed,
            plan,
            out_dir=folder,
            config=config,
            device=device,
            progress=not args.quiet,
            tensorboard=args.tensorboard,
            about=args.about(model_about),
            save_every=args.save_every,
            keep=args.keep,
        )
        if this_rank() == 0:
            tell(result)


def tell(result: gs.cycle.CycleResult) -> None:
    """The rounds, and what came out, on the screen."""
    if result.rounds:
        print(result.table())
    print(
        f"test top-1 {result.final['top1']:.2f} %, {result.deployed['params']:,} parameters "
        f"(the plain net has {result.plain['params']:,}), training cost "
        f"{result.to_dict()['training']['cost']:.2f} times the plain net's.\nRead {result.out_dir / 'report.md'}"
    )


def make_plan(args: Args) -> gs.CyclePlan:
    """The plan in --plan, that of --arm, or the one the options describe."""
    if args.arm is not None:
        return plan_of_arm(args, args.arm)
    if args.plan is not None:
        values = read_json(args.plan)
        try:
            return gs.CyclePlan.from_dict(values.get("plan", values))
        except PlanError as error:
            raise PlanError(f"--plan {args.plan}: {error}") from error
    if not args.branches:
        raise PlanError("--branches: name at least one.")
    base = args.epochs * args.base if args.rounds else args.epochs
    rounds = tuple(
        gs.Round(
            epochs=(args.epochs - base) / args.rounds,
            branch=tuple(args.branches[min(number, len(args.branches) - 1)].split("+")),
            ratio=args.ratio,
            where=args.where,
            hold=args.hold,
            vanish=args.vanish,
            settle=args.settle,
            control=args.control,
            augment=args.augment,
            alpha=args.alpha,
            inplace_distil=args.inplace_distil,
            exit=args.exit,
            distil=args.distil,
            distil_asked=args.distil_asked,
            accept_within=args.accept_within,
            online=args.online,
        )
        for number in range(args.rounds)
    )
    return gs.CyclePlan(rounds=rounds, base_epochs=base, seed=args.seed)


def plan_of_arm(args: Args, name: str) -> gs.CyclePlan:
    """The plan of an arm of the experiment's, over --epochs."""
    arm = ARMS[name]
    if args.plan is not None:
        raise PlanError("--arm, --plan: give one of them.")
    if not arm.shrinks:
        raise PlanError(f"--arm {name}: is an upper bound, and makes no plain net.")
    if arm.expansion and not args.model.endswith(f"_x{arm.expansion}"):
        raise PlanError(
            f"--arm {name}: begins with a net that is grown at birth; add --model reducenet20_x{arm.expansion}."
        )
    return arm.plan(args.epochs, args.seed)


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="--resume goes on from there")
