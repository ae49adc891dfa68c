"""tools/equilibria.py as its users run it."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nets import net
from program import completed

TOOL = Path(__file__).parents[2] / "tools" / "equilibria.py"
ROW = re.compile(r"^(\S+) +([\d.]+) +([\d.]+) +(\d+) +(\S+) +(\S+) \( *(\S+)\) +(\S+) \( *(\S+)\)$", re.M)
COMMON = ("--pixels", 8, "--batch-size", 4, "--steps", 1, 6, "--model-kwargs", "width=0.25")


def test_every_layer_gets_a_row_and_a_curve(tmp_path):
    model = net("mdeq_tiny", seed=3, width=0.25)
    with torch.no_grad():
        for stage in model.stages:
            stage[0].equilibrium.weight.mul_(50)  # so that the bound is active
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    result = completed(
        TOOL, "mdeq_tiny", *COMMON, "--weights", tmp_path / "weights.safetensors", "--picture", tmp_path / "curves.png"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {m[1]: list(map(float, m.groups()[1:])) for m in ROW.finditer(result.stdout)}
    assert list(rows) == [f"stages.{index}.0.equilibrium" for index in range(3)]
    for bound, radius, evaluations, residual, after_1, allowed_1, after_6, allowed_6 in rows.values():
        assert 0.05 < radius <= bound + 1e-3 and bound == pytest.approx(0.9)
        assert 2 < evaluations < 50 and residual <= 1e-4
        assert after_6 < after_1 <= allowed_1 and after_6 <= allowed_6 < allowed_1
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"


def test_the_spectral_radius_is_that_of_the_matrix():
    radius = runpy.run_path(str(TOOL))["spectral_radius"]
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator)
    matrix = matrix @ matrix.T / 20  # real eigenvalues: the iteration settles
    expected = float(torch.linalg.eigvalsh(matrix).max())
    assert radius(lambda z: z @ matrix, torch.zeros(3, 6)) == pytest.approx(expected, rel=1e-4)


def test_branches_too_and_nothing_to_say():
    result = completed(TOOL, "reducenet20", "--branches", "implicit", *COMMON)
    assert result.returncode == 0 and len(ROW.findall(result.stdout)) == 9, result.stderr
    result = completed(TOOL, "reducenet20", *COMMON)
    assert result.returncode == 2 and "the model has no layer at equilibrium" in result.stderr
