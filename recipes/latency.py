"""How long a net and its merged segments take here: interleaved timings, cached on disk (not a program)."""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growshrink.algebra.dataflow import InputSize, trace
from growshrink.base.reading import read_json
from growshrink.base.timing import interleaved_timings, machine
from growshrink.base.writing import write_atomic
from growshrink.data.datasets import CACHE
from growshrink.depth.segments import Cut, Segment, all_segments, cut_at, links_of, merge_cut, vanish_cut
from growshrink.errors import RunError
from growshrink.layers.activations import set_lambda
from growshrink.proofs.probes import random_images
from growshrink.transforms import fold

#: Whole cuts that are timed beside the nets with one segment merged.
ANCHORS = 12


@dataclass(frozen=True)
class Latencies:
    """What was measured on this `hardware`, in milliseconds per batch; `cached` if it comes from the disk.

    `net_ms` is the whole net, folded, nothing merged; `change_ms` what merging a segment adds (negative: it is faster).
    """

    hardware: str
    net_ms: float
    change_ms: Mapping[Segment, float]
    cached: bool = False

    def predict(self, cut: Sequence[Segment]) -> float:
        """Milliseconds of the net cut into these segments, if the changes add up."""
        return self.net_ms + sum(self.change_ms[segment] for segment in cut)


def measure_latencies(
    model: nn.Module,
    input_size: InputSize,
    *,
    batch_size: int = 1,
    longest: int = 4,
    rounds: int = 200,
    cache: Path | None = CACHE / "latency",
    progress: bool = False,
) -> Latencies:
    """Time a plain net with each of its segments merged, on its device, with torch's present number of threads.

    Each segment is timed as the net in which it alone is merged (alone, its input always in the cache, a large kernel
    looks up to 15 % faster), beside some cuts of the whole net; the changes fit all times best (least squares). What
    has been measured on this hardware and torch for a net of this shape comes from the disk.

    A segment has at most `longest` blocks; the net's weights do not matter. `cache` is a folder for the tables, one
    JSON file per hardware, to be deleted to measure again; None neither reads nor writes one.
    """
    segments = all_segments(model, longest)
    hardware = hardware_name(next(model.parameters()).device)
    table: dict[str, Any] = {"hardware": hardware, "nets": {}}
    path = None if cache is None else cache.expanduser() / f"{re.sub(r'[^A-Za-z0-9.]+', '-', hardware)}.json"
    if path is not None and path.exists():
        table = read_table(path)
    shape = _shape(model, input_size, batch_size)
    sizes = trace(model, input_size).input_sizes
    kinds = {segment: _kind(model, segment, sizes) for segment in segments if segment.length > 1}
    known = table["nets"].get(shape)
    cached = known is not None and set(kinds.values()) <= set(known.get("change_ms", ()))
    if not cached:
        examples = {kind: segment for segment, kind in kinds.items()}
        cuts = [cut_at(model, segment) for segment in examples.values()]
        draw = random.Random("anchors")
        cuts += dict.fromkeys(random_cut(segments, draw) for _ in range(ANCHORS))
        net_ms, ms = measure_cuts(model, cuts, input_size, batch_size=batch_size, rounds=rounds, progress=progress)
        merged = [Counter(kinds[segment] for segment in cut if segment in kinds) for cut in cuts]
        known = _fit([Counter(), *merged], [net_ms, *ms])
        table["nets"][shape] = known
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, (json.dumps(table, indent=1) + "\n").encode())
    changes = {segment: known["change_ms"][kinds[segment]] if segment in kinds else 0.0 for segment in segments}
    return Latencies(hardware, known["net_ms"], changes, cached)


def read_table(path: Path) -> dict[str, Any]:
    """What `measure_latencies` left on the disk; RunError if it is something else."""
    table = read_json(path)
    try:
        numbers = [ms for entry in table["nets"].values() for ms in (entry["net_ms"], *entry["change_ms"].values())]
        if all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            return table
    except (KeyError, TypeError, AttributeError):
        pass
    raise RunError(f"{path}: not a table of latencies; delete it, to measure again.")


