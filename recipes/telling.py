"""Plain summary of a finished run, and its report as one page (for grow_cycle.py; not a program).

Everything is read from the files that the run has left, so that it can be said again at any time.
"""

from __future__ import annotations

import base64
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from growshrink.base.reading import parse_json, read_bytes, read_json
from growshrink.base.writing import save_picture, write_atomic
from growshrink.cycle import CycleResult

PAGE = "report.html"
#: A learning rate below this is not lowered further.
TOO_LOW = 0.005
#: Classes at most that a confusion matrix is labelled with.
MOST_LABELS = 40


@dataclass(frozen=True)
class Told:
    """A finished run, as its files have it.

    Attributes:
        report: report.json.
        rows: Rows of log.jsonl.
        baseline: The same of the plain net beside it, or None.
    """

    folder: Path
    report: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    baseline: Told | None = None

    @staticmethod
    def of(folder: Path) -> Told:
        """Read it."""
        report = read_json(folder / "report.json")
        rows = [parse_json(line) for line in read_bytes(folder / "log.jsonl").splitlines()]
        beside = report["about"].get("baseline")
        return Told(folder, report, rows, Told.of(folder.with_name(beside)) if beside else None)

    @property
    def top1(self) -> float:
        """On the test set."""
        return float(self.report["final"]["top1"])

    @property
    def counts(self) -> list[int]:
        """Test images of each class."""
        return [sum(row) for row in self.report["confusion"]]

    @property
    def majority(self) -> float:
        """Percent of the test images that belong to the largest class."""
        return 100 * max(self.counts) / sum(self.counts)

    @property
    def noise(self) -> float:
        """Half the 95 % interval of top-1, in points, as far as the number of test images goes."""
        number = sum(self.counts)
        share = min(max(self.top1 / 100, 0.5 / number), 1 - 0.5 / number)
        return 196 * math.sqrt(share * (1 - share) / number)


def tell_story(folder: Path, notes: Sequence[str] = ()) -> list[str]:
    """Complete report.md with advice, baselines and the next commands, and make report.html of it; the advice."""
    told = Told.of(folder)
    said = [*advice(told), *(f"{note[0].upper()}{note[1:]}." for note in notes)]
    head, rest = (folder / "report.md").read_text(encoding="utf-8").split("\n## ", 1)
    story = ["", "## What it means", "", *(f"- {sentence}" for sentence in said), "", *baselines(told)]
    if draw_beside(told):
        story += ["![beside](beside.png)", ""]
    if (folder / "mistakes.png").exists():
        story += ["![mistakes](mistakes.png)", ""]
    steps = next_steps(folder, told.report["about"].get("command", ""))
    text = "\n".join([head, *story, f"## {rest.rstrip()}", "", *steps])
    write_atomic(folder / "report.md", text.encode())
    write_atomic(folder / PAGE, page_of(text, folder).encode())
    return said


def baselines(told: Told) -> list[str]:
    """Chance, the majority class, the plain net where it was trained, and this run, as lines of Markdown."""
    counts, classes = told.counts, told.report["classes"]
    rows = [
        ("guessing", 100 / len(counts), "-", "-"),
        (f'always "{classes[counts.index(max(counts))]}"', told.majority, "-", "-"),
    ]
    for name, run in (("the plain net, for the same compute", told.baseline), ("this run", told)):
        if run is not None:
            rows.append((name, run.top1, f"{run.report['val']['top1']:.2f}", f"{run.report['training']['macs']:.2e}"))
    lines = [f"| {name} | {test:.2f} | {val} | {macs} |" for name, test, val, macs in rows]
    return ["| | test top-1 | val top-1 | training MACs |", "|---|---|---|---|", *lines, ""]


