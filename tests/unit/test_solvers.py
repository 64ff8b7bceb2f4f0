"""The own solvers against closed forms and torchdiffeq: order, error, cost, dense output, gradients, failures."""

import math

import numpy as np
import pytest
import torch
import torchdiffeq
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from predoc_lib.measure import bytes_kept
from predoc_lib.ode import METHODS, SolverError, integrate
from predoc_lib.solvers import E, dopri5, rms, weigh

F64 = torch.float64
ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "adams": 4, "dopri5": 5}
EVEN = tuple(method for method in METHODS if method != "dopri5")
A = torch.tensor([[-0.3, 2.0, 0.1], [-1.5, -0.2, 0.0], [0.3, 0.0, -0.1]], dtype=F64)
# name: f, x(0), x(t)
PROBLEMS = {
    "linear": (
        lambda t, x: x @ A.T,
        torch.tensor([[1.0, 0.0, -1.0], [0.5, 2.0, 0.1]], dtype=F64),
        lambda x0, t: x0 @ torch.matrix_exp(A * t).T,
    ),
    "nonlinear": (
        lambda t, x: torch.cos(x) ** 2,
        torch.tensor([-1.0, 0.0, 0.2], dtype=F64),
        lambda x0, t: torch.atan(torch.tan(x0) + t),
    ),
    "non-autonomous": (
        lambda t, x: -2 * t * x,
        torch.tensor(0.7, dtype=F64),
        lambda x0, t: x0 * torch.exp(-(t**2)),
    ),
}


def times(*t):
    return torch.tensor(t, dtype=F64)


def exact(problem, t):
    _, x0, solution = PROBLEMS[problem]
    return torch.stack([solution(x0, s) for s in t])


def even(method, h):
    """Options that make every method step by h; "dopri5" through a tolerance that accepts all."""
    loose = {"rtol": 1e3, "atol": 1e3, "first_step": h} if method == "dopri5" else {}
    return {"method": method, "step_size": h, **loose}


def error(problem, t, **options):
    f, x0, _ = PROBLEMS[problem]
    return (integrate(f, x0, t, **options).x - exact(problem, t)).abs().max().item()


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_the_error_shrinks_with_the_order_of_the_method(method, problem):
    n = {1: 128, 2: 128, 4: 128, 5: 32}[ORDER[method]]
    errors = [error(problem, times(0.0, 1.3), **even(method, 1.3 / m)) for m in (n, 2 * n)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDER[method], abs=0.1)


def test_adams_keeps_its_order_where_the_times_are_uneven():
    """It starts anew where the length of the steps changes: its formula holds for equal steps."""
    lengths = [torch.tensor([1.0] * n + [2.0] * n, dtype=F64) * 1.3 / (3 * n) for n in (40, 80)]
    grids = [torch.cat([times(0.0), length.cumsum(0)]) for length in lengths]
    errors = [error("non-autonomous", t, method="adams") for t in grids]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.2)


def test_adams_goes_on_where_steps_differ_by_rounding_alone():
    f, x0, _ = PROBLEMS["nonlinear"]
    for dtype in (torch.float64, torch.float32):
        t = torch.linspace(0, 20, 201, dtype=dtype)
        assert integrate(f, x0.to(dtype), t, method="adams").evaluations == 3 * 4 + 197 * 2


@pytest.mark.parametrize("method", METHODS)
def test_every_step_costs_what_the_method_says(method):
    f, x0, _ = PROBLEMS["linear"]
    solution = integrate(f, x0, times(0.0, 1.0), **even(method, 0.1))
    expected = {"euler": 10, "midpoint": 20, "heun": 20, "rk4": 40, "adams": 3 * 4 + 7 * 2, "dopri5": 1 + 6 * 10}
    assert (solution.evaluations, solution.accepted, solution.rejected) == (expected[method], 10, 0)
    assert solution.grid == pytest.approx(np.linspace(0, 1, 11))


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_a_polynomial_of_the_order_of_the_method_is_exact(method, data):
    """x' = p(t), of a degree below the order: a quadrature that each method does without error."""
    degree = ORDER[method] - 1
    p = data.draw(st.lists(st.floats(-3, 3), min_size=degree + 1, max_size=degree + 1))
    start, end = data.draw(st.floats(-2, 2)), data.draw(st.floats(-2, 2))
    if abs(end - start) < 0.1:
        return
    slope = np.polynomial.Polynomial(p)
    f = lambda t, x: torch.tensor(slope(float(t)), dtype=F64)  # noqa: E731
    x = integrate(f, torch.tensor(1.0, dtype=F64), times(start, end), **even(method, abs(end - start) / 7)).x[-1]
    assert x.item() == pytest.approx(1 + slope.integ()(end) - slope.integ()(start), abs=1e-11)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8, 1e-10])
