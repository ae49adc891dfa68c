"""What every test and every example in a docstring starts with."""

import os

# The workers of pytest-xdist share the cores; more threads than cores make every one of them slower,
# the programs that tests start among them. Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import timm
import torch
from torch import nn

import growshrink as gs

# Else every run would time steps, and the machine decide what is trained.
for _what in ("AMP", "GRAPHS", "COMPILE"):
    os.environ[f"GROWSHRINK_{_what}"] = "off"

torch.set_num_threads(1)

# --doctest-modules would import them: one changes timm's registry, the other is a program.
collect_ignore = ["tests/conformance/timm_shim.py", "tests/cycle/ranks_worker.py"]


@pytest.fixture(autouse=True)
def fixed_seed():
    """The order in which the workers happen to run the tests decides nothing."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def names_of_examples(request, fixed_seed):
    """What every example in a docstring finds, as docs/reference/index.md says."""
    if isinstance(request.node, pytest.DoctestItem):
        net = timm.create_model("reducenet20", width=0.25, depths=(1, 1, 1), num_classes=10)
        folder = request.getfixturevalue("tmp_path")
        request.node.dtest.globs.update(gs=gs, timm=timm, torch=torch, nn=nn, net=net, folder=folder)
