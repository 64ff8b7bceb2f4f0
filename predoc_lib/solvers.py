"""Solvers of initial value problems x'(t) = f(t, x), x(t_0) = x_0 (eqs. 3.1-3.3), written to be read.

One step of each method, then the two loops around them: steps that divide the time evenly, and steps that follow an
estimate of the error. ``integrate`` is the door to both.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.utils.checkpoint
from jaxtyping import Float
from torch import Tensor

from predoc_lib.guards import Counted, check_options, check_problem, even_steps

Field = Callable[[Tensor, Tensor], Tensor]

# Dormand and Prince's method: stage i is at t + C[i] h and weighs the slopes before it by A[i]. The last row is the
# solution itself, of order 5; E is its difference from the embedded solution of order 4, and D the dense output's
# quartic term (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, sections II.5 and II.6).
C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
B = (*A[-1], 0)
E = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
D = (
    -12715105075 / 11282082432,
    0,
    87487479700 / 32700410799,
    -10690763975 / 1880347072,
    701980252875 / 199316789632,
    -1453857185 / 822651844,
    69997945 / 29380423,
)


def euler(f: Field, t: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """Follow the slope at the start: order 1."""
    return x + h * f(t, x)


def midpoint(f: Field, t: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """Follow the slope in the middle, where Euler's half step leads: order 2."""
    return x + h * f(t + h / 2, x + h / 2 * f(t, x))


