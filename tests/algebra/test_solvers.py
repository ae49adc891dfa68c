"""Fixed points against direct solutions."""

import math
import warnings

import pytest
import torch

from growshrink.algebra import Solver
from growshrink.errors import EquilibriumError

METHODS = ["anderson", "plain"]


def affine(norm, n=6, size=12, dtype=torch.float64, seed=0):
    """z -> M z + b for each sample, symmetric M of this norm, and its fixed points."""
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(size, size, generator=generator, dtype=torch.float64)
    m = (m + m.T) / torch.linalg.matrix_norm(m + m.T, 2) * norm
    b = torch.randn(n, size, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - m, b.T).T
    return lambda z, rows=slice(None): z @ m.T.to(z) + b[rows].to(z), b.to(dtype), exact.to(dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", [0.0, 0.5, 0.9])
def test_the_fixed_point_of_a_contraction(method, norm):
    func, start, exact = affine(norm)
    found = Solver(method=method).solve(func, start)
    assert (found.value - exact).norm() < 1e-11 * exact.norm()
    assert found.residuals[-1] <= 1e-13 < found.residuals[0] or norm == 0


def test_mixing_takes_fewer_evaluations_where_plain_iteration_is_slow():
    func, start, _ = affine(0.95)
    evaluations = {method: len(Solver(method=method, max_steps=100).solve(func, start).residuals) for method in METHODS}
    assert evaluations["anderson"] < 0.25 * evaluations["plain"]
    assert evaluations["plain"] == pytest.approx(math.log(1e-13) / math.log(0.95), rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_does_not_depend_on_its_batch(method):
    func, start, exact = affine(0.8, n=64, dtype=torch.float32)
    start = start * torch.logspace(-3, 3, 64)[:, None]  # some converge at once, some late
    solver = Solver(method=method, tol=1e-3, max_steps=100)
    together = solver.solve(func, start).value
    for n in (0, 17, 63):
        alone = solver.solve(lambda z, n=n: func(z, [n]), start[n : n + 1]).value
        assert (alone - together[n]).norm() < 1e-6 * alone.norm()
    assert 1e-6 < (together - exact).norm() / exact.norm() < 1e-2  # it did stop at the tolerance


def test_the_best_iterate_is_kept_and_the_tolerance_missed_is_told():
    func, start, _ = affine(1.5)
    with pytest.warns(UserWarning, match=r"^layer.7: the equilibrium was not found \(residual .* after 30 eval"):
        found = Solver(method="plain", max_steps=3).solve(func, start, "layer.7")
    seen = []
    z = start
    for _ in range(30):
        seen.append(((func(z) - z).norm(dim=1), func(z)))
        z = func(z)
    best = torch.stack([r for r, _ in seen]).argmin(0)
    assert best.unique().numel() > 1
    assert torch.equal(found.value, torch.stack([v for _, v in seen])[best, torch.arange(6)])


def test_mixing_that_leads_astray_is_taken_back():
    torch.manual_seed(0)
    turn, shift = 0.98 * torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0], torch.randn(4, dtype=torch.float64)
    astray = []

    def kinked(z):  # a contraction whose slope changes its sign where the mixture does not expect it
        out = z.abs() @ turn.T + shift
        astray.append(float((out - z).norm()))
        return out

    for start in (-100.0, 0.0, 5.0, 1000.0):
        found = Solver(max_steps=100).solve(kinked, torch.full((1, 4), start, dtype=torch.float64))
        assert (kinked(found.value) - found.value).norm() < 1e-11 * found.value.norm()
    assert any(later > earlier for earlier, later in zip(astray, astray[1:], strict=False))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_an_error(method):
    bad = torch.tensor([[0.0], [torch.nan]])
    with pytest.raises(EquilibriumError, match="^stages.0: evaluation 1 is not finite"):
        Solver(method=method).solve(lambda z: 0.5 * z + bad, torch.zeros(2, 1), "stages.0")
    with pytest.raises(EquilibriumError, match="is not finite"):
        Solver(method="plain").solve(lambda z: 3 * z.square() + 1, torch.ones(1, 1))


def test_zeros_are_a_fixed_point_like_any_other():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in METHODS:
            start = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
            assert Solver(method=method).solve(lambda z: 0.5 * z, start[:1]).residuals == (0.0,)
            assert (
                Solver(method=method)
                .solve(lambda z: z @ torch.tensor([[0.0, 0.5], [0.0, 0.0]]), start)
                .value.eq(0)
                .all()
            )
