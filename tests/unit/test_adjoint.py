"""The adjoint's gradients against backpropagation, finite differences, torchdiffeq's and closed forms; its memory."""

import math

import pytest
import torch
import torchdiffeq
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from predoc_lib.measure import bytes_kept
from predoc_lib.ode import SolverError, integrate, integrate_torchdiffeq, odeint_adjoint

F64 = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
X0 = torch.tensor([[2.0, 0.0], [1.0, 0.5]], dtype=F64)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=F64))

    def forward(self, t, x):
        return x @ self.matrix.T


class Spiral(Linear):
    def forward(self, t, x):
        return x**3 @ self.matrix.T


class Network(nn.Module):
    """Depends on the time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def forward(self, t, x):
        return self.layers(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1))


def by_adjoint(f, x0, t, **options):
    return odeint_adjoint(f, x0, t, **TIGHT | options)


def by_backpropagation(f, x0, t):
    return integrate(f, x0, t, **TIGHT).x


def by_torchdiffeq(f, x0, t):
    return torchdiffeq.odeint_adjoint(f, x0, t, method="dopri5", **TIGHT)


def weights(t, x0):
    """A loss that sees the solution at every time, the first one too."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(t), *x0.shape, generator=generator, dtype=x0.dtype)


def gradients(solve, f, x0, t):
    """Of x0, of t and of all parameters together."""
    x0, t = x0.clone().requires_grad_(), t.clone().requires_grad_()
    found = torch.autograd.grad((solve(f, x0, t) * weights(t, x0)).sum(), [x0, t, *f.parameters()])
    return {"x0": found[0], "t": found[1], "theta": torch.cat([g.flatten() for g in found[2:]])}


def assert_near(found, expected, relative):
    for name in expected:
        off = (found[name] - expected[name]).norm() / expected[name].norm()
        assert off <= relative, f"{name}: {off:.2e}"


def observed(n, reverse=False):
    t = torch.linspace(0, 2, n + 1, dtype=F64)
    return t.flip(0) if reverse else t


@pytest.mark.parametrize("options", [{}, {"seminorm": True}, {"solve": integrate_torchdiffeq}], ids=str)
@pytest.mark.parametrize("n", [1, 2, 50])
@pytest.mark.parametrize("field", [Linear, Spiral, Network])
def test_gradients_are_those_of_backpropagation(field, n, options):
    found = gradients(lambda *a: by_adjoint(*a, **options), field(), X0, observed(n))
    relative = 3e-8 if "solve" in options else 1e-8  # torchdiffeq's own adjoint is 9e-9 away on the spiral
    assert_near(found, gradients(by_backpropagation, field(), X0, observed(n)), relative)


@pytest.mark.parametrize("field", [Linear, Network])
def test_gradients_are_right_backwards_in_time_and_at_uneven_times(field):
    t = torch.tensor([1.0, 0.7, -0.2, -0.3], dtype=F64)
    assert_near(gradients(by_adjoint, field(), X0, t), gradients(by_backpropagation, field(), X0, t), 1e-8)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_a_linear_field_has_the_gradients_of_the_matrix_exponential(n):
    closed = lambda f, x0, t: torch.stack([x0 @ torch.matrix_exp(f.matrix * (s - t[0])).T for s in t])  # noqa: E731
    assert_near(gradients(by_adjoint, Linear(), X0, observed(n)), gradients(closed, Linear(), X0, observed(n)), 1e-8)


@given(
    entries=st.lists(st.floats(-2, 2), min_size=9, max_size=9),
    x0=st.lists(st.floats(-2, 2), min_size=3, max_size=3),
    t=st.lists(st.integers(-20, 20), min_size=1, max_size=5, unique=True),
    backwards=st.booleans(),
)
def test_every_linear_field_has_the_gradients_of_the_matrix_exponential(entries, x0, t, backwards):
    f = Linear()
    f.matrix = nn.Parameter(torch.tensor(entries, dtype=F64).view(3, 3))
    x0, t = torch.tensor(x0, dtype=F64), torch.tensor(sorted(t, reverse=backwards), dtype=F64) / 10
    closed = lambda f, x0, t: torch.stack([x0 @ torch.matrix_exp(f.matrix * (s - t[0])).T for s in t])  # noqa: E731
    found, true = gradients(by_adjoint, f, x0, t), gradients(closed, f, x0, t)
    for name in true:
        torch.testing.assert_close(found[name], true[name], atol=1e-6, rtol=1e-7)


