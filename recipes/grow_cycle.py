"""Grow a net, train it, let the extra activations vanish, fuse it back exactly, and do it again.

    python recipes/grow_cycle.py                                    digits, two rounds, well under 3 minutes on 2 cores
    python recipes/grow_cycle.py --data DIR --model mobilenetv3_small_050 --image-size 64        images of your own, in
                                                          DIR/CLASS/*, or in DIR/train/CLASS/* and DIR/test/CLASS/*
    python recipes/grow_cycle.py --data DIR --model resnet18 --pretrained --image-size 128 --baseline     tuned, and the
                                                                    plain net beside it, for the same compute
    python recipes/grow_cycle.py --data DIR --model resnet18 --init FILE --hours 2   weights of your own, in that time
    python recipes/grow_cycle.py --data cifar10 --data-dir D --model reducenet20 --epochs 60
    python recipes/grow_cycle.py --data D --model mobilenetv3_small_050 --branches bottleneck insert+bottleneck
    python recipes/grow_cycle.py --teacher wider,share=0.1,weight=0.9,asked=0.15 --base 0 --rounds 1 --branches none
                                                                    taught by the same net twice as wide, trained first
    python recipes/grow_cycle.py --arm orepa-online --epochs 200    a recipe of the experiment's (docs/evidence)
    python recipes/grow_cycle.py --widths lazy --exit choose        with middle widths sampled, as NetAug does
    torchrun --nproc-per-node 2 --max-restarts 3 recipes/grow_cycle.py --resume --out DIR ...      on several processes,
                                                                    started again where one of them dies

Leaves runs/NAME/ with report.html and report.md (read one of them), report.json, curves.png, mistakes.png,
plain.safetensors (the net to deploy, the keys and shapes of the plain architecture), growth_log.json, log.jsonl, and
run.json (options, versions, seeds).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

import growshrink as gs
from growshrink.base.limits import InFile, OneOf, Positive, Share
from growshrink.base.ranks import joined, run_on_rank0, this_rank
from growshrink.base.reading import read_json
from growshrink.cli.forms import given, pick
from growshrink.cli.options import GrowOptions, LengthOptions, Options
from growshrink.cli.program import run_program
from growshrink.cycle import lay_out
from growshrink.cycle.costs import Costs, teacher_nets
from growshrink.cycle.records import plain_net
from growshrink.data.feed import Feed, MemoryFeed
from growshrink.errors import PlanError, RunError
from growshrink.evidence.arms import ARMS
from growshrink.layers import recompute
from growshrink.runs.folder import MARKER, RunFolder, claim_together
from growshrink.training.trainer import TrainConfig
from starting import StartOptions, images_folder, least_epochs, updates_per_epoch
from telling import PAGE, draw_mistakes, tell_story

#: What is grown in a round in which another net teaches a plain one.
NOTHING = "none"
#: What all rounds have alike, as options (--init is a file of weights).
COMMON = tuple(entry.name for entry in fields(gs.Round) if entry.name not in ("epochs", "branch", "init"))
#: Learning rate, and its factor from layer to layer, for weights that were trained before.
TUNING_LR, TUNING_DECAY = 0.02, 0.85
#: Updates below which the learning rate is lowered, in proportion to their root.
FEW_UPDATES = 1000
#: Share of the time of a run, without scoring and surgery.
SHARE_OF_TRAINING = 0.8
CAUTIOUS = (
    "The images are your own and no rounds were asked for, so the cautious recipe was taken (--arm small: linear "
    "branches, merged in training, at about the plain net's cost); --rounds 2 grows, lets vanish and fuses instead"
)
#: What --arm small brings along for images that it is asked for by name.
STRONGER = {"resized_crop": 0.5, "jitter": 0.2}


@dataclass(frozen=True, kw_only=True)
class Args(Options):
    """Options of grow_cycle.

    The epochs are those of the whole run: --base, then rounds of equal length. Round 1, 2, ... attaches the 1st, 2nd,
    ... entry of --branches, the last one again and again; a model that is built grown (reducenet20_x4) is not grown
    again in round 1. What hold, vanish and settle leave of a round is trained at plain cost.
    """

    base: Share = 0.1
    """Share of the epochs before the first round."""
    arm: Annotated[str, OneOf("no such arm", tuple(ARMS))] | None = None
    """A whole recipe by name, one of those that recipes/compare.py compares (--list lists them), instead of the options
    of the rounds: small, long, orepa-online, return, lazy-distil, cycles-2, ..."""
    plan: InFile | None = None
    """A JSON file with a whole plan (see run.json of any run), instead of the options of the rounds."""
    hours: Positive | None = None
    """Train for about so long on this machine, instead of --epochs."""
    baseline: bool = False
    """Train the plain net beside it for the same compute, in the folder NAME-plain; the report compares both."""
    metric: Literal["top1", "balanced", "macro_f1"] = "top1"
    """What rounds are judged by and the report begins with: top-1, the mean of the classes' recalls, or of their F1."""
    balance: bool = False
    """Weigh the classes in the loss by the inverse of their frequency."""
    grow: GrowOptions = GrowOptions()
    rounds: gs.Round = pick(gs.Round(epochs=1), *COMMON)
    length: LengthOptions = pick(LengthOptions(epochs=60.0), "epochs")
    model: StartOptions = StartOptions()


