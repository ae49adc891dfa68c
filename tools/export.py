"""Out to deployment: a trained net in the formats that others read, each checked, with a report.

    python tools/export.py runs/digits-reducenet20                      a finished run of grow_cycle.py or netaug.py
    python tools/export.py runs/digits-reducenet20 --int8 per-channel --data digits
    python tools/export.py plain.safetensors --model resnet18           a state_dict; also last.pth.tar of timm's
    python tools/export.py grown.safetensors --model resnet18 --branches bottleneck --ratio 4
    python tools/export.py last.pth.tar --model resnet18 --no-merge     leaves the branches out, NetAug's way

    python tools/export.py grown.pth --model resnet18 --branches se --dynamic   kept dynamic beside merged at lam = 0

Grown nets are merged first, which takes a lam of 0. Writes CHECKPOINT/export (or CHECKPOINT-export), numbered if taken:
report.md (read this), report.json and ranges.png (will int8 hurt?), model.safetensors and config.json (the plain net,
for timm.create_model("local-dir:FOLDER", pretrained=True)), and its inference form, batch norms folded, as
folded.safetensors, folded.onnx and folded.pt2, with --int8 also int8.onnx, for any batch size. Exit code 1 if one of
them is further from the net than rounding explains.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import growshrink as gs
from export_report import summary
from exporting import ExportOptions, export
from growshrink.cli.forms import pick
from growshrink.cli.options import DataOptions, GrowOptions, ModelOptions, RunOptions, TimingOptions
from growshrink.cli.program import run_program
from growshrink.cycle.source import Recipe, Source
from growshrink.data.datasets import DataSet, load_data
from growshrink.export import read_source
from growshrink.runs.folder import RunFolder
from inputs import CheckpointOptions


@dataclass(frozen=True, kw_only=True)
class Args(CheckpointOptions):
    """Options of export; the model is needed for a state_dict alone, branches and ratio where it is of a grown net."""

    files: ExportOptions = pick(ExportOptions(), "onnx", "pt2", "int8", "calibration")
    source: Recipe = pick(Recipe(), "merge", "dynamic", "mean", "std")
    model: ModelOptions = ModelOptions(model=None)
    grow: GrowOptions = pick(GrowOptions(branches=()), "branches")
    rounds: gs.Round = pick(gs.Round(epochs=1), "ratio")
    data: DataOptions = pick(DataOptions(data=None), "data", "data_dir", "image_size", "skip_damaged")
    timing: TimingOptions = pick(TimingOptions(turns=50), "turns", "latency_batch")
    running: RunOptions = pick(RunOptions(threads=1), "out", "seed", "threads", "quiet")


def main(args: Args) -> int:
    """Export; 1 if something is not as exact as it should be."""
    running, timing = args.running, args.timing
    options = replace(
        args.files,
        rounds=timing.turns,
        batch_size=timing.latency_batch,
        seed=running.seed,
        progress=not running.quiet,
    )
    options.check_installed()
    running.set_threads()
    recipe = replace(
        args.source,
        name=args.model.model,
        kwargs=args.model.kwargs,
        branches=args.grow.branches,
        ratio=args.rounds.ratio,
        image_size=args.data.image_size,
    )
    source = read_source(args.checkpoint, recipe)
    data = load(args, source) if options.int8 != "none" else None
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
    name, own, running = args.data.data or source.data, args.data, args.running
    if name is None:
        return None
    return load_data(
        name,
        own.data_dir,
        val_fraction=0.0,
        image_size=own.image_size,
        skip_damaged=own.skip_damaged,
        progress=not running.quiet,
        seed=running.seed,
    )


def claim(args: Args) -> RunFolder:
    """The folder, which nothing was written to before."""
    if args.running.out is not None:
        return RunFolder.claim(args.running.out)
    path: Path = args.checkpoint.resolve()
    if path.is_dir():
        return RunFolder.claim_next(path, "export")
    return RunFolder.claim_next(path.parent, f"{path.name.partition('.')[0]}-export")


if __name__ == "__main__":
    run_program(main, Args, __doc__)
