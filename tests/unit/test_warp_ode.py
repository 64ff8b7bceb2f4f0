"""The network that gives a velocity at any time: what holds before and after training."""

import pytest
import torch

from predoc_lib.flow_warp import WarpODE, compose, warp
from predoc_lib.flow_warp.losses import census, charbonnier, edge_aware_smoothness, photometric, slowness
from predoc_lib.flow_warp.model import correlation, expected_shift

torch.manual_seed(0)
T = torch.arange(3.0)


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = WarpODE(width=8, residual=True, trained=(-9.0, 9.0))
    return model.eval()


@pytest.fixture
def frames():
    return torch.nn.functional.interpolate(torch.rand(6, 3, 12, 16), (48, 64), mode="bicubic").unflatten(0, (2, 3))


def constant(model, velocity):
    """Make the model find this velocity everywhere, at all times."""
    values = torch.zeros(2, model.order + 1, 3, 24, 32)
    values[:, 0, 0], values[:, 0, 1] = velocity
    model.coefficients = lambda frames, t: [values]


def test_frames_that_are_seen_come_back(model, frames):
    torch.testing.assert_close(model.predict(frames, T, T), frames, atol=1e-5, rtol=0)


def test_a_constant_velocity_moves_frames_by_itself_times_the_time(model, frames):
    constant(model, (1.5, -0.5))
    made = model.predict(frames, T, torch.tensor([2.5, 4.0]))
    for i, ahead in enumerate((0.5, 2.0)):
        flow = torch.tensor([1.5, -0.5])[None, :, None, None].expand(2, 2, 48, 64) * ahead
        torch.testing.assert_close(made[:, i], warp(frames[:, 2], flow), atol=1e-4, rtol=0)
        torch.testing.assert_close(model.flow(frames, T, 2.0, 2.0 + ahead), flow, atol=1e-4, rtol=0)
        torch.testing.assert_close(model.flow(frames, T, 2.0 + ahead, 2.0), -flow, atol=1e-4, rtol=0)


def test_the_unit_of_time_is_the_callers(model, frames):
    """The same frames, twice as far apart in time: the same flows over the same share of the interval."""
    slow = model.flow(frames, 2 * T + 7, 2 * 2.0 + 7, 2 * 3.0 + 7)
    torch.testing.assert_close(slow, model.flow(frames, T, 2.0, 3.0), atol=1e-5, rtol=0)


def test_half_way_both_neighbours_are_warped_and_blended(model, frames):
    constant(model, (2.0, 0.0))
    made = model.predict(frames, T, torch.tensor([1.25]))[:, 0]
    back = torch.zeros(2, 2, 48, 64)
    back[:, 0] = 2 * 0.25
    on = torch.zeros(2, 2, 48, 64)
    on[:, 0] = -2 * 0.75
    expected = 0.75 * warp(frames[:, 1], back) + 0.25 * warp(frames[:, 2], on)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


def test_flows_of_parts_compose_to_the_whole():
    """A smooth field that changes in time: t0 to t2 is t0 to t1, then t1 to t2."""
    model = WarpODE(width=4, steps=8, method="rk4", trained=(-9.0, 9.0))
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    field = torch.zeros(1, 3, 2, 48, 64)
    field[:, 0, 0], field[:, 0, 1] = torch.sin(y / 9), torch.cos(x / 9)
    field[:, 1, 0], field[:, 1, 1] = torch.cos((x + y) / 12), torch.sin((x - y) / 12)
    parts = compose(model.displacement(field, 0.5, 0.0), model.displacement(field, 1.0, 0.5))
    middle = (..., slice(6, -6), slice(6, -6))
    torch.testing.assert_close(parts[middle], model.displacement(field, 1.0, 0.0)[middle], atol=0.02, rtol=0)
    assert (model.displacement(field, 1.0, 0.0) - model.displacement(field, 2.0, 1.0)).abs().max() > 0.5


def test_agreement_is_best_where_features_have_moved_to(frames):
    x = torch.randn(1, 16, 20, 24)
    moved = torch.roll(x, (1, -2), (2, 3))  # what was at p is now at p + (-2, 1): later(p) = earlier(p + (2, -1))
    agreement = correlation(moved, x, torch.zeros(1, 2, 20, 24), 3)
    shift = expected_shift(agreement, torch.tensor(60.0), 3)[0, :, 5:-5, 5:-5]
    torch.testing.assert_close(shift.mean((1, 2)), torch.tensor([2.0, -1.0]), atol=0.05, rtol=0)
    known = torch.tensor([2.0, -1.0])[None, :, None, None].expand(1, 2, 20, 24)
    rest = expected_shift(correlation(moved, x, known, 3), torch.tensor(60.0), 3)[0, :, 5:-5, 5:-5]
    assert rest.abs().mean() < 0.05


