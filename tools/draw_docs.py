"""Draw the pictures of the docs into docs/pictures, the same bytes every time.

python tools/draw_docs.py                          all of them
python tools/draw_docs.py --only kernels knobs     some, by name
"""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import timm
import torch
from matplotlib.figure import Figure
from torch import nn

import growshrink as gs
from growshrink.algebra.convmap import ConvMap
from growshrink.base.limits import OneOf, OutFolder
from growshrink.base.writing import write_atomic
from growshrink.cli.program import run_program
from growshrink.layers.grown import GrownConv2d

ROOT = Path(__file__).parent.parent
#: Ink: the plain convolution, branches, activations, what is said beside.
BLUE, ORANGE, RED, GREY = "#1a6fb5", "#d9822b", "#c23b22", "#555555"
PICTURES: dict[str, Callable[[], Figure]] = {}


def picture(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    """Register a picture under its function's name."""
    PICTURES[draw.__name__] = draw
    return draw


def names() -> list[str]:
    """Those there are."""
    return sorted(PICTURES)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of draw_docs."""

    only: tuple[Annotated[str, OneOf("no such picture", names)], ...] = ()
    """Names of pictures; by default all."""
    out: OutFolder = ROOT / "docs" / "pictures"
    """Folder they are written to."""


def main(args: Args) -> None:
    """Draw them."""
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only or PICTURES:
        content = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": name, "font.size": 12, "axes.spines.top": False}):
            with matplotlib.rc_context({"axes.spines.right": False}):
                PICTURES[name]().savefig(content, format="svg", metadata={"Date": None})
        write_atomic(args.out / f"{name}.svg", content.getvalue())
        print(args.out / f"{name}.svg")


@picture
def vanishing() -> Figure:
    """A vanishing ReLU at several lam, and lam over a round."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    curve, schedule = figure.subplots(1, 2)
    x = torch.linspace(-2, 2, 201)
    act = gs.layers.VanishingReLU()
    for lam in (1.0, 0.75, 0.5, 0.25, 0.0):
        gs.set_lambda(act, lam)
        shade = matplotlib.colormaps["plasma"](0.85 * (1 - lam))
        curve.plot(x.numpy(), act(x).numpy(), color=shade, linewidth=2)
        note = {1.0: "lam = 1: ReLU", 0.0: "lam = 0: identity"}.get(lam, f"lam = {lam:g}")
        curve.text(-2.08, float(act(x)[0]), note, ha="right", va="center", color=shade)
    curve.set(xlim=(-5, 2), xticks=[-2, -1, 0, 1, 2], xlabel="input", ylabel="output", title="The activation")
    default = gs.Round(epochs=100)
    hold, vanish, settle = (round(100 * share) for share in (default.hold, default.vanish, default.settle))
    lam_at, stop = gs.schedules.hold_then_vanish(hold=hold, vanish=vanish), hold + vanish + settle
    schedule.plot(range(stop + 1), [lam_at(step) for step in range(stop + 1)], color=RED, linewidth=2)
    schedule.axvspan(0, stop, color="0.93", linewidth=0)
    tail = "tail: the plain net\ntrains on"
    spans = {"hold": (0, hold), "vanish": (hold, hold + vanish), "settle": (hold + vanish, stop), tail: (stop, 100)}
    for name, (begin, end) in spans.items():
        upright = end - begin > 10
        schedule.text(
            (begin + end) / 2, 1.12, name, ha="center", va="center", fontsize=10, rotation=0 if upright else 90
        )
        schedule.axvline(end, color="0.75", linewidth=0.8)
    schedule.annotate("fuse", (stop, 0.02), (stop + 10, 0.3), arrowprops={"arrowstyle": "->"}, color=BLUE)
    schedule.set(xlim=(0, 100), ylim=(-0.03, 1.26), xlabel="share of the round (%); shaded: grown", ylabel="lam")
    schedule.set(title="lam in a round (the defaults)", yticks=[0, 0.25, 0.5, 0.75, 1])
    return figure


@picture
def grown() -> Figure:
    """A grown convolution: what runs beside the kernel, and what is left of it."""
    figure = Figure(figsize=(9, 4.5))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 900), ylim=(450, 0))
    axis.axis("off")

    def box(x: float, y: float, text: str, colour: str) -> None:
        shape: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=6", "fc": colour, "ec": "#333"}
        axis.add_patch(matplotlib.patches.FancyBboxPatch((x - 82, y - 20), 164, 40, **shape))
        axis.text(x, y, text, ha="center", va="center", fontsize=11.5)

    def wire(*points: tuple[float, float]) -> None:
        axis.plot(*zip(*points[:-1], strict=True), color="#333", linewidth=1.2, solid_joinstyle="miter")
        ends = {"arrowstyle": "-|>", "color": "#333", "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", points[-1], points[-2], arrowprops=ends)

    plain, branch, alive = "#cfe3f7", "#fde3c8", "#f7b8b0"
    columns = {
        90: ("the layer itself:\nthe same keys", (("conv 3x3\nI to O channels", 220, plain),)),
        290: ('"pointwise"', (("conv 1x1\nI to O", 190, branch), ("batch norm\ngamma starts at 0", 250, branch))),
        490: (
            '"bottleneck", ratio=4',
            (
                ("conv 3x3\nI to 4 O", 120, branch),
                ("batch norm", 178, branch),
                ("activation\nof strength lam", 236, alive),
                ("conv 1x1\n4 O to O", 294, branch),
                ("batch norm\ngamma starts at 0", 352, branch),
            ),
        ),
    }
    for x, (name, boxes) in columns.items():
        wire((290, 32), (290, 56), (x, 56), (x, boxes[0][1] - 20))
        axis.text(x + 8, 76, name, va="center", fontsize=11, color=GREY)
        for (_, y, _), (_, below, _) in zip(boxes, boxes[1:], strict=False):
            wire((x, y + 20), (x, below - 20))
        for text, y, colour in boxes:
            box(x, y, text, colour)
        end = [(290, 386)] if x == 290 else [(x, 400), (278 if x < 290 else 302, 400)]
        wire((x, boxes[-1][1] + 20), *end)
    axis.text(290, 400, "+", ha="center", va="center", fontsize=18)
    wire((290, 409), (290, 438))
    box(800, 220, "conv 3x3\nI to O channels", "#a9cbee")
    wire((800, 32), (800, 200))
    wire((800, 240), (800, 438))
    for x, about in ((290, "input x"), (800, "input x")):
        axis.text(x, 20, about, ha="center", va="center", color=GREY)
        axis.text(x + 10, 430, "output y", va="center", color=GREY)
    axis.annotate("", (715, 220), (585, 220), arrowprops={"arrowstyle": "-|>", "color": BLUE, "linewidth": 2})
    axis.text(645, 204, "fuse", ha="center", color=BLUE, fontweight="bold")
    axis.text(645, 240, "exact at lam = 0", ha="center", va="center", color=BLUE, fontsize=11)
    return figure


