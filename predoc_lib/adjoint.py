"""The adjoint method (eqs. 3.4-3.8): the gradients of an ODE's solution from a second solve, backwards in time."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from predoc_lib.guards import BACKWARDS, Counted, check_problem
from predoc_lib.solvers import integrate, rms

COUNTS = ("evaluations", "accepted", "rejected")


def odeint_adjoint(
    f: Callable[[Tensor, Tensor], Tensor],
    x0: Float[Tensor, "..."],
    t: Float[Tensor, " T"],
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    step_size: float | None = None,
    seminorm: bool = False,
    max_evaluations: int | None = None,
    parameters: Iterable[Tensor] | None = None,
    solve: Callable = integrate,
    stats: dict[str, int] | None = None,
) -> Float[Tensor, "T ..."]:
    """x at the times t, differentiable in x0, t and f's parameters by eq. 3.8: no step is kept in memory.

    Args:
        f, x0, t, rtol, atol, method, step_size: of ``solve``, forwards and backwards.
        seminorm: steps backwards answer for the error of x and a alone; a_t and a_theta are integrals along them.
        max_evaluations: of f forwards, and of the augmented f backwards.
        parameters: what f depends on. None: f is a module, with its own.
        solve: ``predoc_lib.ode.integrate`` or ``integrate_torchdiffeq``.
        stats: receives ``COUNTS``, and, with "_backward" after their names, those of the last gradient.

    Raises:
        ValueError: as ``solve``, or f is no module and ``parameters`` does not say what it depends on.
        SolverError: as ``solve``; from ``backward()``, if the solve backwards fails.
    """
    check_problem(x0, t)
    theta = tuple(p for p in (_parameters(f, x0, t) if parameters is None else parameters) if p.requires_grad)
    solve = functools.partial(solve, rtol=rtol, atol=atol, method=method, step_size=step_size)
    limit, stats = max_evaluations, {} if stats is None else stats
    return _Adjoint.apply(f, solve, limit, seminorm, stats, x0, t.to(x0.device), *theta)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f, solve, limit, seminorm, stats, x0, t, *theta) -> Tensor:
        solution = solve(f, x0, t, max_evaluations=limit)
        stats.update({name: getattr(solution, name) for name in COUNTS})
        ctx.f, ctx.solve, ctx.limit, ctx.seminorm, ctx.stats = f, solve, limit, seminorm, stats
        ctx.save_for_backward(solution.x, t, *theta)
        return solution.x

    @staticmethod
    def backward(ctx: Any, dL_dx: Tensor) -> tuple[Tensor | None, ...]:
        """From dL/dx(t_i) [T, ...] to the gradients of x0, t and theta, by one solve from each t_i to t_{i-1}."""
        if torch.is_grad_enabled():
            raise RuntimeError("Gradients by the adjoint have no gradients of their own: backpropagate by integrate.")
        x, t, *theta = ctx.saved_tensors
        n, time_moves = x[0].numel(), ctx.needs_input_grad[6]
        augmented = _augmented(ctx.f, x[0].shape, theta, time_moves)
        augmented = Counted(augmented, ctx.solve.keywords["method"] + BACKWARDS, ctx.limit)
        sizes = [n, n, int(time_moves), sum(p.numel() for p in theta)]
        z = x.new_zeros(sum(sizes))  # [x, a, a_t, a_theta], flat; a_t only if it is asked for
        norm = functools.partial(_largest, sizes[:2] if ctx.seminorm else sizes)
        counts, dL_dt, step = dict.fromkeys(COUNTS, 0), torch.zeros_like(t), None
        for i in reversed(range(1, len(t))):
            z_x, a, a_t, _ = z.split(sizes)
            z_x.copy_(x[i].flatten())  # as found forwards: what the solve backwards loses of x is not carried on
            a += dL_dx[i].flatten()  # the loss sees x(t_i): a jumps
            if time_moves:
                dL_dt[i] = (dL_dx[i] * ctx.f(t[i].to(x.dtype), x[i])).sum()  # x(t_i) moves by f when t_i does
                a_t -= dL_dt[i]
            solution = ctx.solve(augmented, z, t[[i, i - 1]], first_step=step, norm=norm)
            z, step = solution.x[1], solution.next_step  # the next piece begins with the step that served this one
            counts = {name: counts[name] + getattr(solution, name) for name in COUNTS}
        ctx.stats.update({f"{name}_backward": count for name, count in counts.items()})
        _, a, a_t, a_theta = z.split(sizes)
        dL_dx0 = a.view_as(x[0]) + dL_dx[0]
        if time_moves:
            dL_dt[0] = a_t
        dL_dtheta = zip(theta, a_theta.split([p.numel() for p in theta]), strict=True)
        dL_dtheta = [g.view_as(p).to(p.dtype) for p, g in dL_dtheta]
        return None, None, None, None, None, dL_dx0, dL_dt if time_moves else None, *dL_dtheta


def _largest(sizes: list[int], error: Tensor) -> Tensor:
    """The largest of the root mean squares of the first parts, of these sizes, of the augmented state's error."""
    return torch.stack([rms(part) for part in error[: sum(sizes)].split(sizes) if part.numel()]).amax()


def _augmented(f: Callable, shape: torch.Size, theta: list[Tensor], time_moves: bool) -> Callable:
    """The right-hand side of eq. 3.8: [f, -a df/dx, -a df/dt, -a df/dtheta] of z = [x, a, a_t, a_theta]."""
    n = shape.numel()

    def augmented(t: Tensor, z: Tensor) -> Tensor:
        x, a = z[:n].view(shape), z[n : 2 * n].view(shape)
        with torch.enable_grad():
            x, t = x.detach().requires_grad_(), t.detach().requires_grad_(time_moves)
            dx = f(t, x).to(x.dtype)
        to = (x, t, *theta) if time_moves else (x, *theta)
        if dx.requires_grad:
            vjp = torch.autograd.grad(dx, to, -a, allow_unused=True, materialize_grads=True)
        else:
            vjp = [torch.zeros_like(v) for v in to]
        return torch.cat([v.detach().flatten().to(z.dtype) for v in (dx, *vjp)])

    return augmented


def _parameters(f: Callable, x0: Tensor, t: Tensor) -> Iterable[Tensor]:
    """Those of a module; nothing else may have any, lest their gradients be missed."""
    if isinstance(f, nn.Module):
        return f.parameters()
    if f(t[0].detach().to(x0.dtype), x0.detach()).requires_grad:
        raise ValueError("f is no module, yet depends on tensors that require gradients: name them in parameters.")
    return ()
