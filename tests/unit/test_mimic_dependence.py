"""Dependence measured without a critic, and the scores of codes, against closed forms and planted codes."""

import itertools
import math

import numpy as np
import pytest
import torch

from predoc_lib.data.factors import factors, sprites
from predoc_lib.files import FileError
from predoc_lib.mimic import CriticError
from predoc_lib.mimic.dependence import dead_channels, effective_rank, gaussian_copula, nearest_neighbours
from predoc_lib.mimic.estimate import equicorrelated, rotated_square, xor
from predoc_lib.mimic.penalties import decorrelation, gaussian_kl, minibatch_total_correlation
from predoc_lib.mimic.scores import all_scores, dci, factor_vae_score, mig, sap


@pytest.mark.parametrize(("channels", "nats"), [(2, 0.3), (4, 1.0), (10, 3.0)])
def test_normal_scores_give_a_gaussians_total_correlation_through_any_increasing_functions(channels, nats):
    torch.manual_seed(0)
    sample, truth = equicorrelated(channels, nats)
    x = sample(20_000).double()
    assert gaussian_copula(x) == pytest.approx(truth, abs=0.05)
    assert gaussian_copula(x.exp() + x**3) == pytest.approx(gaussian_copula(x), abs=1e-9)


def test_normal_scores_miss_what_pairs_do_not_show():
    torch.manual_seed(0)
    assert abs(gaussian_copula(xor(5000))) < 0.01
    assert gaussian_copula(rotated_square(20_000)) < 0.02


@pytest.mark.parametrize(("channels", "nats"), [(2, 0.5), (3, 1.0), (4, 1.5)])
def test_neighbours_give_a_gaussians_total_correlation(channels, nats):
    torch.manual_seed(0)
    sample, truth = equicorrelated(channels, nats)
    assert nearest_neighbours(sample(8000)) == pytest.approx(truth, abs=0.06)


def test_neighbours_see_the_square_and_nothing_where_nothing_is():
    torch.manual_seed(0)
    assert nearest_neighbours(rotated_square(8000)) == pytest.approx(1 - math.log(2), abs=0.04)
    assert abs(nearest_neighbours(torch.rand(8000, 3))) < 0.04


def test_rank_and_dead_channels_of_planted_spectra():
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(500, 5) - torch.randn(500, 5).mean(0))[0]
    x = x - x.mean(0)
    x = torch.linalg.qr(x)[0]  # centred and orthonormal: all eigenvalues of the covariance are one
    assert effective_rank(x) == pytest.approx(5, abs=1e-3)
    assert effective_rank(x[:, :1].expand(-1, 4)) == pytest.approx(1, abs=1e-3)
    shares = torch.tensor([0.7, 0.2, 0.1])
    entropy = -(shares * shares.log()).sum()
    assert effective_rank(x[:, :3] * shares.sqrt()) == pytest.approx(math.exp(entropy), abs=1e-3)
    assert effective_rank(torch.ones(10, 3)) == 0
    dead = torch.cat([x, torch.full((500, 1), 3.0), 1e-5 * x[:, :1]], 1)
    assert dead_channels(dead) == 2
    assert gaussian_copula(dead[:, :6]) == pytest.approx(gaussian_copula(x), abs=1e-9)
    assert nearest_neighbours(torch.ones(50, 3)) == 0


def test_dependence_of_what_is_not_finite_or_not_rows_is_refused():
    with pytest.raises(CriticError, match="finite"):
        gaussian_copula(torch.full((5, 2), math.nan))
    with pytest.raises(CriticError, match=r"rows \[N, F\]"):
        effective_rank(torch.zeros(1, 2))
    with pytest.raises(CriticError, match="more than 5 rows"):
        nearest_neighbours(torch.randn(5, 2))


def test_decorrelation_is_the_gaussian_total_correlation_of_weak_correlations():
    torch.manual_seed(0)
    sample, truth = equicorrelated(4, 0.01)
    x = sample(400_000)
    assert decorrelation(x).item() == pytest.approx(truth, rel=0.1)


def test_the_divergence_of_codes_is_that_of_torch_distributions():
    torch.manual_seed(0)
    mean, log_var = torch.randn(8, 3), torch.randn(8, 3)
    normal = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    assert torch.allclose(gaussian_kl(mean, log_var), expected)


