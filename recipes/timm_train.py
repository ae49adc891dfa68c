"""timm's own train.py, unchanged, with a grown net and NetAugTask in the place of its task.

    python recipes/timm_train.py TRAIN_PY --model resnet18 --data-dir D --epochs 90 ...      timm's arguments
    python recipes/timm_train.py --ratio 2 --widths netaug TRAIN_PY --model ...              ours come first
    python recipes/timm_train.py --widths none --hold 9000 --vanish 3000 --fused net.safetensors TRAIN_PY --model ...

TRAIN_PY is train.py of https://github.com/huggingface/pytorch-image-models, in a folder without a folder `timm` beside
it (Python would take that one). The model that --model names is grown before its optimizer is made, at timm's
--img-size. By default it is trained at base width, which is the model itself, with wider nets beside it. With
`--widths none` the grown net itself is trained: lam is 1 for `--hold` updates, falls to 0 over `--vanish` more, and the
net, fused, is written when timm's script is through. Checkpoints hold the branches too; of nets trained at base width
the net to deploy is

    plain.load_state_dict({key: value for key, value in checkpoint["state_dict"].items() if ".branches." not in key})
"""

from __future__ import annotations

import argparse
import runpy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm.optim
import timm.task
import torch
from safetensors.torch import save
from torch import nn

import growshrink as gs
from growshrink.algebra.dataflow import InputSize
from growshrink.base.limits import OutFile, Whole
from growshrink.base.reading import clean_keys
from growshrink.base.writing import check_unwritten, write_atomic
from growshrink.cli.forms import pick
from growshrink.cli.options import RunOptions
from growshrink.cli.program import guarded, read_options
from growshrink.errors import RunError
from growshrink.layers.grown import grown_modules


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of timm_train; they come before TRAIN_PY."""

    rounds: gs.Round = pick(
        gs.Round(epochs=1, ratio=4.0, widths=gs.cycle.NetAug("lazy")), "branch", "ratio", "where", "widths"
    )
    hold: Whole = 0
    """Updates with lam 1."""
    vanish: Whole = 0
    """Updates over which lam falls to 0; the run must last longer. 0 leaves it at 1."""
    fused: OutFile | None = None
    """Where the fused net (its average, where timm makes one) is written at the end, as safetensors."""
    running: RunOptions = pick(RunOptions(), "seed")


def main(args: Args, script: Path, arguments: list[str]) -> None:
    """Run timm's script."""
    if not script.is_file():
        raise RunError(f"{script}: no such script. Take train.py of timm's repository.")
    if (script.parent / "timm").is_dir():
        raise RunError(f"{script}: there is a folder timm beside it, which Python would import. Copy the script away.")

    check_unwritten("--fused", args.fused)
    how, seed = args.rounds, args.running.seed
    if args.fused and how.widths is None and not args.vanish:
        raise RunError("--fused without --vanish: branches fuse once lam is 0.")
    lam = gs.schedules.hold_then_vanish(args.hold, args.vanish) if args.vanish else gs.schedules.constant(1.0)
    base: Any = timm.task.ClassificationTask if how.widths is None else gs.NetAugTask
    options = {} if how.widths is None else {**asdict(how.widths), "seed": seed}

    class Task(base):
        """What train.py makes in the place of its own task."""

        def __init__(self, model: nn.Module, **keywords: Any) -> None:
            size = input_size(model, arguments)
            if not grown_modules(model):
                gs.grow(model, how.branch, ratio=how.ratio, where=how.where, seed=seed, inplace=True, input_size=size)
            super().__init__(model, **{**keywords, **options})
            self.size, self.scheduler = size, gs.LambdaScheduler(model, lam)
            made.append(self)

        def update_ema(self, step: int | None = None) -> None:
            super().update_ema(step)
            average = getattr(self, "trainable_module_ema", None)
            self.scheduler.nets[1:] = [] if average is None else [average]
            self.scheduler.step(step)

    def create_optimizer(*positional: Any, **keywords: Any) -> torch.optim.Optimizer:
        optimizer = original(*positional, **keywords)
        if how.widths is not None:
            made[-1].attach(optimizer)
        return optimizer

    original = timm.optim.create_optimizer_v2
    made: list[Any] = []
    sys.modules["timm.task"].__dict__["ClassificationTask"] = Task  # train.py binds both names when it is run
    sys.modules["timm.optim"].__dict__["create_optimizer_v2"] = create_optimizer
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")
    if args.fused:
        plain = gs.fuse(made[-1].scheduler.nets[-1], input_size=made[-1].size)
        tensors = {name: value.cpu().contiguous() for name, value in clean_keys(plain.state_dict()).items()}
        write_atomic(args.fused, save(tensors))


def input_size(model: nn.Module, arguments: list[str]) -> InputSize | None:
    """The size timm's --input-size C H W or --img-size N asks for; None where neither does."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--input-size", nargs=3, type=int)
    given.add_argument("--img-size", type=int)
    given.add_argument("--in-chans", type=int)
    asked, _ = given.parse_known_args(arguments)
    if asked.input_size:
        return asked.input_size[0], asked.input_size[1], asked.input_size[2]
    cfg: Any = model.pretrained_cfg
    channels = int(asked.in_chans or cfg["input_size"][0])
    return None if asked.img_size is None else (channels, asked.img_size, asked.img_size)


def split(argv: list[str]) -> tuple[list[str], Path, list[str]]:
    """Our options, the script, and timm's arguments."""
    index = next((i for i, word in enumerate(argv) if word.endswith(".py")), None)
    if index is None:
        return argv, Path(), []
    return argv[:index], Path(argv[index]), argv[index + 1 :]


if __name__ == "__main__":
    ours, script, theirs = split(sys.argv[1:])
    with guarded("timm's --resume CHECKPOINT continues"):
        args = read_options(Args, __doc__, ours)
        if not script.name:
            raise RunError("name timm's train.py, behind our options and before its own.")
        main(args, script, theirs)
