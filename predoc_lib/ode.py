"""Initial value problems x'(t) = f(t, x), x(t_0) = x_0, with a neural network as f (eqs. 3.1-3.8).

``NeuralODE`` stands on torchdiffeq and is what the models use; ``integrate`` and ``odeint_adjoint`` are the book's own.
"""

import functools
import itertools
from collections.abc import Callable

import torch
import torchdiffeq
from jaxtyping import Float
from torch import Tensor, nn

from predoc_lib.adjoint import COUNTS, odeint_adjoint
from predoc_lib.guards import BACKWARDS, Counted, SolverError, check_options, check_problem, even_steps
from predoc_lib.solvers import METHODS, Solution, integrate

__all__ = [
    "ADAPTIVE", "FIXED_STEP", "METHODS", "NeuralODE", "Solution", "SolverError", "integrate", "integrate_torchdiffeq",
    "odeint_adjoint",
]  # fmt: skip

# torchdiffeq's other adaptive solvers do not keep their tolerance at times between their steps.
ADAPTIVE = ("dopri5", "adaptive_heun")
FIXED_STEP = ("euler", "midpoint", "heun3", "rk4")


class NeuralODE(nn.Module):
    """The solution of x' = f(t, x) at given times, differentiable in x0, t and f's parameters (over torchdiffeq).

    Args:
        f: f(t, x), t a 0-d tensor, returns the shape of x; a module, if ``adjoint``.
        method: an adaptive solver ("dopri5", ...) or one of fixed steps ("euler", "midpoint", "heun3", "rk4").
        rtol: relative tolerance of an adaptive solver.
        atol: absolute tolerance of an adaptive solver.
        step_size: longest step of a fixed-step solver; each interval between times is divided evenly. None: one step.
        adjoint: gradients by the adjoint method (eqs. 3.5-3.8) instead of through the solver's steps.
        max_evaluations: of f in a solve; more stop it. The adjoint's solve backwards has as many of its own.

    Attributes:
        stats: of the last solve: "evaluations" of f, steps "accepted" and "rejected"; and "evaluations_backward",
            of f in the adjoint's solve.

    Raises:
        ValueError: unknown method, or a tolerance, step or limit that is not positive.
    """

    def __init__(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        *,
        method: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        step_size: float | None = None,
        adjoint: bool = False,
        max_evaluations: int | None = None,
    ) -> None:
        super().__init__()
        check_options(method, ADAPTIVE + FIXED_STEP, rtol, atol, step_size, max_evaluations)
        self.f, self.method, self.adjoint = f, method, adjoint
        self.rtol, self.atol, self.step_size, self.max_evaluations = rtol, atol, step_size, max_evaluations
        self.stats = {"evaluations": 0, "accepted": 0, "rejected": 0, "evaluations_backward": 0}

    def forward(self, x0: Float[Tensor, "..."], t: Float[Tensor, " T"]) -> Float[Tensor, "T ..."]:
        """x at the times t, the first of which is x0's own; t increases or decreases strictly.

        Raises:
            ValueError: t is empty or not strictly monotone, x0 is not floating point, f returns another shape.
            SolverError: the adaptive step underflows, x is no longer finite, or ``max_evaluations`` are used up;
                from ``backward()`` too, with ``adjoint``.
        """
        check_problem(x0, t)
        if len(t) == 1:
            return x0[None]
        counted = Counted(self.f, self.method, self.max_evaluations)
        solve = torchdiffeq.odeint_adjoint if self.adjoint else torchdiffeq.odeint
        options = (self.method, self.step_size, self.rtol, self.atol, {})
        x, watched = _solve(solve, self.f, counted, x0, t, *options)
        self.stats = watched.stats
        if self.adjoint:
            watched.turn_back()
            if x.requires_grad:
                x.register_hook(watched.check_gradient)
        return x


