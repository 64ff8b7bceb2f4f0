"""Continuous normalizing flows (eqs. 2.1-2.5, 3.9, 3.10): a density that an ODE carries to a Gaussian.

Flow time runs from data at t = 0 to noise at t = 1. Along x' = f(t, x) the density changes by

    d log p(x(t)) / dt = -div f(t, x(t))                                     eq. 3.10
    log p(x(0)) = log N(x(1)) + integral from 0 to 1 of div f(t, x(t)) dt    eq. 3.9
"""

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from predoc_lib.naming import unknown
from predoc_lib.ode import NeuralODE

NOISES = ("rademacher", "gaussian")
EXACT = 8  # numbers in x up to which the divergence is exact where nothing else is said


@runtime_checkable
class Noise(Protocol):
    """Where random numbers come from: [B, *shape] for the B rows of a batch (``predoc_lib.batches.Rows``, say)."""

    def rand(self, *shape: int) -> Tensor: ...
    def randn(self, *shape: int) -> Tensor: ...


def divergence(
    f: Callable[..., Tensor],
    t: Tensor,
    x: Float[Tensor, "B ..."],
    cond: Tensor | None = None,
    noise: Float[Tensor, "B ..."] | None = None,
) -> Float[Tensor, " B"]:
    """The trace of df/dx: exact, or Hutchinson's estimate noise . (df/dx) noise, unbiased if noise has unit covariance.

    Args:
        f: f(t, x) or f(t, x, cond), [B, ...], each row of which depends on its own row of x alone.
        t: 0-d, or [B].
        x: any shape after the first axis.
        cond: a condition, B rows.
        noise: the shape of x; None: exact, with one backward pass for each number in a row.
    """
    return _velocity_and_divergence(f, t, x, cond, noise)[1]


def _velocity_and_divergence(f, t, x, cond, noise) -> tuple[Tensor, Tensor, Tensor]:
    """f, its divergence, and |noise^T df/dx|^2 (exact: the Jacobian's squared Frobenius norm), [B] each."""
    train = torch.is_grad_enabled()
    with torch.enable_grad():  # the divergence is a derivative, also where nothing is trained
        x = x if train and x.requires_grad else x.detach().requires_grad_()
        dx = f(t, x) if cond is None else f(t, x, cond)
        if not dx.requires_grad:  # f does not depend on x
            return dx, x.new_zeros(len(x)), x.new_zeros(len(x))
        if noise is None:
            flat = dx.flatten(1).sum(0)
            rows = [_gradient(flat[i], x, train).flatten(1) for i in range(len(flat))]
            trace, square = sum(row[:, i] for i, row in enumerate(rows)), sum(row.square().sum(1) for row in rows)
        else:
            row = _gradient(dx, x, train, noise)
            trace, square = (row * noise).flatten(1).sum(1), row.flatten(1).square().sum(1)
    return (dx, trace, square) if train else (dx.detach(), trace.detach(), square.detach())


def _gradient(y: Tensor, x: Tensor, train: bool, weight: Tensor | None = None) -> Tensor:
    return torch.autograd.grad(y, x, weight, create_graph=train, retain_graph=True, materialize_grads=True)[0]


class _Augmented(nn.Module):
    """The field of [x, log-density, kinetic energy, Jacobian norm], flat, with the same noise throughout a solve."""

    def __init__(self, f: nn.Module, shape: tuple[int, ...], cond: Tensor | None, noise: Tensor | None) -> None:
        super().__init__()
        self.f, self.shape, self.cond, self.noise = f, shape, cond, noise

    def forward(self, t: Tensor, z: Float[Tensor, "B Z"]) -> Float[Tensor, "B Z"]:
        x = z[:, :-3].unflatten(1, self.shape)
        dx, trace, square = _velocity_and_divergence(self.f, t, x, self.cond, self.noise)
        dx = dx.flatten(1)
        return torch.cat([dx, torch.stack([trace, dx.square().sum(1), square], 1)], 1)


