"""Bounds of operator norms against the dense matrices of convolutions."""

import pytest
import torch
from torch.nn import functional as F

from growshrink.algebra import contract, operator_bound

GEOMETRIES = [
    {"kernel_size": (1, 1), "padding": 0},
    {"kernel_size": (3, 3), "padding": 1},
    {"kernel_size": (3, 3), "padding": 0},
    {"kernel_size": (3, 3), "padding": 3, "stride": 2},
    {"kernel_size": (5, 5), "padding": 4, "dilation": 2},
    {"kernel_size": (3, 1), "padding": (1, 0)},
    {"kernel_size": (2, 4), "padding": 2},
    {"kernel_size": (3, 3), "padding": 1, "groups": 2},
    {"kernel_size": (7, 7), "padding": 3, "channels": 2},
]


def random_kernel(kernel_size, channels=4, groups=1, seed=0, smooth=False):
    kernel = torch.randn(
        channels, channels // groups, *kernel_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return kernel.abs() if smooth else kernel


def dense_norm(kernel, size=9, **geometry):
    channels = kernel.shape[1] * geometry.get("groups", 1)
    basis = torch.eye(channels * size**2, dtype=torch.float64).view(-1, channels, size, size)
    return float(torch.linalg.matrix_norm(F.conv2d(basis, kernel, **geometry).flatten(1), 2))


def sum_over_taps(kernel):
    return float(torch.linalg.matrix_norm(kernel.flatten(2).permute(2, 0, 1), 2).sum())


def symbol_norm(kernel, fineness=64):
    symbol = torch.fft.fft2(kernel, s=(fineness, fineness)).flatten(2).permute(2, 0, 1)
    return float(torch.linalg.matrix_norm(symbol, 2).max())


@pytest.mark.parametrize("smooth", [False, True])  # a positive kernel is largest at frequency 0, on any grid
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_it_is_a_bound_and_a_close_one(options, smooth):
    geometry = {key: value for key, value in options.items() if key not in ("kernel_size", "channels")}
    groups = geometry.get("groups", 1)
    for seed in range(3):
        kernel = random_kernel(options["kernel_size"], options.get("channels", 4), groups, seed, smooth)
        bound = operator_bound(kernel, groups)
        assert bound.shape == (groups,)
        assert float(bound.max()) * (1 + 1e-12) >= dense_norm(kernel, **geometry) > 0
        for own, block in zip(bound, kernel.chunk(groups), strict=True):
            assert symbol_norm(block) * (1 - 1e-12) <= own <= 1.25 * symbol_norm(block)


def test_it_holds_between_the_frequencies_of_the_grid():
    worst = 0.0
    for seed in range(200):  # one channel: no Schatten norm hides the grid
        kernel = random_kernel((3, 3), 1, seed=seed)
        worst = max(worst, symbol_norm(kernel) / float(operator_bound(kernel)))
    assert 0.9 < worst <= 1.0


def test_it_is_closer_than_the_sum_over_taps():
    kernel = random_kernel((3, 3), 8)
    assert dense_norm(kernel, 8, padding=1) < float(operator_bound(kernel)) < 0.6 * sum_over_taps(kernel)


@pytest.mark.parametrize(("size", "groups"), [((1, 1), 1), ((3, 3), 1), ((3, 3), 2)])
def test_a_contracted_kernel_obeys_and_another_stays(size, groups):
    kernel = random_kernel(size, 4, groups)
    scaled = contract(kernel, 0.9, groups)
    torch.testing.assert_close(operator_bound(scaled, groups), torch.full((groups,), 0.9, dtype=torch.float64))
    assert dense_norm(scaled, groups=groups, padding="same") <= 0.9
    assert torch.equal(contract(kernel * 1e-3, 0.9, groups), kernel * 1e-3)
    small = torch.cat([scaled[: 4 // groups] * 0.1, 5 * scaled[4 // groups :]])  # each group is scaled alone
    assert groups == 1 or torch.equal(contract(small, 0.9, groups)[:2], small[:2])


@pytest.mark.parametrize(("size", "groups"), [((1, 1), 1), ((3, 3), 2)])
def test_its_gradient(size, groups):
    kernel = random_kernel(size, 4, groups).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: operator_bound(k, groups), (kernel,))
    zero = torch.zeros(2, 2, 3, 3, requires_grad=True)
    contract(zero, 0.9).sum().backward()
    assert torch.equal(zero.grad, torch.ones_like(zero)) and operator_bound(zero) < 1e-9