def test_dopri5_keeps_its_tolerance_and_does_not_overdo_it(problem, tolerance):
    """The error of a step is held to the tolerance; those of many steps add up."""
    found = error(problem, times(0.0, 0.3, 2.0, 5.0), rtol=tolerance, atol=tolerance)
    assert tolerance / 100 < found < 10 * tolerance


@pytest.mark.parametrize("problem", PROBLEMS)
def test_dopri5_needs_at_most_twice_torchdiffeqs_evaluations_at_equal_error(problem):
    f, x0, _ = PROBLEMS[problem]
    t = times(0.0, 5.0)
    true = exact(problem, t)
    ours, theirs = [], []
    for tolerance in 10.0 ** -np.arange(2, 11.5, 0.5):
        solution = integrate(f, x0, t, rtol=tolerance, atol=tolerance)
        ours.append(((solution.x - true).abs().max().item(), solution.evaluations))
        calls = []
        counted = lambda t, x: calls.append(1) or f(t, x)  # noqa: B023, E731
        x = torchdiffeq.odeint(counted, x0, t, rtol=tolerance, atol=tolerance, method="dopri5")
        theirs.append(((x - true).abs().max().item(), len(calls)))
    ours, theirs = (np.log(np.array(sorted(v))).T for v in (ours, theirs))
    ratios = np.exp(ours[1] - np.interp(ours[0], *theirs))
    inside = (ours[0] >= theirs[0].min()) & (ours[0] <= theirs[0].max())
    assert inside.sum() > 10
    assert ratios[inside].max() < 2
    assert np.median(ratios[inside]) < 1.2


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_estimate_of_the_error_is_of_order_5_and_not_below_the_error(problem):
    """It is that of the embedded solution, of order 4: a step's own error is of order 6, far below."""
    f, x0, solution = PROBLEMS[problem]
    estimates = []
    for h in (0.05, 0.025):
        start = torch.tensor(0.4, dtype=F64)
        x = solution(x0, start)
        x_next, k = dopri5(lambda t, x: f(torch.as_tensor(t, dtype=F64), x), 0.4, x, h, f(start, x))
        estimates.append(rms(weigh(torch.zeros_like(x), h, E, k)).item())
        assert rms(x_next - solution(x0, start + h)) < 0.1 * estimates[-1]
    assert math.log2(estimates[0] / estimates[1]) == pytest.approx(5, abs=0.2)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_dense_output_is_accurate_between_the_steps(problem):
    f, x0, _ = PROBLEMS[problem]
    t = torch.linspace(0, 5, 401, dtype=F64)
    tolerance = {"rtol": 1e-7, "atol": 1e-7}
    solution = integrate(f, x0, t, **tolerance)
    assert solution.accepted < 100  # so most of the times lie between steps
    worst = (solution.x - exact(problem, t)).abs().max()
    theirs = (torchdiffeq.odeint(f, x0, t, method="dopri5", **tolerance) - exact(problem, t)).abs().max()
    assert worst < min(1e-6, 1.5 * theirs)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_dense_output_is_of_order_4(problem):
    """Inside one step from an exact start, its error shrinks with the power 5 of the step."""
    f, x0, solution = PROBLEMS[problem]
    errors = []
    for h in (0.08, 0.04):
        start = torch.tensor(0.5, dtype=F64)
        t = start + h * times(0.0, 0.2, 0.5, 0.7, 1.0)
        x = integrate(f, solution(x0, start), t, **even("dopri5", h)).x
        errors.append((x - exact(problem, t))[1:-1].abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(5, abs=0.2)


def test_a_step_cut_short_by_the_end_says_nothing_against_longer_ones():
    f, x0, _ = PROBLEMS["nonlinear"]
    solution = integrate(f, x0, times(0.0, 1e-6), first_step=0.05)
    assert solution.accepted == 1
    assert solution.next_step == 0.05
    further = integrate(f, x0, times(0.0, 0.5), first_step=solution.next_step)
    assert further.next_step > 0.05


def test_more_times_cost_dopri5_nothing():
    f, x0, _ = PROBLEMS["nonlinear"]
    few, many = (integrate(f, x0, torch.linspace(0, 5, n, dtype=F64)) for n in (2, 300))
    assert few.evaluations == many.evaluations
    torch.testing.assert_close(few.x[-1], many.x[-1], atol=0, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ends", [(0.0, 1.7), (1.7, 0.3)])
def test_f_is_asked_for_no_time_outside_the_span(method, ends):
    asked = []
    integrate(lambda t, x: asked.append(float(t)) or -x, torch.ones(2, dtype=F64), times(*ends), method=method)
    assert min(ends) <= min(asked)
    assert max(asked) <= max(ends)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_time_runs_backwards_as_well(method, problem):
    f, *_ = PROBLEMS[problem]
    t = times(2.0, 1.4, 0.3, 0.0)
    x = integrate(f, exact(problem, t[:1])[0], t, method=method, step_size=0.002, rtol=1e-8, atol=1e-8).x
    torch.testing.assert_close(x, exact(problem, t), atol={1: 0.05, 2: 1e-4}.get(ORDER[method], 1e-6), rtol=0)


@pytest.mark.parametrize("method", METHODS)
@given(shift=st.floats(-5, 5), scale=st.floats(0.2, 5), backwards=st.booleans())
def test_a_clock_that_is_shifted_scaled_or_reversed_changes_nothing(method, shift, scale, backwards):
    """With x(t) = y(c t + s), y' = f / c; steps of dopri5 that scale too are the same steps."""
    f, x0, _ = PROBLEMS["non-autonomous"]
    c = -scale if backwards else scale
    t = times(0.2, 0.9, 1.1)
    x = integrate(f, x0, t, **even(method, 0.09)).x
    y = integrate(lambda s, y: f((s - shift) / c, y) / c, x0, c * t + shift, **even(method, 0.09 * scale)).x
    torch.testing.assert_close(x, y, atol=1e-10, rtol=0)


@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4, 4)])
@pytest.mark.parametrize("method", METHODS)
def test_any_shape_and_precision_goes_in_and_comes_out(method, shape, dtype, t_dtype):
    given_times = []
    f = lambda t, x: given_times.append(t) or -x * t  # noqa: E731
    x0, t = torch.rand(shape, dtype=dtype), torch.tensor([0.0, 0.5, 1.0], dtype=t_dtype)
    x = integrate(f, x0, t, method=method, step_size=0.1).x
    assert (x.dtype, x.shape) == (dtype, (3, *shape))
    assert {(s.dtype, s.shape) for s in given_times} == {(dtype, ())}
    torch.testing.assert_close(x[-1], x0 * math.exp(-0.5), atol=0.1 if method == "euler" else 2e-3, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_state_keeps_its_precision_whatever_f_returns(method, dtype):
    t = torch.tensor([0.0, 1.0])
    x = integrate(lambda t, x: (-x).to(dtype), torch.ones(3), t, method=method, step_size=0.1, rtol=1e-2, atol=1e-2).x
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[-1], torch.full((3,), math.exp(-1)), atol=0.03, rtol=0)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, t, x):
        return self.layers(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("method", EVEN)
def test_gradients_are_those_of_the_steps(method, checkpoint):
    """Of x0, times and parameters, by finite differences of the same steps."""
    f = Small()
    x0 = torch.randn(2, 3, dtype=F64, requires_grad=True)
    t = times(0.1, 0.5, 1.45).requires_grad_()  # steps of one length in all would make adams jump with t
    bias = f.layers[2].bias

    def solve(x0, t, bias):
        field = lambda t, x: torch.func.functional_call(f, {"layers.2.bias": bias}, (t, x))  # noqa: E731
        return integrate(field, x0, t, method=method, step_size=0.11, checkpoint=checkpoint).x

    assert torch.autograd.gradcheck(solve, (x0, t, bias), eps=1e-6, atol=1e-7)


def test_gradients_of_dopri5_are_those_of_the_solution():
    f, x0, solution = PROBLEMS["nonlinear"]
    x0, t = x0.clone().requires_grad_(), times(0.3, 0.5, 2.0).requires_grad_()
    weight = torch.randn(3, 3, dtype=F64)
    found = torch.autograd.grad((integrate(f, x0, t, rtol=1e-11, atol=1e-11).x * weight).sum(), [x0, t])
    closed = torch.stack([solution(x0, s - t[0]) for s in t])
    true = torch.autograd.grad((closed * weight).sum(), [x0, t])
    torch.testing.assert_close(found, true, atol=1e-8, rtol=1e-8)


def test_times_that_need_no_gradient_cost_no_evaluation():
    f, x0, _ = PROBLEMS["nonlinear"]
    t = times(0.3, 0.5, 2.0)
    plain = integrate(f, x0, t).evaluations
    assert integrate(f, x0, t.clone().requires_grad_()).evaluations == plain + 3
    with torch.no_grad():
        assert integrate(f, x0, t.clone().requires_grad_()).evaluations == plain


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_keeps_less_and_changes_nothing(method):
    torch.manual_seed(0)
    f, t = Small(), times(0.0, 0.7, 2.0)
    x0 = torch.randn(64, 3, dtype=F64, requires_grad=True)
    kept, gradients = [], []
    for checkpoint in (False, True):
        options = {"step_size": 0.1, "max_evaluations": 200, "checkpoint": checkpoint}
        kept.append(bytes_kept(lambda: integrate(f, x0, t, method=method, **options)))  # noqa: B023
        solution = integrate(f, x0, t, method=method, **options)
        gradients.append(torch.autograd.grad(solution.x.square().sum(), [x0, *f.parameters()]))
    assert kept[1] < 0.5 * kept[0]
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)


