"""Measures of images against their definitions and scikit-image."""

import pytest
import skimage.metrics
import torch

from predoc_lib.metrics import centroid, endpoint_error, mse, psnr, ssim


def test_mse_and_psnr_by_hand():
    a = torch.zeros(2, 1, 2, 2)
    b = torch.tensor([[[[0.1, 0.1], [0.1, 0.1]]], [[[1.0, 0.0], [0.0, 0.0]]]])
    torch.testing.assert_close(mse(a, b), torch.tensor([0.01, 0.25]))
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 6.0206]))


def test_the_psnr_of_equal_images_is_100():
    a = torch.rand(3, 1, 4, 4)
    assert psnr(a, a).tolist() == [100] * 3


def test_measures_are_of_each_image_whatever_the_leading_axes():
    a, b = torch.rand(2, 3, 2, 16, 20), torch.rand(2, 3, 2, 16, 20)
    for measure in (mse, psnr, ssim):
        value = measure(a, b)
        assert value.shape == (2, 3)
        torch.testing.assert_close(value[1, 2], measure(a[1, 2], b[1, 2]))


def test_psnr_is_that_of_scikit_image():
    a, b = torch.rand(5, 1, 16, 16), torch.rand(5, 1, 16, 16)
    expected = [
        skimage.metrics.peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=1) for x, y in zip(a, b, strict=True)
    ]
    assert psnr(a, b).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
def test_ssim_is_that_of_scikit_image(noise):
    """On images that are equal near their edges, where libraries pad in different ways."""
    a = torch.rand(4, 1, 40, 32, dtype=torch.float64)
    b = a.clone()
    b[..., 10:-10, 10:-10] += noise * torch.randn(4, 1, 20, 12)
    b = b.clamp(0, 1)
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1, "full": True}
    pairs = zip(a[:, 0].numpy(), b[:, 0].numpy(), strict=True)
    expected = [skimage.metrics.structural_similarity(x, y, **wang)[1].mean() for x, y in pairs]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_centroid_of_one_pixel_is_the_pixel():
    frames = torch.zeros(2, 1, 1, 8, 10)
    frames[0, 0, 0, 3, 7] = 0.5
    frames[1, 0, 0, 0, 9] = 1.0
    torch.testing.assert_close(centroid(frames)[:, 0], torch.tensor([[3.0, 7.0], [0.0, 9.0]]), atol=1e-4, rtol=0)


def test_the_centroid_weighs_by_brightness_over_all_channels():
    frames = torch.zeros(1, 2, 8, 8)
    frames[0, 0, 0, 0], frames[0, 1, 4, 2] = 0.25, 0.75
    torch.testing.assert_close(centroid(frames)[0], torch.tensor([3.0, 1.5]), atol=1e-4, rtol=0)


def test_the_endpoint_error_is_a_mean_length_over_what_counts():
    flow, true = torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 2, 2)
    true[0, :, 0, 0], true[0, :, 1, 1] = torch.tensor([3.0, 4.0]), torch.tensor([300.0, 400.0])
    known = torch.ones(2, 2, 2, dtype=torch.bool)
    known[0, 1, 1] = False
    torch.testing.assert_close(endpoint_error(flow, true, known), torch.tensor([5 / 3, 0.0]))
    torch.testing.assert_close(endpoint_error(flow, true), torch.tensor([505 / 4, 0.0]))