@picture
def kernels() -> Figure:
    """The kernels of an ACNet-like convolution, for one input and one output channel, and their sum."""
    torch.manual_seed(5)
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), conv, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    kinds = {"pointwise": "1x1, norm", "vertical": "3x1, norm", "horizontal": "1x3, norm", "identity": "norm alone"}
    net = gs.grow(plain, list(kinds), where=["1"], init="paper", input_size=(3, 8, 8))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.4, 1.2)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
    layer = net.get_submodule("1")
    assert isinstance(layer, GrownConv2d)
    with torch.no_grad():
        total = ConvMap.from_conv2d(layer.as_conv())
        parts = {"the layer's 3x3": total.kernel}
        for branch in layer.branches:
            added = branch.as_convmap(total).fit(layer.as_conv())
            parts[kinds[branch.kind]] = added.kernel
            total = total + added
        parts["fused 3x3"] = gs.fuse(net, input_size=(3, 8, 8)).get_parameter("1.weight").double()
        assert torch.allclose(parts["fused 3x3"], total.kernel, atol=1e-6)
    figure = Figure(figsize=(9, 1.62))
    scale = float(abs(parts["fused 3x3"][1, 1]).max())
    for number, (name, kernel) in enumerate(parts.items()):
        axis = figure.add_axes((0.012 + 0.1685 * number, 0.03, 0.136, 0.136 * 9 / 1.62))
        axis.imshow(kernel[1, 1].numpy(), cmap="RdBu_r", vmin=-1.3 * scale, vmax=1.3 * scale)
        for row in range(3):
            for column in range(3):
                value = float(kernel[1, 1, row, column])
                text, ink = (f"{value:.2f}", "black") if value else ("0", "0.6")
                axis.text(column, row, text, ha="center", va="center", fontsize=10, color=ink)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=True, color="0.4")
        axis.set_title(name, fontsize=12.5, color=BLUE if number in (0, len(parts) - 1) else ORANGE)
        if number:
            sign = "=" if number == len(parts) - 1 else "+"
            figure.text(0.1685 * number - 0.0045, 0.4, sign, ha="center", va="center", fontsize=15)
    return figure


