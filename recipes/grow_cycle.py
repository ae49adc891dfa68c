"""Grow a net, train it, let the extra activations vanish, fuse it back exactly, and do it again.

    python recipes/grow_cycle.py                                    digits, two rounds, well under 3 minutes on 2 cores
    python recipes/grow_cycle.py --data cifar10 --data-dir D --model reducenet20 --epochs 60 --amp
    python recipes/grow_cycle.py --data D --model mobilenetv3_small_050 --branches bottleneck insert+bottleneck

Leaves runs/NAME/ with report.md (read this), report.json, curves.png, plain.safetensors (the net to deploy, the keys
and shapes of the plain architecture), growth_log.json, log.jsonl, and run.json (options, versions, seeds).
"""

from __future__ import annotations

import ast
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
import tyro
from torch import nn

import growshrink as gs
from growshrink.cycle.plan import DISTIL
from growshrink.errors import PlanError, RunError, near
from growshrink.grown import grown_modules
from growshrink.training import Augment, DataSet, Feed, MemoryFeed, RunFolder, TrainConfig, load_data, stream_data
from growshrink.training.folder import read_json


@dataclass(kw_only=True)
class Args:
    """Options of grow_cycle."""

    # ---- what is trained on what
    data: str = "digits"
    """digits, fashion-mnist, cifar10, cifar100, or a folder train/CLASS/*, test/CLASS/* of images."""
    data_dir: Path | None = None
    """Where the data set lies (digits need none; fashion-mnist is looked for in Debian's package)."""
    model: str = "reducenet20"
    """Any timm model; one that is grown at birth (reducenet20_x4) is not grown again in round 1."""
    model_kwargs: tuple[str, ...] = ()
    """KEY=VALUE arguments for timm.create_model, e.g. width=0.5 drop_path_rate=0.05."""
    image_size: int | None = None
    """Resize the images of a folder to this many pixels."""
    stream: bool = False
    """Decode a folder that does not fit into memory as it is needed, with timm's loader (needs --image-size)."""
    val_fraction: float = 0.1
    """Share of the training images that rounds are judged by; the test set is read once, at the end."""

    # ---- the rounds
    epochs: float = 60.0
    """Of the whole run: --base, then rounds of equal length."""
    rounds: int = 2
    """How many times to grow and fuse."""
    base: float = 0.1
    """Share of the epochs before the first round."""
    branches: tuple[str, ...] = ("bottleneck", "insert")
    """What round 1, 2, ... attaches (the last entry is repeated): bottleneck, insert, nest; A+B attaches both."""
    ratio: float = 4.0
    """Middle width of a branch over the output channels of its convolution."""
    where: str | None = None
    """Regular expression on module names; by default every convolution that can be grown exactly."""
    hold: float = 0.20
    """Share of a round with the branches' activations alive (lam = 1)."""
    vanish: float = 0.15
    """Share of a round in which lam falls to 0."""
    settle: float = 0.08
    """Share of a round at lam = 0 before the fuse (at least 50 updates). The rest is trained at plain cost."""
    distil: Annotated[Literal["none", "peak", "previous"], tyro.conf.arg(metavar="|".join(DISTIL))] = "none"
    """Teacher after the hold: this round's own finished peak, the net the round began with, or none."""
    plan: Path | None = None
    """A JSON file with a whole plan (see run.json of any run), instead of the options of this group."""

    # ---- training
    batch_size: int = 64
    """Images per update."""
    lr: float = 0.1
    """Peak learning rate."""
    optimizer: str = "sgd"
    """Any optimizer of timm's that keeps its state parameter by parameter (not lamb, adan, kron, adahessian)."""
    weight_decay: float = 5e-4
    """Not applied to norms and biases."""
    momentum: float = 0.9
    """Of SGD."""
    label_smoothing: float = 0.0
    """In [0, 1)."""
    ema_decay: float = 0.998
    """Of the averaged weights, which are what is judged and deployed; 0 for none."""
    clip_grad: float | None = None
    """Largest norm of the gradient."""
    crop: int | None = None
    """Pad by this many pixels and crop at random; by default an eighth of the image."""
    flip: bool | None = None
    """Mirror at random; by default except for digits."""
    cutout: int = 0
    """Side in pixels of a square blanked at random."""
    amp: bool = False
    """bfloat16 autocast: about twice as fast where the machine has it."""

    # ---- the run
    out: Path | None = None
    """Folder of the run; by default runs/DATA-MODEL, numbered if taken."""
    resume: bool = False
    """Go on with the run in the folder; starts it if there is none, does nothing if it is finished."""
    seed: int = 0
    """Of initial weights, branches, data order and augmentation."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps."""
    tensorboard: bool = False
    """Write TensorBoard event files too."""
    quiet: bool = False
    """No progress bar."""


#: Options that change what the net is fed with: a run is resumed with the same only.
OF_THE_DATA = ("image_size", "stream", "val_fraction", "crop", "flip", "cutout")