def heun(f: Field, t: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """Follow the mean of the slopes at the start and at the end that Euler foresees: order 2."""
    k1 = f(t, x)
    k2 = f(t + h, x + h * k1)
    return x + h / 2 * (k1 + k2)


def rk4(f: Field, t: Tensor, x: Tensor, h: Tensor, k1: Tensor | None = None) -> Tensor:
    """Runge and Kutta's four slopes, weighed as in Simpson's rule: order 4. k1: f(t, x), if it is known."""
    k1 = f(t, x) if k1 is None else k1
    k2 = f(t + h / 2, x + h / 2 * k1)
    k3 = f(t + h / 2, x + h / 2 * k2)
    k4 = f(t + h, x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def adams(f: Field, t: Tensor, x: Tensor, h: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Adams and Bashforth predict, Moulton corrects: order 4 for two evaluations a step.

    past: f at t - h, t - 2h, t - 3h; where there are fewer, at the start, rk4 steps. Returns the next ``past`` too.
    """
    k = [f(t, x), *past[:3]]
    if len(k) < 4:
        return rk4(f, t, x, h, k[0]), k
    predicted = x + h / 24 * (55 * k[0] - 59 * k[1] + 37 * k[2] - 9 * k[3])
    return x + h / 24 * (9 * f(t + h, predicted) + 19 * k[0] - 5 * k[1] + k[2]), k


def dopri5(f: Field, t: float, x: Tensor, h: float, k1: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Dormand and Prince's step: x(t + h) of order 5, and the seven slopes; the last is f(t + h, x(t + h))."""
    k = [k1]
    for c, a in zip(C, A, strict=True):
        x_stage = weigh(x, h, a, k)
        k.append(f(t + c * h, x_stage))
    return x_stage, k


def dense_output(theta: float, x: Tensor, h: float, k: list[Tensor]) -> Tensor:
    """x(t + theta h) from a step's slopes: the cubic with the ends' values and slopes, and a quartic: order 4."""
    both, quartic = theta**2 * (3 - 2 * theta), theta**2 * (1 - theta) ** 2
    weights = [both * b + quartic * d for b, d in zip(B, D, strict=True)]
    weights[0] += theta * (1 - theta) ** 2
    weights[-1] -= theta**2 * (1 - theta)
    return weigh(x, h, weights, k)


def weigh(x: Tensor, h: float, weights: tuple[float, ...] | list[float], k: list[Tensor]) -> Tensor:
    """x + h (w_1 k_1 + w_2 k_2 + ...); with numbers as weights, backpropagation has nothing to keep."""
    for weight, slope in zip(weights, k, strict=True):
        x = torch.add(x, slope, alpha=h * weight) if weight else x
    return x


def rms(x: Tensor) -> Tensor:
    """The root of the mean square."""
    return x.square().mean().sqrt()


@dataclass(frozen=True)
class Solution:
    """x at the times t, and what it cost."""

    x: Float[Tensor, "T ..."]
    t: Float[Tensor, " T"]
    evaluations: int  # of f
    accepted: int  # steps
    rejected: int  # steps tried again, shorter
    grid: tuple[float, ...] = field(default=(), repr=False)  # where the steps begin and end
    next_step: float | None = None  # that the control of the error would try next


ONE_STEP = {"euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4}
METHODS = (*ONE_STEP, "adams", "dopri5")


def integrate(
    f: Field,
    x0: Float[Tensor, "..."],
    t: Float[Tensor, " T"],
    *,
    method: str = "dopri5",
    step_size: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_evaluations: int | None = None,
    checkpoint: bool = False,
    first_step: float | None = None,
    norm: Callable[[Tensor], Tensor] = rms,
) -> Solution:
    """Solve x' = f(t, x) from x(t[0]) = x0 (eq. 3.2), differentiable in x0, t and whatever f depends on.

    Args:
        f: f(t, x), t a 0-d tensor of x's type, returns the shape of x.
        x0: any shape.
        t: times, strictly increasing or decreasing.
        method: one of ``METHODS``; "dopri5" chooses its steps, the others divide every interval of t evenly.
        step_size: longest step. None: one step an interval; no limit for "dopri5".
        rtol, atol: "dopri5" keeps the norm of error / (atol + rtol |x|) at most 1 in every step.
        max_evaluations: of f; more stop the solve.
        checkpoint: keep only x at every step for backpropagation, and evaluate f again on the way back.
        first_step: that "dopri5" tries. None: it finds one.
        norm: that makes one number of the scaled error.

    Raises:
        ValueError: an unknown method, an option out of range, x0 or t of a wrong kind, f returns another shape.
        SolverError: max_evaluations are used up, a step underflows, or x is no longer finite.
    """
    check_options(method, METHODS, rtol, atol, step_size, max_evaluations)
    check_problem(x0, t)
    f = f if isinstance(f, Counted) else Counted(f, method, max_evaluations)
    before, t = f.evaluations, t.to(x0.device)
    run = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False) if checkpoint else _run
    if len(t) == 1:
        return Solution(x0[None], t, 0, 0, 0, tuple(t.tolist()))
    if method == "dopri5":
        # Its steps do not depend on t, so their gradient knows nothing of the times: dx(t_i)/dt_i = f(t_i, x(t_i)),
        # and a start that is later by dt is a state that is earlier by f dt.
        slopes = t.requires_grad and torch.is_grad_enabled()
        start = _move(x0, f, t[0], -1) if slopes else x0
        measure = functools.partial(_measure, rtol, atol, norm)
        x, grid, rejected, next_step = _adaptive_steps(f, start, t, measure, step_size, first_step, run)
        if slopes:
            x = [_move(x_i, f, t_i, 1) for x_i, t_i in zip(x, t[1:], strict=True)]
    else:
        x, grid = _even_steps(f, x0, t, method, step_size, run)
        rejected, next_step = 0, None
    x = torch.stack([x0, *x])
    f.check_finite(x, t)
    if checkpoint:
        f.limit = None  # what backpropagation evaluates again is not counted
    return Solution(x, t, f.evaluations - before, len(grid) - 1, rejected, tuple(grid), next_step)


def _even_steps(
    f: Counted, x: Tensor, t: Tensor, method: str, step_size: float | None, run: Callable
) -> tuple[list[Tensor], list[float]]:
    """x at t[1:], and where the steps end: every interval of t is divided evenly."""
    solution, past, grid, before = [], [], t.tolist()[:1], 0.0
    for (start, end), (t_start, t_end) in zip(itertools.pairwise(t.tolist()), itertools.pairwise(t), strict=True):
        n = even_steps(start, end, step_size)
        length = (end - start) / n
        if abs(length - before) > 8 * torch.finfo(t.dtype).eps * max(abs(start), abs(end)):
            past = []  # Adams needs equal steps; those that differ by rounding alone are equal
        before, h = length, (t_end - t_start) / n
        for i in range(n):
            f.at(start + i * length, length)
            if method == "adams":
                x, past = run(adams, f, t_start + i * h, x, h.to(x.dtype), past)
            else:
                x = run(ONE_STEP[method], f, t_start + i * h, x, h.to(x.dtype))
            grid.append(start + (i + 1) * length)
        solution.append(x)
    return solution, grid


def _adaptive_steps(
    f: Counted, x: Tensor, t: Tensor, measure: Callable, longest: float | None, size: float | None, run: Callable
) -> tuple[list[Tensor], list[float], int, float]:
    """x at t[1:], where the steps end, how many were rejected, and the size of the next: steps of bounded error."""
    times = t.tolist()
    now, end, sign = times[0], times[-1], math.copysign(1, times[-1] - times[0])
    f.at(now, math.nan)
    k1 = f(now, x)
    size = size or _first_size(f, now, x, k1, sign, measure)
    solution, grid, rejected = [], [now], 0
    while now != end:
        size = min(size, longest or math.inf)
        # The last step ends at the last time; a remainder too small to be a step of its own is added to it.
        last = 1.01 * size >= abs(end - now)
        h = end - now if last else sign * size
        f.at(now, h)
        if now + h == now or not abs(h) > 1e-30 * abs(end - times[0]):
            raise f.failure("its step underflowed")
        x_next, k = run(dopri5, f, now, x, h, k1)
        with torch.no_grad():
            ratio = measure(weigh(torch.zeros_like(x), h, E, k), x, x_next)
        if ratio <= 1:
            then = end if last else now + h
            while len(solution) < len(times) - 1 and sign * (then - times[len(solution) + 1]) >= 0:
                theta = (times[len(solution) + 1] - now) / (then - now)
                solution.append(x_next if theta == 1 else dense_output(theta, x, h, k))
            now, x, k1 = then, x_next, k[-1]
            grid.append(now)
        else:
            rejected += 1
        # A step's error grows with the power 5 of its size. An error that is not finite asks for a shorter step.
        factor = 0.2 if math.isnan(ratio) else min(10.0, max(0.2, 0.9 * max(ratio, 1e-10) ** -0.2))
        size = max(size, abs(h) * factor) if last and ratio <= 1 else abs(h) * factor
    return solution, grid, rejected, size


@torch.no_grad()
def _first_size(f: Counted, t: float, x: Tensor, k1: Tensor, sign: float, measure: Callable) -> float:
    """A first step with about 1% of the tolerance as its error, from x, x' and x'' (Hairer et al., section II.4)."""
    size_x, size_k = measure(x, x, x), measure(k1, x, x)
    if not math.isfinite(size_x + size_k):
        raise f.failure("x or f is not finite at the start")
    trial = 1e-6 if min(size_x, size_k) < 1e-5 else 0.01 * size_x / size_k
    k2 = f(t + sign * trial, x + sign * trial * k1)
    bend = max(size_k, measure(k2 - k1, x, x) / trial)
    return min(100 * trial, (0.01 / bend) ** 0.2 if bend > 1e-15 else max(1e-6, 1e-3 * trial))


def _measure(rtol: float, atol: float, norm: Callable, error: Tensor, x: Tensor, x_next: Tensor) -> float:
    """The error in units of the tolerance."""
    return float(norm(error / (atol + rtol * torch.maximum(x.abs(), x_next.abs()))))


def _move(x: Tensor, f: Counted, t: Tensor, sign: int) -> Tensor:
    """x itself, to which t gives the gradient that it has as the solution of x' = f."""
    with torch.no_grad():
        dx = f(t, x)
    return x + sign * (t - t.detach()).to(x.dtype) * dx


def _run(step: Callable, *args):
    return step(*args)
