"""Write the files of deployment and read them back: weights are compared, programs returned as functions on the CPU."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from growshrink.base.writing import write_atomic
from growshrink.cycle.source import Source
from growshrink.errors import RunError
from growshrink.transforms import fold

TIMM_FILE = "model.safetensors"
FOLDED_FILE = "folded.safetensors"
ONNX_FILE = "folded.onnx"
ONNX_INPUT = "images"

Function = Callable[[Tensor], Tensor]


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


def write_onnx(folded: nn.Module, source: Source, folder: Path, *, file: str = ONNX_FILE) -> Function:
    """folded.onnx: input `images` (batch, C, H, W), any batch size, output `logits`; runs in onnxruntime."""
    require_onnx()
    import onnx

    path = folder / file
    with warnings.catch_warnings():  # the exporter warns about its own internals
        warnings.simplefilter("ignore")
        torch.onnx.export(
            folded,
            (torch.zeros(2, *source.input_size),),
            str(path),
            input_names=[ONNX_INPUT],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    onnx.checker.check_model(str(path), full_check=True)
    return onnx_function(path)


def onnx_function(path: Path) -> Function:
    """What an ONNX file computes, by onnxruntime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {ONNX_INPUT: x.contiguous().numpy()})[0])


def require_onnx() -> None:
    """RunError unless what ONNX needs is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        advice = "pip install -e '.[onnx]' in the clone, or leave it out (--no-onnx)."
        raise RunError(f"ONNX needs {error.name}: {advice}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the chatter that exporter and quantiser log about themselves."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _contiguous(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.contiguous() for key, value in net.state_dict().items()}


def _assert_same_bits(read: nn.Module, written: nn.Module, path: Path) -> None:
    ours, theirs = written.state_dict(), read.state_dict()
    if list(ours) != list(theirs) or any(not torch.equal(ours[key], theirs[key]) for key in ours):
        raise RunError(f"{path}: the net read back is not the one that was written.")