def test_what_is_evaluated_again_for_backpropagation_is_not_held_against_the_limit():
    x0 = torch.ones(3, dtype=F64, requires_grad=True)
    solution = integrate(lambda t, x: -x, x0, times(0.0, 1.0), method="euler", step_size=0.1, max_evaluations=10)
    assert solution.evaluations == 10
    solution = integrate(
        lambda t, x: -(x**2), x0, times(0.0, 1.0), method="euler", step_size=0.1, max_evaluations=10, checkpoint=True
    )
    solution.x.sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_too_many_evaluations_stop_with_the_time_reached(method):
    calls = []
    f = lambda t, x: calls.append(1) or -20 * x  # noqa: E731
    with pytest.raises(SolverError, match=rf"{method} stopped near t = .* max_evaluations = 90 are used up .*\.$") as e:
        integrate(f, torch.ones(2, dtype=F64), times(3.0, 8.0), method=method, step_size=0.02, max_evaluations=90)
    assert len(calls) == 90
    reached = float(str(e.value).split("t = ")[1].split()[0])
    assert 3.2 < reached < 5
    assert "more evaluations" in str(e.value)


def test_as_many_evaluations_as_are_needed_are_enough():
    f, x0, _ = PROBLEMS["linear"]
    needed = integrate(f, x0, times(0.0, 1.0)).evaluations
    assert integrate(f, x0, times(0.0, 1.0), max_evaluations=needed).evaluations == needed
    with pytest.raises(SolverError, match="used up"):
        integrate(f, x0, times(0.0, 1.0), max_evaluations=needed - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["dopri5", "rk4", "adams"])
