"""What a run leaves behind: the plain net on disk, report.json, report.md and pictures."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from growshrink.base.config import to_dict
from growshrink.base.ranks import run_on_rank0, this_rank
from growshrink.base.writing import save_picture, write_atomic, write_json
from growshrink.cycle.layout import Phases
from growshrink.cycle.records import RoundRecord
from growshrink.cycle.result import CycleResult, glossary, rounds_table
from growshrink.cycle.running import Run
from growshrink.data.feed import Feed
from growshrink.errors import EquivalenceError, RunError
from growshrink.proofs import assert_equivalent, profile
from growshrink.runs.folder import PLAIN_FILE
from growshrink.training._evaluate import judge


def leave_result(run: Run, phases: Phases, about: Mapping[str, Any]) -> CycleResult:
    """Score the net of a run that has come to its end, write everything down, and mark the run as finished."""
    best, size, state = run.trainer.best.eval(), run.size, run.state
    worst = 12 if getattr(run.feed, "nets", 1) == 1 else 0
    judged = run_on_rank0(lambda: judge(best, run.feed.test, worst, run.loss))
    result = CycleResult(
        out_dir=run.folder.path,
        model=best,
        rounds=state.rounds,
        history=state.history,
        growth_log=state.log,
        phases=phases,
        val=run.score(),
        judged=judged,
        classes=run.feed.classes,
        plain=run.plain.size,
        deployed=profile(best, size),
        training_macs=state.macs_spent,
        plain_training_macs=phases.total * run.images_per_update * run.plain.train,
        seconds=state.seconds,
        about=about,
    )
    if this_rank() == 0:
        save_plain(result, run.plain.net, run.feed)
        write_json(result.out_dir / "report.json", result.to_dict())
        write_json(result.out_dir / "growth_log.json", {"entries": to_dict(state.log)})
        write_atomic(result.out_dir / "report.md", _markdown(result, draw_curves(result)).encode())
    run.folder.write_marker("finished", about)
    return result


def save_plain(result: CycleResult, plain: nn.Module, feed: Feed) -> None:
    """Write the deployed net; RunError unless it can be read into the plain architecture, with the same outputs."""
    state = {key: value.detach().cpu().contiguous() for key, value in result.model.state_dict().items()}
    about = {key: list(getattr(feed, key)) for key in ("classes", "input_size", "mean", "std")}
    metadata = {"run": json.dumps({"about": result.model_about, **about}, sort_keys=True)}  # safetensors keeps no order
    path = result.out_dir / PLAIN_FILE
    write_atomic(path, save(state, metadata))
    read = load_file(path)
    try:
        plain.load_state_dict(read, strict=True)
        assert_equivalent(result.model, plain, input_size=feed.input_size)
    except (RuntimeError, EquivalenceError) as error:
        raise RunError(f"{path}: the net read back is not the one that was trained: {error}") from error
    assert all(torch.equal(read[key], value) for key, value in state.items()), path


def _markdown(result: CycleResult, drawn: bool) -> str:
    data, model, final, deployed = result.about["data"], result.model_about, result.final, result.deployed
    same = "exactly the plain net's" if deployed == result.plain else "NOT the plain net's"
    rounds = result.rounds
    kib = {key: f"{value / 1024:,.1f}" for key, value in deployed.memory.items()}
    classified = "loss" not in result.about
    lines = [
        f"# {model['name']} on {data['name']}",
        "",
        f"**Test top-1 {final.top1:.2f} %** (loss {final.loss:.4f}; the test set was read once, at the end), "
        f"val {result.val.top1:.2f} %. Balanced accuracy {final.balanced:.2f} %, macro F1 {final.macro_f1:.2f} %."
        if classified
        else f"**Test loss {final.loss:.6g}** (the test set was read once, at the end), val {result.val.loss:.6g}.",
        f"Deployed: {deployed.params:,} parameters, {deployed.macs:,} MACs an image, {same}.",
        f"On a microcontroller: {kib['flash_float32']} KiB of flash in float32, {kib['flash_int8']} in int8; at least "
        f"{kib['ram_float32']} KiB of RAM for activations in float32, {kib['ram_int8']} in int8.",
        f"Training cost {result.training_macs:.3e} MACs, {result.cost:.2f} times "
        f"that of as many updates of the plain net; {result.seconds:.0f} s.",
        "",
    ]
    if rounds:
        lines += ["## Rounds", "", rounds_table(rounds, markdown=True), ""]
        lines += [
            f"Top-1 in percent on the val split, {data['val_images']} images of the training set (one image is "
            f"{100 / data['val_images']:.2f} points), of the averaged weights where an average is kept."
            if classified
            else "Minus the loss on the val split, of the averaged weights where an average is kept.",
            "",
            *(f"- *{word}*: {meaning}." for word, meaning in glossary(rounds)),
            "",
            *(
                f"- Round {r.number} was **undone**: fused {r.top1.fused:.2f} against {r.top1.before:.2f} "
                "before. The net from before it was restored, so the proof below is of a net that is gone.\n"
                for r in rounds
                if r.undone
            ),
        ]
    lines += [*_sampled_widths(rounds), *_teachers(result), *_gradients(rounds), *_proof(rounds)]
    if drawn:
        lines += ["![curves](curves.png)", ""]
    lines += _use(model, data)
    command = result.about.get("command", " ".join(sys.argv))
    lines += ["## Made by", "", f"`{command}`", "", "```json"]
    lines += [json.dumps(dict(result.about), indent=2), "```", ""]
    return "\n".join(lines)


def _gradients(rounds: Sequence[RoundRecord]) -> list[str]:
    lines = []
    for record in rounds:
        moments = (("second update", record.gradients_at_update_2), ("end of the hold", record.gradients_at_peak))
        lines += [
            f"- Round {record.number}, {moment}: {found.with_gradient} of {found.new_parameters} new "
            f"tensors had a gradient, of {found.share_of_norm:.0%} of the whole gradient's norm."
            for moment, found in moments
            if found is not None
        ]
    if not lines:
        return []
    last = (
        "- The bias of a branch's last norm is among them; where a batch norm follows, that norm subtracts it and "
        "its gradient is rounding noise."
    )
    return ["## Did the new parameters learn?", "", *lines, last, ""]


def _proof(rounds: Sequence[RoundRecord]) -> list[str]:
    merged = [record for record in rounds if record.max_rel is not None]
    return [
        "## Proof" if merged else "## The file",
        "",
        *(
            f"- Round {r.number}: fused against grown, max_rel {r.max_rel:.1e} in float64, "
            f"{r.max_rel_float32:.1e} in float32, top-1 agreement {r.top1_agreement:.0%}. Silencing the branches "
            f"changes the outputs by {r.trained_effect:.2g} as trained, by {r.effect:.2g} with random norms."
            for r in merged
        ),
        *(
            f"- Round {r.number} merged nothing, so there is nothing to prove: its branches were cut off, or its grown "
            "net taught the plain net from before the growth."
            for r in rounds
            if r.max_rel is None and r.branch
        ),
        *(
            "- max_rel is the larger of two: of the net as trained, and of a copy with random norms, where no mistake "
            "can hide behind a small gamma."
            for _ in merged[:1]
        ),
        f"- `{PLAIN_FILE}` was read back into the plain architecture (strict): tensors bit-identical, outputs equal.",
        "",
    ]


def _use(model: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    return [
        "## Use it",
        "",
        "```python",
        "import growshrink, timm, safetensors.torch",
        f"net = timm.create_model({model.get('plain_name', '...')!r}, **{model.get('plain_kwargs', {})!r})",
        f"net.load_state_dict(safetensors.torch.load_file({PLAIN_FILE!r}))",
        "```",
        "",
        f"It takes images of size {tuple(data['input_size'])}, values in [0, 1], less the mean "
        f"{_rounded(data['mean'])}, over the standard deviation {_rounded(data['std'])} (exact in the file's metadata, "
        "with the names of the classes).",
        "",
    ]


def _sampled_widths(rounds: Sequence[RoundRecord]) -> list[str]:
    """The section of the rounds whose middle widths were sampled."""
    lines = []
    for record in rounds:
        if (left := record.left_by) is None:
            continue
        every = f", in every {left.every}th update" if left.every > 1 else ""
        own = f", {left.inplace_distil:.0%} of its loss learnt from the wider net" * bool(left.inplace_distil)
        lines += [
            f"- Round {record.number}: mode {left.mode}{every}, out of {left.nets:,} nets; base net "
            f"{record.top1.base:.2f} %{own}, widest net {record.top1.peak:.2f} % (at the end of the hold, "
            f"statistics recalibrated). An average step cost {left.step_macs / record.plain_step_macs:.2f} times "
            f"the plain net's in MACs. Left by *{left.exit}*, at width: {_width_name(left.width)}.",
            *(f"    - {tried.top1:.2f} % fused at width: {_width_name(tried.width)}" for tried in left.candidates),
        ]
    return ["## Sampled widths", "", *lines, ""] if lines else []


def _teachers(result: CycleResult) -> list[str]:
    """The section of the rounds that another net taught."""
    lines = [
        f"- Round {r.number} was taught by *{r.teacher}*, val {r.teacher_top1:.2f} %: "
        + (
            f"trained here in {r.teacher_updates} updates, "
            if r.teacher_updates
            else "given, its training not counted, "
        )
        + f"{r.teacher_macs / result.training_macs:.0%} of the run's MACs; its answers another "
        f"{r.answers_macs / result.training_macs:.0%}."
        for r in result.rounds
        if r.teacher_top1 is not None
    ]
    return ["## Teachers", "", *lines, ""] if lines else []


def _width_name(width: str | Mapping[str, int]) -> str:
    return width if isinstance(width, str) else f"one drawn at random, {sum(width.values())} middle channels in all"


def _rounded(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.4f}' for value in values)})"


def draw_curves(result: CycleResult) -> bool:
    """Draw curves.png: accuracy, loss, lam and learning rate, cost, over the updates; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 10), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True)
    rows, phases = result.history, result.phases
    _draw_scores(result, axes[0], axes[1])
    _draw_schedules(result, axes[2])
    cost, spent = axes[3], [(0, 0), *((row.update, row.training_macs) for row in rows)]
    cost.plot(*zip(*spent, strict=True), color="C4", label="this run")
    cost.plot([0, phases.total], [0, result.plain_training_macs], "--", color="0.6", label="plain net, as many updates")
    cost.set(ylabel="training MACs", xlabel="optimizer updates (shaded: grown)", xlim=(0, phases.total))
    for axis in axes:
        for span in phases.spans:
            axis.axvspan(span.start, span.grown_stop, color="0.93", linewidth=0, zorder=0)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    final = result.final
    reached = f"loss {final.loss:.6g}" if "loss" in result.about else f"top-1 {final.top1:.2f} %"
    figure.suptitle(f"{result.model_about['name']} on {result.about['data']['name']}: test {reached}")
    save_picture(figure, result.out_dir / "curves.png")
    return True


