"""What does it cost: fused, grown and plain nets, our loader, a whole round, the activation, the training loop.

    python tools/benchmark.py                             every section, about 3 minutes on 2 quiet cores
    python tools/benchmark.py --only fused grown --threads 1
    python tools/benchmark.py --file bench.json --strict   exit 1 if a target is missed
    python tools/benchmark.py --suite --authors FOLDER     every ratio of the docs, other programs' too: over an hour

Every row compares two things, A and B, in one process on the CPU: they take turns (A, B, A, B, ...), each pair of
turns gives a ratio A / B, and the row shows the median of the ratios and their quartiles. What slows the machine down
for a while slows both halves of a pair, so a ratio stands where a single timing does not. The times shown are medians.
On a machine that is busy with other things, --threads 1 is steadier: threads wait for one another.

| section    | A / B                                                                                     | target  |
| ---------- | ----------------------------------------------------------------------------------------- | ------- |
| fused      | inference of a fused reducenet20_x4 / of that net written by hand, and of reducenet20     | <= 1.02 |
| grown      | inference of reducenet20 grown (ratio 4), and of reducenet20_x4 / of what it fuses into   | >= 2.5  |
| loader     | images/s of TrainBatches, out of memory / of timm's loader, 2 workers, out of PNG files   | >= 20   |
| round      | time of a default round on reducenet20 / of its twin that stays grown for as many updates | bound   |
| activation | other ways to write the vanishing ReLU, forward and backward / VanishingReLU              |         |
| step       | one update of Trainer / of a loop of forward, backward and step written by hand           |         |
| data       | making a batch, by augmentation / a whole training step with it: the share of the data    |         |
| rank       | with --suite: gs.rank of 6,561 nets with 1,000 resamples / 10 s                           | <= 1    |
| compile    | with --suite: an eager step / the same by torch.compile                                   |         |

The bound of a round is 1.1 * ((1 - t) + t / c): t is the share of its tail, trained at plain cost, and c the time of a
grown training step over that of a plain one. The surgery (growing, fusing with its proofs) counts against the round
alone; scoring on a val split, which a run of either kind does, is left out of both.
"""

from __future__ import annotations

import copy
import gc
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from typing import Any, Literal, get_args

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.base.environment import versions
from growshrink.base.limits import InFolder
from growshrink.base.timing import Call, machine, seconds_of
from growshrink.base.writing import check_unwritten, write_json
from growshrink.cli.options import command
from growshrink.cli.program import run_program
from growshrink.cycle import lay_out
from growshrink.cycle.records import Grew
from growshrink.cycle.surgery import fuse_nets, grow_nets
from growshrink.data.batches import Augment, Batch, PhotoAugment, TrainBatches
from growshrink.data.feed import UpdateBatches
from growshrink.data.stream import stream_data
from growshrink.errors import RunError
from growshrink.proofs.probes import randomize_norms_
from growshrink.training import TrainConfig, Trainer
from inputs import FileOptions
from loaders import MEAN, STD, png_folder, random_split, timm_loader
from paired import Bench, OneBatch, PairOptions, TimedArgs, channels_last, load, table
from suite import measure_compile, measure_rank, run_programs

Section = Literal["fused", "grown", "loader", "round", "activation", "step", "data"]
SECTIONS: tuple[Section, ...] = get_args(Section)
SLOW = {"rank": measure_rank, "compile": measure_compile}
FUSED_AT_MOST, GROWN_AT_LEAST, LOADER_AT_LEAST, ROUND_MARGIN = 1.02, 2.5, 20.0, 1.1
SIZE = (3, 32, 32)
#: Samples a round is cut into, each with every phase in it: updates 0, 10, 20, ..., updates 1, 11, 21, ..., and so on.
ROUND_SAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class Args(TimedArgs):
    """Options of benchmark; the file, which must not exist, gets everything as JSON, single ratios included."""

    only: tuple[Section, ...] = SECTIONS
    """Sections to run."""
    suite: bool = False
    """Measure what else the docs give a ratio of, too, and run the other programs that time things."""
    authors: InFolder | None = None
    """With --suite: a clone of DingXiaoH/DiverseBranchBlock, whose module runs beside ours."""
    pairs: PairOptions = PairOptions(seconds=4.0)
    output: FileOptions = FileOptions()


