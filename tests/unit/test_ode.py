"""Solutions of ODEs against closed forms; counts, gradients and failures."""

import math

import pytest
import torch
from torch import nn

from predoc_lib.ode import ADAPTIVE, FIXED_STEP, NeuralODE, SolverError, integrate_torchdiffeq

A = torch.tensor([[-0.3, 2.0, 0.1], [-1.5, -0.2, 0.0], [0.3, 0.0, -0.1]], dtype=torch.float64)
X0 = torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.1]], dtype=torch.float64)
TIMES = torch.tensor([0.5, 0.7, 1.0, 2.5], dtype=torch.float64)
ORDER = {"euler": 1, "midpoint": 2, "heun3": 3, "rk4": 4}  # each calls f as often a step


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(A.clone())

    def forward(self, t, x):
        return x @ self.matrix.T


def exact(x0, t):
    return torch.stack([x0 @ torch.matrix_exp(A * (s - t[0])).T for s in t])


@pytest.mark.parametrize("times", [TIMES, TIMES.flip(0)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize(
    ("method", "options"),
    [("dopri5", {"rtol": 1e-10, "atol": 1e-10}), ("rk4", {"step_size": 0.01})],
)
def test_a_linear_field_gives_the_matrix_exponential(method, options, times, adjoint):
    x = NeuralODE(Linear(), method=method, adjoint=adjoint, **options)(X0, times)
    torch.testing.assert_close(x, exact(X0, times), atol=1e-8, rtol=0)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_every_adaptive_solver_keeps_to_its_tolerance(method):
    errors = [
        (NeuralODE(Linear(), method=method, rtol=tol, atol=tol)(X0, TIMES) - exact(X0, TIMES)).abs().max()
        for tol in (1e-3, 1e-6)
    ]
    assert errors[0] < 0.1
    assert errors[1] < 1e-4


@pytest.mark.parametrize("method", ["dopri5", "midpoint", "rk4"])
@pytest.mark.parametrize("end", [1.5, -1.0])
def test_f_is_given_the_time(method, end):
    times = torch.tensor([0.2, end], dtype=torch.float64)
    solve = NeuralODE(lambda t, x: t * x, method=method, rtol=1e-10, atol=1e-10, step_size=1e-3)
    x = solve(torch.ones(1, dtype=torch.float64), times)
    assert x[-1].item() == pytest.approx(math.exp((end**2 - 0.2**2) / 2), abs=1e-5)


@pytest.mark.parametrize("method", FIXED_STEP)
def test_fixed_steps_converge_with_the_order_of_the_method(method):
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    h = 1 / 32
    errors = [
        (NeuralODE(Linear(), method=method, step_size=step)(X0, times) - exact(X0, times))[-1].norm().item()
        for step in (h, h / 2)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDER[method], abs=0.1)


@pytest.mark.parametrize("method", FIXED_STEP)
@pytest.mark.parametrize(
    ("times", "step_size", "steps"),
    [
        ([0.0, 1.0, 1.5], 0.3, 4 + 2),
        ([1.5, 1.0, 0.0], 0.3, 2 + 4),
        ([0.0, 1.0, 5.0], None, 2),
        ([0.0, 1.0, 1.5], 10.0, 2),
        ([0.0, 0.1 + 0.2], 0.1, 3),  # 0.30000000000000004 is 3 steps, not 4
    ],
)
def test_step_size_divides_every_interval_evenly(method, times, step_size, steps):
    solve = NeuralODE(Linear(), method=method, step_size=step_size)
    solve(X0, torch.tensor(times, dtype=torch.float64))
    assert solve.stats["evaluations"] == steps * ORDER[method]


def test_even_steps_start_where_they_should():
    called = []
    f = lambda t, x: called.append(float(t)) or x  # noqa: E731
    NeuralODE(f, method="euler", step_size=0.3)(X0, torch.tensor([0.0, 1.0, 1.5], dtype=torch.float64))
    assert called == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1.25])


def test_fixed_steps_end_at_any_time_exactly():
    """Also at times, in single precision, where start + (end - start) is not end."""
    for _ in range(200):
        times = torch.cat([torch.zeros(1), (torch.rand(4) * 20).sort().values])
        x = NeuralODE(lambda t, x: torch.ones_like(x), method="euler", step_size=1.0)(torch.zeros(1), times)
        torch.testing.assert_close(x[:, 0], times, atol=1e-4, rtol=0)