def advice(told: Told) -> list[str]:
    """Sentences on what the figures mean and what to try, the most important first."""
    about, final, rows, said = told.report["about"], told.report["final"], told.rows, list[str]()
    chance, lr, updates = max(told.majority, 100 / len(told.counts)), about["config"]["lr"], about["updates"]
    if told.top1 <= chance + told.noise / 2:
        rate = f"high: try four times the --epochs, or --lr {lr / 4:.2g}"
        if lr < TOO_LOW:
            rate = f"low: try four times the --epochs, or --lr {10 * lr:.2g}"
        said.append(
            f"The net is at chance: {told.top1:.1f} %, and the largest class alone has {chance:.1f} %. {updates:,} "
            f"updates are too few, or the learning rate is too {rate}."
        )
    said += _on_growing(told)
    if rows[-1]["train_loss"] < 0.3 * rows[-1]["val_loss"]:
        said.append(
            f"The net knows the training images by heart (loss {rows[-1]['train_loss']:.2f}, on others "
            f"{rows[-1]['val_loss']:.2f}): try --resized-crop 0.5 --jitter 0.2, --mixup 0.2, or --pretrained."
        )
    late = [row["val_top1"] for row in rows if row["update"] >= 0.8 * updates]
    if (best := max(row["val_top1"] for row in rows)) in late and best - late[0] > 2:
        said.append(f"It was still learning (+{best - late[0]:.1f} points in the last fifth): try more --epochs.")
    if max(told.counts) > 3 * min(told.counts):
        said.append(
            f"The classes are uneven ({min(told.counts)} to {max(told.counts)} test images): the balanced accuracy, "
            f"{final['balanced']:.1f} %, counts them alike, and --metric balanced --balance trains for it."
        )
    said.append(f"With {sum(told.counts)} test images, top-1 is known to {told.noise:.1f} points at best.")
    return said + ([about["why"]] if "why" in about else [])


def _on_growing(told: Told) -> list[str]:
    """Whether it was worth it."""
    cost = told.report["training"]["cost"]
    grew = f"Growing cost {cost:.1f} times as many updates of the plain net"
    if not told.report["rounds"] or (told.baseline is None and cost < 1.1):
        return []
    if told.baseline is None:
        return [f"{grew}. Whether it was worth it, the plain net for the same compute can tell: add --baseline."]
    gain, sure = told.top1 - told.baseline.top1, math.sqrt(2) * told.noise
    where = (
        f"{abs(gain):.1f} points {'higher' if gain > 0 else 'lower'} than" if abs(gain) >= 0.05 else "level with where"
    )
    ended = f"{grew} and ended {where} it does for the same compute"
    if gain < -sure:
        return [f"{ended}: use --rounds 0."]
    if gain <= sure:
        return [f"{ended}, no more than chance explains: --rounds 0 is as good, and simpler."]
    return [f"{ended}, more than chance explains; see whether it holds with another --seed."]


def draw_beside(told: Told) -> bool:
    """Draw beside.png, both runs over their compute; False without another run, or matplotlib."""
    if told.baseline is None or (figure := _figure(9, 4)) is None:
        return False
    axis = figure.subplots()
    for name, run, style in (("this run", told, "-"), ("plain net, for the same compute", told.baseline, "--")):
        axis.plot([row["training_macs"] for row in run.rows], [row["val_top1"] for row in run.rows], style, label=name)
    axis.set_xlabel("training MACs")
    axis.set_ylabel("val top-1 (%)")
    axis.legend(frameon=False)
    save_picture(figure, told.folder / "beside.png")
    return True


def draw_mistakes(result: CycleResult) -> bool:
    """Draw mistakes.png: the confusion matrix, and the images with the highest losses; False without matplotlib."""
    judged, classes = result.judged, result.classes
    if not len(judged.worst) or (figure := _figure(11, 12)) is None:
        return False
    above, below = figure.subfigures(2, 1, height_ratios=(5, 4))
    axis, table = above.subplots(), judged.confusion
    shares = table / table.sum(1, keepdim=True).clamp(min=1)
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set_title("Test images by class (row) and what the net takes them for (column)")
    if len(classes) <= MOST_LABELS:
        size = 10 if len(classes) <= 12 else 6
        axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size)
        axis.set_yticks(range(len(classes)), classes, fontsize=size)
        for row, column in table.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, int(table[row, column]), ha="center", va="center", fontsize=size, color=colour)
    mean, std = (torch.tensor(result.about["data"][key])[:, None, None] for key in ("mean", "std"))
    below.suptitle("The test images with the highest losses: what they are, and what the net takes them for")
    places = below.subplots(2, 6).flatten()
    for place in places:
        place.axis("off")
    for place, image, label, guess in zip(places, judged.worst, judged.labels, judged.taken_for, strict=False):
        pixels = (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
        place.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=1)
        place.set_title(f"{classes[label]}\nas {classes[guess]}", fontsize=8, color="C2" if label == guess else "C3")
    save_picture(figure, result.out_dir / "mistakes.png")
    return True