@pytest.mark.parametrize("field", [Linear, Spiral, Network])
def test_four_ways_to_a_gradient_agree(field):
    """Finite differences, backpropagation, the adjoint and torchdiffeq's; the first to what rounding leaves them."""
    t, f, x0 = observed(2), field(), X0 / 2
    ours = gradients(by_adjoint, f, x0, t)
    assert_near(gradients(by_torchdiffeq, f, x0, t), ours, 1e-8)
    assert_near(gradients(by_backpropagation, f, x0, t), ours, 1e-8)

    def loss(x0, t):
        with torch.no_grad():
            return (integrate(f, x0, t, rtol=1e-13, atol=1e-13).x * weights(t, x0)).sum()

    def differences(values, loss, by=2e-5):
        found = torch.zeros_like(values)
        for i in range(values.numel()):
            ends = []
            for sign in (1, -1):
                moved = values.detach().clone()
                moved.view(-1)[i] += sign * by
                ends.append(loss(moved))
            found.view(-1)[i] = (ends[0] - ends[1]) / (2 * by)
        return found

    theta = torch.nn.utils.parameters_to_vector(f.parameters()).detach()

    def of_theta(moved):
        torch.nn.utils.vector_to_parameters(moved, f.parameters())
        value = loss(x0, t)
        torch.nn.utils.vector_to_parameters(theta, f.parameters())
        return value

    some = slice(0, 6)  # parameters; each costs two solves
    found = {"x0": differences(x0, lambda moved: loss(moved, t)), "t": differences(t, lambda moved: loss(x0, moved))}
    found["theta"] = differences(theta[some], lambda head: of_theta(torch.cat([head, theta[some.stop :]])))
    assert_near(found, ours | {"theta": ours["theta"][some]}, 1e-6)


def test_gradients_of_times_are_the_slopes_at_them():
    """x' = -2tx from x(t0) = x0 is x0 exp(t0^2 - t^2): a later t0 is as good as another x0."""

    class Gaussian(nn.Module):
        def forward(self, t, x):
            return -2 * t * x

    t = torch.tensor([0.3, 0.5, 1.2], dtype=F64, requires_grad=True)
    x = by_adjoint(Gaussian(), torch.tensor([1.5], dtype=F64), t)
    (found,) = torch.autograd.grad(x.sum(), t)
    with torch.no_grad():
        true = -2 * t * x[:, 0]
        true[0] = 2 * t[0] * x[1:].sum()
    torch.testing.assert_close(found, true, atol=1e-9, rtol=1e-9)


def test_the_solve_backwards_takes_x_from_the_solve_forwards_wherever_it_was_observed():
    """Backwards, an error in x grows as exp(10 t) here: over all of the time, without bound; between times, little."""
    f = Linear()
    f.matrix = nn.Parameter(-10 * torch.eye(2, dtype=F64))
    t = torch.linspace(0, 4, 51, dtype=F64)
    found = gradients(lambda *a: odeint_adjoint(*a, rtol=1e-6, atol=1e-9), f, X0, t)
    assert_near(found, gradients(by_backpropagation, f, X0, t), 1e-4)


def test_a_loss_that_sees_one_time_alone_sees_no_other():
    """The jump of the adjoint is at that time: nothing that comes after it matters."""
    t = observed(4).requires_grad_()
    f, x0 = Network(), X0.clone().requires_grad_()
    found = torch.autograd.grad(by_adjoint(f, x0, t)[2].sum(), [x0, t, *f.parameters()])
    early = t.detach()[:3].clone().requires_grad_()
    expected = torch.autograd.grad(by_backpropagation(f, x0, early)[2].sum(), [x0, early, *f.parameters()])
    torch.testing.assert_close(found[1][:3], expected[1], atol=1e-8, rtol=1e-8)
    assert not found[1][3:].any()
    torch.testing.assert_close((found[0], *found[2:]), (expected[0], *expected[2:]), atol=1e-8, rtol=1e-8)


