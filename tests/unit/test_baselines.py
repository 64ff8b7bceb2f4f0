"""Trivial predictions by hand, the GRU that stands in for the ODE, and a mixture against densities that are known."""

import math

import pytest
import torch

from predoc_lib.baselines import GaussianScaleMixture, LatentGRU, copy_last, cross_fade, mean_image
from predoc_lib.experiments.latent_ode import Config, build_model
from predoc_lib.latent_ode import LatentODE

T = torch.tensor([1.0, 2.0, 4.0])
QUERY = torch.tensor([-3.0, 1.0, 1.5, 2.0, 3.5, 4.0, 9.0])


def video(*values):
    """A video of one pixel for each row of values."""
    return torch.tensor(values).view(len(values), -1, 1, 1, 1)


FRAMES = video([0.0, 1.0, 0.5], [0.2, 0.6, 0.8])


def test_copy_last_is_the_last_frame_at_or_before_each_time():
    expected = video([0.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.5], [0.2, 0.2, 0.2, 0.6, 0.6, 0.8, 0.8])
    assert torch.equal(copy_last(FRAMES, T, QUERY), expected)


def test_cross_fade_is_linear_between_frames_and_constant_beyond():
    expected = video([0.0, 0.0, 0.5, 1.0, 0.625, 0.5, 0.5], [0.2, 0.2, 0.4, 0.6, 0.75, 0.8, 0.8])
    torch.testing.assert_close(cross_fade(FRAMES, T, QUERY), expected)


def test_baselines_take_whole_frames_and_times_in_any_order():
    frames, order = torch.rand(2, 3, 2, 4, 6), [5, 0, 3, 3]
    for f in (copy_last, cross_fade):
        whole = f(frames, T, QUERY)
        assert whole.shape == (2, 7, 2, 4, 6)
        assert torch.equal(f(frames, T, QUERY[order]), whole[:, order])
        assert torch.equal(f(frames, T, T), frames)


def test_no_constant_prediction_is_better_than_the_mean_image():
    frames = torch.rand(4, 3, 1, 2, 2, dtype=torch.float64)
    c = torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True)
    (frames - c).square().sum().backward()
    torch.testing.assert_close(mean_image(frames), -c.grad / 2 / 12)  # the minimum of a parabola, from its slope at 0


@pytest.fixture
def gru():
    model = LatentGRU((8, 12), objects=2, state=6, content=5, width=16, step=2.0).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


S0 = torch.linspace(-1, 1, 2 * 2 * 6, dtype=torch.float64).view(2, 2, 6)


def steps(network, s, n):
    """s and the states after 1 ... n steps, object by object."""
    start, cell, change = network
    h, states = torch.tanh(start(s)), [s]
    for _ in range(n):
        h = torch.stack([cell(s[k : k + 1], h[k : k + 1])[0] for k in range(len(s))])
        states.append(states[-1] + change(h))
        s = states[-1]
    return torch.stack(states)


def solve(model, *tau):
    return model.solve(S0, torch.tensor([tau, tau], dtype=torch.float64))


def test_at_whole_steps_the_gru_has_stepped_by_hand(gru):
    forwards, backwards = solve(gru, 0, 2, 4, 6), solve(gru, 0, -2, -4, -6)
    for b in range(2):
        torch.testing.assert_close(forwards[b], steps(gru.forwards, S0[b], 3))
        torch.testing.assert_close(backwards[b], steps(gru.backwards, S0[b], 3))
    assert torch.equal(solve(gru, 0)[:, 0], S0)


@pytest.mark.parametrize("side", [1, -1])
def test_between_two_steps_the_states_are_linear_in_time(gru, side):
    a, x, b = (solve(gru, side * 2, side * 2.5, side * 4)[:, i] for i in range(3))
    torch.testing.assert_close(x, 0.75 * a + 0.25 * b)
    a, x, b = (solve(gru, 0, side * 1.5, side * 2)[:, i] for i in range(3))
    torch.testing.assert_close(x, 0.25 * a + 0.75 * b)


def test_other_times_asked_for_beside_change_nothing(gru):
    together = gru.solve(S0, torch.tensor([[5.0, -3.0], [0.5, 9.0]], dtype=torch.float64))
    torch.testing.assert_close(together[0, 0], solve(gru, 5.0)[0, 0])
    torch.testing.assert_close(together[0, 1], solve(gru, -3.0)[0, 0])
    torch.testing.assert_close(together[1, 0], solve(gru, 0.5)[1, 0])