def main(args: Args) -> None:
    """Run it; errors of the user's are raised as GrowShrinkError."""
    folder = claim(args)
    with folder:
        if folder.finished:
            print(f"{folder.path} is finished: {folder.path / 'report.md'}")
            return
        device = find_device(args.device)
        torch.manual_seed(args.seed)
        feed = make_feed(args, device)
        model, about = make_model(args, feed)
        result = gs.run_cycle(
            model,
            feed,
            make_plan(args),
            out_dir=folder,
            config=TrainConfig(
                optimizer=args.optimizer,
                lr=args.lr,
                weight_decay=args.weight_decay,
                momentum=args.momentum,
                label_smoothing=args.label_smoothing,
                ema_decay=args.ema_decay,
                clip_grad=args.clip_grad,
                amp=args.amp,
            ),
            device=device,
            progress=not args.quiet,
            tensorboard=args.tensorboard,
            about={
                "command": shlex.join(["python", *sys.argv]),
                "seed": args.seed,
                "model": about,
                "options": {name: getattr(args, name) for name in OF_THE_DATA},
            },
        )
    if result.rounds:
        print(result.table())
    print(
        f"test top-1 {result.final['top1']:.2f} %, {result.deployed['params']:,} parameters "
        f"(the plain net has {result.plain['params']:,}), training cost "
        f"{result.to_dict()['training']['cost']:.2f} times the plain net's.\nRead {folder.path / 'report.md'}"
    )


def claim(args: Args) -> RunFolder:
    """The folder of the run, claimed before anything else is done."""
    if args.out is not None:
        return RunFolder.claim(args.out, resume=args.resume)
    name = f"{Path(args.data).resolve().name}-{args.model}".replace("/", "-")
    return RunFolder.claim_next(Path("runs"), name, resume=args.resume)


def find_device(name: str) -> torch.device:
    """The device, if it is there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {name}: not to be had here ({str(error).splitlines()[0]}).") from error
    return device


def make_feed(args: Args, device: torch.device) -> Feed:
    """Batches of the data set."""
    if args.stream:
        if args.image_size is None:
            raise RunError("--stream needs --image-size.")
        return stream_data(
            args.data_dir or Path(args.data),
            batch_size=args.batch_size,
            image_size=args.image_size,
            val_fraction=args.val_fraction,
            seed=args.seed,
            device=device,
        )
    data: DataSet = load_data(
        args.data,
        args.data_dir,
        val_fraction=args.val_fraction,
        seed=args.seed,
        image_size=args.image_size,
        progress=not args.quiet,
    )
    crop = data.input_size[1] // 8 if args.crop is None else args.crop
    flip = args.data != "digits" if args.flip is None else args.flip
    augment = Augment(crop=crop, flip=flip, cutout=args.cutout)
    return MemoryFeed.of(data, batch_size=args.batch_size, augment=augment, seed=args.seed, device=device)


def make_model(args: Args, feed: Feed) -> tuple[nn.Module, dict[str, Any]]:
    """The model for this data, and how to make its plain form again."""
    if not timm.is_model(args.model):
        raise RunError(f"--model {args.model}: timm knows no such model{near(args.model, timm.list_models())}")
    kwargs = {"num_classes": len(feed.classes), "in_chans": feed.input_size[0], **parse_kwargs(args.model_kwargs)}
    try:
        model = timm.create_model(args.model, **kwargs)
    except Exception as error:  # models check their arguments in their own ways
        raise RunError(f"--model {args.model} with {kwargs}: {type(error).__name__}: {error}") from error
    plain_name = args.model.split("_x")[0] if grown_modules(model) else args.model
    plain_kwargs = {
        key: value for key, value in kwargs.items() if key not in ("expansion", "pretrained", "checkpoint_path")
    }
    return model, {"name": args.model, "kwargs": kwargs, "plain_name": plain_name, "plain_kwargs": plain_kwargs}


def parse_kwargs(pairs: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE strings as arguments; values are Python literals, or strings."""
    kwargs = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise RunError(f"--model-kwargs {pair}: must be KEY=VALUE.")
        try:
            kwargs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            kwargs[key] = text
    return kwargs


def make_plan(args: Args) -> gs.CyclePlan:
    """The plan in --plan, or the one the options describe."""
    if args.plan is not None:
        values = read_json(args.plan)
        return gs.CyclePlan.from_dict(values.get("plan", values))
    if not 0 < args.epochs < math.inf:
        raise PlanError(f"--epochs {args.epochs}: must be a number above 0.")
    if args.rounds < 0:
        raise PlanError(f"--rounds {args.rounds}: must not be negative.")
    if not 0.0 <= args.base <= 1.0:
        raise PlanError(f"--base {args.base}: a share of the epochs, must lie in [0, 1].")
    if not args.branches:
        raise PlanError("--branches: name at least one.")
    base = args.epochs * args.base if args.rounds else args.epochs
    rounds = tuple(
        gs.RoundPlan(
            epochs=(args.epochs - base) / args.rounds,
            branch=tuple(args.branches[min(number, len(args.branches) - 1)].split("+")),
            ratio=args.ratio,
            where=args.where,
            hold=args.hold,
            vanish=args.vanish,
            settle=args.settle,
            distil=args.distil,
        )
        for number in range(args.rounds)
    )
    return gs.CyclePlan(rounds=rounds, base_epochs=base, seed=args.seed)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except gs.GrowShrinkError as error:
        print(f"grow_cycle: {' '.join(str(error).split())}", file=sys.stderr)  # one line, whatever is quoted in it
        sys.exit(2)
    except KeyboardInterrupt:
        print("grow_cycle: interrupted; --resume goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
