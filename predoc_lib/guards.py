"""What every ODE solve checks, counts and says when it fails."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from predoc_lib.naming import unknown

BACKWARDS = " (of the adjoint, backwards in time)"
# The likely causes of a failure, and what to try.
GROWS = (
    "The solution grows without bound, f is not finite there, or a fixed step is too long for a stiff f. Try a shorter "
    "time span, shorter steps, smaller weights or learning rate, or a bounded f."
)
STIFF = (
    "f is stiff: it could change x much faster than x moves, and the steps that this asks for are lost to rounding. "
    "Try smaller weights, another unit of time, or an implicit solver such as SciPy's Radau."
)
JUMPS = (
    "No step is short enough: f seems to jump, or to draw noise anew at every call. Try looser tolerances, a smoother "
    "f, or noise drawn once before the solve."
)
TAKES_LONG = (
    "f is stiff, draws noise anew at every call, or the tolerances allow no longer steps. Try looser tolerances, "
    "smaller weights, noise drawn once before the solve, or more evaluations."
)
REVERSED = " Solved backwards, what decays grows: without the adjoint, the gradient goes through the steps themselves."


class SolverError(RuntimeError):
    """An ODE solve failed: the message says where, after how many evaluations, the likely cause, and what to try."""


class Counted:
    """f with its calls counted, limited and checked, and where the solve is.

    Args:
        f: f(t, x).
        method: the solver's name, for messages.
        max_evaluations: more calls are an error. None: no limit.
    """

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], method: str, max_evaluations: int | None = None) -> None:
        self.f, self.method, self.limit, self.evaluations = f, method, max_evaluations, 0
        self.t, self.step = math.nan, math.nan
        self.x = self.dx = None

    def __call__(self, t: Tensor | float, x: Tensor) -> Tensor:
        """f(t, x) in x's type, t given as a 0-d tensor of that type.

        Raises:
            ValueError: f returns another shape than x's.
            SolverError: the limit is reached.
        """
        if self.limit is not None and self.evaluations >= self.limit:
            raise self.failure(f"max_evaluations = {self.limit} are used up")
        self.evaluations += 1
        dx = self.f(t.to(x.dtype) if isinstance(t, Tensor) else x.new_full((), t), x)
        if getattr(dx, "shape", None) != x.shape:
            got = list(dx.shape) if isinstance(dx, Tensor) else type(dx).__name__
            raise ValueError(f"f must return the shape of x, {list(x.shape)}, got {got}.")
        dx = dx.to(x.dtype)  # a network under autocast returns another
        self.x, self.dx = x.detach(), dx.detach()
        return dx

    def at(self, t: Tensor | float, step: Tensor | float) -> None:
        """Note the step that is about to be made, for a message."""
        self.t, self.step = t, step

    def check_finite(self, x: Tensor, t: Tensor) -> None:
        """Raise a SolverError if x [T, ...], the solution at t, is not finite somewhere."""
        finite = torch.isfinite(x).reshape(len(x), -1).all(1)
        if not finite.all():
            first = int((~finite).nonzero()[0])
            self.t = t[first]
            raise self.failure(f"x was finite at t = {float(t[max(first - 1, 0)]):.4g} and no longer is")

    def failure(self, reason: str) -> SolverError:
        """What to raise."""
        x, dx = (float(v.abs().max()) if v is not None and v.numel() else 0.0 for v in (self.x, self.dx))
        t, step = (v.item() if isinstance(v, Tensor) else v for v in (self.t, self.step))
        if self.limit is not None and self.evaluations >= self.limit:
            cause = TAKES_LONG
        else:
            cause = GROWS if not (x < 1e6 and math.isfinite(dx)) else STIFF if dx > 1e6 else JUMPS
        return SolverError(
            f"The solver {self.method} stopped near t = {t:.4g} after {self.evaluations} evaluations of f: "
            f"{reason} (last step {abs(step):.3g}, |x| up to {x:.3g}, |f| up to {dx:.3g}). {cause}"
            + (REVERSED if self.method.endswith(BACKWARDS) else "")
        )


def check_options(
    method: str,
    methods: Iterable[str],
    rtol: float,
    atol: float,
    step_size: float | None,
    max_evaluations: int | None,
) -> None:
    """Raise a ValueError for an unknown method, or a tolerance, step or limit that is not positive."""
    if method not in methods:
        raise ValueError(unknown("ODE method", method, methods))
    if not (rtol > 0 and atol > 0 and (step_size is None or step_size > 0)):
        raise ValueError(f"rtol, atol and step_size must be positive, got {rtol}, {atol} and {step_size}.")
    if max_evaluations is not None and max_evaluations < 1:
        raise ValueError(f"max_evaluations must be at least 1, got {max_evaluations}.")


def check_problem(x0: Tensor, t: Tensor) -> None:
    """Raise a ValueError unless x0 and t are floating point, and t [T] increases or decreases strictly."""
    for name, value in (("x0", x0), ("t", t)):
        if not value.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {value.dtype}.")
    steps = t.detach().reshape(-1).diff()
    if t.ndim != 1 or not len(t) or not t.isfinite().all() or not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError(f"t must hold strictly increasing or strictly decreasing times, got {t.tolist()}.")


def even_steps(start: float, end: float, step_size: float | None) -> int:
    """How many equal steps of at most ``step_size`` make an interval."""
    # The small allowance keeps rounding of times such as 0.1 + 0.2 from adding a step.
    return 1 if step_size is None else max(1, math.ceil(abs(end - start) / step_size - 1e-4))
