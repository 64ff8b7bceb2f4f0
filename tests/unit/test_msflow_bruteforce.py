"""Whether the likelihood is one: over ALL tiny images the probabilities sum to the fraction of samples that are images.

"At most 1" would be a weak test, as most errors lower the sum. So the same errors are planted here, and must be caught.
"""

import functools

import pytest
import torch
from torch import nn

from predoc_lib.msflow import MSFlow, logit, pyramid, readings, whitening

FIXED = {"method": "rk4", "step_size": 0.2, "exact": True}
READINGS = {
    "haar": {"pyramid": "haar"},
    "haar, affine": {"pyramid": "haar", "lam": None},
    "laplacian, rounded": {"pyramid": "laplacian", "condition": "rounded"},
    "laplacian, dequantized": {"pyramid": "laplacian", "condition": "dequantized"},
    "laplacian, affine": {"pyramid": "laplacian", "condition": "dequantized", "lam": None},
    "single scale": {"scales": 1},
}


class Net(nn.Module):
    """A small vector field of any shape."""

    def __init__(self, channels, cond, side):
        super().__init__()
        n, m = channels * side**2, cond * side**2
        self.net = nn.Sequential(nn.Linear(n + m + 1, 24), nn.Tanh(), nn.Linear(24, n))

    def forward(self, t, x, cond=None):
        rows = [x.flatten(1), t.expand(len(x))[:, None]] + ([] if cond is None else [cond.flatten(1)])
        return self.net(torch.cat(rows, 1)).view_as(x)


def every_image(side, bits):
    pixels = torch.cartesian_prod(*[torch.arange(2**bits, dtype=torch.uint8)] * side**2)
    return pixels.view(-1, 1, side, side)


def some_images(n, side, bits):
    """Slanted planes with noise, rather bright: at middle grey a logit of 4 levels has slope 1 and hides errors."""
    axis = torch.linspace(-1, 1, side)
    brightness, down, right = torch.randn(3, n, 1, 1, 1)
    planes = 0.7 + 0.3 * (brightness + down * axis[:, None] + right * axis) + 0.05 * torch.randn(n, 1, side, side)
    return logit.quantize(planes.clamp(0, 1), bits)


@functools.cache
def trained(reading, side, bits, steps=100):
    """A model after a little training, in double precision."""
    torch.manual_seed(0)
    options = {"scales": side.bit_length(), **READINGS[reading]}
    model = MSFlow(side, 1, bits=bits, field=Net, **{"lam": 0.01} | FIXED | options).double()
    model.whiten(some_images(4096, side, bits))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(some_images(256, side, bits)).backward()
        optimizer.step()
    return model


@torch.no_grad()
def total(model, images, draws, rows=16_384):
    """The sum of the images' probabilities, p (never log p) averaged over the noise, and its variance."""
    mean, square = 0.0, 0.0
    for part in images.split(rows // draws):
        p = model.log_probs(part.repeat_interleave(draws, 0)).sum(0).exp().view(-1, draws)
        mean, square = mean + p.mean(1).sum().item(), square + (p.var(1) / draws).sum().item()
    return mean, square


def fraction_of_images(model, n):
    """Of n samples, those that are images, and the variance."""
    views = [view[-1] for view in model.views(n)]
    f = model.reading.valid(views).double().mean().item()
    return f, max(f * (1 - f), 1 / n) / n


def discrepancy(model, side, bits, draws=128, samples=100_000):
    """In standard errors."""
    (p, p_variance), (f, f_variance) = total(model, every_image(side, bits), draws), fraction_of_images(model, samples)
    print(f"sum {p:.4f} +- {p_variance**0.5:.4f}, fraction {f:.4f} +- {f_variance**0.5:.4f}")
    return abs(p - f) / (p_variance + f_variance) ** 0.5


TINY = pytest.mark.parametrize("reading", READINGS)


@TINY
def test_over_all_2x2_images_probabilities_sum_to_the_fraction_of_valid_samples(reading):
    assert discrepancy(trained(reading, 2, 2), 2, 2) < 4


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["haar", "laplacian, rounded", "laplacian, dequantized"])
def test_over_all_4x4_images_of_one_bit_they_do_too(reading):
    assert discrepancy(trained(reading, 4, 1), 4, 1, draws=2) < 4


@pytest.mark.parametrize("condition", ["rounded", "dequantized"])
def test_every_coarser_scale_of_the_laplacian_is_a_model_of_its_own(condition):
    model = trained(f"laplacian, {condition}", 4, 1)
    for side in (1, 2):
        p, p_variance = total(model, every_image(side, 1), 1024)
        views = [view[-1] for view in model.views(50_000)][: side.bit_length()]
        f = model.reading.valid(views).double().mean().item()
        assert abs(p - f) < 4 * (p_variance + f * (1 - f) / 50_000) ** 0.5


def planted_logit(factor):
    """The pixels' correction times a factor."""

    def plant(patch):
        true = readings.Pixels.to_real
        patch.setattr(readings.Pixels, "to_real", lambda self, z: (true(self, z)[0], factor * true(self, z)[1]))

    return plant


