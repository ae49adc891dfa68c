"""A trained net for phones and microcontrollers: ExecuTorch's .pte or LiteRT's .tflite, float32 and int8, each checked.

    pip install -e '.[recipes]' executorch        in an environment of its own: it wants a torch of its own
    python tools/targets.py runs/digits-reducenet20 --to executorch --data digits
    pip install -e '.[recipes]' litert-torch      in another one
    python tools/targets.py runs/digits-reducenet20 --to litert --data digits

Writes RUN/executorch (or RUN/litert) with the net, batch norms folded, for one image at a time, and targets.json: how
far each file's outputs are from torch's, its size, and with --data the accuracy. int8 is calibrated on training images,
by the target's own quantiser. Exit code 1 if the float32 file is further from torch than rounding explains.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from growshrink.base.environment import versions
from growshrink.base.writing import write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import DataOptions, ModelOptions, RunOptions
from growshrink.cli.program import run_program
from growshrink.cycle.source import Recipe
from growshrink.data.datasets import load_data
from growshrink.errors import RunError
from growshrink.export import read_source
from growshrink.export.int8 import calibration_images, check_data, score_all
from growshrink.runs.folder import RunFolder
from growshrink.transforms import fold
from inputs import CheckpointOptions

Function = Callable[[Tensor], Tensor]
#: Relative to the largest output, between a file in float32 and torch.
TOLERANCE = 1e-4
NUM_CHECKED, NUM_CALIBRATION = 16, 64
PACKAGES = {"executorch": "executorch", "litert": "litert_torch"}


@dataclass(frozen=True, kw_only=True)
class Args(CheckpointOptions):
    """Options of targets; the model is needed for a state_dict alone."""

    to: Literal["executorch", "litert"] = "executorch"
    """What runs the net."""
    model: ModelOptions = ModelOptions(model=None)
    data: DataOptions = pick(DataOptions(data=None), "data", "data_dir", "image_size", "skip_damaged")
    running: RunOptions = pick(RunOptions(), "out", "quiet")


def main(args: Args) -> int:
    """Write and check the files; 1 if the float32 one is not torch's net."""
    try:
        importlib.import_module(PACKAGES[args.to])
    except ImportError as error:
        package = PACKAGES[args.to].replace("_", "-")
        raise RunError(
            f"--to {args.to}: {error}; pip install '.[recipes]' {package}, in an environment of its own."
        ) from error
    name, kwargs = args.model.model, args.model.kwargs
    source = read_source(args.checkpoint, Recipe(name=name, kwargs=kwargs, image_size=args.data.image_size))
    net, data = fold(source.plain, input_size=source.input_size).eval(), None
    images = torch.rand(NUM_CALIBRATION, *source.input_size)
    if args.data.data is not None:
        reading: dict[str, Any] = {"image_size": args.data.image_size, "skip_damaged": args.data.skip_damaged}
        data = load_data(args.data.name, args.data.data_dir, progress=not args.running.quiet, **reading)
        check_data(source, data)
        images = calibration_images(source, data, NUM_CALIBRATION, seed=0)
    where = args.running.out or (args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent) / args.to
    with RunFolder.claim(where) as folder:
        make = to_executorch if args.to == "executorch" else to_litert
        made: dict[str, tuple[Path, Function]] = {}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters warn about their own internals
            for kind in ("float32", "int8") if data is not None else ("float32",):
                made[kind] = make(net, images, folder.path, int8=kind == "int8")
        report: dict[str, Any] = {"command": sys.argv, "versions": versions(), "files": {}}
        expected = net(images[:NUM_CHECKED]).detach()
        for kind, (path, function) in made.items():
            away = (one_by_one(function)(images[:NUM_CHECKED]) - expected).abs().max() / expected.abs().max()
            report["files"][kind] = {"file": path.name, "bytes": path.stat().st_size, "max_rel": float(away)}
        if data is not None:
            functions: dict[str, Function] = {"torch": net}
            functions |= {kind: one_by_one(function) for kind, (_, function) in made.items()}
            report["scores"] = {kind: asdict(score) for kind, score in score_all(functions, source, data).items()}
        write_json(folder.path / "targets.json", report)
        folder.write_marker("finished", {"command": sys.argv})
        for kind, file in report["files"].items():
            top1 = f", test top-1 {report['scores'][kind]['top1']:.2f} %" if data is not None else ""
            print(f"{file['file']:24s} {file['bytes'] / 1024:8.1f} KiB, {file['max_rel']:.1e} from torch{top1}")
        print(f"Read {folder.path / 'targets.json'}")
    return int(not report["files"]["float32"]["max_rel"] <= TOLERANCE)


def one_by_one(function: Function) -> Function:
    """A function of one image, as one of a batch."""
    return lambda images: torch.cat([function(in_order(image[None])) for image in images])


def in_order(images: Tensor) -> Tensor:
    """A copy whose strides are those of (N, C, H, W), also where an axis is 1 and torch takes any stride for right."""
    return torch.empty(images.shape).copy_(images)


def to_executorch(net: nn.Module, images: Tensor, folder: Path, *, int8: bool) -> tuple[Path, Function]:
    """A .pte for XNNPACK, and what ExecuTorch's runtime computes with it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    sample = (in_order(images[:1]),)
    if int8:
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(torch.export.export(net, sample).module(), quantizer)
        for image in images:
            prepared(in_order(image[None]))
        net = convert_pt2e(prepared)
    program = to_edge_transform_and_lower(torch.export.export(net, sample), partitioner=[XnnpackPartitioner()])
    path = folder / ("model-int8.pte" if int8 else "model.pte")
    path.write_bytes(program.to_executorch().buffer)
    method = Runtime.get().load_program(path).load_method("forward")
    return path, lambda x: method.execute([x])[0].clone()


def to_litert(net: nn.Module, images: Tensor, folder: Path, *, int8: bool) -> tuple[Path, Function]:
    """A .tflite, and what LiteRT computes with it; int8 is made of the float32 file."""
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    path = folder / ("model-int8.tflite" if int8 else "model.tflite")
    if int8:
        from ai_edge_quantizer import quantizer, recipe

        made = quantizer.Quantizer(str(folder / "model.tflite"), recipe.static_wi8_ai8())
        (name,) = Interpreter(str(folder / "model.tflite")).get_signature_list()["serving_default"]["inputs"]
        seen = [{name: in_order(image[None]).numpy()} for image in images]
        made.quantize(made.calibrate({"serving_default": seen})).export_model(str(path))
    else:
        litert_torch.convert(net, (in_order(images[:1]),)).export(str(path))
    run = Interpreter(str(path)).get_signature_runner("serving_default")
    ((given, taken),), ((_, left),) = run.get_input_details().items(), run.get_output_details().items()

    def function(images: Tensor) -> Tensor:
        (scale, zero), (unit, origin) = taken["quantization"], left["quantization"]
        if int8:
            images = (images / scale + zero).round().clamp(-128, 127).to(torch.int8)
        found = torch.from_numpy(next(iter(run(**{given: images.numpy()}).values()))).float()
        return (found - origin) * unit if int8 else found

    return path, function


if __name__ == "__main__":
    run_program(main, Args, __doc__)
