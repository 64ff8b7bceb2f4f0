"""Logit, pyramids and whitening: exact inverses, and log-determinants as autograd finds them."""

import math

import pytest
import torch

from predoc_lib.msflow import from_logit, pyramid, quantize, to_logit
from predoc_lib.msflow.whitening import Whitening


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def log_det(f, x):
    """Of one image, by brute force."""
    jacobian = torch.func.jacrev(lambda v: f(v[None])[0].flatten())(x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), -1))[1]


BITS = pytest.mark.parametrize("bits", range(1, 9))


@BITS
@pytest.mark.parametrize("lam", [1e-6, 0.05, 0.4])
def test_the_logit_and_its_inverse_undo_each_other_with_opposite_log_determinants(bits, lam):
    z = torch.rand(5, 3, 4, 4) * 2**bits
    x, there = to_logit(z, lam, bits)
    back, home = from_logit(x, lam, bits)
    torch.testing.assert_close(back, z, atol=1e-10 * 2**bits, rtol=0)
    torch.testing.assert_close(there, -home, atol=1e-8, rtol=0)


@BITS
def test_the_logits_log_determinant_is_the_jacobians(bits):
    z = torch.rand(3, 1, 2, 3) * 2**bits
    x, found = to_logit(z, 0.05, bits)
    truth = torch.stack([log_det(lambda v: to_logit(v, 0.05, bits)[0], image) for image in z])
    torch.testing.assert_close(found, truth)
    torch.testing.assert_close(from_logit(x, 0.05, bits)[1], -truth)


def test_the_logit_is_equations_6_11_and_6_15():
    x, lam = torch.randn(4, 3, 2, 2), 0.05
    z, log_slope = from_logit(x, lam)
    s = x.sigmoid()
    torch.testing.assert_close(z, 256 / (1 - 2 * lam) * (s - lam))
    bits = (s.log2() + (1 - s).log2()).flatten(1).mean(1) - math.log2(1 - 2 * lam) + 8
    torch.testing.assert_close(log_slope / (12 * math.log(2)), bits)


def test_the_logit_takes_the_ends_of_the_range_in_single_precision():
    z = torch.tensor([0.0, 256.0], dtype=torch.float32).view(1, 1, 1, 2)
    x, found = to_logit(z, 1e-6)
    assert torch.isfinite(x).all()
    assert torch.isfinite(found).all()
    torch.testing.assert_close(x[..., 0], -x[..., 1])


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("z", "options", "message"),
    [
        (torch.zeros(1, 1, dtype=torch.uint8), {"lam": 0.05}, "z must be dequantized: floats.*got torch.uint8"),
        (torch.full((1, 1), 257.0), {"lam": 0.05}, r"z must lie in \[0, 256\] for 8 bits, got 257 to 257"),
        (torch.full((1, 1), -1.0), {"lam": 0.05}, "got -1 to -1"),
        (torch.full((1, 1), math.nan), {"lam": 0.05}, "got nan"),
        (torch.zeros(1, 1), {"lam": 0.5}, "lam must be at least 0 and less than 1/2, got 0.5"),
        (torch.zeros(1, 1), {"lam": 0.05, "bits": 9}, "bits must be 1 to 8, got 9"),
    ],
)
def test_bad_pixels_are_refused_in_one_sentence(z, options, message):
    with pytest.raises(ValueError, match=message):
        to_logit(z, **options)


@pytest.mark.usefixtures("as_shipped")
def test_bad_logits_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="x must be floats without NaN, got NaN"):
        from_logit(torch.full((1, 1), math.nan), 0.05)
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        from_logit(torch.zeros(1, 1, dtype=torch.int64), 0.05)


def test_quantized_images_have_levels_of_equal_width():
    grey = torch.linspace(0, 1, 1001)
    levels = quantize(grey, 2)
    assert levels.dtype == torch.uint8
    assert torch.equal(levels.long(), (4 * grey).floor().clamp(max=3).long())


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("bad", [torch.tensor([1.1]), torch.tensor([-0.1]), torch.tensor([math.nan]),
                                 torch.tensor([3], dtype=torch.uint8)])  # fmt: skip
def test_what_is_no_float_image_in_0_1_is_not_quantized(bad):
    with pytest.raises(ValueError, match=r"images must be floats in \[0, 1\] without NaN, got torch"):
        quantize(bad)


SIZES = pytest.mark.parametrize(("side", "scales"), [(1, 1), (2, 2), (8, 3), (12, 3), (16, 5)])


@SIZES
@pytest.mark.parametrize("channels", [1, 3])
def test_pyramids_are_undone_exactly(side, scales, channels):
    x = torch.randn(2, channels, side, side)
    bands = pyramid.haar(x, scales)
    assert [b.shape[1] for b in bands] == [channels] + [3 * channels] * (scales - 1)
    assert sum(b[0].numel() for b in bands) == x[0].numel()
    torch.testing.assert_close(pyramid.from_haar(bands), x, atol=1e-14, rtol=0)
    bands = pyramid.laplacian(x, scales)
    assert [b.shape[-1] for b in bands] == [side >> s for s in reversed(range(scales))]
    torch.testing.assert_close(pyramid.from_laplacian(bands), x, atol=1e-14, rtol=0)


def test_haar_is_orthonormal():
    def flat(v):
        return torch.cat([b.flatten(1) for b in pyramid.haar(v, 3)], 1)

    matrix = torch.func.jacrev(lambda v: flat(v[None])[0])(torch.randn(3, 8, 8)).reshape(192, 192)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(192), atol=1e-14, rtol=0)


def test_haars_coarse_image_is_twice_the_mean_and_constants_have_no_details():
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(pyramid.split(x)[0], 2 * pyramid.halve(x))
    assert pyramid.split(torch.full((1, 1, 4, 4), 7.0))[1].abs().max() == 0
    for band in pyramid.laplacian(torch.full((1, 1, 8, 8), 7.0), 3)[1:]:
        assert band.abs().max() == 0


def test_the_rounded_pyramid_rounds_every_mean_of_2_by_2_half_upwards():
    levels = torch.tensor([[0, 1, 3, 3], [1, 0, 3, 4], [2, 2, 0, 0], [2, 3, 0, 1]]).double()[None, None]
    one, two, four = pyramid.rounded(levels, 3)
    assert torch.equal(four, levels)
    assert two[0, 0].tolist() == [[1, 3], [2, 0]]
    assert one.item() == 2  # 1.5


def test_whitening_makes_mean_0_and_covariance_the_identity_and_counts_it():
    x = torch.randn(500, 3, 4, 5) @ torch.randn(5, 5) + torch.randn(3, 1, 1)
    x = torch.einsum("ij,bjhw->bihw", torch.randn(3, 3), x)
    white = Whitening(3)
    assert torch.equal(white(x)[0], x), "at first the identity"
    white.fit(x)
    y, found = white(x)
    rows = y.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(rows.mean(0), torch.zeros(3), atol=1e-10, rtol=0)
    torch.testing.assert_close(rows.T.cov(correction=0), torch.eye(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(white.inverse(y), x)
    torch.testing.assert_close(found, log_det(lambda v: white(v)[0], x[0]))


def test_whitening_bears_a_band_without_variance():
    white = Whitening(2)
    white.fit(torch.ones(4, 2, 1, 1))
    assert torch.isfinite(white(torch.ones(1, 2, 1, 1))[0]).all()