def main(args: Args) -> int:
    """Measure, print, write; the exit status."""
    if args.authors is not None and not (args.suite and (args.authors / "diversebranchblock.py").is_file()):
        raise RunError(f"--authors {args.authors}: goes with --suite, and is a clone of DingXiaoH/DiverseBranchBlock.")
    if not args.only:
        raise RunError(f"--only: name at least one of {', '.join(SECTIONS)}.")
    check_unwritten("--file", file := args.output.file)
    bench = args.bench(quick=Bench(0.02, 3, 4, 256, 2, 120))
    about: dict[str, Any] = {
        "command": command(),
        "versions": versions(),
        **machine(),
        "load_before": load(),
    }
    began = time.perf_counter()
    for section, measure in zip(SECTIONS, MEASURES, strict=True):
        if section in args.only:
            torch.manual_seed(0)
            measure(bench)
            gc.collect()  # worker processes too
    for measure in SLOW.values() if args.suite else ():
        measure(bench)
    about |= {"seconds": time.perf_counter() - began, "load_after": load()}
    print(table(bench.rows, about))
    if file is not None:
        if file.exists():
            raise RunError(f"--file {file}: File exists.")
        write_json(file, {**about, **asdict(bench)})
    failed = run_programs(args.authors, args.pairs.quick) if args.suite else []
    if failed:
        print(f"\nExit status other than 0: {', '.join(failed)}.")
    return int(bool(failed) or (args.pairs.strict and any(row.verdict == "MISSED" for row in bench.rows)))


# ---- fused, grown