def test_a_solution_that_blows_up_says_when_how_and_what_to_try(method, dtype):
    """x' = x^2, x(0) = 1 is 1 / (1 - t)."""
    sentence = (
        r"stopped near t = [\d.]+ after \d+ evaluations of f: .* \(last step .*, \|x\| up to .*, \|f\| up to .*\)\. "
    )
    with pytest.raises(SolverError, match=sentence + r"The solution grows without bound.* Try .*\.$") as e:
        integrate(lambda t, x: x**2, torch.ones(1, dtype=dtype), times(0.0, 2.0), method=method, step_size=0.01)
    near = float(str(e.value).split("t = ")[1].split()[0])
    assert near == (pytest.approx(1, abs=1e-3) if method == "dopri5" else 2)


def test_a_field_that_jumps_with_every_call_says_so():
    f = lambda t, x: torch.randn_like(x)  # noqa: E731
    with pytest.raises(SolverError, match="draws noise anew at every call"):
        integrate(f, torch.zeros(4, dtype=F64), times(0.0, 1.0), rtol=1e-6, atol=1e-6, max_evaluations=2000)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("when", [-1.0, 0.4])
def test_a_field_that_is_nan_is_a_solver_error(method, when):
    f = lambda t, x: torch.where(t > when, math.nan, -x)  # noqa: E731
    with pytest.raises(SolverError, match=r"f is not finite there.* Try") as e:
        integrate(f, torch.ones(2, dtype=F64), times(0.0, 0.3, 1.0), method=method, step_size=0.1)
    near = float(str(e.value).split("t = ")[1].split()[0])
    expected = max(when, 0) if method == "dopri5" else (0.3 if when < 0 else 1)
    assert near == pytest.approx(expected, abs=1e-3)


