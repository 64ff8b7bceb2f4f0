"""Continuous normalizing flows against closed forms, brute force and the identities that they must obey."""

import math

import pytest
import torch
from torch import nn

from predoc_lib import cnf
from predoc_lib.cnf import CNF, divergence

TIGHT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Affine(nn.Module):
    """f(t, x) = A x + b."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, t, x):
        return x @ self.a.T + self.b


class Net(nn.Module):
    """A small nonlinear field of any shape that knows the time and, if there is one, a condition [B, 1]."""

    def __init__(self, shape, width=16):
        super().__init__()
        n = math.prod(shape)
        self.net = nn.Sequential(nn.Linear(n + 2, width), nn.Tanh(), nn.Linear(width, n))

    def forward(self, t, x, cond=None):
        time = t.expand(len(x))[:, None]
        cond = torch.zeros_like(time) if cond is None else cond
        return self.net(torch.cat([x.flatten(1), time, cond], 1)).view_as(x)


def jacobian_trace(f, t, x, cond=None):
    """The trace by brute force, one row at a time."""
    traces = []
    for i in range(len(x)):
        one = lambda v, i=i: f(t, v[None], *([] if cond is None else [cond[i : i + 1]]))[0].flatten()  # noqa: E731
        traces.append(torch.func.jacfwd(one)(x[i]).reshape(x[i].numel(), -1).trace())
    return torch.stack(traces)


SHAPES = pytest.mark.parametrize("shape", [(2,), (7,), (1, 3, 2)], ids=str)


@SHAPES
@pytest.mark.parametrize("with_condition", [False, True])
def test_the_exact_divergence_is_the_trace_of_the_jacobian(shape, with_condition):
    f, x = Net(shape), torch.randn(4, *shape)
    cond = torch.randn(4, 1) if with_condition else None
    found = divergence(f, torch.tensor(0.3), x, cond)
    torch.testing.assert_close(found, jacobian_trace(f, torch.tensor(0.3), x, cond), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", cnf.NOISES)
@SHAPES
def test_hutchinsons_estimate_is_unbiased(kind, shape):
    f, n = Net(shape), 10_000
    x = torch.randn(1, *shape).expand(n, *shape)
    noise = torch.randn(n, *shape) if kind == "gaussian" else torch.randint(0, 2, (n, *shape)) * 2.0 - 1
    estimates = divergence(f, torch.tensor(0.3), x, noise=noise)
    truth = jacobian_trace(f, torch.tensor(0.3), x[:1])[0]
    assert abs(estimates.mean() - truth) < 4 * estimates.std() / n**0.5


def test_for_a_diagonal_jacobian_rademacher_noise_has_no_variance_and_gaussian_noise_has():
    f, x = (lambda t, x: -(x**3)), torch.randn(1, 5).expand(100, 5)
    rademacher = divergence(f, torch.tensor(0.0), x, noise=torch.randint(0, 2, (100, 5)) * 2.0 - 1)
    gaussian = divergence(f, torch.tensor(0.0), x, noise=torch.randn(100, 5))
    assert rademacher.std() < 1e-12
    assert gaussian.std() > 0.1


@SHAPES
def test_the_divergence_can_be_trained_through(shape):
    f, x = Net(shape), torch.randn(3, *shape, requires_grad=True)
    value = divergence(f, torch.tensor(0.3), x).sum()
    grads = torch.autograd.grad(value, (x, *f.parameters()), allow_unused=True)
    h, direction = 1e-6, torch.randn(3, *shape)
    ends = [divergence(f, torch.tensor(0.3), (x + s * h * direction).detach()).sum() for s in (1, -1)]
    assert (grads[0] * direction).sum().item() == pytest.approx((ends[0] - ends[1]).item() / (2 * h), rel=1e-5)


def test_without_gradients_the_divergence_is_the_same_and_keeps_no_graph():
    f, x = Net((3,)), torch.randn(2, 3)
    with torch.no_grad():
        found = divergence(f, torch.tensor(0.1), x)
    assert not found.requires_grad
    torch.testing.assert_close(found, divergence(f, torch.tensor(0.1), x).detach())


def affine_log_prob(f, x):
    """x1 = e^A x + integral of e^{A s} b, so that x is a Gaussian in closed form."""
    a, b = f.a.detach(), f.b.detach()
    n = len(b)
    block = torch.matrix_exp(torch.cat([torch.cat([a, b[:, None]], 1), torch.zeros(1, n + 1)]))
    x1 = x @ block[:n, :n].T + block[:n, n]
    return torch.distributions.Normal(0.0, 1.0).log_prob(x1).sum(1) + a.trace()


@pytest.mark.parametrize("options", [{}, {"adjoint": True}, {"method": "rk4", "step_size": 0.005}], ids=str)
def test_an_affine_flow_has_the_closed_forms_density(options):
    f, x = Affine(0.7 * torch.randn(3, 3), torch.randn(3)), torch.randn(5, 3)
    flow = CNF(f, (3,), **{**TIGHT, **options})
    torch.testing.assert_close(flow.log_prob(x), affine_log_prob(f, x), atol=1e-6, rtol=0)


def test_a_density_integrates_to_one():
    flow = CNF(Net((2,)), (2,), rtol=1e-6, atol=1e-6)
    axis = torch.linspace(-8, 8, 161)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = flow.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-2)


def test_samples_have_the_density_that_the_flow_gives_them():
    """A sample's density is its noise's, changed by the divergence along its own way."""
    f = Net((2,))
    flow, noise = CNF(f, (2,), **TIGHT), torch.randn(6, 2)
    samples = flow.sample(6, noise=noise)
    back = flow.carry(samples, torch.tensor([0.0, 1.0]))[-1]
    torch.testing.assert_close(back, noise, atol=1e-4, rtol=0)
    jacobians = [
        torch.autograd.functional.jacobian(lambda v: flow.carry(v[None], torch.tensor([0.0, 1.0]))[-1, 0], s)
        for s in samples
    ]
    truth = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(1)
    truth = truth + torch.stack([torch.linalg.slogdet(j)[1] for j in jacobians])
    torch.testing.assert_close(flow.log_prob(samples).detach(), truth.detach(), atol=1e-4, rtol=0)


def test_hutchinsons_log_prob_is_unbiased_and_more_draws_vary_less():
    shape = (12,)
    f, x = Net(shape), torch.randn(3, *shape)
    exact = CNF(f, shape, exact=True, **TIGHT).log_prob(x).detach()
    flow = CNF(f, shape, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        ones = torch.stack([flow.log_prob(x) for _ in range(200)])
        fours = torch.stack([flow.log_prob(x, draws=4) for _ in range(50)])
    assert ((ones.mean(0) - exact).abs() < 4 * ones.std(0) / 200**0.5 + 1e-4).all()
    assert (fours.std(0) / ones.std(0)).mean() == pytest.approx(0.5, abs=0.15)


def test_the_noise_is_drawn_once_a_solve():
    """Drawn anew at every evaluation, it would make the right-hand side jump and an adaptive solver despair."""
    seen = []

    class Spy(Net):
        def forward(self, t, x, cond=None):
            out = super().forward(t, x, cond)
            if out.requires_grad:
                out.register_hook(lambda g: seen.append(g.clone()))
            return out

    flow = CNF(Spy((12,)), (12,), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        flow.log_prob(torch.randn(3, 12))
    assert len(seen) > 5
    assert all(torch.equal(g, seen[0]) for g in seen)
    assert set(seen[0].unique().tolist()) == {-1.0, 1.0}
    flow.log_prob(torch.randn(3, 12))
    assert not torch.equal(seen[-1], seen[0])


def test_the_regularizers_are_their_integrals_and_no_part_of_the_likelihood():
    a, b = 0.5 * torch.randn(2, 2), torch.randn(2)
    x, t = torch.randn(4, 2), torch.linspace(0, 1, 2001)
    plain, regular = CNF(Affine(a, b), (2,), **TIGHT), CNF(Affine(a, b), (2,), kinetic=0.3, jacobian=0.2, **TIGHT)
    found = regular.loss(x)
    path = plain.carry(x, t)
    kinetic = torch.trapezoid((path @ a.T + b).square().sum(-1), t, dim=0).mean() / 2
    torch.testing.assert_close(found["kinetic"], kinetic, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["jacobian"], a.square().sum() / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(found["nll"], plain.loss(x)["loss"], atol=1e-7, rtol=0)
    torch.testing.assert_close(found["loss"], found["nll"] + 0.3 * found["kinetic"] + 0.2 * found["jacobian"])
    torch.testing.assert_close(regular.log_prob(x), plain.log_prob(x), atol=1e-7, rtol=0)


def test_steer_ends_training_flows_at_random_times_and_evaluation_at_one():
    flow = CNF(Affine(torch.eye(1), torch.zeros(1)), (1,), steer=0.5, **TIGHT)
    x = torch.zeros(1, 1)
    ends = [-(flow.loss(x)["nll"].item() - 0.5 * math.log(2 * math.pi)) for _ in range(200)]  # the divergence is 1
    assert 0.5 <= min(ends) < 0.6 < 1.4 < max(ends) <= 1.5
    assert flow.log_prob(x).item() == pytest.approx(1 - 0.5 * math.log(2 * math.pi), abs=1e-6)


def test_flow_matching_regresses_the_velocity_of_straight_lines_from_data_to_noise():
    f = Net((2,))
    x, noise, t = torch.randn(5, 2), torch.randn(5, 2), torch.rand(5)
    found = CNF(f, (2,)).flow_matching_loss(x, noise=noise, t=t)
    each = [
        (f(t[i], ((1 - t[i]) * x[i] + t[i] * noise[i])[None])[0] - (noise[i] - x[i])).square().mean() for i in range(5)
    ]
    torch.testing.assert_close(found, torch.stack(each).mean())
    weight = torch.rand(5)
    found = CNF(f, (2,)).flow_matching_loss(x, noise=noise, t=t, weight=weight)
    torch.testing.assert_close(found, (weight * torch.stack(each)).mean())


def test_the_best_field_of_flow_matching_carries_a_gaussian_to_its_right_density():
    """For data N(m, s^2) the mean velocity is known: the flow of that field must have exactly that density."""
    m, s = 1.5, 0.4

    class Best(nn.Module):
        def forward(self, t, x):
            variance = (1 - t) ** 2 * s**2 + t**2
            return -m + (t - (1 - t) * s**2) / variance * (x - (1 - t) * m)

    x = torch.linspace(0, 3, 7)[:, None]
    found = CNF(Best(), (1,), **TIGHT).log_prob(x)
    torch.testing.assert_close(found, torch.distributions.Normal(m, s).log_prob(x)[:, 0], atol=1e-6, rtol=0)


def test_a_condition_changes_the_density_row_by_row():
    flow, x = CNF(Net((2,)), (2,), **TIGHT), torch.randn(4, 2)
    cond = torch.randn(4, 1)
    together = flow.log_prob(x, cond)
    torch.testing.assert_close(together[1:2], flow.log_prob(x[1:2], cond[1:2]), atol=1e-6, rtol=0)
    assert (together - flow.log_prob(x)).abs().max() > 1e-4
    assert flow.sample(4, cond).shape == (4, 2)
    assert torch.isfinite(flow.flow_matching_loss(x, cond))


def test_trajectories_never_cross():
    flow, x = CNF(Net((1,)), (1,), **TIGHT), torch.linspace(-3, 3, 31)[:, None]
    path = flow.carry(x, torch.linspace(0, 1, 21))[..., 0]
    assert (path.diff(dim=1) > 0).all()


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 3), r"x must be \[B, 2\], B at least 1, got \[3, 3\]"),
        (torch.zeros(0, 2), "B at least 1"),
        (torch.full((2, 2), math.nan), "x must hold finite floats, got NaN or infinity"),
        (torch.zeros(2, 2, dtype=torch.int64), "x must hold finite floats, got torch.int64"),
    ],
)
def test_bad_data_are_refused_in_one_sentence(x, message):
    for method in ("log_prob", "loss", "flow_matching_loss"):
        with pytest.raises(ValueError, match=message):
            getattr(CNF(Net((2,)), (2,)), method)(x)


@pytest.mark.usefixtures("as_shipped")
def test_bad_options_and_conditions_are_refused_in_one_sentence():
    flow, x = CNF(Net((2,)), (2,)), torch.zeros(3, 2)
    for call, message in (
        (lambda: CNF(Net((2,)), (2,), noise="gausian"), "Unknown noise 'gausian'. Did you mean 'gaussian'"),
        (lambda: CNF(Net((2,)), (2,), steer=1.5), r"steer in \[0, 1\)"),
        (lambda: CNF(Net((2,)), (2,), kinetic=-1.0), "at least 0"),
        (lambda: flow.log_prob(x, draws=0), "draws must be at least 1, got 0"),
        (lambda: flow.log_prob(x, torch.zeros(2, 1)), "cond must have 3 rows, as x has, got 2"),
        (lambda: flow.sample(0), "n must be at least 1, got 0"),
        (lambda: flow.sample(2, torch.zeros(3, 1)), "cond must have 2 rows"),
        (lambda: flow.sample(2, noise=torch.zeros(3, 2)), "noise must have 2 rows, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
