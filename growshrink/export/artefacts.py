"""Export a net to ONNX, and run what was exported on the CPU; the names of the files of deployment."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from growshrink.cycle.source import Source
from growshrink.errors import RunError

TIMM_FILE = "model.safetensors"
FOLDED_FILE = "folded.safetensors"
ONNX_FILE = "folded.onnx"
ONNX_INPUT = "images"

Function = Callable[[Tensor], Tensor]


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