def test_a_start_that_is_not_finite_is_a_solver_error():
    with pytest.raises(SolverError, match="x or f is not finite at the start"):
        integrate(lambda t, x: -x, torch.tensor([1.0, math.inf]), torch.tensor([0.0, 1.0]))


def test_a_trial_step_beyond_the_domain_of_f_is_made_again_shorter():
    """f is not a number above t = 1, and the solve ends there."""
    f = lambda t, x: torch.sqrt(1 - t) + 0 * x  # noqa: E731
    x = integrate(f, torch.zeros(1, dtype=F64), times(0.0, 1.0), rtol=1e-6, atol=1e-6).x
    assert x[-1].item() == pytest.approx(2 / 3, abs=1e-5)


def test_one_time_gives_the_initial_value_for_nothing():
    solution = integrate(lambda t, x: -x, torch.ones(2), torch.tensor([3.0]))
    torch.testing.assert_close(solution.x, torch.ones(1, 2), atol=0, rtol=0)
    assert solution.evaluations == solution.accepted == 0


LINE, ONES = torch.tensor([0.0, 1.0]), torch.ones(2, 3)


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "rk5"}, r"Unknown ODE method 'rk5'\. Did you mean 'rk4'\? Valid: euler, midpoint, .*, dopri5\."),
        ({"rtol": 0.0}, r"must be positive, got 0\.0"),
        ({"atol": -1.0}, r"must be positive, got .*-1\.0"),
        ({"atol": math.nan}, r"must be positive, got .*nan"),
        ({"step_size": 0.0}, r"must be positive, got .* 0\.0\."),
        ({"max_evaluations": 0}, r"max_evaluations must be at least 1, got 0\."),
        ({"x0": torch.ones(2, dtype=torch.int64)}, r"x0 must be floating point, got torch\.int64\."),
        ({"x0": torch.ones(2, dtype=torch.complex64)}, r"x0 must be floating point, got torch\.complex64\."),
        ({"t": torch.arange(3)}, r"t must be floating point, got torch\.int64\."),
        ({"t": torch.tensor([0.0, 1.0, 1.0])}, r"t must hold strictly increasing or strictly decreasing times, got"),
        ({"t": torch.tensor([0.0, 1.0, 0.5])}, r"t must hold strictly"),
        ({"t": torch.tensor([0.0, math.nan])}, r"t must hold strictly"),
        ({"t": torch.tensor([0.0, math.inf])}, r"t must hold strictly"),
        ({"t": torch.tensor([])}, r"t must hold strictly"),
        ({"t": torch.tensor([[0.0, 1.0]])}, r"t must hold strictly"),
        ({"t": torch.tensor(1.0)}, r"t must hold strictly"),
        ({"f": lambda t, x: x[:, :1]}, r"f must return the shape of x, \[2, 3\], got \[2, 1\]\."),
        ({"f": lambda t, x: None}, r"f must return the shape of x, \[2, 3\], got NoneType\."),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        integrate(**{"f": lambda t, x: -x, "x0": ONES, "t": LINE} | arguments)