def _fit(merged: Sequence[Counter[str]], ms: Sequence[float]) -> dict[str, Any]:
    """The net's time and the change by kind of segment that explain best what nets with these merged take."""
    kinds = list(dict.fromkeys(kind for counts in merged for kind in counts))
    design = torch.tensor([[1.0, *(counts[kind] for kind in kinds)] for counts in merged], dtype=torch.float64)
    times = torch.tensor(ms, dtype=torch.float64)[:, None]  # errors are relative: a clock is a certain share off
    net_ms, *changes = torch.linalg.lstsq(design / times, torch.ones_like(times)).solution[:, 0].tolist()
    return {"net_ms": net_ms, "change_ms": dict(zip(kinds, changes, strict=True))}


def measure_cuts(
    model: nn.Module,
    cuts: Sequence[Cut],
    input_size: InputSize,
    *,
    batch_size: int = 1,
    rounds: int = 200,
    progress: bool = False,
) -> tuple[float, list[float]]:
    """Time a plain net and what it becomes by each of the cuts, interleaved: milliseconds per batch of each."""
    like = next(model.parameters())
    images = random_images(input_size, batch_size, like.dtype, seed=0).to(like.device)
    nets = [fold(model, input_size=input_size)]
    for cut in cuts:
        vanished = vanish_cut(model, cut)
        set_lambda(vanished, 0.0)
        nets.append(merge_cut(vanished, cut, input_size=input_size))
    calls = {str(number): partial(_forward, net.eval(), images) for number, net in enumerate(nets)}
    own_thread = like.device.type == "cpu" and torch.get_num_threads() == 1
    net_ms, *ms = interleaved_timings(calls, rounds=rounds, own_thread=own_thread, progress=progress).values()
    return net_ms, ms


def hardware_name(device: torch.device) -> str:
    """What a latency depends on besides the net: processor, threads, version of torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    about = machine()
    return f"{about['processor']}, {about['threads']} of {about['cores']} threads, torch {torch.__version__}"


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor) -> None:
    model(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def _shape(model: nn.Module, input_size: InputSize, batch_size: int) -> str:
    """All of a net that its latency depends on."""
    convs = [conv for conv in model.modules() if isinstance(conv, nn.Conv2d)]
    parts = [f"{batch_size}x{'x'.join(map(str, input_size))}", type(model).__name__, " ".join(map(_conv, convs))]
    dtype = convs[0].weight.dtype
    parts += [str(getattr(model, "num_classes", ""))] + ([] if dtype == torch.float32 else [str(dtype)])
    return " | ".join(parts)


def _kind(model: nn.Module, segment: Segment, sizes: Mapping[str, tuple[int, int]]) -> str:
    """What the latency of a segment depends on: neighbours of one shape need not be measured twice."""
    names = [link.conv for link in links_of(model)[segment.stage][segment.start : segment.stop]]
    convs = " ".join(_conv(model.get_submodule(name)) for name in names)
    return f"{'x'.join(map(str, sizes[names[0]]))}: {convs}" + ", slim" * segment.slim


def _conv(conv: nn.Module) -> str:
    assert isinstance(conv, nn.Conv2d)
    kernel = "x".join(map(str, conv.kernel_size))
    return f"{conv.in_channels}-{conv.out_channels}/{conv.stride[0]} {kernel}" + f" g{conv.groups}" * (conv.groups > 1)


def random_cut(segments: Iterable[Segment], draw: random.Random) -> Cut:
    """A cut of the whole net into some of the segments, drawn from front to back."""
    segments, cut = list(segments), list[Segment]()
    for stage in sorted({segment.stage for segment in segments}):
        start = 0
        while following := [s for s in segments if s.stage == stage and s.start == start]:
            cut.append(draw.choice(following))
            start = cut[-1].stop
    return tuple(cut)
