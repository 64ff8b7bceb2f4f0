"""Colours of flows, and the pictures made of them."""

import colorsys

import numpy as np

from predoc_lib import figures


def test_hue_is_direction_and_strength_is_length():
    flow = np.zeros((2, 1, 5))
    flow[:, 0, 1], flow[:, 0, 2], flow[:, 0, 3], flow[:, 0, 4] = (2, 0), (0, 2), (-2, 0), (1, 0)
    colours = figures.flow_colours(flow, 2.0)[0] / 255
    assert (colours[0] == 1).all(), "what stands still is white"
    hues, strengths = zip(*[colorsys.rgb_to_hsv(*c)[:2] for c in colours[1:]], strict=True)
    np.testing.assert_allclose(hues, [0, 0.25, 0.5, 0], atol=0.01)
    np.testing.assert_allclose(strengths, [1, 1, 1, 0.5], atol=0.01)


def test_a_flow_is_drawn_at_the_shape_of_its_image():
    image = np.full((48, 80, 3), 128, np.uint8)
    picture = figures.picture(figures.flow_picture(image, np.ones((2, 48, 80)), 4.0))
    assert abs(picture.shape[1] / picture.shape[0] - 80 / 48) < 0.02
    assert picture.dtype == np.uint8
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