def planted_whitening(factor):
    """The whitening's log-determinant times a factor."""

    def plant(patch):
        true = whitening.Whitening.forward
        patch.setattr(whitening.Whitening, "forward", lambda self, x: (true(self, x)[0], factor * true(self, x)[1]))

    return plant


def planted_scale(reading, which, factor):
    """The correction of one scale times a factor."""

    def plant(patch):
        true = reading.encode

        def encode(self, images, noise):
            encoded = true(self, images, noise)
            band, cond, log_det = encoded[which]
            encoded[which] = (band, cond, factor * log_det)
            return encoded

        patch.setattr(reading, "encode", encode)

    return plant


def planted_bands(reading):
    """Details that are a fifth too large."""

    def plant(patch):
        true = reading.encode

        def encode(self, images, noise):
            coarsest, *finer = true(self, images, noise)
            return [coarsest, *((1.2 * band, cond, log_det) for band, cond, log_det in finer)]

        patch.setattr(reading, "encode", encode)

    return plant


def haar_corrected_at_every_scale(patch):
    """Eq. 6.15 for the coarse image too, though its noise is that of the finest pixels."""
    true = readings.Haar.encode

    def encode(self, images, noise):
        (x, cond, _), *finer = true(self, images, noise)
        z = self.view(0, x)
        return [(x, cond, self.pixels.to_real(z)[1]), *finer]

    patch.setattr(readings.Haar, "encode", encode)


def rounded_mean_with_orthonormal_details(patch):
    """Half of each reading: the coarse image as the Laplacian's, the details as Haar's."""
    true = readings.Haar.encode

    def encode(self, images, noise):
        _, (details, cond, log_det) = true(self, images, noise)
        coarse = pyramid.rounded(images, 2)[0]
        x, coarse_log_det = self.pixels.to_real(coarse + noise.rand(*coarse.shape[1:]))
        return [(2 * x, None, coarse_log_det), (details, cond, log_det)]

    patch.setattr(readings.Haar, "encode", encode)


def laplacian_of_truncated_means(patch):
    """The pyramid that is scored is rounded down, the one that samples must fit is rounded."""
    true, rounded = readings.Laplacian.encode, pyramid.rounded

    def truncated(images, scales):
        return [pyramid.halve(images).floor(), images]

    def encode(self, images, noise):
        patch.setattr(pyramid, "rounded", truncated)
        encoded = true(self, images, noise)
        patch.setattr(pyramid, "rounded", rounded)
        return encoded

    patch.setattr(readings.Laplacian, "encode", encode)


LAPLACIANS = ["laplacian, rounded", "laplacian, dequantized"]
ERRORS = [
    pytest.param(name, plant(factor), id=f"{name}-{what}-times-{factor}")
    for name in ["haar", *LAPLACIANS]
    for plant, what in ((planted_logit, "pixel-correction"), (planted_whitening, "band-scaling"))
    for factor in (0, -1)
]
ERRORS += [
    pytest.param("haar", planted_bands(readings.Haar), id="haar-details-mis-scaled"),
    pytest.param("haar", haar_corrected_at_every_scale, id="haar-corrected-at-every-scale"),
    pytest.param("haar", rounded_mean_with_orthonormal_details, id="haar-with-the-rounded-mean"),
]
for name in LAPLACIANS:
    ERRORS += [
        pytest.param(name, planted_scale(readings.Laplacian, 0, 0), id=f"{name}-corrected-once"),
        pytest.param(name, planted_scale(readings.Laplacian, 0, -1), id=f"{name}-coarse-correction-flipped"),
        pytest.param(name, planted_scale(readings.Laplacian, 1, 0), id=f"{name}-fine-correction-dropped"),
        pytest.param(name, planted_bands(readings.Laplacian), id=f"{name}-bands-mis-scaled"),
        pytest.param(name, laplacian_of_truncated_means, id=f"{name}-of-truncated-means"),
    ]


@pytest.mark.parametrize(("reading", "error"), ERRORS)
def test_a_planted_error_is_caught(reading, error, monkeypatch):
    model = trained(reading, 2, 2)
    error(monkeypatch)
    assert discrepancy(model, 2, 2, draws=64, samples=30_000) > 4


def test_as_written_with_real_means_training_makes_probabilities_sum_to_more_than_one(monkeypatch):
    """The coarse image is then a function of the fine one: the finer flow's density may grow without bound."""

    def encode(self, images, noise):
        z = images + noise.rand(*images.shape[1:])
        (x0, log_det0), (x1, log_det1) = self.pixels.to_real(pyramid.halve(z)), self.pixels.to_real(z)
        cond = pyramid.double(x0)
        return [(x0, None, log_det0), (x1 - cond, cond, log_det1)]

    monkeypatch.setattr(readings.Laplacian, "encode", encode)
    sums = []
    for steps in (100, 400):
        p, variance = total(trained.__wrapped__("laplacian, affine", 2, 2, steps), every_image(2, 2), 64)
        sums.append(p - 4 * variance**0.5)
        print(p, variance**0.5)
    assert sums[0] > 1
    assert sums[1] > 1.5 * sums[0]
