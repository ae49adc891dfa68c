import os

# The workers of pytest-xdist share the cores; more threads than cores make every one of them slower,
# the programs that tests start among them. Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

# Else every run would time steps, and the machine decide what is trained.
os.environ["GROWSHRINK_AMP"] = os.environ["GROWSHRINK_COMPILE"] = "off"

torch.set_num_threads(1)

# --doctest-modules would import them: one changes timm's registry, the other is a program.
collect_ignore = ["conformance/timm_shim.py", "cycle/ranks_worker.py"]


@pytest.fixture(autouse=True)
def fixed_seed():
    """The order in which the workers happen to run the tests decides nothing."""
    torch.manual_seed(0)
