"""Post-training static quantisation by onnxruntime, what it costs in accuracy, and which ranges foretell that."""

import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.base.seeding import generator
from growshrink.cycle.source import Source
from growshrink.data.batches import Batch, eval_batches
from growshrink.data.datasets import DataSet, Split
from growshrink.errors import RunError
from growshrink.export.artefacts import ONNX_FILE, ONNX_INPUT, Function, onnx_function, quiet, write_onnx
from growshrink.training._evaluate import Score
from growshrink.transforms import fold

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


def quantise(
    onnx_path: Path, path: Path, images: Tensor, *, granularity: str, reduce_range: bool, batch_size: int = 32
) -> None:
    """Write an int8 net in the QDQ format: uint8 activations by their range on `images`, symmetric int8 weights.

    `onnx_path` is the float32 net, batch norms folded; `images` are normalised training images (N, C, H, W);
    `granularity` is one of `GRANULARITIES`; `reduce_range` gives the weights 7 bits (`needs_reduced_range`).

    Source: the defaults that onnxruntime documents for x86-64.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = iter([{ONNX_INPUT: batch.contiguous().numpy()} for batch in images.split(batch_size)])

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
    """Training images (N, C, H, W) drawn at random without replacement, normalised as the net wants them."""
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


def int8_scores(source: Source, data: DataSet, *, calibration: int = 256, seed: int = 0) -> dict[str, Score]:
    """Score the folded net on the test split in int8, by granularity, with the defaults of `export`; keeps no file.

    Raises:
        RunError: ONNX is not installed, or the data is not the net's.
    """
    check_data(source, data)
    images = calibration_images(source, data, calibration, seed)
    functions: dict[str, Function] = {}
    with tempfile.TemporaryDirectory() as scratch, quiet():
        folder = Path(scratch)
        write_onnx(fold(source.plain, input_size=source.input_size).eval(), source, folder)
        for granularity in GRANULARITIES:
            path = folder / f"{granularity}.onnx"
            reduced = needs_reduced_range()
            quantise(folder / ONNX_FILE, path, images, granularity=granularity, reduce_range=reduced)
            functions[granularity] = onnx_function(path)
        return score_all(functions, source, data)


def _batches(source: Source, data: DataSet, split: Split) -> Iterable[Batch]:
    mean, std = (source.mean, source.std) if source.mean else (data.mean, data.std)
    return eval_batches(split, batch_size=256, mean=mean, std=std, device="cpu")


#: Steps on either side of zero in symmetric int8.
LEVELS = 127
#: Ratios of the largest to the median channel from which per-tensor int8 leaves the median channel fewer than 32 and
#: fewer than 8 steps on either side of zero (6 and 4 bits). A rule of thumb; `--int8` measures.
MAY_HURT, WILL_HURT = 4.0, 16.0


@dataclass(frozen=True)
class LayerRange:
    """Ranges of a layer's weights, output channel by output channel.

    `channels` is max|w| of each over that of the layer (`largest`), `ratio` is `largest` over the median of those that
    are not all zero; the errors are norms of what rounding to int8 changes over those of the weights.
    """

    name: str
    channels: tuple[float, ...]
    largest: float
    ratio: float
    error_per_tensor: float
    error_per_channel: float


def weight_ranges(model: nn.Module) -> list[LayerRange]:
    """Every convolution and linear layer of `model`, which is to be quantised (folded), the most unequal first."""
    layers = [
        _range(name, module.weight.detach().flatten(1).double())
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight is not None
    ]
    return sorted(layers, key=lambda layer: -layer.ratio)


def _range(name: str, weight_ON: Tensor) -> LayerRange:
    range_O = weight_ON.abs().amax(1)
    largest, alive = range_O.max(), range_O[range_O > 0]
    if not len(alive):
        return LayerRange(name, (0.0,) * len(range_O), 0.0, 1.0, 0.0, 0.0)
    return LayerRange(
        name,
        tuple((range_O / largest).tolist()),
        float(largest),
        float(largest / alive.median()),
        _rounding(weight_ON, largest),
        _rounding(weight_ON, range_O.clamp_min(float(alive.min())).unsqueeze(1)),
    )


def _rounding(weight_ON: Tensor, largest: Tensor) -> float:
    step = largest / LEVELS
    return float((torch.round(weight_ON / step) * step - weight_ON).norm() / weight_ON.norm())


def range_verdict(ranges: Sequence[LayerRange]) -> str:
    """One plain sentence: will int8 with one scale per layer hurt?"""
    if not ranges:
        return "There is no layer to quantise."
    worst = ranges[0]
    where = (
        f"in {worst.name}, the worst layer, the largest channel is {worst.ratio:.1f} times the median one, which is "
        f"left {LEVELS / worst.ratio:.0f} of {LEVELS} steps"
    )
    if worst.ratio > WILL_HURT:
        count = sum(layer.ratio > WILL_HURT for layer in ranges)
        return f"Per-tensor int8 will likely hurt ({count} of {len(ranges)} layers): {where}; quantise per channel."
    if worst.ratio > MAY_HURT:
        return f"Per-tensor int8 may hurt: {where}; quantise per channel, or measure it with --int8."
    return f"Per-tensor int8 will likely not hurt: {where}."


def draw_ranges(ranges: Sequence[LayerRange], path: Path, *, most: int = 40) -> None:
    """A picture: a column per layer, worst first, a dot per channel at its share of the layer's range."""
    from matplotlib.figure import Figure

    shown = ranges[:most]
    figure = Figure(figsize=(max(6.0, 0.3 * len(shown) + 2), 5), layout="constrained")
    axis = figure.subplots()
    for column, layer in enumerate(shown):
        alive = [share for share in layer.channels if share > 0]
        axis.scatter([column] * len(alive), alive, s=9, color="C0", alpha=0.5, linewidths=0)
        axis.scatter([column], [1 / layer.ratio], s=60, marker="_", color="C3", label="median" if not column else None)
    lowest = min([1 / LEVELS, *(share for layer in shown for share in layer.channels if share > 0)]) / 1.5
    label = "below 8 steps with one scale per layer"
    axis.axhspan(lowest, 8 / LEVELS, color="0.88", linewidth=0, zorder=0, label=label)
    axis.set(yscale="log", ylim=(lowest, 1.2), ylabel="max|w| of a channel over its layer's")
    axis.set_xticks(range(len(shown)), [layer.name for layer in shown], rotation=90, fontsize=7)
    axis.legend(frameon=False, loc="lower left")
    of = f"{len(shown)} worst of {len(ranges)} layers" if len(shown) < len(ranges) else f"all {len(ranges)} layers"
    axis.set_title(f"ranges of output channels, {of}")
    figure.savefig(path, dpi=110)
