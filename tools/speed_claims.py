"""Are shallow nets and merged kernels faster on this machine? Interleaved timings, and a page of pictures.

    python tools/speed_claims.py --file speed.json --picture speed.png
    python tools/speed_claims.py --only kernels --seconds 2

| section | A / B                                                                                               |
| ------- | --------------------------------------------------------------------------------------------------- |
| shallow | vanillanet_5 / reducenet20, resnet18, resnet34, folded, at batch 1, 16 and 128; and GMACs a second of each |
| kernels | two 3x3 convolutions / the 5x5 they merge into, of 8 to 128 channels                                |
| depthwise | an inverted residual (1x1, depthwise 3x3, 1x1) / the dense 3x3 it merges into, of 8 to 128 channels |

Inference, in one process on the CPU; every pair of turns gives a ratio, shown are the median and the quartiles.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

import timm
import torch
from torch import Tensor, nn

import growshrink as gs
from growshrink.base.environment import versions
from growshrink.base.limits import Pixels
from growshrink.base.timing import machine
from growshrink.base.writing import check_unwritten, save_picture, write_json
from growshrink.cli.forms import pick
from growshrink.cli.options import command
from growshrink.cli.program import run_program
from inputs import BatchSizes, FileOptions, NetOptions, PictureOptions
from paired import Bench, PairOptions, TimedArgs, load, table

Section = Literal["shallow", "kernels", "depthwise"]
SECTIONS: tuple[Section, ...] = get_args(Section)
OTHERS = ("reducenet20", "resnet18", "resnet34")
WIDTHS = (8, 16, 32, 64, 128)
EXPANSION = 6


@dataclass(frozen=True, kw_only=True)
class Args(TimedArgs):
    """Options of speed_claims; the file and the picture must not exist."""

    only: tuple[Section, ...] = SECTIONS
    """Sections to run."""
    whole: BatchSizes = BatchSizes(batches=(1, 16, 128))
    nets: NetOptions = pick(NetOptions(pixels=64), "pixels")
    side: Pixels = 16
    """Side of the maps of the kernels, at batch 16."""
    drawn: PictureOptions = PictureOptions()
    pairs: PairOptions = PairOptions(seconds=4.0)
    output: FileOptions = FileOptions()


def main(args: Args) -> None:
    """Measure, print, draw, write."""
    check_unwritten("--file", args.output.file)
    check_unwritten("--picture", args.drawn.picture)
    bench = args.bench()
    began, before = time.perf_counter(), load()
    rows: dict[str, list[dict[str, Any]]] = {section: [] for section in args.only}
    for section in args.only:
        measure = {"shallow": shallow, "kernels": kernels, "depthwise": depthwise}[section]
        rows[section] = measure(bench, args)
    about: dict[str, Any] = {"command": command(), "versions": versions(), **machine(), "load_before": before}
    about |= {"load_after": load(), "seconds": time.perf_counter() - began}
    print(table(bench.rows, about))
    if args.output.file is not None:
        write_json(args.output.file, {"rows": rows, "about": about})
    if args.drawn.picture is not None:
        draw(args, rows)


def shallow(bench: Bench, args: Args) -> list[dict[str, Any]]:
    """A VanillaNet against deeper nets, by batch size."""
    size, found = (3, args.nets.pixels, args.nets.pixels), []
    nets = {name: gs.fold(timm.create_model(name).eval(), input_size=size) for name in ("vanillanet_5", *OTHERS)}
    macs = {name: gs.profile(net, size).macs for name, net in nets.items()}
    for batch in args.whole.batches:
        x = torch.randn(batch, *size)
        for name in OTHERS:
            calls = (partial(_forward, nets[own], x) for own in ("vanillanet_5", name))
            row = bench.compare(f"shallow: vanillanet_5 / {name}, batch {batch}", *calls)
            rates = [batch * macs[own] / ms / 1e6 for own, ms in (("vanillanet_5", row.a), (name, row.b))]
            found.append({**asdict(row), "batch": batch, "net": name, "gmacs_a_second": rates})
    return found


def kernels(bench: Bench, args: Args) -> list[dict[str, Any]]:
    """Two 3x3 against a 5x5."""
    pairs = [
        (
            width,
            nn.Sequential(nn.Conv2d(width, width, 3, padding=2), nn.Conv2d(width, width, 3)),
            nn.Conv2d(width, width, 5, padding=2),
        )
        for width in WIDTHS
    ]
    return _merged(bench, args, "kernels: 3x3 + 3x3 / 5x5", pairs)


def depthwise(bench: Bench, args: Args) -> list[dict[str, Any]]:
    """An inverted residual against a dense 3x3."""
    pairs = []
    for width in WIDTHS:
        wide = EXPANSION * width
        middle = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        block = nn.Sequential(nn.Conv2d(width, wide, 1), nn.ReLU6(), middle, nn.ReLU6(), nn.Conv2d(wide, width, 1))
        pairs.append((width, block, nn.Conv2d(width, width, 3, padding=1)))
    return _merged(bench, args, "depthwise: inverted residual / dense 3x3", pairs)


def _merged(
    bench: Bench, args: Args, what: str, pairs: Sequence[tuple[int, nn.Module, nn.Module]]
) -> list[dict[str, Any]]:
    found = []
    for width, apart, merged in pairs:
        x = torch.randn(16, width, args.side, args.side)
        macs = [gs.profile(net, (width, args.side, args.side)).macs for net in (apart, merged)]
        row = bench.compare(f"{what}, {width} channels", partial(_forward, apart, x), partial(_forward, merged, x))
        found.append({**asdict(row), "width": width, "macs": macs})
    return found


@torch.inference_mode()
def _forward(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def draw(args: Args, rows: dict[str, list[dict[str, Any]]]) -> None:
    """A panel for each section: the ratio of times, with its quartiles, and beside it the ratio of MACs."""
    from matplotlib.figure import Figure

    assert args.drawn.picture is not None
    figure = Figure(figsize=(7, 3.2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    titles = {
        "shallow": "time of vanillanet_5 over that of ... (below 1: vanillanet_5 is faster)",
        "kernels": "two 3x3 over one 5x5 (below 1: the two are faster)",
        "depthwise": "inverted residual over dense 3x3 (below 1: the inverted residual is faster)",
    }
    for axes, (section, found) in zip(panels, rows.items(), strict=True):
        by = "batch" if section == "shallow" else "width"
        for net in dict.fromkeys(row.get("net", "measured time") for row in found):
            own = [row for row in found if row.get("net", "measured time") == net]
            ratio = [row["ratio"] for row in own]
            spread = [[r["ratio"] - r["q1"] for r in own], [r["q3"] - r["ratio"] for r in own]]
            axes.errorbar([row[by] for row in own], ratio, spread, fmt="o-", capsize=3, label=net)
        if section != "shallow":
            macs = [row["macs"][0] / row["macs"][1] for row in found]
            axes.plot([row[by] for row in found], macs, "k:", label="MACs")
        axes.axhline(1.0, color="grey", lw=0.8)
        axes.set_xscale("log", base=2)
        ticks = list(dict.fromkeys(row[by] for row in found))
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        unit = "images in a batch" if by == "batch" else "channels"
        axes.set(xlabel=unit, ylabel="ratio of times", title=titles[section])
        axes.set_ylim(bottom=0)
        axes.legend()
        axes.grid(alpha=0.3)
    save_picture(figure, args.drawn.picture, dpi=100)


if __name__ == "__main__":
    run_program(main, Args, __doc__)
