"""Pictures of a run: its curves, and what the net takes for what."""

from __future__ import annotations

from typing import Any

import torch

from growshrink.base.writing import save_picture
from growshrink.cycle.result import CycleResult

#: Classes at most that a confusion matrix is labelled with.
MOST_LABELS = 40


def draw_curves(result: CycleResult) -> bool:
    """Draw curves.png: accuracy, loss, lam and learning rate, cost, over the updates; False without matplotlib."""
    if (figure := _figure(9, 10)) is None:
        return False
    axes = figure.subplots(4, 1, sharex=True)
    rows, phases = result.history, result.phases
    _draw_scores(result, axes[0], axes[1])
    _draw_schedules(result, axes[2])
    cost = axes[3]
    cost.plot(
        [0, *(row.update for row in rows)], [0, *(row.training_macs for row in rows)], color="C4", label="this run"
    )
    cost.plot([0, phases.total], [0, result.plain_training_macs], "--", color="0.6", label="plain net, as many updates")
    cost.set_ylabel("training MACs")
    cost.set_xlabel("optimizer updates (shaded: grown)")
    cost.set_xlim(0, phases.total)
    for axis in axes:
        for span in phases.spans:
            axis.axvspan(span.start, span.grown_stop, color="0.93", linewidth=0, zorder=0)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figure.suptitle(
        f"{result.model_about['name']} on {result.about['data']['name']}: test top-1 {result.final.top1:.2f} %"
    )
    save_picture(figure, result.out_dir / "curves.png")
    return True


def _draw_scores(result: CycleResult, accuracy: Any, loss: Any) -> None:
    rows = result.history
    updates, top1 = [row.update for row in rows], [row.val_top1 for row in rows]
    accuracy.plot(updates, top1, color="C0")
    interesting = [row.val_top1 for row in rows if row.round] or top1  # the climb from chance would hide the rest
    margin = 0.08 * (max(top1) - min(interesting)) or 1.0
    accuracy.set_ylim(min(interesting) - margin, max(top1) + margin)
    accuracy.set_ylabel("val top-1 (%)")
    for change in result.growth_log:
        place = (change.update, 1.0)
        accuracy.annotate(f"{change.kind} {change.round}", place, xycoords=("data", "axes fraction"), va="bottom")
    teachers = any(record.teacher is not None for record in result.rounds)
    loss.plot(updates, [row.train_loss for row in rows], color="C1", label="training" + " (and teacher)" * teachers)
    loss.plot(updates, [row.val_loss for row in rows], color="C0", label="val")
    loss.set_yscale("log")
    loss.set_ylabel("loss")


def _draw_schedules(result: CycleResult, axis: Any) -> None:
    phases = result.phases
    every = range(phases.total)  # rows are too far apart to show a re-warm
    axis.plot(every, [phases.learning_rate(update) for update in every], color="C2", label="learning rate / peak")
    for span in phases.spans:
        lams: dict[int, float] = {update: span.lam(update) for update in range(span.start, span.grown_stop)}
        if span.plan.controlled:  # what lam was is in the rows alone
            own = [row for row in result.history if row.round == span.number]
            lams = {row.update - 1: row.lam for row in own if row.lam is not None}
        axis.plot(list(lams), list(lams.values()), color="C3", label="lam" if span.number == 1 else None)
    axis.set_ylabel("lam, learning rate")


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
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
