"""The export itself: every file written, read back, compared, timed, and told about."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from growshrink.base.config import check_fields
from growshrink.base.environment import versions
from growshrink.base.limits import BatchSize, Count, OneOf, Seed, Whole
from growshrink.base.progress import progress_bar
from growshrink.base.timing import interleaved_timings, machine
from growshrink.cycle.source import Source
from growshrink.data.datasets import DataSet
from growshrink.errors import RunError
from growshrink.export import artefacts, int8
from growshrink.export.artefacts import FOLDED_FILE, ONNX_FILE, PT2_FILE, TIMM_FILE, Function, write_folded
from growshrink.export.checks import exactness
from growshrink.export.int8 import GRANULARITIES
from growshrink.export.ranges import draw_ranges, range_verdict, weight_ranges
from growshrink.export.report import write_report
from growshrink.proofs._profile import profile
from growshrink.proofs.probes import random_images

RANGES_PICTURE = "ranges.png"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to make.

    Attributes:
        onnx: Write and check folded.onnx.
        pt2: Write and check folded.pt2.
        int8: Quantise too (static, after training), one scale per output channel or per layer; or "none".
        calibration: Training images that int8 activations are calibrated with.
        rounds: Turns of each net in the timing; 0 leaves it out.
        batch_size: Batch size of the timing.
        seed: Seed of random inputs and of the calibration images.
        progress: Show progress bars.
    """

    onnx: bool = True
    pt2: bool = True
    int8: Annotated[str, OneOf("no such granularity", ("none", *GRANULARITIES))] = "none"
    calibration: Count = 256
    rounds: Whole = 50
    batch_size: BatchSize = 1
    seed: Seed = 0
    progress: bool = False

    def __post_init__(self) -> None:
        check_fields(self, RunError)
        if self.int8 != "none" and not self.onnx:
            raise RunError(f"int8={self.int8!r}: quantises the ONNX net, which onnx=False (--no-onnx) leaves out.")

    def check_installed(self) -> None:
        """RunError unless what ONNX needs is installed, where it is needed."""
        if self.onnx:
            artefacts.require_onnx()


def export(
    source: Source, folder: Path, options: ExportOptions | None = None, *, data: DataSet | None = None
) -> dict[str, Any]:
    """Write the net into `folder` in every format, with report.md, report.json and ranges.png.

    Each file is read back and compared on random images with the net it was made from (see `checks.exactness`).

    Args:
        source: The net.
        folder: Exists; files in it by the names of ours are replaced.
        options: What to make; None for the defaults.
        data: For int8: its training split calibrates, its test split is read once.

    Returns:
        The content of report.json. `ok` tells whether all is as exact as it should be: 1e-10 in float64, and in float32
        1e-5, or 10 times the rounding error of the plain net if that is more.

    Raises:
        RunError: Something cannot be written, or reads back as something else; int8 without data.
    """
    options = options or ExportOptions()
    options.check_installed()
    if options.int8 != "none":
        if data is None:
            raise RunError("--int8 needs --data: training images to calibrate with, test images for the accuracy.")
        int8.check_data(source, data)
    threads = torch.get_num_threads()
    steps = 3 + options.pt2 + options.onnx + 2 * (options.int8 != "none") + bool(options.rounds)
    with progress_bar(total=steps, unit="step", show=options.progress) as bar:

        def doing(what: str) -> None:
            bar.set_description(what)
            bar.update()

        doing("timm's format")
        artefacts.write_timm(source, folder)
        doing("folded")
        folded = write_folded(source, folder)
        programs: dict[str, Function] = {}
        if options.pt2:
            doing("torch.export")
            programs[PT2_FILE] = artefacts.write_pt2(folded, source, folder)
            if source.dynamic is not None:
                file = artefacts.DYNAMIC_PT2_FILE
                programs[file] = artefacts.write_pt2(source.dynamic, source, folder, file)
        if options.onnx:
            doing("ONNX")
            with artefacts.quiet():
                programs[ONNX_FILE] = artefacts.write_onnx(folded, source, folder, threads=threads)
                if source.dynamic is not None:
                    file = artefacts.DYNAMIC_ONNX_FILE
                    programs[file] = artefacts.write_onnx(source.dynamic, source, folder, threads=threads, file=file)
        doing("checks")
        report: dict[str, Any] = {
            "source": _about(source),
            "exactness": exactness(source, folded, programs, options.seed),
            "cost": _cost(source, folded),
            "weight_ranges": _ranges(folded, folder),
        }
        if options.int8 != "none":
            assert data is not None
            doing("int8")
            quantised = folder / int8.INT8_FILE
            images = int8.calibration_images(source, data, options.calibration, options.seed)
            reduced = int8.needs_reduced_range()
            with artefacts.quiet():
                int8.quantise(folder / ONNX_FILE, quantised, images, granularity=options.int8, reduce_range=reduced)
            program = programs[int8.INT8_FILE] = artefacts.onnx_function(quantised, threads=threads)
            doing("accuracy")
            judged: dict[str, Function] = {"float32": source.plain, "float32, ONNX": programs[ONNX_FILE]}
            judged["int8"] = program
            report["int8"] = {
                "granularity": options.int8,
                "weight_bits": 7 if reduced else 8,
                "calibration_images": len(images),
                "data": data.name,
                "test_images": len(data.test),
                "scores": {name: asdict(found) for name, found in int8.score_all(judged, source, data).items()},
            }
        if options.rounds:
            doing("latency")
            report["latency"] = _latency(source, {FOLDED_FILE: folded, **programs}, options)
    report["ok"] = all(check["ok"] for check in report["exactness"]["checks"])
    report["files"] = {name: (folder / name).stat().st_size for name in (TIMM_FILE, FOLDED_FILE, *programs)}
    report["versions"] = versions()
    write_report(folder, report)
    return report


def _about(source: Source) -> dict[str, Any]:
    return {
        "path": str(source.path),
        "model": source.name,
        "kwargs": dict(source.kwargs),
        **{name: list(getattr(source, name)) for name in ("input_size", "mean", "std")},
        "merged_from_a_grown_net": source.grown is not None,
        "needs_growshrink": source.needs_growshrink,
    }


def _cost(source: Source, folded: nn.Module) -> dict[str, Any]:
    nets = {"grown net": source.grown, "dynamic net": source.dynamic, "plain net": source.plain, "folded net": folded}
    return {name: asdict(profile(net, source.input_size)) for name, net in nets.items() if net is not None}


def _ranges(folded: nn.Module, folder: Path) -> dict[str, Any]:
    ranges = weight_ranges(folded)
    if ranges:
        draw_ranges(ranges, folder / RANGES_PICTURE)
    return {"verdict": range_verdict(ranges), "layers": [asdict(layer) for layer in ranges]}


def _latency(source: Source, functions: Mapping[str, Function], options: ExportOptions) -> dict[str, Any]:
    """Milliseconds of each net, interleaved, and their ratios to the plain net's."""
    x = random_images(source.input_size, options.batch_size, torch.float32, options.seed)
    nets: dict[str, Function] = {"plain net": source.plain, **functions}
    if source.grown is not None:
        nets = {"grown net": source.grown, **nets}
    if source.dynamic is not None:
        nets["dynamic net"] = source.dynamic
    calls = {name: partial(net, x) for name, net in nets.items()}
    with torch.inference_mode():
        times = interleaved_timings(calls, rounds=options.rounds, progress=options.progress)
    return {
        "machine": machine(),
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "ms": times,
        "over_plain": {name: ms / times["plain net"] for name, ms in times.items()},
    }
