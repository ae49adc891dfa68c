"""What a scan says: the winner of every arm, all that was trained, and the fronts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from growshrink.base.writing import save_picture, write_atomic, write_json
from growshrink.errors import RunError
from growshrink.evidence.experiment import Experiment
from growshrink.evidence.record import Job, RunRecord, read_runs
from growshrink.evidence.scan import Entry, ScanPlan, front, halve


def scans_of(plan: ScanPlan, out: Path) -> dict[str, list[Entry]]:
    """Read what the scan in the folder `out` found, by arm, from its finished runs; RunError if one is missing."""
    records = {record.job: record for record in read_runs(out)}

    def look_up(runs: Sequence[tuple[Experiment, Job]]) -> list[RunRecord]:
        if lacking := [job.name for _, job in runs if job not in records]:
            raise RunError(
                f"{out}: the scan is not finished ({lacking[0]} is missing). Continue it with recipes/scan.py."
            )
        return [records[job] for _, job in runs]

    return {arm: halve(plan.experiment, plan.candidates, arm, plan.budget, look_up) for arm in plan.experiment.arms}


def winner(entries: Sequence[Entry]) -> str:
    """Describe the last one standing, in a line."""
    last, net = entries[-1], entries[-1].candidate
    scores = f"val {last.val:.2f} %, test {last.test:.2f} %"
    return f"{net.name}, cost {net.cost:g}, {scores} after {last.budget:g} epochs' worth"


def write_scan_report(plan: ScanPlan, out: Path) -> dict[str, list[Entry]]:
    """Write report.md, scan.json and front.png of a scan, from its runs alone."""
    scans = scans_of(plan, out)
    lines = [f"# Scan: {plan.bound} <= {plan.at_most:g}", ""]
    for arm, entries in scans.items():
        best = {entry.candidate.name for entry in front(entries)}
        lines += [f"## {arm}", "", f"Won: {winner(entries)}.", ""]
        lines += [f"| net | {plan.bound} | budget (epochs) | val top-1 | |", "|---|---|---|---|---|"]
        for entry in entries:
            mark, net = "on the front" * (entry.rung == 0 and entry.candidate.name in best), entry.candidate
            lines.append(f"| {net.name} | {net.cost:g} | {entry.budget:g} | {entry.val:.2f} | {mark} |")
        lines.append("")
    command = f"python {read_runs(out)[-1].command}"
    lines += ["![front](front.png)", "", f"`{command}`", ""]
    write_json(out / "scan.json", {arm: [asdict(entry) for entry in entries] for arm, entries in scans.items()})
    draw_fronts(plan, scans, out)
    write_atomic(out / "report.md", "\n".join(lines).encode())
    return scans


def draw_fronts(plan: ScanPlan, scans: dict[str, list[Entry]], out: Path) -> None:
    """front.png: cost and accuracy of all candidates after the first rung, and the fronts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for colour, (arm, entries) in zip(("black", "C1"), scans.items(), strict=False):
        first = [entry for entry in entries if entry.rung == 0]
        axis.scatter([e.candidate.cost for e in first], [e.val for e in first], color=colour, s=14)
        best = front(entries)
        axis.step([e.candidate.cost for e in best], [e.val for e in best], where="post", color=colour, label=arm)
    axis.set_xlabel(f"{plan.bound} of the plain net")
    axis.set_ylabel(f"val top-1 (%) after {plan.budget:g} epochs' worth of training")
    axis.legend(frameon=False)
    save_picture(figure, out / "front.png")
