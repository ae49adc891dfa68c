"""The deployed nets of finished runs, and their top-1 in int8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from growshrink.cycle.result import PLAIN_FILE
from growshrink.data.datasets import DataSet
from growshrink.evidence.experiment import Experiment, data_of, plain_of
from growshrink.evidence.record import Job, read_runs, replace_run
from growshrink.evidence.weights import states_of
from growshrink.export import Source
from growshrink.export.int8 import int8_scores


def deployed_nets(experiment: Experiment, job: Job, out: Path, data: DataSet) -> list[nn.Module]:
    """Make the plain net of each seed of a finished run again, in eval mode, from its run folder in `out`."""
    nets = [plain_of(experiment, job.arm, data, seed) for seed in job.seeds]
    for net, state in zip(nets, states_of(out, job), strict=True):
        net.load_state_dict(state, strict=True)
        net.eval()
    return nets


def add_int8(experiment: Experiment, out: Path, data_dir: Path | None) -> None:
    """Add the int8 top-1 to the lines of finished runs that lack it and whose weights are still there.

    RunError where ONNX is not installed.
    """
    for record in read_runs(out):
        done = all(score.test is None or score.int8_channel is not None for score in record.scores)
        asked = record.job.kind == "run" and record.job.arm in experiment.arms
        if done or not asked or not (out / record.job.folder / PLAIN_FILE).is_file():
            continue
        scores = []
        nets = deployed_nets(experiment, record.job, out, data_of(experiment, record.job.seeds[0], data_dir))
        for score, plain in zip(record.scores, nets, strict=True):
            data = data_of(experiment, score.seed, data_dir)
            found = int8_scores(Source(Path(), plain, "", {}, data.input_size), data)
            tensor, channel = found["per-tensor"].top1, found["per-channel"].top1
            scores.append(replace(score, int8_tensor=tensor, int8_channel=channel))
        replace_run(out, replace(record, scores=tuple(scores)))