def test_everything_is_trained(frames):
    model = WarpODE(width=8, residual=True)
    made = model.predict(frames, T, torch.tensor([0.5, 3.0]))
    (made - 0.5).square().mean().backward()
    model.fill[-1].weight.data.normal_()
    for last in (layers[-1] for layers in model.correct.values()):
        last.weight.data.normal_(std=0.1)
    model.zero_grad()
    (model.predict(frames, T, torch.tensor([0.5, 3.0])) - 0.5).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_single_frame_and_times_in_disorder_are_refused(model, frames):
    with pytest.raises(ValueError, match="a single one cannot show how things move"):
        model.predict(frames[:, :1], T[:1], torch.tensor([1.0]))
    with pytest.raises(ValueError, match="must increase"):
        model.flow(frames, torch.tensor([0.0, 2.0, 1.0]), 0.0, 1.0)
    wide = torch.zeros(1, 3, 3, 48, 60)
    with pytest.raises(ValueError, match="multiples of 8 pixels, got 48 x 60"):
        model.predict(wide, T, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="multiples of 8 pixels, got 44 x 64"):
        model.predict(frames[..., :44, :], T, torch.tensor([1.0]))
    with pytest.raises(ValueError, match="width and steps of at least 1"):
        WarpODE(width=0)


def test_times_outside_the_trained_range_are_allowed_and_said(frames):
    model = WarpODE(width=4, trained=(-2.0, 3.0))
    with pytest.warns(UserWarning, match="from -2 to 3 intervals"):
        made = model.predict(frames, T, torch.tensor([7.0]))
    assert made.isfinite().all()


def test_charbonnier_is_a_smooth_absolute_value():
    x = torch.tensor([-2.0, 0.0, 1e-4, 3.0])
    torch.testing.assert_close(charbonnier(x), torch.tensor([2.0, 0, 0, 3]) - 1e-2 * (x.abs() > 1), atol=1e-4, rtol=0)


def test_census_does_not_mind_more_light():
    image = torch.rand(1, 3, 12, 12)
    torch.testing.assert_close(census(image), census(image + 0.2), atol=1e-4, rtol=0)
    assert photometric(image, image + 0.2, 1.0) > photometric(image, image, 1.0) == 0
    assert (census(image).abs() <= 1).all()
    assert census(image).shape == (1, 8, 12, 12)


def test_a_shift_in_textures_that_noise_hides_tells_when_differences_are_averaged():
    generator = torch.Generator().manual_seed(0)
    noise = 0.012 * torch.randn(2, 8, 3, 32, 32, generator=generator)
    wave = 0.01 * torch.sin(torch.arange(32.0) * 2 * torch.pi / 32)
    still, moved = wave + noise[0], wave.roll(4) + noise[1]

    def ratio(halvings: int) -> float:
        """Of what a shift adds to what noise alone costs."""
        alone = photometric(still, wave + noise[1], 0.0, halvings)
        return (photometric(still, moved, 0.0, halvings) / alone - 1).item()

    assert ratio(3) > 2 * ratio(0) > 0
    assert photometric(still, still, 1.0, 3) == 0


def test_each_halving_adds_the_difference_of_smaller_images_and_its_scale():
    a, b = torch.rand(2, 2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in (1, 2, 3):
        small = (a - b).reshape(2, 3, 16 // 2**k, 2**k, 24 // 2**k, 2**k).mean((3, 5))
        epsilon = 1e-2 / 2**k
        added = ((small**2 + epsilon**2).sqrt() - epsilon).mean()
        torch.testing.assert_close(photometric(a, b, 0.1, k) - photometric(a, b, 0.1, k - 1), added)


def test_a_level_field_and_a_ramp_are_smooth_and_a_step_costs_less_at_an_edge():
    level = torch.ones(1, 2, 16, 16)
    flat, edge = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 1
    assert edge_aware_smoothness(level, flat) < 1e-6
    ramp = (torch.arange(16.0)[:, None] + 2 * torch.arange(16.0)).expand(1, 2, 16, 16)
    assert edge_aware_smoothness(ramp, flat) < 1e-6 < edge_aware_smoothness(ramp.square(), flat)
    step = torch.zeros(1, 2, 16, 16)
    step[..., 8:] = 1
    assert edge_aware_smoothness(step, edge) < 0.1 * edge_aware_smoothness(step, flat)


def test_slowness_holds_what_is_slow_and_lets_what_is_fast_be():
    assert slowness(torch.zeros(1, 2, 4, 4)) == 0
    pulls = []
    for speed in (2.0, 12.0):
        field = torch.full((1, 2, 1, 1), speed / 2**0.5, dtype=torch.float64, requires_grad=True)
        value = slowness(field)
        assert value.item() == pytest.approx(speed**2 / (speed**2 + 1))
        value.backward()
        pulls.append(field.grad.norm().item())
    assert pulls[1] < 0.02 * pulls[0]
