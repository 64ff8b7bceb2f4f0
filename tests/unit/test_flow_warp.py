"""Warping by its definition, and the order of the schemes against exact maps."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from predoc_lib.flow_warp.transport import advect, compose, inside, invert, pixels, sampled, trace, warp

torch.manual_seed(0)


def by_definition(image, flow):
    """Bilinear interpolation in loops, the nearest edge beyond it."""
    b, _, h, w = image.shape
    out = np.zeros(image.shape)
    for n in range(b):
        for row in range(h):
            for column in range(w):
                x = min(max(column + float(flow[n, 0, row, column]), 0), w - 1)
                y = min(max(row + float(flow[n, 1, row, column]), 0), h - 1)
                i, j = min(int(y), max(h - 2, 0)), min(int(x), max(w - 2, 0))
                a, d = y - i, x - j
                rows, columns = (i, min(i + 1, h - 1)), (j, min(j + 1, w - 1))
                patch = image[n][:, rows][:, :, columns].numpy()
                out[n, :, row, column] = (
                    patch[:, 0, 0] * (1 - a) * (1 - d) + patch[:, 0, 1] * (1 - a) * d
                    + patch[:, 1, 0] * a * (1 - d) + patch[:, 1, 1] * a * d
                )  # fmt: skip
    return torch.from_numpy(out)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 4, 1), (1, 2, 1, 6)])
def test_warp_is_interpolation_by_definition(shape):
    image = torch.rand(shape, dtype=torch.float64)
    flow = 3 * torch.randn(shape[0], 2, *shape[2:], dtype=torch.float64)
    torch.testing.assert_close(warp(image, flow), by_definition(image, flow), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("border", ["border", "zeros", "reflection"])
def test_warp_is_grid_sample(mode, border):
    image, flow = torch.rand(2, 3, 11, 17, dtype=torch.float64), 4 * torch.randn(2, 2, 11, 17, dtype=torch.float64)
    at = pixels(flow) + flow
    grid = torch.stack([at[:, 0] / 16 * 2 - 1, at[:, 1] / 10 * 2 - 1], -1)
    expected = F.grid_sample(image, grid, mode=mode, padding_mode=border, align_corners=True)
    torch.testing.assert_close(warp(image, flow, mode=mode, border=border), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dx", "dy"), [(2, 0), (0, -3), (1, 2)])
def test_whole_shifts_move_pixels_exactly(dx, dy):
    image = torch.rand(1, 2, 12, 15, dtype=torch.float64)
    flow = torch.tensor([dx, dy], dtype=torch.float64)[None, :, None, None].expand(1, 2, 12, 15)
    moved = warp(image, flow, border="zeros")
    known = inside(flow)
    expected = torch.roll(image, (-dy, -dx), (2, 3))
    assert known.sum() == (12 - abs(dy)) * (15 - abs(dx))
    torch.testing.assert_close(moved * known, expected * known, atol=1e-12, rtol=0)
    assert (moved * ~known).abs().max() < 1e-12


def test_a_plane_is_warped_to_what_it_is_there():
    """Bilinear interpolation is exact for planes, for any flow that stays inside."""
    x, y = pixels(torch.zeros(1, 2, 20, 24, dtype=torch.float64))[0]
    plane = (0.3 * x - 0.2 * y + 1)[None, None]
    flow = torch.rand(1, 2, 20, 24, dtype=torch.float64) * 3 - 1.5
    expected = plane + 0.3 * flow[:, :1] - 0.2 * flow[:, 1:]
    known = inside(flow)
    assert (warp(plane, flow) - expected)[known].abs().max() < 1e-6
    assert (warp(plane.float(), flow.float()) - expected)[known].abs().max() < 1e-5  # as images come


def cubic(x, a=-0.75):
    """The kernel of Keys (1981) with PyTorch's a. Only a = -0.5 would reproduce a plane."""
    x = x.abs()
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


