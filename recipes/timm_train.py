"""timm's own train.py, unchanged, with a grown net and NetAugTask in the place of its task.

    python recipes/timm_train.py TRAIN_PY --model resnet18 --data-dir D --epochs 90 ...      timm's arguments
    python recipes/timm_train.py --ratio 2 --widths netaug TRAIN_PY --model ...              ours come first

TRAIN_PY is train.py of https://github.com/huggingface/pytorch-image-models, in a folder without a folder `timm` beside
it (Python would take that one). The model that --model names is grown before its optimizer is made, and trained at base
width, which is the model itself, with wider nets beside it. Checkpoints hold the branches too; the net to deploy is

    plain.load_state_dict({key: value for key, value in checkpoint["state_dict"].items() if ".branches." not in key})
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm.optim
import timm.task
import torch
from torch import nn

import growshrink as gs
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
    running: RunOptions = pick(RunOptions(), "seed")


def main(args: Args, script: Path, arguments: list[str]) -> None:
    """Run timm's script."""
    if not script.is_file():
        raise RunError(f"{script}: no such script. Take train.py of timm's repository.")
    if (script.parent / "timm").is_dir():
        raise RunError(f"{script}: there is a folder timm beside it, which Python would import. Copy the script away.")

    how, seed = args.rounds, args.running.seed
    if how.widths is None:
        raise RunError("--widths none: there would be no wider net.")
    widths = asdict(how.widths)

    class Task(gs.NetAugTask):
        """What train.py makes in the place of its own task."""

        def __init__(self, model: nn.Module, **keywords: Any) -> None:
            if not grown_modules(model):
                gs.grow(model, how.branch, ratio=how.ratio, where=how.where, seed=seed, inplace=True)
            super().__init__(model, **{**keywords, **widths}, seed=seed)
            made.append(self)

    def create_optimizer(*positional: Any, **keywords: Any) -> torch.optim.Optimizer:
        optimizer = original(*positional, **keywords)
        made[-1].attach(optimizer)
        return optimizer

    original = timm.optim.create_optimizer_v2
    made: list[gs.NetAugTask] = []
    sys.modules["timm.task"].__dict__["ClassificationTask"] = Task  # train.py binds both names when it is run
    sys.modules["timm.optim"].__dict__["create_optimizer_v2"] = create_optimizer
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


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
