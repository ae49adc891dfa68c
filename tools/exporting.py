"""The export itself: files written, read back, compared with the net they are of, timed (not a program)."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import timm
import timm.models
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from export_report import write_report
from growshrink.base.config import check_fields
from growshrink.base.copying import copy_net
from growshrink.base.environment import versions
from growshrink.base.limits import BatchSize, Count, OneOf, Seed, Whole
from growshrink.base.progress import progress_bar
from growshrink.base.timing import interleaved_timings, machine
from growshrink.base.writing import write_atomic
from growshrink.cycle.source import Source
from growshrink.data.datasets import DataSet
from growshrink.errors import RunError
from growshrink.export import artefacts, int8
from growshrink.export.artefacts import FOLDED_FILE, ONNX_FILE, TIMM_FILE, Function
from growshrink.export.int8 import GRANULARITIES
from growshrink.proofs._compare import (
    EXACT_FLOAT32,
    EXACT_FLOAT64,
    Comparison,
    branch_effect,
    compare,
    net_rounding_float32,
)
from growshrink.proofs._profile import profile
from growshrink.proofs.probes import random_images
from growshrink.transforms import fold, fuse
from ranges import draw_ranges, range_verdict, weight_ranges

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

    Each file is read back and compared on random images with the net it was made from (see `exactness`).

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
    steps = 3 + options.pt2 + options.onnx + 2 * (options.int8 != "none") + bool(options.rounds)
    with progress_bar(total=steps, unit="step", show=options.progress) as bar:

        def doing(what: str) -> None:
            bar.set_description(what)
            bar.update()

        doing("timm's format")
        write_timm(source, folder)
        doing("folded")
        folded = write_folded(source, folder)
        programs = _programs(source, folded, folder, options, doing)
        doing("checks")
        report: dict[str, Any] = {
            "source": _about(source),
            "exactness": exactness(source, folded, programs, options.seed),
            "cost": _cost(source, folded),
            "weight_ranges": _ranges(folded, folder),
        }
        if options.int8 != "none" and data is not None:
            report["int8"] = _quantised(source, programs, folder, options, data, doing)
        if options.rounds:
            doing("latency")
            report["latency"] = _latency(source, {FOLDED_FILE: folded, **programs}, options)
    report["ok"] = all(check["ok"] for check in report["exactness"]["checks"])
    report["files"] = {name: (folder / name).stat().st_size for name in (TIMM_FILE, FOLDED_FILE, *programs)}
    report["versions"] = versions()
    write_report(folder, report)
    return report


def _programs(
    source: Source, folded: nn.Module, folder: Path, options: ExportOptions, doing: Callable[[str], None]
) -> dict[str, Function]:
    """What the programs that are written compute, by file: of the folded net, and of the dynamic one if it is there."""
    programs: dict[str, Function] = {}
    nets = {"folded": folded} if source.dynamic is None else {"folded": folded, "dynamic": source.dynamic}
    if options.pt2:
        doing("torch.export")
        for name, net in nets.items():
            programs[f"{name}.pt2"] = write_pt2(net, source, folder, f"{name}.pt2")
    if options.onnx:
        doing("ONNX")
        with artefacts.quiet():
            for name, net in nets.items():
                programs[f"{name}.onnx"] = artefacts.write_onnx(net, source, folder, file=f"{name}.onnx")
    return programs


def _quantised(
    source: Source,
    programs: dict[str, Function],
    folder: Path,
    options: ExportOptions,
    data: DataSet,
    doing: Callable[[str], None],
) -> dict[str, Any]:
    """Write int8.onnx, add it to the programs, and score it beside the nets it comes from."""
    doing("int8")
    images = int8.calibration_images(source, data, options.calibration, options.seed)
    reduced = int8.needs_reduced_range()
    with artefacts.quiet():
        path = folder / int8.INT8_FILE
        int8.quantise(folder / ONNX_FILE, path, images, granularity=options.int8, reduce_range=reduced)
    programs[int8.INT8_FILE] = artefacts.onnx_function(path)
    doing("accuracy")
    judged: dict[str, Function] = {
        "float32": source.plain,
        "float32, ONNX": programs[ONNX_FILE],
        "int8": programs[int8.INT8_FILE],
    }
    return {
        "granularity": options.int8,
        "weight_bits": 7 if reduced else 8,
        "calibration_images": len(images),
        "data": data.name,
        "test_images": len(data.test),
        "scores": {name: asdict(found) for name, found in int8.score_all(judged, source, data).items()},
    }


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


#: At which the batch dimension of exported programs is tried; they were traced at 2.
BATCH_SIZES = (1, 2, 7, 16)


def exactness(source: Source, folded: nn.Module, programs: Mapping[str, Function], seed: int) -> dict[str, Any]:
    """Differences on random images, each with what is allowed.

    In float64 the transforms are judged, in float32 what was written: the weights in files (`folded`), and what other
    files compute (`programs`, by name).

    Returns:
        `checks`, a list of rows (`net`, `against`, `dtype`, `max_abs`, `max_rel`, `allowed`, `ok`); `rounding_float32`
        of the plain net (None where it does not run in float64); and, of a net that was grown, `effect_of_branches`.
    """
    size: dict[str, Any] = {"input_size": source.input_size, "seed": seed}
    exact = _in_float64(source.plain, source, seed)
    rounding = None if exact is None else net_rounding_float32(exact, source.plain, **size)
    allowed = {"float64": EXACT_FLOAT64, "float32": max(EXACT_FLOAT32, 10 * (rounding or 0.0))}
    checks: list[dict[str, Any]] = []

    def add(net: str, against: str, dtype: str, found: Comparison) -> None:
        row = {"net": net, "against": against, "dtype": dtype, "max_abs": found.max_abs, "max_rel": found.max_rel}
        checks.append({**row, "allowed": allowed[dtype], "ok": found.max_rel <= allowed[dtype]})

    result: dict[str, Any] = {"rounding_float32": rounding, "checks": checks}
    if source.grown is not None:
        grown = _in_float64(source.grown, source, seed)
        if grown is not None:
            fused = fuse(grown, input_size=source.input_size)
            add("fused", "grown", "float64", compare(grown, fused, **size))
            result["effect_of_branches"] = branch_effect(grown, **size)
        add("fused", "grown", "float32", compare(source.grown, source.plain, dtype=torch.float32, **size))
    if exact is not None:
        folded_exactly = fold(exact, input_size=source.input_size)
        add("folded", "plain", "float64", compare(exact, folded_exactly, **size))
    add("folded", "plain", "float32", compare(source.plain, folded, dtype=torch.float32, **size))
    for name, program in programs.items():
        dynamic = source.dynamic if name.startswith("dynamic") else None
        for number in BATCH_SIZES:
            x = random_images(source.input_size, number, torch.float32, seed)
            with torch.no_grad():
                found = Comparison.of((dynamic or source.plain)(x), program(x))
            add(f"{name}, batch of {number}", "dynamic" if dynamic else "plain", "float32", found)
    return result


@torch.no_grad()
def _in_float64(net: nn.Module, source: Source, seed: int) -> nn.Module | None:
    """A copy in float64; None where it does not run: some nets make float32 constants inside."""
    double = copy_net(net).double()
    try:
        double(random_images(source.input_size, 2, torch.float64, seed))
    except RuntimeError:
        return None
    return double


# ---- files


def write_timm(source: Source, folder: Path) -> None:
    """model.safetensors and config.json: what `timm.create_model("local-dir:FOLDER", pretrained=True)` reads."""
    data_config: dict[str, Any] = {"input_size": source.input_size}
    if source.mean:
        data_config |= {"mean": source.mean, "std": source.std}
    if source.data is not None:  # trained by growshrink, whose images are not cropped to be scored
        data_config["crop_pct"] = 1.0
    timm.models.save_for_hf(
        source.plain,
        str(folder),
        model_config={"label_names": list(source.classes)} if source.classes else {},
        model_args=dict(source.kwargs),
        safe_serialization=True,
        data_config=data_config,
    )
    # written again by ours: timm's is readable by its owner alone
    write_atomic(folder / TIMM_FILE, save(_contiguous(source.plain), {"format": "pt"}))
    with torch.random.fork_rng([]):
        read = timm.create_model(f"local-dir:{folder}", pretrained=True)
    _assert_same_bits(read, source.plain, folder / TIMM_FILE)


def write_folded(source: Source, folder: Path) -> nn.Module:
    """folded.safetensors: the inference form, to be loaded into a net folded likewise (see `growshrink.fold`)."""
    folded = fold(source.plain, input_size=source.input_size).eval()
    path = folder / FOLDED_FILE
    write_atomic(path, save(_contiguous(folded)))
    with torch.random.fork_rng([]):
        read = fold(timm.create_model(source.name, **source.kwargs).eval(), input_size=source.input_size)
    read.load_state_dict(load_file(path))
    _assert_same_bits(read, folded, path)
    return read


def write_pt2(folded: nn.Module, source: Source, folder: Path, file: str = "folded.pt2") -> Function:
    """folded.pt2: a `torch.export` program with any batch size; torch alone runs it, on the CPU and elsewhere."""
    path = folder / file
    batch = torch.zeros(2, *source.input_size)  # a batch of one would be taken for a constant
    program = torch.export.export(folded, (batch,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _contiguous(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in net.state_dict().items()}


def _assert_same_bits(read: nn.Module, written: nn.Module, path: Path) -> None:
    ours, theirs = written.state_dict(), read.state_dict()
    if list(ours) != list(theirs) or any(not torch.equal(ours[key], theirs[key]) for key in ours):
        raise RunError(f"{path}: the net read back is not the one that was written.")