def test_the_gru_differs_from_the_ode_in_nothing_but_what_moves_the_state(gru):
    ode = LatentODE((8, 12), objects=2, state=6, content=5, width=16)
    names = [{n for n, _ in m.named_parameters() if n.split(".")[0] in ("encoder", "decoder")} for m in (gru, ode)]
    assert names[0] == names[1]
    assert {n.split(".")[0] for n, _ in gru.named_parameters()} == {"encoder", "decoder", "forwards", "backwards"}
    assert {n.split(".")[0] for n, _ in ode.named_parameters()} == {"encoder", "decoder", "ode"}
    frames, t = torch.rand(3, 4, 1, 8, 12, dtype=torch.float64), torch.arange(4, dtype=torch.float64)
    gru.negative_elbo(frames, t, n_context=2)["loss"].backward()
    assert all(p.grad is not None for p in gru.forwards.parameters())
    assert gru.predict(frames, t, t + 0.5).shape == frames.shape


@pytest.mark.parametrize(
    "change",
    [{}, {"n_digits": 2}, {"canvas": 64}, {"layout": "plain"}, {"layout": "plain", "n_digits": 2}, {"field": "free"}],
    ids=str,
)
def test_gru_and_ode_have_as_many_parameters_within_a_tenth(change):
    ode, gru = (
        sum(p.numel() for p in build_model(Config(dynamics=dynamics, **change)).parameters())
        for dynamics in ("ode", "gru")
    )
    assert gru == pytest.approx(ode, rel=0.1)


def drawn(n, scales, channels=1):
    """Images of 4 x 4 pixels, correlated, of several contrasts with equal chance; and their density's bits/dim."""
    d = 16 * channels
    factor = torch.linalg.cholesky(0.9 * torch.ones(d, d, dtype=torch.float64) + 0.1 * torch.eye(d)) * 16
    s = torch.tensor(scales, dtype=torch.float64)
    x = torch.randn(n, d, dtype=torch.float64) @ factor.T * s[torch.randint(len(s), (n, 1))].sqrt()
    square = torch.linalg.solve_triangular(factor, x.T, upper=False).square().sum(0)
    nats = (-0.5 * (square[:, None] / s + d * (2 * math.pi * s).log())).logsumexp(1) - math.log(len(s))
    bits = -(nats - factor.diagonal().log().sum()) / (d * math.log(2))
    return (x + 128).clamp(0, 255).to(torch.uint8).view(n, channels, 4, 4), bits


@pytest.mark.parametrize("scales", [[1.0], [0.3, 3.0]])
def test_a_scale_mixture_finds_the_entropy_of_one(scales):
    train, test = drawn(20_000, scales)[0], drawn(5_000, scales)
    mixture = GaussianScaleMixture(4).fit(train, iterations=20)
    assert mixture.bits_per_dim(test[0]).mean().item() == pytest.approx(test[1].mean().item(), abs=0.02)


def test_one_gaussian_is_too_little_where_contrasts_differ():
    train, test = drawn(20_000, [0.3, 3.0])[0], drawn(5_000, [0.3, 3.0])[0]
    one, four = (GaussianScaleMixture(k).fit(train).bits_per_dim(test).mean() for k in (1, 4))
    assert one > four + 0.05


def test_a_mixture_of_one_is_the_gaussian_of_the_datas_mean_and_covariance():
    images = drawn(500, [1.0])[0]
    noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    found = GaussianScaleMixture(1).fit(images, generator=noise[0])
    z = images.flatten(1).double() + torch.rand(500, 16, dtype=torch.float64, generator=noise[1])
    normal = torch.distributions.MultivariateNormal(z.mean(0), z.T.cov(correction=0))
    noise[0].manual_seed(0)
    torch.testing.assert_close(found.bits_per_dim(images, noise[0]), -normal.log_prob(z) / (16 * math.log(2)))


def test_more_iterations_never_fit_worse():
    images = drawn(2_000, [0.3, 3.0])[0]
    noise = torch.Generator()
    fits = [GaussianScaleMixture(3).fit(images, i, noise.manual_seed(0)) for i in (1, 2, 4, 8)]
    bits = [f.bits_per_dim(images, noise.manual_seed(0)).mean().item() for f in fits]
    assert bits == sorted(bits, reverse=True)


def test_a_mixture_of_too_few_images_is_refused():
    with pytest.raises(ValueError, match="A covariance of 16 numbers needs more images than that, got 16"):
        GaussianScaleMixture().fit(drawn(16, [1.0])[0])


@pytest.mark.parametrize("step", [0.0, -1.0, math.inf, math.nan])
def test_a_gru_needs_a_positive_step(step):
    with pytest.raises(ValueError, match=f"step must be positive, got {step}"):
        LatentGRU((16, 16), step=step)