def main(args: Args) -> None:
    """Run it; errors of the user's are raised as GrowShrinkError."""
    make_plan(args, updates_per_epoch(args.data))  # before there is a folder, or data are decoded
    if args.arm == "small":
        stronger: dict[str, Any] = {name: value for name, value in STRONGER.items() if not given(name)}
        args = replace(args, data=replace(args.data, **stronger))
    counted = recompute(args.training.recompute)  # what is run again is counted
    with joined(args.running.device_name), args.running.claim(args.title) as folder, counted:
        if folder.finished:
            if this_rank() == 0 and not (folder.path / PAGE).exists():  # it was stopped just before
                tell_story(folder.path)
            print(f"{folder.path} is finished: {folder.path / PAGE}")
            tell_unused(args, folder)
            return
        torch.manual_seed(args.running.seed)
        feed = args.feed()
        model, about = args.model.make(feed)
        plan, why = (kept, "") if (kept := kept_plan(args, folder)) else plan_in_time(args, model, feed, about)
        config = configure(args, feed, plan)
        config = args.running.decide_speed(config, model, feed, folder)
        run: dict[str, Any] = {"about": about, "config": config}
        if why:
            run["why"] = f"{why}."
            if not this_rank():
                print(f"plan: {run['why']}", file=sys.stderr)
        if args.baseline:
            run["baseline"] = train_baseline(args, plan, folder.path, feed, model, **run)
        torch.manual_seed(args.running.seed)
        result = args.run_cycle(plan, folder, feed, model, **run)
        if this_rank() == 0:
            draw_mistakes(result)
            tell(result, tell_story(folder.path, feed.data.notes if isinstance(feed, MemoryFeed) else ()))


def tell(result: gs.cycle.CycleResult, advice: Sequence[str]) -> None:
    """The rounds, what came out, and what it means, on the screen."""
    if result.rounds:
        print(result.table())
    print(
        f"test top-1 {result.final.top1:.2f} %, {result.deployed.params:,} parameters "
        f"(the plain net has {result.plain.params:,}), training cost {result.cost:.2f} times the plain net's."
    )
    for sentence in advice:
        print(f"* {sentence}")
    print(f"Read {result.out_dir / PAGE}")


