"""Post-training static quantisation by onnxruntime, and what it costs in accuracy."""

import platform
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from growshrink.base.seeding import generator
from growshrink.cycle.source import Source
from growshrink.data.batches import Batch, eval_batches
from growshrink.data.datasets import DataSet, Split
from growshrink.errors import RunError
from growshrink.export.artefacts import ONNX_INPUT, Function
from growshrink.training._evaluate import Score

INT8_FILE = "int8.onnx"
GRANULARITIES = ("per-channel", "per-tensor")


def needs_reduced_range() -> bool:
    """Whether int8 products can saturate on this CPU: x86 without VNNI adds two of them in 16 bits."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True


def quantise(onnx_path: Path, path: Path, images: Tensor, *, granularity: str, reduce_range: bool) -> None:
    """Write an int8 net in the QDQ format: uint8 activations by their range on `images`, symmetric int8 weights.

    `onnx_path` is the float32 net, batch norms folded; `images` are normalised training images (N, C, H, W);
    `granularity` is one of `GRANULARITIES`; `reduce_range` gives the weights 7 bits (`needs_reduced_range`).

    Source: the defaults that onnxruntime documents for x86-64.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = iter([{ONNX_INPUT: batch.contiguous().numpy()} for batch in images.split(32)])

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return next(batches, None)

    with tempfile.TemporaryDirectory() as scratch:
        ready = Path(scratch) / "ready.onnx"
        quant_pre_process(str(onnx_path), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=granularity == "per-channel",
            reduce_range=reduce_range,
        )


def check_data(source: Source, data: DataSet) -> None:
    """RunError unless the images are those the net takes, and there are test images of as many classes."""
    if data.input_size != source.input_size:
        raise RunError(
            f"the net takes images of size {source.input_size}, those of {data.name} have {data.input_size}: pass "
            "--image-size (of a folder of images) or the data it was trained on."
        )
    if not len(data.test):
        raise RunError(f"{data.name} has no test split to take the accuracy on.")
    with torch.no_grad():
        outputs = source.plain(torch.zeros(1, *source.input_size)).shape[1:]
    if outputs != (data.num_classes,):
        raise RunError(f"the net gives outputs of shape {tuple(outputs)}, {data.name} has {data.num_classes} classes.")


def calibration_images(source: Source, data: DataSet, number: int, seed: int) -> Tensor:
    """Training images (N, C, H, W) drawn at random without replacement, normalised as the net expects."""
    chosen = torch.randperm(len(data.train), generator=generator("int8 calibration", seed))[:number]
    split = Split(data.train.images[chosen], data.train.labels[chosen])
    return torch.cat([images for images, _ in _batches(source, data, split)])


def score_all(functions: Mapping[str, Function], source: Source, data: DataSet) -> dict[str, Score]:
    """Top-1 and loss of several nets on the test split, which is read once for all of them."""
    right = dict.fromkeys(functions, 0)
    loss = dict.fromkeys(functions, 0.0)
    for images_NCHW, labels_N in _batches(source, data, data.test):
        for name, function in functions.items():
            with torch.no_grad():
                logits = function(images_NCHW)
            right[name] += int((logits.argmax(1) == labels_N).sum())
            loss[name] += float(F.cross_entropy(logits, labels_N, reduction="sum"))
    number = len(data.test)
    return {name: Score(100.0 * right[name] / number, loss[name] / number) for name in functions}


def _batches(source: Source, data: DataSet, split: Split) -> Iterable[Batch]:
    mean, std = (source.mean, source.std) if source.mean else (data.mean, data.std)
    return eval_batches(split, batch_size=256, mean=mean, std=std, device="cpu")