def test_evaluations_are_the_calls_of_f_in_the_last_solve():
    calls = []
    solve = NeuralODE(lambda t, x: calls.append(1) or -x, method="dopri5")
    for _ in range(2):
        calls.clear()
        solve(X0, TIMES)
        assert solve.stats["evaluations"] == len(calls) > 6


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_adjoint_and_direct_gradients_agree_with_each_other_and_with_the_closed_form(method):
    weight = torch.randn(len(TIMES), *X0.shape, dtype=torch.float64)

    def gradients(solve, f):
        x0, t = X0.clone().requires_grad_(), TIMES.clone().requires_grad_()
        return torch.autograd.grad((solve(x0, t) * weight).sum(), [x0, t, f.matrix])

    found = []
    for adjoint in (False, True):
        f = Linear()
        solve = NeuralODE(f, method=method, rtol=1e-11, atol=1e-11, step_size=0.005, adjoint=adjoint)
        found.append(gradients(solve, f))
    f = Linear()
    closed = lambda x0, t: torch.stack([x0 @ torch.matrix_exp(f.matrix * (s - t[0])).T for s in t])  # noqa: E731
    true = gradients(closed, f)
    for direct, adjoint, expected in zip(*found, true, strict=True):
        torch.testing.assert_close(direct, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(adjoint, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_solution_that_blows_up_says_near_which_time_and_after_how_many_evaluations(method):
    """x' = x^2, x(0) = 1 is 1 / (1 - t): there is no solution beyond t = 1."""
    solve = NeuralODE(lambda t, x: x**2, method=method, step_size=0.01)
    with pytest.raises(SolverError, match=rf"{method} stopped near t = [\d.]+ after \d+ evaluations of f: .*\.$") as e:
        solve(torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64))
    near = float(str(e.value).split("t = ")[1].split()[0])
    assert near == pytest.approx(1, abs=1e-3) if method == "dopri5" else 1 <= near <= 2
    assert "Try" in str(e.value)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_field_that_is_not_finite_is_a_solver_error(method):
    with pytest.raises(SolverError, match="evaluations"):
        NeuralODE(lambda t, x: x * math.nan, method=method)(X0, TIMES)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "rk4"])
def test_too_many_evaluations_stop_with_the_time_reached(method, adjoint):
    calls = []
    f = Linear()
    f.register_forward_hook(lambda *_: calls.append(1))
    solve = NeuralODE(f, method=method, step_size=0.1, adjoint=adjoint, max_evaluations=50)
    with pytest.raises(
        SolverError, match=rf"{method} stopped near t = .* max_evaluations = 50 are used up \(last"
    ) as e:
        solve(X0, torch.tensor([3.0, 90.0], dtype=torch.float64))
    assert len(calls) == 50
    assert 3.1 < float(str(e.value).split("t = ")[1].split()[0]) < 10


def test_a_limit_holds_for_the_solve_backwards_too():
    f = Linear()
    solve = NeuralODE(f, adjoint=True)
    solve(X0, TIMES).sum().backward()
    forwards, backwards = solve.stats["evaluations"], solve.stats["evaluations_backward"]
    assert backwards > forwards
    x = NeuralODE(f, adjoint=True, max_evaluations=backwards)(X0, TIMES)
    x.sum().backward()
    x = NeuralODE(f, adjoint=True, max_evaluations=backwards - 1)(X0, TIMES)
    with pytest.raises(SolverError, match=r"dopri5 \(of the adjoint, backwards in time\) stopped near t = .* used up"):
        x.sum().backward()


def test_a_solve_that_fails_backwards_only_is_a_solver_error_that_says_so():
    """Forwards, everything settles at 0; backwards, what is lost of it to rounding grows, and blows up."""
    x = NeuralODE(lambda t, x: -50 * x - x**3, adjoint=True)(X0.clone().requires_grad_(), TIMES)
    with pytest.raises(
        SolverError, match=r"of the adjoint, backwards in time.* its step underflowed .*what decays grows"
    ):
        x.sum().backward()