@pytest.mark.parametrize(("dx", "dy"), [(0.25, 0.0), (-0.4, 0.7)])
def test_bicubic_shifts_are_the_convolution_with_the_kernel(dx, dy):
    image = torch.rand(1, 1, 12, 13, dtype=torch.float64)
    flow = torch.tensor([dx, dy], dtype=torch.float64)[None, :, None, None].expand(1, 2, 12, 13)
    rows, columns = (
        cubic(torch.arange(n, dtype=torch.float64) - torch.arange(n)[:, None] - d) for n, d in ((12, dy), (13, dx))
    )
    expected = rows @ image @ columns.T
    found = warp(image, flow, mode="bicubic")
    torch.testing.assert_close(found[..., 3:-3, 3:-3], expected[..., 3:-3, 3:-3], atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_gradients_of_image_and_flow_are_right(mode):
    image = torch.rand(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    flow = (0.25 + 0.5 * torch.rand(1, 2, 5, 6, dtype=torch.float64)).requires_grad_()  # away from the kinks
    assert torch.autograd.gradcheck(lambda i, f: warp(i, f, mode=mode, border="zeros"), (image, flow))
    assert torch.autograd.gradcheck(lambda a, b: compose(a, b), (flow, flow.detach().clone().requires_grad_()))


@pytest.mark.parametrize(
    ("image", "flow", "options", "message"),
    [
        ((1, 3, 8, 8), (1, 2, 8, 9), {}, "same batch, height and width"),
        ((1, 3, 8, 8), (2, 2, 8, 8), {}, "same batch, height and width"),
        ((1, 3, 8, 8), (1, 2, 8, 8), {"mode": "bicubik"}, "bicubic"),
        ((1, 3, 8, 8), (1, 2, 8, 8), {"border": "wrap"}, "border"),
    ],
)
def test_what_cannot_be_warped_is_refused_with_a_sentence(image, flow, options, message):
    with pytest.raises(ValueError, match=message):
        warp(torch.zeros(image), torch.zeros(flow), **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_flow_that_is_not_finite_is_refused(value):
    flow = torch.zeros(1, 2, 8, 8)
    flow[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=r"must be finite, but 1 of its numbers"):
        warp(torch.zeros(1, 3, 8, 8), flow)


# Velocities in pixels per unit of time; images follow dx/dt = u . grad x.
CENTRE = torch.tensor([15.5, 15.5], dtype=torch.float64)[:, None, None]


def rotation(t, p):
    """A steady turn."""
    x, y = (p - CENTRE).unbind(1)
    return torch.stack([-y, x], 1) * 0.9


def turning_and_shearing(t, p):
    """A turn that becomes a shear: fields of different times do not commute."""
    x, y = (p - CENTRE).unbind(1)
    a, b = math.cos(2 * t), math.sin(2 * t)
    return torch.stack([-a * y + 0.8 * b * x + 6 * b, a * x + 3 * t * a + b * x], 1)


def scipy_trace(u, p, t0, t1):
    """The characteristics by an adaptive solver of order 8: dq/dt = -u(t, q), from t1 back to t0."""
    from scipy.integrate import solve_ivp

    def f(t, q):
        return -u(t, torch.from_numpy(q.reshape(1, 2, *p.shape[-2:])))[0].numpy().ravel()

    solved = solve_ivp(f, (t1, t0), p[0].numpy().ravel(), method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(solved.y[:, -1].reshape(p.shape))


def picture(p):
    """An image that is known everywhere."""
    x, y = p.unbind(1)
    return torch.sin(0.35 * x) * torch.cos(0.27 * y) + 0.3 * torch.sin(0.2 * (x + y))


def wrong_trace(u, p, t0, t1, *, steps, method):
    """The planted error: dPhi/dt = u(Phi, t), the places moved along in the order of time."""
    from predoc_lib.flow_warp.transport import departure

    dt = (t1 - t0) / steps
    for i in range(steps):
        p = departure(u, t0 + i * dt, dt, p, method)
    return p


def order(tracer, u, method, steps):
    """Measured from the error of the image, with twice the steps."""
    here = pixels(torch.zeros(1, 2, 32, 32, dtype=torch.float64))
    exact = picture(scipy_trace(u, here, 0.2, 1.2))
    errors = [
        (picture(tracer(u, here, 0.2, 1.2, steps=n, method=method)) - exact).square().mean().sqrt().item()
        for n in (steps, 2 * steps)
    ]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("u", [rotation, turning_and_shearing])
@pytest.mark.parametrize(("method", "expected", "steps"), [("euler", 1, 256), ("midpoint", 2, 64), ("rk4", 4, 32)])
def test_schemes_have_their_order_on_steady_and_unsteady_fields(u, method, expected, steps):
    assert abs(order(trace, u, method, steps) - expected) < 0.2


def test_the_wrong_composition_passes_on_a_rotation_and_fails_on_an_unsteady_field():
    """So the test above can fail, and needs its second field."""
    assert abs(order(wrong_trace, rotation, "rk4", 32) - 4) < 0.2
    assert order(wrong_trace, turning_and_shearing, "rk4", 32) < 0.2
    assert order(wrong_trace, turning_and_shearing, "midpoint", 64) < 0.2


def test_a_rotation_is_traced_to_where_it_was():
    here = pixels(torch.zeros(1, 2, 32, 32, dtype=torch.float64))
    x, y = (here - CENTRE).unbind(1)
    c, s = math.cos(0.9), math.sin(0.9)
    exact = torch.stack([c * x - s * y, s * x + c * y], 1) + CENTRE
    torch.testing.assert_close(trace(rotation, here, 0, 1, steps=64, method="rk4"), exact, atol=1e-7, rtol=0)
    back = trace(rotation, exact, 1, 0, steps=64, method="rk4")
    torch.testing.assert_close(back, here, atol=1e-7, rtol=0)


def test_composing_flows_of_short_times_gives_that_of_the_whole():
    """On a grid: these flows are linear in p, so interpolation is exact. In the other order it is another map."""
    here = pixels(torch.zeros(1, 2, 32, 32, dtype=torch.float64))
    flows = [trace(turning_and_shearing, here, t, t + 0.1, steps=8, method="rk4") - here for t in (0.2, 0.3)]
    whole = trace(turning_and_shearing, here, 0.2, 0.4, steps=16, method="rk4") - here
    middle = (slice(None), slice(None), slice(8, 24), slice(8, 24))
    assert (compose(*flows) - whole)[middle].abs().max() < 1e-6
    assert (compose(flows[1], flows[0]) - whole)[middle].abs().max() > 1e-2


def test_a_flow_and_its_inverse_cancel():
    x, y = pixels(torch.zeros(1, 2, 40, 40, dtype=torch.float64))[0] / 40 * 2 * math.pi
    flow = torch.stack([2 * torch.sin(x) * torch.sin(y), 1.5 * torch.sin(x) * torch.cos(y)])[None]
    flow = flow * (torch.sin(x / 2) * torch.sin(y / 2))
    inverse = invert(flow)
    assert compose(flow, inverse).abs().max() < 1e-9
    assert flow.abs().max() > 1
    assert (compose(inverse, flow)[..., 4:-4, 4:-4]).abs().max() < 0.05  # here interpolation of the inverse counts


def test_one_warp_of_coordinates_keeps_what_many_warps_of_the_image_blur():
    generator = torch.Generator().manual_seed(3)
    image = F.interpolate(torch.rand(1, 1, 32, 32, generator=generator, dtype=torch.float64), 64, mode="bicubic")
    centre = torch.tensor([31.5, 31.5], dtype=torch.float64)[:, None, None]

    def u(t, p):
        x, y = (p - centre).unbind(1)
        return torch.stack([-y, x], 1) * 2 * math.pi

    turned = {
        s: advect(u, image, 0, 1, steps=32, method="rk4", state=s, mode="bilinear") for s in ("coordinates", "image")
    }
    x, y = (pixels(image) - centre).unbind(1)
    disc = (x.square() + y.square()).sqrt() < 28
    error = {s: (found[:, 0] - image[:, 0])[disc].square().mean() for s, found in turned.items()}
    assert 10 * math.log10(error["image"] / error["coordinates"]) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [({"state": "imag"}, "image"), ({"method": "rk45"}, "rk4"), ({"steps": 0}, "at least 1")],
)
def test_what_cannot_be_advected_is_refused_with_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        advect(rotation, torch.zeros(1, 1, 8, 8, dtype=torch.float64), 0, 1, **options)


def test_a_coarse_field_is_spread_over_the_image():
    field = torch.arange(4.0)[None, None, None].expand(1, 1, 3, 4)
    found = sampled(field, pixels(torch.zeros(1, 2, 5, 7)), (5, 7))
    torch.testing.assert_close(found[0, 0, 2], torch.arange(7.0) / 2)