def test_a_loss_of_the_initial_value_alone_has_its_gradient_exactly():
    x0, t, f = X0.clone().requires_grad_(), observed(2).requires_grad_(), Linear()
    found = torch.autograd.grad(by_adjoint(f, x0, t)[0].sum(), [x0, t, f.matrix])
    for value, expected in zip(found, (torch.ones_like(x0), torch.zeros_like(t), torch.zeros(2, 2)), strict=True):
        torch.testing.assert_close(value, expected.to(F64), atol=0, rtol=0)
    (found,) = torch.autograd.grad((3 * by_adjoint(f, x0, t[:1])).sum(), x0)
    torch.testing.assert_close(found, torch.full_like(x0, 3), atol=0, rtol=0)


@pytest.mark.parametrize("method", ["midpoint", "heun", "rk4", "adams"])
def test_with_even_steps_the_gradient_is_near_that_of_the_steps_and_nearer_with_shorter(method):
    """The adjoint is the gradient of the solution, not of the solver's steps."""
    f, t = Network(), observed(3)
    off = []
    for h in (0.1, 0.05):
        steps = gradients(lambda f, x0, t: integrate(f, x0, t, method=method, step_size=h).x, f, X0, t)  # noqa: B023
        found = gradients(lambda f, x0, t: odeint_adjoint(f, x0, t, method=method, step_size=h), f, X0, t)  # noqa: B023
        off.append((found["theta"] - steps["theta"]).norm() / steps["theta"].norm())
    assert 1e-12 < off[1] < 0.4 * off[0] < 0.01


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_shape_and_precision_gets_gradients_of_its_own(shape, dtype):
    class Decay(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.5, dtype=torch.float32))

        def forward(self, t, x):
            return -self.rate * x

    f, x0 = Decay(), torch.rand(shape, dtype=dtype).requires_grad_()
    t = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    x = odeint_adjoint(f, x0, t)
    grad_x0, grad_t, grad_rate = torch.autograd.grad(x[1].sum(), [x0, t, f.rate])
    assert (x.dtype, grad_x0.dtype, grad_t.dtype, grad_rate.dtype) == (dtype, dtype, F64, torch.float32)
    torch.testing.assert_close(grad_x0, torch.full(shape, math.exp(-0.5), dtype=dtype), atol=1e-4, rtol=0)
    torch.testing.assert_close(grad_rate, -x[1].sum().float(), atol=1e-3, rtol=1e-3)


def test_what_needs_no_gradient_or_has_no_part_in_f_is_left_alone():
    f = Network()
    f.layers[0].bias.requires_grad_(False)
    f.idle = nn.Parameter(torch.ones(3, dtype=F64))
    by_adjoint(f, X0, observed(2)).sum().backward()
    assert f.layers[0].bias.grad is None
    assert not f.idle.grad.any()
    assert f.layers[0].weight.grad.any()


def test_a_field_that_depends_on_nothing_gives_zero():
    x0 = X0.clone().requires_grad_()
    found = torch.autograd.grad(odeint_adjoint(lambda t, x: torch.ones_like(x), x0, observed(2))[1:].sum(), x0)[0]
    torch.testing.assert_close(found, torch.full_like(x0, 2), atol=0, rtol=0)


def test_a_function_with_parameters_must_name_them():
    f = Network()
    field = lambda t, x: f(t, x)  # noqa: E731
    with pytest.raises(ValueError, match="depends on tensors that require gradients: name them in parameters"):
        odeint_adjoint(field, X0, observed(1))
    named = gradients(lambda _, x0, t: by_adjoint(field, x0, t, parameters=f.parameters()), f, X0, observed(2))
    assert_near(named, gradients(by_adjoint, f, X0, observed(2)), 1e-12)
    with torch.no_grad():
        odeint_adjoint(field, X0, observed(1))


def test_a_gradient_of_the_gradient_is_refused():
    x0 = X0.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"have no gradients of their own: .* integrate"):
        torch.autograd.grad(odeint_adjoint(Spiral(), x0, observed(1)).sum(), x0, create_graph=True)


def test_memory_does_not_grow_with_the_steps():
    f, x0, t = Network(), torch.randn(500, 2, dtype=F64).requires_grad_(), observed(1)
    few, many = {"method": "rk4", "step_size": 0.2}, {"method": "rk4", "step_size": 0.02}
    adjoint = [bytes_kept(lambda: odeint_adjoint(f, x0, t, **options)) for options in (few, many)]  # noqa: B023
    direct = [bytes_kept(lambda: integrate(f, x0, t, **options).x) for options in (few, many)]  # noqa: B023
    assert adjoint[0] == adjoint[1] < direct[0]
    assert direct[1] > 9 * direct[0]


