"""Out to deployment: a trained net in the formats that others read, each checked, with a report.

    python tools/export.py runs/digits-reducenet20                      a finished run of grow_cycle.py or netaug.py
    python tools/export.py runs/digits-reducenet20 --int8 per-channel --data digits
    python tools/export.py plain.safetensors --model resnet18           a state_dict; also last.pth.tar of timm's
    python tools/export.py grown.safetensors --model resnet18 --branches bottleneck --ratio 4
    python tools/export.py last.pth.tar --model resnet18 --exit drop    leaves the branches out, NetAug's way

Grown nets are merged first, which takes a lam of 0. Writes CHECKPOINT/export (or CHECKPOINT-export), numbered if taken:
report.md (read this), report.json and ranges.png (will int8 hurt?), model.safetensors and config.json (the plain net,
for timm.create_model("local-dir:FOLDER", pretrained=True)), and its inference form, batch norms folded, as
folded.safetensors, folded.onnx and folded.pt2, with --int8 also int8.onnx, for any batch size. Exit code 1 if one of
them is further from the net than rounding explains.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from growshrink.base.limits import (
    Argument,
    BatchSize,
    Checkpoint,
    Count,
    InFolder,
    Pixels,
    Positive,
    Ratio,
    Seed,
    Share,
    Threads,
    Whole,
)
from growshrink.cli.limits import BranchName, DataName, ModelName
from growshrink.cli.options import parse_kwargs
from growshrink.cli.program import run_program
from growshrink.data.datasets import DataSet, load_data
from growshrink.export import ExportOptions, export, read_source
from growshrink.export.int8 import GRANULARITIES
from growshrink.export.report import summary
from growshrink.export.source import WAYS_OUT, Recipe, Source
from growshrink.runs.folder import RunFolder


@dataclass
class Args:
    """Options of export."""

    checkpoint: Annotated[Checkpoint, tyro.conf.Positional]
    """Folder of a finished run, or a file with weights."""
    out: Path | None = None
    """Folder to make."""
    model: ModelName | None = None
    """timm model that a state_dict alone is of. Classes and input channels are read off the weights."""
    model_kwargs: tuple[Argument, ...] = ()
    """KEY=VALUE arguments for timm.create_model, e.g. width=0.5."""
    branches: tuple[BranchName, ...] = ()
    """What a grown state_dict alone was grown with: bottleneck, dbb, ..."""
    ratio: Ratio = 2.0
    """The ratio it was grown with."""
    exit: Annotated[str, tyro.conf.arg(metavar="|".join(WAYS_OUT))] = "fuse"
    """Of a grown net: merge its branches, or leave them out."""
    image_size: Pixels | None = None
    """Pixels of the images, where they are not those of the checkpoint or of the model's default."""
    mean: tuple[Share, ...] = ()
    """Per channel, of images in [0, 1]: how those of a state_dict alone were normalised; by default as timm says."""
    std: tuple[Positive, ...] = ()
    """Per channel, in the same unit."""
    onnx: bool = True
    """Write ONNX (needs the extra growshrink[onnx])."""
    pt2: bool = True
    """Write a program of torch.export."""
    int8: Annotated[str, tyro.conf.arg(metavar="|".join(("none", *GRANULARITIES)))] = "none"
    """Quantise too (static, after training), one scale per output channel or per layer, and take its test accuracy."""
    data: DataName | None = None
    """For --int8: digits, cifar10, ..., or a folder; by default what the run was trained on."""
    data_dir: InFolder | None = None
    """Where it lies."""
    calibration: Count = 256
    """Training images that activations are calibrated with."""
    rounds: Whole = 50
    """Turns of each net in the timing; 0 leaves it out."""
    batch_size: BatchSize = 1
    """Images at a time in the timing."""
    threads: Threads = 1
    """Of torch and onnxruntime."""
    seed: Seed = 0
    """Of random inputs and calibration images."""
    quiet: bool = False
    """No progress bars."""


def main(args: Args) -> int:
    """Export; 1 if something is not as exact as it should be."""
    options = ExportOptions(
        onnx=args.onnx,
        pt2=args.pt2,
        int8=args.int8,
        calibration=args.calibration,
        rounds=args.rounds,
        batch_size=args.batch_size,
        seed=args.seed,
        progress=not args.quiet,
    )
    torch.set_num_threads(args.threads)
    recipe = Recipe(
        name=args.model,
        kwargs=parse_kwargs(args.model_kwargs),
        branches=args.branches,
        ratio=args.ratio,
        exit=args.exit,
        image_size=args.image_size,
        mean=args.mean,
        std=args.std,
    )
    source = read_source(args.checkpoint, recipe)
    data = load(args, source) if args.int8 != "none" else None
    with claim(args) as folder:
        report = export(source, folder.path, options, data=data)
        folder.write_marker("finished", {"command": sys.argv})
        print(summary(report))
        if source.needs_growshrink:
            print(f"{source.name} is growshrink's: timm knows it after `import growshrink`; ONNX and pt2 need neither.")
        print(f"Read {folder.path / 'report.md'}")
    return int(not report["ok"])


def load(args: Args, source: Source) -> DataSet | None:
    """The data for int8."""
    name = args.data or source.data
    if name is None:
        return None
    return load_data(
        name, args.data_dir, val_fraction=0.0, image_size=args.image_size, progress=not args.quiet, seed=args.seed
    )


def claim(args: Args) -> RunFolder:
    """The folder, which nothing was written to before."""
    if args.out is not None:
        return RunFolder.claim(args.out)
    path: Path = args.checkpoint.resolve()
    if path.is_dir():
        return RunFolder.claim_next(path, "export")
    return RunFolder.claim_next(path.parent, f"{path.name.partition('.')[0]}-export")


if __name__ == "__main__":
    run_program(main, Args, __doc__)
