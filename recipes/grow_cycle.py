"""Grow a net, train it, let the extra activations vanish, fuse it back exactly, and do it again.

    python recipes/grow_cycle.py                                    digits, two rounds, well under 3 minutes on 2 cores
    python recipes/grow_cycle.py --data cifar10 --data-dir D --model reducenet20 --epochs 60 --amp
    python recipes/grow_cycle.py --data D --model mobilenetv3_small_050 --branches bottleneck insert+bottleneck
    python recipes/grow_cycle.py --teacher wider,share=0.1,weight=0.9,asked=0.15 --base 0 --rounds 1 --branches none
                                                                    taught by the same net twice as wide, trained first
    python recipes/grow_cycle.py --arm orepa-online --epochs 200    a recipe of the experiment's (docs/evidence)
    python recipes/grow_cycle.py --widths lazy --exit choose        with middle widths sampled, as NetAug does
    torchrun --nproc-per-node 2 --max-restarts 3 recipes/grow_cycle.py --resume --out DIR ...      on several processes,
                                                                    started again where one of them dies

Leaves runs/NAME/ with report.md (read this), report.json, curves.png, plain.safetensors (the net to deploy, the keys
and shapes of the plain architecture), growth_log.json, log.jsonl, and run.json (options, versions, seeds).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated

import torch

import growshrink as gs
from growshrink.base.limits import InFile, OneOf, Share
from growshrink.base.ranks import joined, this_rank
from growshrink.base.reading import read_json
from growshrink.cli.forms import pick
from growshrink.cli.options import GrowOptions, LengthOptions, Options
from growshrink.cli.program import run_program
from growshrink.errors import PlanError
from growshrink.evidence.arms import ARMS

#: What is grown in a round in which another net teaches a plain one.
NOTHING = "none"
#: What all rounds have alike.
COMMON = tuple(entry.name for entry in fields(gs.Round) if entry.name not in ("epochs", "branch"))


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    """Options of grow_cycle.

    The epochs are those of the whole run: --base, then rounds of equal length. Round 1, 2, ... attaches the 1st, 2nd,
    ... entry of --branches, the last one again and again; a model that is grown at birth (reducenet20_x4) is not grown
    again in round 1. What hold, vanish and settle leave of a round is trained at plain cost.
    """

    base: Share = 0.1
    """Share of the epochs before the first round."""
    arm: Annotated[str, OneOf("no such arm", tuple(ARMS))] | None = None
    """A whole recipe by name, one of those that recipes/compare.py compares (--list lists them), instead of the options
    of the rounds: orepa-online, repvgg, return, lazy-distil, cycles-2, ..."""
    plan: InFile | None = None
    """A JSON file with a whole plan (see run.json of any run), instead of the options of the rounds."""
    grow: GrowOptions = GrowOptions()
    rounds: gs.Round = pick(gs.Round(epochs=1), *COMMON)
    length: LengthOptions = pick(LengthOptions(epochs=60.0), "epochs")


def main(args: Args) -> None:
    """Run it; errors of the user's are raised as GrowShrinkError."""
    plan = make_plan(args)  # before there is a folder, or data are decoded
    with joined(args.running.device), args.running.claim(args.title) as folder:
        if folder.finished:
            print(f"{folder.path} is finished: {folder.path / 'report.md'}")
            return
        torch.manual_seed(args.running.seed)
        feed = args.feed()
        result = args.run_cycle(plan, folder, feed, *args.model.make(feed))
        if this_rank() == 0:
            tell(result)


def tell(result: gs.cycle.CycleResult) -> None:
    """The rounds, and what came out, on the screen."""
    if result.rounds:
        print(result.table())
    print(
        f"test top-1 {result.final.top1:.2f} %, {result.deployed.params:,} parameters "
        f"(the plain net has {result.plain.params:,}), training cost "
        f"{result.cost:.2f} times the plain net's.\nRead {result.out_dir / 'report.md'}"
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
    number, branches, epochs = args.grow.rounds, args.grow.branches, args.length.epochs
    if not branches:
        raise PlanError("--branches: name at least one.")
    base = epochs * args.base if number else epochs
    rounds = tuple(
        replace(
            args.rounds,
            epochs=(epochs - base) / number,
            branch=() if (names := branches[min(n, len(branches) - 1)]) == NOTHING else tuple(names.split("+")),
        )
        for n in range(number)
    )
    return gs.CyclePlan(rounds=rounds, base_epochs=base, seed=args.running.seed)


def plan_of_arm(args: Args, name: str) -> gs.CyclePlan:
    """The plan of an arm of the experiment's, over --epochs."""
    arm = ARMS[name]
    if args.plan is not None:
        raise PlanError("--arm, --plan: give one of them.")
    if not arm.shrinks:
        raise PlanError(f"--arm {name}: is an upper bound, and makes no plain net.")
    if arm.expansion and not args.model.name.endswith(f"_x{arm.expansion}"):
        raise PlanError(
            f"--arm {name}: begins with a net that is grown at birth; add --model reducenet20_x{arm.expansion}."
        )
    return arm.plan(args.length.epochs, args.running.seed)


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="--resume continues from there")