class CNF(nn.Module):
    """A density over tensors of one shape, as the flow of a vector field from data at t = 0 to a Gaussian at t = 1.

    Args:
        vector_field: f(t, x) or f(t, x, cond) -> the shape of x, [B, *shape]; t is a 0-d tensor, in
            ``flow_matching_loss`` [B]. ``cond`` has B rows of any shape.
        shape: of one x.
        noise: "rademacher" or "gaussian", of Hutchinson's estimate of the divergence, drawn once a solve.
        exact: take the exact divergence; None: for at most 8 numbers in x.
        kinetic: weight of the kinetic energy in ``loss`` (RNODE, eq. 6.17), per number in x.
        jacobian: weight of the Jacobian's norm in ``loss`` (RNODE, eq. 6.18), per number in x.
        steer: in ``loss`` the flow ends at a random time in [1 - steer, 1 + steer] (STEER).
        method, rtol, atol, step_size, adjoint: of the ``NeuralODE``.

    Attributes:
        stats: of the last solve, as ``NeuralODE.stats``.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        vector_field: nn.Module,
        shape: tuple[int, ...],
        *,
        noise: str = "rademacher",
        exact: bool | None = None,
        kinetic: float = 0.0,
        jacobian: float = 0.0,
        steer: float = 0.0,
        method: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        step_size: float | None = None,
        adjoint: bool = False,
    ) -> None:
        super().__init__()
        if noise not in NOISES:
            raise ValueError(unknown("noise", noise, NOISES))
        if min(kinetic, jacobian) < 0 or not 0 <= steer < 1:
            raise ValueError(
                f"kinetic and jacobian must be at least 0 and steer in [0, 1), got {kinetic}, {jacobian} and {steer}."
            )
        self.f, self.shape, self.noise = vector_field, tuple(shape), noise
        self.exact = math.prod(shape) <= EXACT if exact is None else exact
        self.kinetic, self.jacobian, self.steer = kinetic, jacobian, steer
        self.solver = {"method": method, "rtol": rtol, "atol": atol, "step_size": step_size, "adjoint": adjoint}
        self.stats = NeuralODE(vector_field, **self.solver).stats

    def log_prob(self, x: Float[Tensor, "B ..."], cond: Tensor | None = None, draws: int = 1) -> Float[Tensor, " B"]:
        """log p(x) in nats (eq. 3.9); with Hutchinson's estimate the mean over ``draws`` of the noise, unbiased.

        Raises:
            ValueError: x is not [B, *shape] of finite floats, cond has another number of rows, draws is less than 1.
            SolverError: the solve fails.
        """
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}.")
        self._check(x, cond)
        draws = 1 if self.exact else draws
        return sum(self._flow(x, cond, 1.0, None)[0] for _ in range(draws)) / draws

    def loss(
        self, x: Float[Tensor, "B ..."], cond: Tensor | None = None, source: Noise | None = None
    ) -> dict[str, Tensor]:
        """Maximum likelihood: {"loss", "nll", "kinetic", "jacobian"}, means over the batch.

        "loss" is "nll", in nats, plus the weighted regularizers (eqs. 6.17, 6.18), which are no part of the likelihood.
        The noise is drawn from ``source``; None: torch's own generator. The errors are those of ``log_prob``.
        """
        self._check(x, cond)
        end = 1 + self.steer * (2 * float(torch.rand(())) - 1) if self.steer else 1.0
        log_prob, kinetic, jacobian = (value.mean() for value in self._flow(x, cond, end, source))
        loss = -log_prob + self.kinetic * kinetic + self.jacobian * jacobian
        return {"loss": loss, "nll": -log_prob, "kinetic": kinetic, "jacobian": jacobian}

    def flow_matching_loss(
        self,
        x: Float[Tensor, "B ..."],
        cond: Tensor | None = None,
        noise: Tensor | None = None,
        t: Float[Tensor, " B"] | None = None,
        weight: Float[Tensor, " B"] | None = None,
    ) -> Tensor:
        """Flow matching (Lipman et al. 2023): mean square of f(t, x_t) - (noise - x), x_t = (1 - t) x + t noise.

        No solve: the field learns the mean velocity of straight lines from data to noise. Noise and t are drawn here if
        they are not given; ``weight`` multiplies each row's mean square. Raises ValueError as ``log_prob`` does.
        """
        self._check(x, cond)
        noise = torch.randn_like(x) if noise is None else noise
        t = torch.rand(len(x), device=x.device, dtype=x.dtype) if t is None else t
        s = t.view(-1, *[1] * (x.ndim - 1))
        x_t = (1 - s) * x + s * noise
        velocity = self.f(t, x_t) if cond is None else self.f(t, x_t, cond)
        square = (velocity - (noise - x)).square()
        return square.mean() if weight is None else (weight.view(-1) * square.flatten(1).mean(1)).mean()

    @torch.no_grad()
    def sample(self, n: int, cond: Tensor | None = None, noise: Tensor | None = None) -> Float[Tensor, "n ..."]:
        """n samples: the flow of noise backwards, from t = 1 to t = 0; cond has n rows.

        Raises:
            ValueError: n is less than 1, cond or noise has another number of rows.
            SolverError: the solve fails.
        """
        like = next(self.f.parameters(), torch.empty(0))
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}.")
        noise = torch.randn(n, *self.shape, device=like.device, dtype=like.dtype) if noise is None else noise
        self._check(noise, cond)
        if len(noise) != n:
            raise ValueError(f"noise must have {n} rows, got {len(noise)}.")
        return self.carry(noise, torch.tensor([1.0, 0.0]), cond)[-1]

    def carry(
        self, x: Float[Tensor, "B ..."], t: Float[Tensor, " T"], cond: Tensor | None = None
    ) -> Float[Tensor, "T B ..."]:
        """Where points that are at x at time t[0] are at the times t: the flow itself, in either direction."""
        f = self.f if cond is None else _Given(self.f, cond)
        ode = NeuralODE(f, **self.solver)
        path = ode(x, t.to(x))
        self.stats = ode.stats
        return path

    def _flow(self, x: Tensor, cond: Tensor | None, end: float, source: Noise | None) -> tuple[Tensor, Tensor, Tensor]:
        """log p, kinetic energy and Jacobian norm per number in x, [B] each, of the flow from t = 0 to ``end``."""
        noise = None if self.exact else self._draw(x, source)
        ode = NeuralODE(_Augmented(self.f, self.shape, cond, noise), **self.solver)
        z = torch.cat([x.flatten(1), x.new_zeros(len(x), 3)], 1)
        z = ode(z, torch.tensor([0.0, end]).to(x))[-1]
        self.stats = ode.stats
        x1, (trace, kinetic, jacobian) = z[:, :-3], z[:, -3:].unbind(1)
        normal = -0.5 * (x1.square() + math.log(2 * math.pi)).sum(1)
        return normal + trace, kinetic / x1.shape[1], jacobian / x1.shape[1]

    def _draw(self, x: Tensor, source: Noise | None) -> Tensor:
        def draw(name: str) -> Tensor:
            if source is not None:
                return getattr(source, name)(*self.shape).to(x)
            return getattr(torch, name)(x.shape, dtype=x.dtype, device=x.device)

        return draw("randn") if self.noise == "gaussian" else (draw("rand") < 0.5).to(x) * 2 - 1

    def _check(self, x: Tensor, cond: Tensor | None) -> None:
        if x.ndim != 1 + len(self.shape) or tuple(x.shape[1:]) != self.shape or not len(x):
            raise ValueError(f"x must be [B, {', '.join(map(str, self.shape))}], B at least 1, got {list(x.shape)}.")
        if not x.is_floating_point() or not torch.isfinite(x).all():
            got = "NaN or infinity" if x.is_floating_point() else x.dtype
            raise ValueError(f"x must hold finite floats, got {got}.")
        if cond is not None and len(cond) != len(x):
            raise ValueError(f"cond must have {len(x)} rows, as x has, got {len(cond)}.")


class _Given(nn.Module):
    """f with its condition filled in."""

    def __init__(self, f: nn.Module, cond: Tensor) -> None:
        super().__init__()
        self.f, self.cond = f, cond

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.f(t, x, self.cond)