@picture
def knobs() -> Figure:
    """Width and lam as axes: where a net of the family lies, and the ways to the plain net."""
    grown = gs.grow(timm.create_model("reducenet20", num_classes=10), "bottleneck", ratio=4)
    space, macs = gs.width_space(grown), []
    for share in (0, 1 / 3, 2 / 3, 1):
        with gs.active_width(grown, space.level(share)):
            macs.append(gs.profile(grown).macs / 1e6)
    base, third, two_thirds, full = macs
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.axhspan(-0.16, 0.0, color="#cfe3f7", linewidth=0, zorder=0)
    words: dict[str, Any] = {"ha": "center", "va": "center"}
    axis.text(
        (base + full) / 2, -0.08, "lam = 0: the branches are linear and fuse exactly, at any width", color=BLUE, **words
    )
    for x in macs:
        axis.plot([x, x], [0, 1], color=BLUE if x == base else "0.8", alpha=0.5, linewidth=6, zorder=1)
    axis.text(base - 2, 0.5, "the plain net\n(width 0)", color=BLUE, ha="right", va="center")
    way: dict[str, Any] = {"arrowstyle": "-|>", "linewidth": 2, "shrinkA": 4, "shrinkB": 4}
    axis.annotate("", (full, 1), (base, 1), arrowprops=way | {"color": ORANGE})
    axis.text((base + full) / 2, 1.06, "1. grow: more width, the same outputs", color=ORANGE, **words)
    axis.annotate("", (full, 0), (full, 1), arrowprops=way | {"color": RED})
    axis.text(full + 2, 0.5, "2. train, and\nlet lam fall", color=RED, va="center")
    axis.annotate("", (base, 0), (full, 0), arrowprops=way | {"color": BLUE})
    axis.text((base + full) / 2, 0.06, "3. fuse: the plain net's keys and cost", color=BLUE, **words)
    for x, y in ((third, 0.33), (two_thirds, 0.4), (full, 0.47)):
        axis.annotate("", (x, y), (base, y), arrowprops={"arrowstyle": "<->", "color": GREY, "linestyle": "--"})
    note = "or NetAug: every update trains the base\nand a width drawn at random;\nin the end the branches are dropped"
    axis.text((base + full) / 2, 0.67, note, color=GREY, backgroundcolor="white", **words)
    axis.set(xlim=(0, full + 22), ylim=(-0.16, 1.18), yticks=[0, 0.5, 1], xticks=[round(x, 1) for x in macs])
    axis.set(xlabel="width, as MACs of an image in millions (reducenet20, ratio=4)", ylabel="lam")
    return figure


@picture
def cost() -> Figure:
    """Accuracy over the training compute, from docs/evidence."""
    evidence = ROOT / "docs/evidence/cifar10-16px/runs.jsonl"
    arms = {
        "plain": ("the plain net", "black", 1.9),
        "orepa-online": ("OREPA, merged as it trains", "C2", 0.1),
        "repvgg": ("RepVGG branches", "C1", -1.1),
        "lazy-distil": ("NetAug, every 8th update", "C4", -1.2),
        "one-round": ("grow, vanish, fuse", "C3", 0),
        "reducenet-x4": ("built grown 4 times", "C5", 0),
    }
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axis = figure.subplots()
    runs = [json.loads(line) for line in evidence.read_text().splitlines()]
    for arm, (name, colour, lift) in arms.items():
        found = [run for run in runs if run["job"]["arm"] == arm and run["job"]["kind"] == "run"]
        macs = [value / 1e12 for value in found[0]["history"]["training_macs"]]
        curves = list(zip(*(run["history"]["val_top1"] for run in found), strict=True))
        axis.plot(macs, [statistics.mean(points) for points in curves], color=colour, linewidth=2)
        axis.fill_between(macs, list(map(min, curves)), list(map(max, curves)), color=colour, alpha=0.15, linewidth=0)
        tests = [run["scores"][0]["test"] for run in found]
        told = f"{name}: {statistics.mean(tests):.1f} ± {statistics.stdev(tests):.1f}"
        axis.text(macs[-1] + 0.02, statistics.mean(curves[-1]) + lift, told, color=colour, va="center", fontsize=11)
    axis.set(xlim=(0, 1.58), ylim=(25, 71), ylabel="val top-1 (%), mean and range of 3 seeds")
    axis.set(xlabel="training compute, 10^12 MACs (forward and backward)")
    axis.set_title(
        "CIFAR-10 at 16 x 16 pixels, one budget for all: the plain net's 6 epochs (at the ends: test top-1, sd)",
        fontsize=11,
    )
    return figure


if __name__ == "__main__":
    run_program(main, Args, __doc__)
