"""What merging runs of blocks does to a net's latency on this machine, and how well that is predicted.

    python tools/depth_latency.py                                    reducenet20 at 32x32, one image at a time
    python tools/depth_latency.py --model reducenet56 --latency-batch 16
    python tools/depth_latency.py --model mobilenetv2_050 --pixels 96 --turns 50

Makes the depth knob's table of latencies (interleaved, nothing is read from or written to the disk): what merging each
run of neighbouring blocks does to the net's time. Then draws whole cuts at random, predicts their latency by adding up,
and times those that are predicted to be no slower than the net (the knob plans no others), interleaved. Exit
code 1 if a prediction is further off than --most-off.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import growshrink  # noqa: F401 - registers the models
from growshrink.base.limits import Count, NotNegative
from growshrink.cli.forms import pick
from growshrink.cli.options import ModelOptions, RunOptions, TimingOptions
from growshrink.cli.program import run_program
from growshrink.depth.segments import Cut
from growshrink.errors import PlanError
from inputs import NetOptions
from latency import Latencies, measure_cuts, measure_latencies, random_cut


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of depth_latency; the model is a plain ReduceNet, or any net with convolutions in a row."""

    cuts: Count = 12
    """How many cuts to draw."""
    most_off: NotNegative = 0.15
    """How far a prediction may be off, relatively to what is measured."""
    model: ModelOptions = ModelOptions()
    nets: NetOptions = pick(NetOptions(), "pixels")
    timing: TimingOptions = TimingOptions()
    running: RunOptions = pick(RunOptions(threads=1), "seed", "threads", "quiet")


def main(args: Args) -> int:
    """Print both tables; 1 if a prediction is too far off."""
    if not args.timing.turns:
        raise PlanError("--turns 0: must be at least 1.")
    args.running.set_threads()
    (model, _), size = args.model.create(), (3, args.nets.pixels, args.nets.pixels)
    options: dict[str, Any] = {"batch_size": args.timing.latency_batch, "rounds": args.timing.turns}
    options["progress"] = not args.running.quiet
    latencies = measure_latencies(model, size, longest=args.timing.longest, cache=None, **options)
    print(f"{latencies.hardware}: {latencies.net_ms:.3f} ms")
    for segment, change in latencies.change_ms.items():
        if segment.length > 1:
            print(f"{segment!s:24s} {1 + change / latencies.net_ms:6.2f} of the net's time")
    cuts = draw_cuts(latencies, args.cuts, random.Random(args.running.seed))
    if not cuts:
        print("no merging makes the net faster here")
        return 0
    net_ms, times = measure_cuts(model, cuts, size, **options)
    errors = []
    for cut, ms in zip(cuts, times, strict=True):
        predicted, measured = latencies.predict(cut) / latencies.net_ms, ms / net_ms
        errors.append(abs(predicted / measured - 1))
        merged = " ".join(str(segment) for segment in cut if segment.length > 1)
        print(f"predicted {predicted:.2f}, measured {measured:.2f} of the net's time: {merged}")
    print(f"predictions are at most {max(errors):.1%} off ({len(cuts)} cuts)")
    return int(max(errors) > args.most_off)


def draw_cuts(latencies: Latencies, number: int, draw: random.Random) -> list[Cut]:
    """Different cuts that are predicted to be no slower than the net, as many as there are of the number."""
    drawn = (random_cut(latencies.change_ms, draw) for _ in range(100 * number))
    cuts = dict.fromkeys(cut for cut in drawn if any(segment.length > 1 for segment in cut))
    return [cut for cut in cuts if latencies.predict(cut) <= latencies.net_ms][:number]


if __name__ == "__main__":
    run_program(main, Args, __doc__)