class HandWritten(nn.Module):
    """The plain reducenet20 as one writes it in PyTorch alone."""

    class Block(nn.Module):
        """3x3 -> BN (+ identity where the shape allows) -> ReLU."""

        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.skip = inputs == outputs
            self.conv = nn.Conv2d(inputs, outputs, 3, stride=1 if self.skip else 2, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(outputs)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:  # noqa: D102
            y = self.norm(self.conv(x))
            if self.skip:
                y = y + x
            return self.relu(y)

    def __init__(self) -> None:
        super().__init__()
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(*map(self.Block, widths[:-1], widths[1:]))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.head(self.blocks(self.stem(x)))


def measure_fused(bench: Bench) -> None:
    """A fused net is as fast as one that never was grown, and as one written in PyTorch alone."""
    _, fused = grown_and_fused("reducenet20_x4")
    hand, plain = HandWritten(), timm.create_model("reducenet20", num_classes=10)
    for name, other in (("hand-written", hand), ("reducenet20 never grown", plain)):
        other.load_state_dict(dict(zip(other.state_dict(), fused.state_dict().values(), strict=True)))  # by order
        gs.assert_equivalent(channels_last(other), fused, input_size=SIZE)
        for size in (1, bench.batch_size):
            compare_inference(bench, f"fused: fused / {name}", fused, other, size, at_most=FUSED_AT_MOST)


def measure_grown(bench: Bench) -> None:
    """What fusing saves."""
    for name, words in (("reducenet20", "reducenet20 + bottleneck 4"), ("reducenet20_x4", "reducenet20_x4")):
        what = f"grown: {words} / fused"
        grown, fused = grown_and_fused(name)
        for size in (1, bench.batch_size):
            compare_inference(bench, what, grown, fused, size, at_least=GROWN_AT_LEAST)
        batch = random_batch(bench.batch_size)
        steps = (partial(BareLoop(net), *batch) for net in (grown, fused))
        bench.compare(f"{what}, training step, batch {bench.batch_size}", *steps)


def grown_and_fused(name: str) -> tuple[nn.Module, nn.Module]:
    """A grown net with lam at 1, and what it fuses into; random norms, so that its branches are at work."""
    grown = timm.create_model(name, num_classes=10)
    grown = gs.grow(grown, ratio=4, input_size=SIZE) if name == "reducenet20" else grown
    randomize_norms_(grown)
    gs.set_lambda(grown, 0.0)
    fused = gs.fuse(grown, input_size=SIZE)
    gs.set_lambda(grown, 1.0)
    return channels_last(grown), channels_last(fused)


def compare_inference(
    bench: Bench, what: str, a: nn.Module, b: nn.Module, size: int, at_most: float = math.inf, at_least: float = 0.0
) -> None:
    """Latency of two nets in eval mode."""
    images, _ = random_batch(size)
    with torch.inference_mode():
        what, nets = f"{what}, inference, batch {size}", (partial(net.eval(), images) for net in (a, b))
        bench.compare(what, *nets, at_most=at_most, at_least=at_least)


# ---- loader


def measure_loader(bench: Bench) -> None:
    """Pad-4 crop and flip of 32x32 images: in memory and batchwise against files, PIL and worker processes."""
    batch_size, passes = 128, 4  # ours makes several passes in a turn: one is a matter of milliseconds
    split = random_split(bench.num_files)
    ours = TrainBatches(split, batch_size=batch_size, mean=MEAN, std=STD)
    with tempfile.TemporaryDirectory(prefix="growshrink-benchmark-") as folder:
        png_folder(split, folder, bench)
        theirs = timm_loader(folder, batch_size)
        shapes = {(images.shape, images.dtype, labels.dtype) for images, labels in (next(iter(theirs)), ours.batch(0))}
        assert len(shapes) == 1, shapes

        def our_turn() -> None:
            for update in range(passes * ours.updates_per_epoch):
                ours.batch(update)

        def their_turn() -> None:
            for _ in theirs:
                pass

        what = "loader: TrainBatches / timm's create_loader with 2 workers on a PNG folder"
        images = ours.updates_per_epoch * batch_size
        bench.compare(what, our_turn, their_turn, images=(passes * images, images), at_least=LOADER_AT_LEAST)


# ---- round


def measure_round(bench: Bench) -> None:
    """A round against the bound that the share of its tail sets it."""
    size, per_epoch = bench.round_batch, 100
    plain = channels_last(timm.create_model("reducenet20", num_classes=10))
    batches = TrainBatches(random_split(per_epoch * size), batch_size=size, mean=MEAN, std=STD)
    plan = gs.Round(epochs=bench.round_updates / per_epoch)
    phases = lay_out(gs.CyclePlan(rounds=(plan,)), batches.updates_per_epoch)
    tail = phases.spans[0].grown_stop

    def grow(trainer: Trainer) -> None:
        grow_nets(trainer, Grew(branches=list(plan.branch), ratio=plan.ratio, init=plan.init), None, SIZE)

    def make(grown: bool) -> Trainer:
        trainer = Trainer(copy.deepcopy(plain), TrainConfig(), batches)
        if grown:
            grow(trainer)
        return trainer

    def advance(trainer: Trainer) -> Call:
        return lambda: trainer.train(trainer.update + 1, learning_rate=phases.learning_rate, lam=phases.lam)

    what = f"round: c, training step of Trainer, grown / plain, batch {size}"
    c = bench.compare(what, advance(make(grown=True)), advance(make(grown=False))).ratio

    twin, actual = make(grown=True), make(grown=False)
    step_actual, step_twin = advance(actual), advance(twin)
    grow_seconds, fuse_seconds = seconds_of(lambda: grow(actual)), 0.0
    parts_actual, parts_twin = ([0.0] * ROUND_SAMPLES for _ in range(2))
    what = f"round: round / twin that stays grown, {phases.total} updates of {size}"
    for update in bench.bar(phases.total, what):
        if update == tail:
            fuse_seconds = seconds_of(lambda: fuse_nets(actual, lambda net: 0.0, SIZE))
        parts_actual[update % ROUND_SAMPLES] += seconds_of(step_actual)
        parts_twin[update % ROUND_SAMPLES] += seconds_of(step_twin)
    surgery, updates, t = grow_seconds + fuse_seconds, sum(parts_actual), phases.spans[0].tail_share
    bound = ROUND_MARGIN * ((1 - t) + t / c)
    note = (
        f"bound {bound:.3f} = {ROUND_MARGIN} * ((1 - t) + t / c), t = {t:.3f}, c = {c:.2f}. The round took "
        f"{updates + surgery:.1f} s: growing {grow_seconds:.2f}, fusing {fuse_seconds:.2f}, updates {updates:.1f}; "
        f"the twin's updates {sum(parts_twin):.1f} s. Each repeat is every {ROUND_SAMPLES}th update, scaled up"
    )
    whole_actual = [ROUND_SAMPLES * part + surgery for part in parts_actual]
    whole_twin = [ROUND_SAMPLES * part for part in parts_twin]
    bench.add(what, whole_actual, whole_twin, "s", at_most=bound, note=note)


# ---- activation


def measure_activation(bench: Bench) -> None:
    """Why VanishingReLU reads lam on the CPU: the ways to write it without reading lose."""
    act = gs.layers.VanishingReLU(0.5)
    x = torch.randn(bench.batch_size, 64, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(x)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "F.prelu with a tensor slope": lambda x: F.prelu(x, (1 - act.lam).reshape(1)),
        "torch.where": lambda x: torch.where(x > 0, x, (1 - act.lam) * x),
        "relu, which does not vanish,": F.relu,
    }

    def both_ways(function: Callable[[Tensor], Tensor]) -> Call:
        return lambda: torch.autograd.grad(function(x), x, gradient)

    for name, function in forms.items():
        if function is not F.relu:
            torch.testing.assert_close(function(x), act(x))
        what = f"activation: {name} / VanishingReLU, forward + backward, {tuple(x.shape)}"
        bench.compare(what, both_ways(function), both_ways(act))


# ---- step


class BareLoop:
    """A training step written by hand, with the optimizer of Trainer's default configuration."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """One update."""
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def measure_step(bench: Bench) -> None:
    """What average, schedules and lam add to an update."""
    batches = OneBatch(random_batch(bench.batch_size), bench.batch_size)
    phases = lay_out(gs.CyclePlan(rounds=(gs.Round(epochs=1),)), batches.updates_per_epoch)
    plain = channels_last(timm.create_model("reducenet20", num_classes=10))
    grown = gs.grow(plain, ratio=4, input_size=SIZE)
    for name, net, decay in (("plain", plain, 0.998), ("plain, no average", plain, 0.0), ("grown", grown, 0.998)):
        trainer = Trainer(copy.deepcopy(net), TrainConfig(lr=1e-3, ema_decay=decay), batches)

        def advance(trainer: Trainer = trainer) -> None:
            trainer.train(trainer.update + 1, learning_rate=phases.learning_rate, lam=phases.lam)

        what = f"step: Trainer / bare loop, {name}, batch {batches.batch_size}"
        bench.compare(what, advance, partial(BareLoop(copy.deepcopy(net)), *batches.value))


# ---- data

#: Nets, their options, side of the images, batch size.
FED: tuple[tuple[str, dict[str, Any], int, int], ...] = (
    ("reducenet20", {"width": 0.25}, 16, 128),
    ("reducenet20", {}, 32, 128),
    ("mobilenetv2_050", {}, 96, 32),
)
AUGMENTS = {
    "crop, flip": Augment(),
    "with cutout": Augment(cutout=8),
    "with resized crop": Augment(crop=0, photo=PhotoAugment(resized_crop=0.3)),
    "with jitter": Augment(photo=PhotoAugment(jitter=0.2)),
    "with RandAugment": Augment(photo=PhotoAugment(randaugment=9)),
    "with mixup": Augment(photo=PhotoAugment(mixup=0.2)),
    "with CutMix": Augment(photo=PhotoAugment(cutmix=1.0)),
    "with all": Augment(cutout=8, photo=PhotoAugment(0.3, 0.2, 9, 0.2, 1.0)),
}


def measure_data(bench: Bench) -> None:
    """What a step's batch takes of it, in the thread that trains; the last net's images also out of PNG files."""
    one, bench.own_thread = gs.schedules.constant(1.0), True  # the last section

    def share(what: str, net: nn.Module, make: Callable[[], UpdateBatches]) -> None:
        updates, alone, trainer = count(), make(), Trainer(copy.deepcopy(net), TrainConfig(lr=1e-3), make())

        def advance() -> None:
            trainer.train(trainer.update + 1, learning_rate=one, lam=one)

        bench.compare(f"data: {what}", lambda: alone.batch(next(updates)), advance)

    for name, options, side, size in FED:
        net, split = channels_last(timm.create_model(name, num_classes=10, **options)), random_split(8 * size, side)
        case = f"{name} {options.get('width', '')}".strip() + f", {side} px, batch {size}"
        common: dict[str, Any] = {"batch_size": size, "mean": MEAN, "std": STD}
        for words, augment in AUGMENTS.items():
            share(f"{words} / step, {case}", net, partial(TrainBatches, split, augment=augment, **common))
    with tempfile.TemporaryDirectory(prefix="growshrink-benchmark-") as folder:
        png_folder(split, folder, bench)
        for workers in (0, 2):
            what = f"streamed, {workers} workers / step, {case}"
            share(what, net, lambda: stream_data(folder, num_workers=workers, **common).train)  # noqa: B023 - at once


MEASURES = (measure_fused, measure_grown, measure_loader, measure_round, measure_activation, measure_step, measure_data)


# ---- small things


def random_batch(size: int) -> Batch:
    """Noise, as batches come."""
    images = torch.randn(size, *SIZE).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(10, (size,))


if __name__ == "__main__":
    run_program(main, Args, __doc__)
