"""Two ranks on the CPU: the same widths, the same weights, the gradient of the joint batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from supernet.ddp_worker import CASES, images_of, model_of, optimizer_of, task_of
from supernet.twins import added, assert_same, grads_of

TESTS = Path(__file__).parents[1]


pytestmark = pytest.mark.exhaustive  # processes of their own


def both_ranks(out, cases, first, stop):
    command = [
        sys.executable,
        str(TESTS / "supernet" / "ddp_worker.py"),
        str(out),
        ",".join(cases),
        str(first),
        str(stop),
    ]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env={**env, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=600)[1] for rank in ranks]
    for rank, said in zip(ranks, errors, strict=True):
        assert rank.returncode == 0, said[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("ddp")
    both_ranks(out, CASES, 0, 3)
    return out


def results(out, name, first=0):
    return [torch.load(out / f"{name}-from-{first}-rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_draw_the_same_and_end_with_the_same_weights(runs, name):
    one, two = results(runs, name)
    assert one["widths"] == two["widths"] and len(one["widths"]) == 3
    assert len(set(map(str, one["widths"]))) > 1
    start = dict(model_of(CASES[name]).named_parameters())
    for key, value in one["parameters"].items():
        assert torch.equal(value, two["parameters"][key]), key
    assert any(not torch.equal(value, start[key]) for key, value in one["parameters"].items())


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_mean_over_the_ranks(runs, name):
    """Gradients of the first update, against one process that runs the batches of both ranks one by one."""
    case = CASES[name]
    grads = []
    for rank in range(2):
        model = model_of(case)
        task = task_of(model, case).attach(optimizer_of(model))
        for index in range(case.get("micro", 1)):
            task.backward(*images_of(0, index, rank), accumulation=case.get("micro", 1))
        grads.append(grads_of(model))
    expected = added((0.5, grads[0]), (0.5, grads[1]))
    for result in results(runs, name):
        found = {n: result["grads"][0].get(n, torch.zeros_like(v)) for n, v in expected.items()}
        assert_same(found, expected)


def test_with_norms_of_running_statistics_it_is_the_gradient_of_the_joint_batch(runs):
    case = CASES["joint"]
    model = model_of(case)
    task = task_of(model, case).attach(optimizer_of(model))
    parts = [images_of(0, index, rank) for index in range(2) for rank in range(2)]
    task.backward(*(torch.cat(values) for values in zip(*parts, strict=True)))
    assert_same(results(runs, "joint")[0]["grads"][0], grads_of(model))


def test_resumed_in_fresh_processes_it_is_the_run_that_never_stopped(runs):
    names = ["x4", "suffix"]
    both_ranks(runs, names, 2, 3)
    for name in names:
        whole, (one, two) = results(runs, name)[0], results(runs, name, first=2)
        assert one["widths"] == two["widths"] == whole["widths"][2:]
        for key, value in whole["parameters"].items():
            assert torch.equal(one["parameters"][key], two["parameters"][key])
            assert torch.equal(one["parameters"][key], value), key
