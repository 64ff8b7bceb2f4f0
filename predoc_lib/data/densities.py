"""Densities in the plane that are known exactly, so that a model's distance from the truth is known too."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from predoc_lib.naming import unknown


class Mixture:
    """A mixture of round Gaussians of equal weight: the means [K, 2] and one standard deviation."""

    def __init__(self, means: Float[Tensor, "K 2"], scale: float) -> None:
        self.means, self.scale = means, scale

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
        """n points."""
        chosen = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[chosen] + self.scale * torch.randn(n, 2, generator=generator)

    def log_prob(self, x: Float[Tensor, "B 2"]) -> Float[Tensor, " B"]:
        """Nats."""
        square = (x[:, None] - self.means.to(x)).square().sum(-1)
        parts = -square / (2 * self.scale**2) - math.log(2 * math.pi * self.scale**2)
        return parts.logsumexp(1) - math.log(len(self.means))

    def entropy(self) -> float:
        """Nats: the sum of -p log p over a grid that is fine and wide enough for an error below 1e-4."""
        edge = self.means.abs().amax().item() + 6 * self.scale
        step = self.scale / 8
        axis = torch.arange(-edge, edge + step, step, dtype=torch.float64)
        total = 0.0
        for rows in axis.split(64):
            log_p = self.log_prob(torch.cartesian_prod(rows, axis))
            total -= float((log_p.exp() * log_p).sum()) * step**2
        return total


class Checkerboard:
    """Uniform on every other square of a board of 4 x 4 squares with a side of 1, centred at 0."""

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n 2"]:
        """n points."""
        column, half = torch.randint(4, (n,), generator=generator), torch.randint(2, (n,), generator=generator)
        corner = torch.stack([column, 2 * half + column % 2], 1) - 2.0
        return corner + torch.rand(n, 2, generator=generator)

    def log_prob(self, x: Float[Tensor, "B 2"]) -> Float[Tensor, " B"]:
        """Nats; minus infinity off the dark squares."""
        square = x.floor()
        dark = ((square.sum(1) % 2) == 0) & (square >= -2).all(1) & (square < 2).all(1)
        return torch.where(dark, -math.log(8), -torch.inf).to(x.dtype)

    def entropy(self) -> float:
        """Nats."""
        return math.log(8)


def _ring() -> Mixture:
    angle = torch.arange(8) * (math.pi / 4)
    return Mixture(2 * torch.stack([angle.cos(), angle.sin()], 1), 0.2)


def _spiral() -> Mixture:
    along = torch.linspace(0.15, 1, 60) * 3 * math.pi
    arm = along[:, None] / 4 * torch.stack([along.cos(), along.sin()], 1)
    return Mixture(torch.cat([arm, -arm]), 0.15)


DENSITIES = {"gaussians": _ring, "spiral": _spiral, "checkerboard": Checkerboard}


def density(name: str) -> Mixture | Checkerboard:
    """One of ``DENSITIES``: 8 Gaussians on a ring, two spiral arms of 60 Gaussians each, a checkerboard.

    Raises:
        ValueError: it is none of them.
    """
    if name not in DENSITIES:
        raise ValueError(unknown("density", name, DENSITIES))
    return DENSITIES[name]()