def integrate_torchdiffeq(
    f: Callable[[Tensor, Tensor], Tensor],
    x0: Float[Tensor, "..."],
    t: Float[Tensor, " T"],
    *,
    method: str = "dopri5",
    step_size: float | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_evaluations: int | None = None,
    first_step: float | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """As ``integrate``, by torchdiffeq's solvers: the methods are those of ``NeuralODE``."""
    check_options(method, ADAPTIVE + FIXED_STEP, rtol, atol, step_size, max_evaluations)
    check_problem(x0, t)
    if len(t) == 1:
        return Solution(x0[None], t, 0, 0, 0)
    counted = f if isinstance(f, Counted) else Counted(f, method, max_evaluations)
    options = {name: value for name, value in (("first_step", first_step), ("norm", norm)) if value is not None}
    x, watched = _solve(torchdiffeq.odeint, f, counted, x0, t, method, step_size, rtol, atol, options)
    return Solution(x, t, *(watched.stats[name] for name in COUNTS))


def _solve(
    odeint: Callable,
    f: Callable,
    counted: Counted,
    x0: Tensor,
    t: Tensor,
    method: str,
    step_size: float | None,
    rtol: float,
    atol: float,
    options: dict,
) -> tuple[Tensor, "_Watched"]:
    """x at t, and who watched."""
    if method in ADAPTIVE:
        watched = _WatchedAdaptive(f, counted)
    else:
        watched, options = _Watched(f, counted), {"grid_constructor": functools.partial(_grid, step_size)}
    try:
        x = odeint(watched, x0, t, rtol=rtol, atol=atol, method=method, options=options)
    except AssertionError as error:  # torchdiffeq's way to say that x is not finite; followed by x
        raise counted.failure(str(error).split(":")[0]) from error
    counted.check_finite(x, t)
    return x, watched


class _Watched(nn.Module):
    """f as torchdiffeq calls it: counted, and told of every step before it is made, in either direction."""

    def __init__(self, f: Callable, counted: Counted) -> None:
        super().__init__()
        self.f, self.counted = f, counted  # f, if it is a module, for torchdiffeq's adjoint to find its parameters
        self.direction = ""
        self.stats = {"evaluations": 0, "accepted": 0, "rejected": 0, "evaluations_backward": 0}

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        dx = self.counted(t, x)
        self.stats["evaluations" + self.direction] += 1
        return dx

    def turn_back(self) -> None:
        """The solve is over: from here on, only the adjoint's calls f."""
        self.direction, self.counted.evaluations = "_backward", 0
        self.counted.method += BACKWARDS

    def check_gradient(self, gradient: Tensor) -> None:
        """Of the loss: the adjoint starts from it."""
        if not gradient.isfinite().all():
            raise self.counted.failure("the gradient of the loss is not finite")

    def step(self, t: Tensor, h: Tensor) -> None:
        self.counted.at(t, h)

    def callback_step(self, t: Tensor, x: Tensor, h: Tensor) -> None:
        self.stats["accepted"] += 1
        self.step(t, h)

    def callback_step_adjoint(self, t: Tensor, x: tuple[Tensor, ...], h: Tensor) -> None:
        self.step(t, h)


class _WatchedAdaptive(_Watched):
    """The same for an adaptive solver, whose steps may be rejected, and may vanish."""

    def step(self, t: Tensor, h: Tensor) -> None:
        super().step(t, h)
        if t + h == t:  # torchdiffeq would raise an AssertionError, and out of backward() in the adjoint's solve
            raise self.counted.failure("its step underflowed")

    def callback_reject_step(self, t: Tensor, x: Tensor, h: Tensor) -> None:
        self.stats["accepted"] -= 1
        self.stats["rejected"] += 1


def _grid(step_size: float | None, f: Callable, x0: Tensor, t: Tensor) -> Tensor:
    """Times of a fixed-step solver: every interval of t, divided evenly into steps of at most ``step_size``."""
    pieces = [t[:1]]
    for start, end in itertools.pairwise(t):
        n = even_steps(start.item(), end.item(), step_size)
        inner = torch.arange(1, n, device=t.device, dtype=t.dtype) / n
        pieces += [start + (end - start) * inner, end[None]]  # the end itself: rounding must not miss it
    return torch.cat(pieces)