def test_the_minibatchs_total_correlation_is_that_of_the_mixture_it_stands_for():
    torch.manual_seed(0)
    n = 2000  # means with a known correlation, and hardly any noise: the mixture is nearly their own distribution
    sample, truth = equicorrelated(2, 0.5)
    mean, log_var = 3 * sample(n), torch.full((n, 2), -2.0)
    z = mean + (0.5 * log_var).exp() * torch.randn(n, 2)
    noise = math.exp(-2.0)
    r = math.sqrt(1 - math.exp(-2 * truth)) * 9 / (9 + noise)
    assert minibatch_total_correlation(z, mean, log_var).item() == pytest.approx(-0.5 * math.log(1 - r**2), abs=0.1)


GRID = np.array(list(itertools.product(range(3), range(4), range(5), range(6), range(8))))[:, :4]
STANDARD = (GRID - GRID.mean(0)) / GRID.std(0)


def test_perfect_codes_score_one_whatever_their_order_sign_and_scale():
    rng = np.random.default_rng(0)
    codes = STANDARD[:, [2, 0, 3, 1]] * [-3, 1, 0.5, 2]
    codes = np.concatenate([codes, 1e-3 * rng.standard_normal((len(GRID), 1))], 1)  # and one that knows nothing
    found = all_scores(codes, GRID)
    assert {name: round(value, 1) for name, value in found.items()} == dict.fromkeys(found, 1.0)
    assert min(found.values()) > 0.98


def test_rotated_codes_know_as_much_and_score_far_less():
    # Hadamard's rotation: every code holds a quarter of every factor.
    rotation = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    codes = STANDARD @ rotation
    assert mig(codes, GRID) < 0.1
    assert sap(codes, GRID) < 0.02
    assert dci(codes, GRID)["disentanglement"] < 0.3
    assert dci(codes, GRID)["completeness"] < 0.3
    assert dci(codes, GRID)["informativeness"] > 0.4


def test_codes_of_noise_score_nothing():
    codes = np.random.default_rng(0).standard_normal((len(GRID), 4))
    assert mig(codes, GRID) < 0.05
    assert sap(codes, GRID) < 0.05
    assert dci(codes, GRID)["disentanglement"] < 0.1
    assert factor_vae_score(codes, GRID) < 0.5


def test_mig_of_a_code_that_two_numbers_share_is_nothing():
    codes = np.concatenate([STANDARD, STANDARD], 1)  # every factor twice: complete in neither
    assert abs(mig(codes, GRID)) < 1e-9
    assert abs(sap(codes, GRID)) < 1e-9
    assert dci(codes, GRID)["disentanglement"] > 0.9


def test_scores_of_rows_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="same rows"):
        mig(np.zeros((3, 2)), GRID[:4])
    with pytest.raises(ValueError, match="two codes"):
        sap(np.zeros((4, 1)), GRID[:4])
    with pytest.raises(ValueError, match="one value in all rows"):
        dci(np.zeros((4, 2)), np.zeros((4, 2), dtype=int))


def test_every_sprite_differs_and_is_where_its_factors_say():
    images, _ = factors()
    assert images.shape == (3072, 1, 32, 32)
    assert len(images.flatten(1).unique(dim=0)) == 3072
    assert images.min() == 0
    assert images.max() <= 1
    disc = sprites(torch.tensor([[1, 2, 3, 1, 6]]))[0, 0]
    line = torch.arange(32.0)
    assert (disc.sum(0) * line).sum() / disc.sum() == pytest.approx(7.5 + 17 / 7, abs=0.05)
    assert (disc.sum(1) * line).sum() / disc.sum() == pytest.approx(7.5 + 6 * 17 / 7, abs=0.05)
    assert disc.sum() == pytest.approx(math.pi * 25, rel=0.03)
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], -1)
    assert border.max() == 0, "no sprite leaves the image"


def test_dsprites_are_read_and_another_file_is_refused(tmp_path):
    classes = np.array([[0, 0, 1], [0, 1, 1], [0, 1, 0]])
    np.savez(tmp_path / "d.npz", imgs=np.eye(4, dtype=np.uint8)[None].repeat(3, 0), latents_classes=classes)
    images, values = factors(tmp_path / "d.npz")
    assert images.shape == (3, 1, 4, 4)
    assert values.tolist() == [[0, 1], [1, 1], [1, 0]]
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(FileError, match="is not dSprites"):
        factors(tmp_path / "other.npz")