def make_plan(args: Args, updates: int | None, epochs: float | None = None) -> tuple[gs.CyclePlan, str]:
    """The plan of the options, or the first of `plans_of` that fits so many updates an epoch, and why it is that one.

    Raises:
        PlanError: It does not fit; says how many epochs would do.
    """
    epochs, plans, why_not = epochs or args.length.epochs, plans_of(args), ""
    for number, (why, plan_of) in enumerate(plans):
        plan = plan_of(epochs)
        if updates is None:
            return plan, why
        try:
            total = lay_out(plan, updates).total
        except PlanError as error:
            least = least_epochs(plan_of, updates) if args.plan is None else None
            if number + 1 < len(plans):
                why_not = f" ({least} epochs of {updates} updates would do)"
                continue
            if least is None:
                raise
            raise PlanError(
                f"--epochs {epochs:g}: {error} The plan needs at least {least} epochs at this batch size ({updates} "
                f"updates an epoch at --batch-size {args.data.batch_size}); --rounds 0 trains the plain net."
            ) from error
        return plan if args.plan else replace(plan, rewarm=min(plan.rewarm, max(1, total // 20))), why + why_not
    raise AssertionError("there is always a plan")


def plans_of(args: Args) -> list[tuple[str, Callable[[float], gs.CyclePlan]]]:
    """Plans by the number of epochs, each with a sentence for the report; several where the options leave a choice."""
    if args.arm is not None:
        return [("", partial(plan_of_arm, args, args.arm))]
    if args.plan is not None:
        values = read_json(args.plan)
        try:
            plan = gs.CyclePlan.from_dict(values.get("plan", values))
        except PlanError as error:
            raise PlanError(f"--plan {args.plan}: {error}") from error
        return [("", lambda epochs: plan)]
    chosen = given("base", "rounds", "branches", *COMMON) or re.search(r"_x\d+$", args.model.name)
    if chosen or images_folder(args.data) is None:
        return [("", partial(plan_of_rounds, args, args.grow.rounds))]
    return [
        (CAUTIOUS, partial(plan_of_arm, args, "small")),
        ("There are too few updates to grow: the plain net is trained", partial(plan_of_rounds, args, 0)),
    ]


def plan_of_rounds(args: Args, number: int, epochs: float) -> gs.CyclePlan:
    """The plan that the options of the rounds describe."""
    branches = args.grow.branches
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


def plan_of_arm(args: Args, name: str, epochs: float) -> gs.CyclePlan:
    """The plan of an arm of the experiment's."""
    arm = ARMS[name]
    if args.plan is not None:
        raise PlanError("--arm, --plan: give one of them.")
    if not arm.shrinks:
        raise PlanError(f"--arm {name}: is an upper bound, and makes no plain net.")
    if arm.expansion and not args.model.name.endswith(f"_x{arm.expansion}"):
        raise PlanError(
            f"--arm {name}: begins with a net that is built grown; add --model reducenet20_x{arm.expansion}."
        )
    return arm.plan(epochs, args.running.seed)


def plan_in_time(args: Args, model: nn.Module, feed: Feed, about: dict[str, Any]) -> tuple[gs.CyclePlan, str]:
    """The plan for the images there are, and for --hours; PlanError if none fits."""
    updates, size, batch_size = feed.train.updates_per_epoch, feed.input_size, feed.train.batch_size
    if args.hours is None:
        return make_plan(args, updates)
    tried = list[str]()
    seconds = run_on_rank0(lambda: args.step_seconds(model, feed))
    for _, plan_of in plans_of(args):
        least = least_epochs(plan_of, updates) or 1
        plan = plan_of(float(least))
        costs = Costs(model, plan, feed.train, size, teacher_nets(plan, feed, about))
        phases = lay_out(plan, updates)
        epoch = seconds * phases.macs(costs) / (batch_size * costs.first.train) / least / SHARE_OF_TRAINING
        epochs = math.floor(3600 * args.hours / epoch)
        if epochs >= least and args.plan is None:
            print(f"--hours {args.hours:g}: {epochs} epochs of about {epoch:.3g} s on this machine.", file=sys.stderr)
            return make_plan(args, updates, epochs)
        tried.append(f"{least} epochs take about {least * epoch / 3600:.2g} h")
    raise PlanError(
        f"--hours {args.hours:g}: no plan fits ({'; '.join(tried)}). Try a smaller --image-size or --model."
    )


def kept_plan(args: Args, folder: RunFolder) -> gs.CyclePlan | None:
    """The plan of a run that is resumed, where a measurement has chosen it."""
    if folder.fresh or args.hours is None:
        return None
    return gs.CyclePlan.from_dict(run_on_rank0(lambda: read_json(folder.path / MARKER)).get("plan", {}))


def configure(args: Args, feed: Feed, plan: gs.CyclePlan) -> TrainConfig:
    """How to train: the options, and where they leave it open what suits the weights and the number of updates."""
    total, lr = lay_out(plan, feed.train.updates_per_epoch).total, args.training.lr
    config = replace(args.training, metric=args.metric)
    gentle = args.model.tunes or args.arm == "small"
    if gentle and not given("layer_decay"):
        config = replace(config, layer_decay=TUNING_DECAY if args.model.tunes else 1.0)
    if not given("lr"):
        lr = (TUNING_LR if gentle else lr) * min(1.0, math.sqrt(total / FEW_UPDATES))
    if args.balance:
        if not isinstance(feed, MemoryFeed):
            raise RunError("--balance: not with --stream.")
        counts = feed.data.train.labels.bincount(minlength=len(feed.classes)).double()
        config = replace(config, class_weights=tuple((counts.mean() / counts).tolist()))
    if lr != args.training.lr and not this_rank():
        why = f"weights that are tuned: layer decay {config.layer_decay:g}, " * args.model.tunes
        print(f"--lr {lr:.2g} for {why}{total:,} updates.")
    return ARMS[args.arm].trained(config, lr) if args.arm else replace(config, lr=lr)


def train_baseline(args: Args, plan: gs.CyclePlan, out: Path, feed: Feed, model: nn.Module, **more: Any) -> str:
    """Train the plain net for what the plan costs, in a folder beside it, whose name is returned."""
    updates, size = feed.train.updates_per_epoch, feed.input_size
    costs = Costs(model, plan, feed.train, size, teacher_nets(plan, feed, more["about"]))
    epochs = lay_out(plan, updates).macs(costs) / (feed.train.batch_size * updates * costs.plain.train)
    beside = out.with_name(f"{out.name}-plain")
    with claim_together(lambda: RunFolder.claim(beside, resume=True)) as folder:
        if not folder.finished:
            baseline = gs.CyclePlan(rounds=(), base_epochs=epochs, rewarm=plan.rewarm, seed=plan.seed)
            args.run_cycle(baseline, folder, feed, plain_net(model, size), **more)
    return beside.name


def tell_unused(args: Args, folder: RunFolder) -> None:
    """Say which options that were typed a finished run was not trained with."""
    about = read_json(folder.path / MARKER)
    then = {**about.get("config", {}), "seed": about.get("seed")}
    now = {**asdict(args.training), "seed": args.running.seed}
    for name, value in now.items():
        if given(name) and name in then and then[name] != value:
            option = name.replace("_", "-")
            print(f"--{option} {value} is not used: it was trained with {then[name]}. --out NEW starts another run.")


if __name__ == "__main__":
    run_program(main, Args, __doc__, go_on="--resume continues from there")