def _draw_scores(result: CycleResult, accuracy: Any, loss: Any) -> None:
    rows = result.history
    updates, top1 = [row.update for row in rows], [row.val_top1 for row in rows]
    accuracy.plot(updates, top1, color="C0")
    interesting = [row.val_top1 for row in rows if row.round] or top1  # the climb from chance would hide the rest
    margin = 0.08 * (max(top1) - min(interesting)) or 1.0
    what = "val: minus the loss" if "loss" in result.about else "val top-1 (%)"
    if top1[0] < min(interesting) - margin:
        accuracy.annotate(f"from {top1[0]:.4g}", (updates[0], 0.02), xycoords=("data", "axes fraction"))
    accuracy.set(ylim=(min(interesting) - margin, max(top1) + margin), ylabel=what)
    for update in dict.fromkeys(change.update for change in result.growth_log):
        text = ", ".join(f"{change.kind} {change.round}" for change in result.growth_log if change.update == update)
        side, at = "right" if update > result.phases.total / 2 else "left", ("data", "axes fraction")
        accuracy.annotate(text, (update, 1.0), xycoords=at, va="bottom", ha=side)
    teachers = any(record.teacher is not None for record in result.rounds)
    loss.plot(updates, [row.train_loss for row in rows], color="C1", label="training" + " (and teacher)" * teachers)
    loss.plot(updates, [row.val_loss for row in rows], color="C0", label="val")
    loss.set(yscale="log", ylabel="loss")


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