def _figure(width: float, height: float) -> Any:
    """A figure of matplotlib's without a screen, or None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure


def next_steps(folder: Path, command: str) -> list[str]:
    """The commands that come after a run; where its data lie, its own command says."""
    words = [part for word in shlex.split(command) for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    data = [
        part
        for name in ("--data", "--data-dir", "--image-size", "--skip-damaged")
        if name in words
        for part in words[words.index(name) :][: 1 if name == "--skip-damaged" else 2]
    ]
    data = [str(Path(word).resolve()) if Path(word).exists() else word for word in data]
    run = shlex.quote(str(folder.resolve()))
    return [
        "## Next",
        "",
        "From the folder of growshrink's clone; the second needs `pip install -e '.[recipes,onnx]'`.",
        "",
        "```bash",
        f"python tools/predict.py {run} FOLDER_OF_IMAGES",
        f"python tools/export.py {run} --int8 per-channel {shlex.join(data)}".rstrip(),
        f"python tools/export.py {run} --no-onnx --no-pt2",
        "```",
        "",
        "They predict (predictions.csv, predictions.png), export (ONNX, int8, its accuracy), and tell size and latency "
        "on this machine.",
        "",
    ]


_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}td,th{border:1px solid #ccc;padding:.2em .6em}"
    "pre{background:#f4f4f4;padding:.8em;overflow-x:auto}img{max-width:100%}"
)
_KINDS = (("```", "code"), ("#", "heading"), ("|", "table"), ("- ", "list"), ("![", "picture"))


def page_of(text: str, folder: Path) -> str:
    """A page of headings, tables, lists, code and pictures; what is a picture lies in `folder`."""
    title, body, code = text.partition("\n")[0].lstrip("# "), list[str](), False
    kinds = []
    for line in text.splitlines():
        kind = "code" if code else next((kind for start, kind in _KINDS if line.startswith(start)), "text")
        code ^= line.startswith("```")
        kinds.append((kind, line))
    for kind, group in groupby(kinds, key=lambda pair: pair[0]):
        lines = [line for _, line in group]
        if kind == "code":
            inside = "\n".join(line for line in lines if not line.startswith("```"))
            body.append(f"<pre>{escape(inside)}</pre>")
        elif kind == "table":
            cells = [line.strip()[1:-1].split("|") if line.startswith("| ") else [] for line in lines]
            rows = ("".join(f"<td>{_inline(cell.strip())}</td>" for cell in row) for row in cells if row)
            body.append("<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>")
        elif kind == "list":
            body.append("<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>")
        elif kind == "heading":
            body += [
                f"<h{level}>{_inline(line[level:].strip())}</h{level}>" for line in lines for level in [_level(line)]
            ]
        elif kind == "picture":
            body += [_picture(line, folder) for line in lines]
        else:
            body.append("<p>" + "<br>".join(map(_inline, filter(None, lines))) + "</p>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'.replace(
        "<p></p>", ""
    )


def _level(line: str) -> int:
    return len(line) - len(line.lstrip("#"))


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text))


def _picture(line: str, folder: Path) -> str:
    name, file = re.fullmatch(r"!\[(.*)\]\((.*)\)", line.strip()).groups()  # type: ignore[union-attr]
    content = base64.b64encode((folder / file).read_bytes()).decode()
    return f'<p><img alt="{escape(name)}" src="data:image/png;base64,{content}"></p>'
