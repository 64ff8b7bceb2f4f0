"""The fit of flows: its parts against dense algebra and loops, the whole against a flow that is known."""

import math

import pytest
import torch
from torch.nn import functional as F

from predoc_lib.flow_warp import between, fit, fit_both, fit_clip, fit_pair, invert, pixels, warp
from predoc_lib.metrics import endpoint_error


def texture(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = [
        F.interpolate(torch.rand(1, 3, height // k, width // k, generator=generator), (height, width), mode="bicubic")
        for k in (3, 6, 12)
    ]
    return (sum(layers) / 3).clamp(0, 1)


def swirl(height, width, size):
    """A smooth flow that is 0 at the edges."""
    x, y = pixels(torch.zeros(1, 2, height, width))[0]
    fade = (torch.sin(math.pi * x / (width - 1)) * torch.sin(math.pi * y / (height - 1))) ** 2
    return torch.stack([size * fade, -0.6 * size * fade])[None]


@pytest.fixture(scope="module")
def pair():
    """image0(p) = image1(p + flow(p))."""
    image1, flow = texture(60, 80), swirl(60, 80, 4.0)
    return warp(image1, flow, mode="bicubic"), image1, flow


def test_a_known_flow_is_found_in_middleburys_direction(pair):
    image0, image1, flow = pair
    there, back = fit_both(image0, image1)
    assert torch.equal(there, fit_pair(image0, image1))
    assert endpoint_error(there, flow).item() < 0.1
    assert endpoint_error(back, invert(flow)).item() < 0.1
    assert endpoint_error(torch.zeros_like(flow), flow).item() > 1


def test_a_clips_flows_lie_on_the_later_frames(pair):
    image0, image1, flow = pair
    flows = fit_clip(torch.cat([image1, image0, image0]))
    assert flows.shape == (2, 2, 60, 80)
    assert endpoint_error(flows[:1], flow).item() < 0.1
    assert flows[1].abs().max() < 0.05


def test_a_frame_between_two_is_where_things_are_then(pair):
    image0, image1, flow = pair
    flow0, flow1 = fit_both(image0, image1)
    half = between(image0, image1, flow0, flow1, 0.5)
    # A point at q in image0 is at q + flow / 2 at half time.
    at = invert(flow / 2)
    truth = warp(image0, at, mode="bicubic")
    error = (half - truth)[..., 8:-8, 8:-8].square().mean()
    fade = ((image0 + image1) / 2 - truth)[..., 8:-8, 8:-8].square().mean()
    assert error < fade / 10
    for t, image in ((0.0, image0), (1.0, image1)):
        assert (between(image0, image1, flow0, flow1, t) - image).abs().max() < 0.02
    with pytest.raises(ValueError, match="from 0 to 1"):
        between(image0, image1, flow0, flow1, 1.5)


@pytest.mark.parametrize(
    ("shapes", "value", "message"),
    [
        (((1, 3, 20, 20), (1, 3, 20, 21)), 0.0, "same size"),
        (((1, 3, 8, 20), (1, 3, 8, 20)), 0.0, "at least 16 pixels"),
        (((1, 3, 20, 20), (1, 3, 20, 20)), math.nan, "finite"),
    ],
)
def test_what_is_no_pair_is_refused_with_a_sentence(shapes, value, message):
    image0, image1 = (torch.zeros(shape) for shape in shapes)
    image1[0, 0, 3, 3] = value
    with pytest.raises(ValueError, match=message):
        fit_both(image0, image1)


def test_a_single_frame_has_no_flow():
    with pytest.raises(ValueError, match="two frames, got 1"):
        fit_clip(torch.zeros(1, 3, 20, 20))


def test_conjugate_gradients_solve_the_system():
    torch.manual_seed(1)
    h, w = 5, 6
    root = torch.randn(1, 2, 2, h, w, dtype=torch.float64)
    a, b, c = (
        (root[:, :, i] * root[:, :, j]).sum(1, keepdim=True) + (0.5 if i == j else 0.0)
        for i, j in ((0, 0), (0, 1), (1, 1))
    )
    springs = [torch.rand(1, 1, h, w - 1, dtype=torch.float64), torch.rand(1, 1, h - 1, w, dtype=torch.float64)]
    right = torch.randn(1, 2, h, w, dtype=torch.float64)

    def energy(v):
        """The quadratic form that the system is the gradient of, term by term."""
        data = (a * v[:, :1] ** 2 + 2 * b * v[:, :1] * v[:, 1:] + c * v[:, 1:] ** 2).sum()
        bends = sum((k * v.diff(dim=axis).square()).sum() for k, axis in zip(springs, (-1, -2), strict=True))
        return (data + bends) / 2 - (right * v).sum()

    hessian = torch.autograd.functional.hessian(energy, torch.zeros_like(right)).reshape(right.numel(), -1)
    exact = torch.linalg.solve(hessian, right.flatten()).view_as(right)
    found = fit.conjugate_gradients((a, b, c), springs, right, torch.zeros_like(right))
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)


def test_the_weighted_median_is_that_of_a_loop():
    torch.manual_seed(2)
    flow, image, certainty = torch.randn(2, 2, 7, 8), torch.rand(2, 3, 7, 8) * 0.1, torch.rand(2, 1, 7, 8)
    found = fit.weighted_median(flow, image, certainty)
    reach = fit.REACH
    for n, y, x in ((0, 0, 0), (1, 3, 4), (0, 6, 2)):
        values, weights = [], []
        for dy in range(-reach, reach + 1):
            for dx in range(-reach, reach + 1):
                r, s = min(max(y + dy, 0), 6), min(max(x + dx, 0), 7)
                unlike = (image[n, :, r, s] - image[n, :, y, x]).square().mean()
                far = (dx * dx + dy * dy) / (2 * fit.NEAR**2)
                weights.append(math.exp(-unlike / (2 * fit.ALIKE**2) - far) * (certainty[n, 0, r, s] + 1e-3))
                values.append(flow[n, 0, r, s].item())
        order = sorted(range(len(values)), key=values.__getitem__)
        sums, half = 0.0, float(sum(weights)) / 2
        for i in order:
            sums += float(weights[i])
            if sums >= half:
                break
        assert found[n, 0, y, x].item() == pytest.approx(values[i])


def test_what_only_one_image_shows_is_told():
    """A board that moves by 6 pixels: beside it a strip of the ground is seen in one image alone."""
    ground, board = texture(40, 64, seed=3), texture(40, 64, seed=4)

    def picture(left):
        out = ground.clone()
        out[..., 10:30, left : left + 16] = board[..., 10:30, :16]
        return out

    there, back = fit_both(picture(20), picture(26))
    seen = fit.agree(torch.cat([there, back]))[0, 0]
    assert there[0, 0, 20, 24:34].median() == pytest.approx(6, abs=0.3)
    assert seen[14:26, 37:41].float().mean() < 0.5, "the board will cover it"
    assert seen[14:26, 22:34].float().mean() > 0.9
    assert seen[:, :12].float().mean() > 0.9