def test_a_seminorm_saves_evaluations_and_keeps_the_gradient():
    f, x0, t, counts = Network(), torch.randn(64, 2, dtype=F64), observed(2), []
    true, off = gradients(by_backpropagation, f, x0, t), []
    for seminorm in (False, True):
        stats = {}
        solve = lambda *a: odeint_adjoint(*a, rtol=1e-6, atol=1e-6, seminorm=seminorm, stats=stats)  # noqa: B023, E731
        found = gradients(solve, f, x0, t)
        counts.append(stats["evaluations_backward"])
        off.append((found["theta"] - true["theta"]).norm() / true["theta"].norm())
    assert counts[1] < counts[0]
    assert max(off) < 1e-4


def test_statistics_tell_the_two_solves_apart():
    calls, stats = [], {}
    f = Network()
    f.register_forward_hook(lambda *_: calls.append(1))
    x = odeint_adjoint(f, X0, observed(3), stats=stats)
    assert stats["evaluations"] == len(calls) == 2 + 6 * (stats["accepted"] + stats["rejected"])
    calls.clear()
    x.sum().backward()
    assert stats["evaluations_backward"] == len(calls)
    # One first step is sought; then each piece begins with the step that served the one before.
    assert len(calls) == 3 + 1 + 6 * (stats["accepted_backward"] + stats["rejected_backward"])


@pytest.mark.parametrize("solve", [integrate, integrate_torchdiffeq])
def test_a_limit_holds_forwards_and_backwards(solve):
    with pytest.raises(SolverError, match=r"The solver dopri5 stopped .* max_evaluations = 20 are used up"):
        odeint_adjoint(Spiral(), X0, observed(1), max_evaluations=20, solve=solve)
    f, stats = Linear(), {}
    odeint_adjoint(f, X0, observed(3), stats=stats, solve=solve).sum().backward()
    needed = stats["evaluations_backward"]
    assert needed > stats["evaluations"]
    odeint_adjoint(f, X0, observed(3), max_evaluations=needed, solve=solve).sum().backward()
    x = odeint_adjoint(f, X0, observed(3), max_evaluations=needed - 1, solve=solve)
    with pytest.raises(SolverError, match=r"dopri5 \(of the adjoint, backwards in time\) stopped near t = [\d.]+ .*up"):
        x.sum().backward()


class Settling(nn.Module):
    """Forwards, everything settles at 0; backwards, what is lost of it to rounding grows, and blows up."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(50.0, dtype=F64))

    def forward(self, t, x):
        return -self.rate * x - x**3


@pytest.mark.parametrize("solve", [integrate, integrate_torchdiffeq])
def test_a_solve_that_fails_backwards_only_is_a_solver_error_that_says_so(solve):
    x = odeint_adjoint(Settling(), X0, observed(1), solve=solve)
    with pytest.raises(
        SolverError, match=r"of the adjoint, backwards in time.* Solved backwards, what decays grows.*\.$"
    ):
        x.sum().backward()
    x = odeint_adjoint(Settling(), X0, observed(1), method="rk4", step_size=0.04, solve=solve)
    with pytest.raises(
        SolverError, match=r"of the adjoint, backwards in time.* Solved backwards, what decays grows.*\.$"
    ):
        x.sum().backward()


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "rk5"}, r"Unknown ODE method 'rk5'\. Did you mean 'rk4'\? Valid: euler, .*dopri5\."),
        ({"solve": integrate_torchdiffeq, "method": "adams"}, r"Unknown ODE method 'adams'\. .*Valid: dopri5, .*rk4\."),
        ({"rtol": -1.0}, r"must be positive, got -1\.0"),
        ({"max_evaluations": 0}, r"max_evaluations must be at least 1"),
        ({"x0": torch.ones(2, dtype=torch.int64)}, r"x0 must be floating point, got torch\.int64\."),
        ({"t": torch.tensor([0.0, 1.0, 1.0])}, r"t must hold strictly increasing or strictly decreasing times, got"),
        ({"f": lambda t, x: x[:1]}, r"f must return the shape of x, \[2, 2\], got \[1, 2\]\."),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        odeint_adjoint(**{"f": lambda t, x: -x, "x0": X0, "t": observed(1)} | arguments)
