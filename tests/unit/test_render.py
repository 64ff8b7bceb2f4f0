"""Placing and cropping at real-valued positions."""

import pytest
import torch
from scipy import ndimage

from predoc_lib.render import crop, place

CANVAS, PATCH = (9, 12), (4, 5)


def random_patches(*batch):
    return torch.rand(*batch, *PATCH, dtype=torch.float64)


def random_corners(*batch, margin=3.0):
    """Corners for which patches lie inside, across the edge or, with a wide margin, outside."""
    free = torch.tensor([c - p for c, p in zip(CANVAS, PATCH, strict=True)], dtype=torch.float64)
    return torch.rand(*batch, 2, dtype=torch.float64) * (free + 2 * margin) - margin


def centroid(image):
    y, x = (torch.arange(n, dtype=image.dtype) for n in image.shape)
    return torch.stack([(image.sum(1) * y).sum(), (image.sum(0) * x).sum()]) / image.sum()


def test_place_and_crop_are_transposes():
    patches, corners = random_patches(100), random_corners(100, margin=6.0)
    images = torch.rand(100, *CANVAS, dtype=torch.float64)
    left = (place(patches, corners, CANVAS) * images).sum((1, 2))
    right = (patches * crop(images, corners, PATCH)).sum((1, 2))
    torch.testing.assert_close(left, right)


def test_at_a_whole_position_placing_pastes_and_cropping_slices():
    patch, image = random_patches(), torch.rand(CANVAS, dtype=torch.float64)
    pasted = torch.zeros(CANVAS, dtype=torch.float64)
    pasted[2:6, 7:12] = patch
    corner = torch.tensor([2.0, 7.0], dtype=torch.float64)
    assert torch.equal(place(patch, corner, CANVAS), pasted)
    assert torch.equal(crop(image, corner, PATCH), image[2:6, 7:12])


def test_cropping_is_linear_interpolation_with_zero_outside():
    image = torch.rand(CANVAS, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in PATCH), indexing="ij"))
    for corner in random_corners(20, margin=5.0):
        points = (grid + corner[:, None, None]).numpy()
        expected = ndimage.map_coordinates(image.numpy(), points, order=1, mode="grid-constant", cval=0.0)
        torch.testing.assert_close(crop(image, corner, PATCH), torch.from_numpy(expected))


def test_a_patch_inside_keeps_its_brightness_and_its_centroid_moves_exactly():
    patch = random_patches()
    for corner in random_corners(20, margin=0.0):
        drawn = place(patch, corner, CANVAS)
        torch.testing.assert_close(drawn.sum(), patch.sum())
        torch.testing.assert_close(centroid(drawn), centroid(patch) + corner)


def test_what_falls_outside_is_cut_off():
    patches, corners = random_patches(50), random_corners(50, margin=6.0)
    wide = place(patches, corners + 10, (CANVAS[0] + 20, CANVAS[1] + 20))
    torch.testing.assert_close(place(patches, corners, CANVAS), wide[:, 10:-10, 10:-10])


def test_leading_axes_broadcast():
    patches, corners = random_patches(1, 3), random_corners(4, 3)
    drawn = place(patches, corners, CANVAS)
    assert drawn.shape == (4, 3, *CANVAS)
    torch.testing.assert_close(drawn[2, 1], place(patches[0, 1], corners[2, 1], CANVAS))
    images = torch.rand(4, 1, *CANVAS, dtype=torch.float64)
    cut = crop(images, corners, PATCH)
    assert cut.shape == (4, 3, *PATCH)
    torch.testing.assert_close(cut[2, 1], crop(images[2, 0], corners[2, 1], PATCH))


@pytest.mark.parametrize("function", [place, crop])
def test_gradients_of_image_and_position_are_right(function):
    corners = torch.tensor([[1.3, 2.6], [-1.6, 8.4]], dtype=torch.float64, requires_grad=True)
    image = torch.rand(2, *(PATCH if function is place else CANVAS), dtype=torch.float64, requires_grad=True)
    size = CANVAS if function is place else PATCH
    assert torch.autograd.gradcheck(lambda image, corners: function(image, corners, size), (image, corners))
