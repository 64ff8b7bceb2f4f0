"""The planar densities: samples, density and entropy agree with each other."""

import math

import pytest
import torch

from predoc_lib.data.densities import DENSITIES, Mixture, density

every = pytest.mark.parametrize("name", DENSITIES)


@every
def test_the_density_integrates_to_one(name):
    axis = torch.arange(-5, 5, 0.025, dtype=torch.float64) + 0.0125
    p = density(name).log_prob(torch.cartesian_prod(axis, axis)).exp()
    assert (p.sum() * 0.025**2).item() == pytest.approx(1, abs=0.01)


@every
def test_the_entropy_is_the_mean_of_minus_log_p_over_samples(name):
    d = density(name)
    log_p = d.log_prob(d.sample(50_000, torch.Generator().manual_seed(0)).double())
    assert abs(-log_p.mean() - d.entropy()) < 4 * log_p.std() / 50_000**0.5 + 1e-3


@every
def test_samples_lie_where_the_density_says(name):
    """Counts in cells against the integral of the density."""
    d, n = density(name), 100_000
    x = d.sample(n, torch.Generator().manual_seed(1))
    cell = (x[:, 0].floor() * 100 + x[:, 1].floor()).long()
    fine = torch.arange(0, 1, 0.02) + 0.01
    for value in cell.unique()[::3]:
        row = x[cell == value]
        corner = row[0].floor()
        grid = corner + torch.cartesian_prod(fine, fine)
        mass = d.log_prob(grid).exp().mean().item()
        assert len(row) == pytest.approx(n * mass, abs=4 * (n * mass) ** 0.5 + 0.01 * n * mass + 2)


def test_the_same_generator_gives_the_same_samples():
    for name in DENSITIES:
        a, b = (density(name).sample(5, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(a, b)


def test_the_entropy_of_one_gaussian_is_the_closed_form():
    d = Mixture(torch.zeros(1, 2), 0.3)
    assert d.entropy() == pytest.approx(1 + math.log(2 * math.pi * 0.3**2), abs=1e-4)


@pytest.mark.usefixtures("as_shipped")
def test_an_unknown_density_is_refused():
    with pytest.raises(ValueError, match=r"Unknown density 'spirl'\. Did you mean 'spiral'"):
        density("spirl")
