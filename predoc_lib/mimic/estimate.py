"""Total correlation from samples, by a critic that is trained for it, and closed forms to test it on."""

import copy
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from predoc_lib.mimic.critic import Critic, mutual_interaction

Sample = Callable[[int], Float[Tensor, "n F"]]


def estimate(
    sample: Sample, critic: Critic, *, steps: int = 1500, batch: int = 1024, learning_rate: float = 2e-3,
    last: int = 100_000, watch: Callable[[int, Critic], None] | None = None,
) -> float:  # fmt: skip
    """Train a critic on new samples at every step; its averaged weights' word on a large new sample, nats.

    Args:
        sample: sample(n) draws n rows, or n rows of the data there are.
        critic: trained in place; at the end it has the averaged weights.
        steps: of Adam, its rate falling along a cosine.
        batch: rows a step.
        learning_rate: the first.
        last: rows of the final value.
        watch: watch(step, critic), after every step.
    """
    optimizer = torch.optim.Adam(critic.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    averaged = AveragedModel(critic, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for step in range(steps):
        optimizer.zero_grad()
        critic.loss(sample(batch)).backward()
        optimizer.step()
        schedule.step()
        averaged.update_parameters(critic)
        if watch:
            watch(step + 1, critic)
    critic.load_state_dict(averaged.module.state_dict())
    with torch.no_grad():
        return mutual_interaction(copy.deepcopy(critic).eval(), sample(last)).item()


def gaussians(correlation: Float[Tensor, "F F"]) -> tuple[Sample, float]:
    """Correlated Gaussians, and their total correlation -1/2 log det R, nats."""
    root = torch.linalg.cholesky(correlation)
    return lambda n: torch.randn(n, len(root)) @ root.T, -root.diagonal().log().sum().item()


def equicorrelated(channels: int, nats: float) -> tuple[Sample, float]:
    """Gaussians that all correlate alike, so much that their total correlation is ``nats``.

    det R = (1 - r)^(F - 1) (1 + (F - 1) r) falls in r, which is found by halving.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        r = (low + high) / 2
        found = -0.5 * ((channels - 1) * math.log1p(-r) + math.log1p((channels - 1) * r))
        low, high = (r, high) if found < nats else (low, r)
    return gaussians(torch.full((channels, channels), low).fill_diagonal_(1.0))


def xor(n: int) -> Float[Tensor, "n 3"]:
    """Two fair bits and whether they differ: any two are independent, and all three share log 2 nats."""
    a, b = torch.randint(2, (2, n))
    return torch.stack([a, b, a ^ b], 1).float()


def rotated_square(n: int) -> Float[Tensor, "n 2"]:
    """Points of a square turned by 45 degrees: uncorrelated, with 1 - log 2 nats in common.

    The square |x| + |y| < 1 has area 2; a coordinate has the density 1 - |x|, of entropy 1/2 nat. 2 (1/2) - log 2.
    """
    return (torch.rand(n, 2) * 2 - 1) @ torch.tensor([[0.5, 0.5], [0.5, -0.5]])
