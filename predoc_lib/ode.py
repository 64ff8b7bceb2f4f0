"""Initial value problems x'(t) = f(t, x), x(t_0) = x_0, with a neural network as f (eqs. 3.1-3.3)."""

import itertools
import math
from collections.abc import Callable

import torch
import torchdiffeq
from jaxtyping import Float
from torch import Tensor, nn

from predoc_lib.guards import SolverError
from predoc_lib.naming import unknown
from predoc_lib.solvers import METHODS, Solution, integrate

__all__ = ["ADAPTIVE", "FIXED_STEP", "METHODS", "NeuralODE", "Solution", "SolverError", "integrate"]

# torchdiffeq's other adaptive solvers do not keep their tolerance at times between their steps.
ADAPTIVE = ("dopri5", "adaptive_heun")
FIXED_STEP = ("euler", "midpoint", "heun3", "rk4")


class _Counted(nn.Module):
    """f with its calls counted and the shape that it returns checked."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.evaluations, self.last = f, 0, None

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        self.last = t
        dx = self.f(t, x)
        if dx.shape != x.shape:
            raise ValueError(f"f must return the shape of x, {list(x.shape)}, got {list(dx.shape)}.")
        return dx


class NeuralODE(nn.Module):
    """The solution of x' = f(t, x) at given times, differentiable in x0, t and f's parameters (over torchdiffeq).

    Args:
        f: f(t, x), t a 0-d tensor, returns the shape of x; a module, if ``adjoint``.
        method: an adaptive solver ("dopri5", ...) or one of fixed steps ("euler", "midpoint", "heun3", "rk4").
        rtol: relative tolerance of an adaptive solver.
        atol: absolute tolerance of an adaptive solver.
        step_size: longest step of a fixed-step solver; each interval between times is divided evenly. None: one step.
        adjoint: gradients by the adjoint method (eqs. 3.5-3.8) instead of through the solver's steps.

    Attributes:
        stats: {"evaluations": calls of f in the last forward solve}.

    Raises:
        ValueError: unknown method, or a tolerance or step that is not positive.
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
    ) -> None:
        super().__init__()
        if method not in ADAPTIVE + FIXED_STEP:
            raise ValueError(unknown("ODE method", method, ADAPTIVE + FIXED_STEP))
        if not (rtol > 0 and atol > 0 and (step_size is None or step_size > 0)):
            raise ValueError(f"rtol, atol and step_size must be positive, got {rtol}, {atol} and {step_size}.")
        self.f, self.method, self.rtol, self.atol, self.step_size, self.adjoint = (
            f,
            method,
            rtol,
            atol,
            step_size,
            adjoint,
        )
        self.stats = {"evaluations": 0}

    def forward(self, x0: Float[Tensor, "..."], t: Float[Tensor, " T"]) -> Float[Tensor, "T ..."]:
        """x at the times t, the first of which is x0's own; t increases or decreases strictly.

        Raises:
            ValueError: t is empty or not strictly monotone, x0 is not floating point, f returns another shape.
            SolverError: the adaptive step underflows, or x is no longer finite.
        """
        if not x0.is_floating_point():
            raise ValueError(f"x0 must be floating point, got {x0.dtype}.")
        steps = t.reshape(-1).diff()
        if t.ndim != 1 or not len(t) or not ((steps > 0).all() or (steps < 0).all()):
            raise ValueError(f"t must hold strictly increasing or strictly decreasing times, got {t.tolist()}.")
        if len(t) == 1:
            return x0[None]
        f = _Counted(self.f)
        options = {"grid_constructor": self._grid} if self.method in FIXED_STEP else {}
        solve = torchdiffeq.odeint_adjoint if self.adjoint else torchdiffeq.odeint
        try:
            x = solve(f, x0, t, rtol=self.rtol, atol=self.atol, method=self.method, options=options)
        except AssertionError as error:  # torchdiffeq's way to say that its step underflows or x is not finite
            raise self._failure(f, x0, str(error)) from error
        if not torch.isfinite(x).all():
            raise self._failure(f, x0, "x is not finite")
        self.stats = {"evaluations": f.evaluations}
        return x

    def _grid(self, f: Callable, x0: Tensor, t: Tensor) -> Tensor:
        """Times of a fixed-step solver: every interval of t, divided evenly into steps of at most ``step_size``."""
        pieces = [t[:1]]
        for start, end in itertools.pairwise(t):
            # The small allowance keeps rounding of times such as 0.1 + 0.2 from adding a step.
            n = 1 if self.step_size is None else max(1, math.ceil(abs((end - start).item()) / self.step_size - 1e-4))
            inner = torch.arange(1, n, device=t.device, dtype=t.dtype) / n
            pieces += [start + (end - start) * inner, end[None]]  # the end itself: rounding must not miss it
        return torch.cat(pieces)

    def _failure(self, f: _Counted, x0: Tensor, reason: str) -> SolverError:
        return SolverError(
            f"The solver {self.method} stopped near t = {float(f.last):.4g} after {f.evaluations} evaluations of f: "
            f"{reason}. The solution may grow without bound, or f may be stiff or not finite "
            f"(|x0| is at most {float(x0.abs().max()):.3g}). Try a shorter time span, looser tolerances, smaller "
            "weights or learning rate, or a bounded f."
        )
