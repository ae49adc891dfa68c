"""The weights of finished runs, read back from their run folders; what other runs start with."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from growshrink.cycle.result import PLAIN_FILE
from growshrink.errors import RunError
from growshrink.evidence.comparison import ArmComparison, chosen_lr, runs_of
from growshrink.evidence.record import Job, read_plan, read_runs
from growshrink.evidence.stack import unstack_state


def states_of(out: Path, job: Job) -> list[dict[str, Tensor]]:
    """Read the state_dict of the plain net of each seed of a finished run; RunError where it was not kept."""
    path = out / job.folder / PLAIN_FILE
    if not path.is_file():
        raise RunError(f"{path}: the weights of a finished run are missing; only its line of runs.jsonl was kept.")
    return unstack_state(load_file(path), len(job.seeds))


def load_start_(net: nn.Module, init: str, seed: int, out: Path) -> None:
    """Load into a plain net what another experiment's arm learned, but for the classifier, which stays as it is.

    `init` is "FOLDER/ARM": the experiment's folder, beside `out`, and the arm; its net of this `seed` is taken, the
    first where there is none. RunError where that experiment or its weights are missing, or are of another net.
    """
    folder, _, arm = init.partition("/")
    source = out.parent / folder
    if (plan := read_plan(source)) is None:
        raise RunError(f"{source}: init={init!r}: holds no experiment. Run that one first, with --out {source}.")
    comparison, records = ArmComparison.from_plan(plan), read_runs(source)
    runs = runs_of(comparison, chosen_lr(comparison, records), records).get(arm)
    if not runs:
        raise RunError(f"{source}: init={init!r}: has no finished run of the arm {arm!r}.")
    run = next((run for run in runs if seed in run.seeds), runs[0])
    state = states_of(source, run.job)[run.seeds.index(seed) if seed in run.seeds else 0]
    classifier = next(name for name, module in net.named_modules() if module is net.get_classifier())  # type: ignore[operator]
    own = {key: value for key, value in net.state_dict().items() if key.startswith(f"{classifier}.")}
    try:
        net.load_state_dict({**state, **own}, strict=True)
    except RuntimeError as error:
        raise RunError(f"{source}: init={init!r}: the weights are those of another net: {error}") from error