def test_a_loss_that_is_nan_is_a_solver_error_of_the_adjoint():
    x = NeuralODE(Linear(), adjoint=True)(X0, TIMES)
    with pytest.raises(
        SolverError, match=r"of the adjoint, backwards in time.* the gradient of the loss is not finite"
    ):
        (x * math.nan).sum().backward()


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_statistics_count_steps_and_both_solves(method):
    calls = []
    f = Linear()
    f.register_forward_hook(lambda *_: calls.append(1))
    solve = NeuralODE(f, method=method, step_size=0.1, adjoint=True)
    x = solve(X0, TIMES)
    forwards, steps = len(calls), solve.stats["accepted"] + solve.stats["rejected"]
    x.sum().backward()
    assert solve.stats["evaluations"] == forwards == (2 + 6 * steps if method == "dopri5" else 4 * steps)
    assert solve.stats["evaluations_backward"] == len(calls) - forwards > 0
    NeuralODE(f, method=method, step_size=0.1)(X0, TIMES).sum().backward()


def test_a_step_that_is_made_again_counts_as_rejected():
    solve = NeuralODE(lambda t, x: torch.where(t < 0.6, 0.0, 10.0) * torch.cos(5 * x), method="dopri5")
    solve(X0, TIMES)
    assert solve.stats["rejected"] > 0
    assert solve.stats["evaluations"] == 2 + 6 * (solve.stats["accepted"] + solve.stats["rejected"])


@pytest.mark.parametrize("method", ADAPTIVE + FIXED_STEP)
def test_torchdiffeqs_solvers_also_give_a_solution_with_its_statistics(method):
    options = {"method": method, "step_size": 0.1, "rtol": 1e-6, "atol": 1e-6}
    solve, solution = NeuralODE(Linear(), **options), integrate_torchdiffeq(Linear(), X0, TIMES, **options)
    torch.testing.assert_close(solution.x, solve(X0, TIMES), atol=0, rtol=0)
    assert solve.stats == {"evaluations_backward": 0} | {
        name: getattr(solution, name) for name in ("evaluations", "accepted", "rejected")
    }
    torch.testing.assert_close(integrate_torchdiffeq(Linear(), X0, TIMES[:1]).x, X0[None], atol=0, rtol=0)


def test_one_time_gives_the_initial_value():
    torch.testing.assert_close(NeuralODE(Linear())(X0, TIMES[:1]), X0[None], atol=0, rtol=0)


def test_the_fields_parameters_are_the_modules():
    assert [name for name, _ in NeuralODE(Linear()).named_parameters()] == ["f.matrix"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dopri55"}, r"Unknown ODE method 'dopri55'\. Did you mean 'dopri5'\? Valid: dopri5, .*rk4\."),
        ({"rtol": 0.0}, r"must be positive, got 0\.0"),
        ({"atol": -1e-3}, r"must be positive, got .*-0\.001"),
        ({"rtol": math.nan}, r"must be positive, got nan"),
        ({"step_size": 0.0}, r"must be positive, got .* 0\.0\."),
        ({"max_evaluations": 0}, r"max_evaluations must be at least 1, got 0\."),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralODE(Linear(), **options)


@pytest.mark.parametrize(
    "times",
    [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.5], [0.0, math.nan], [], [[0.0, 1.0]], 1.0],
    ids=["repeated", "repeated falling", "turning", "nan", "empty", "two axes", "no axis"],
)
@pytest.mark.usefixtures("as_shipped")
def test_bad_times_are_refused(times):
    with pytest.raises(ValueError, match=r"t must hold strictly increasing or strictly decreasing times, got"):
        NeuralODE(Linear())(X0, torch.tensor(times, dtype=torch.float64))


@pytest.mark.usefixtures("as_shipped")
def test_an_integer_initial_value_is_refused():
    with pytest.raises(ValueError, match=r"x0 must be floating point, got torch\.int64"):
        NeuralODE(Linear())(torch.ones(3, dtype=torch.int64), TIMES)


@pytest.mark.parametrize("method", ["dopri5", "euler"])
def test_a_field_of_another_shape_is_refused(method):
    with pytest.raises(ValueError, match=r"f must return the shape of x, \[2, 3\], got \[2, 1\]"):
        NeuralODE(lambda t, x: x[:, :1], method=method)(X0, TIMES)


def test_a_field_that_is_too_stiff_to_step_says_so():
    ode = NeuralODE(lambda t, x: -1e18 * (x - torch.cos(t)))
    with pytest.raises(SolverError, match=r"underflowed .* f is stiff: .*Radau\.$"):
        ode(torch.ones(1, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64))
