"""An experiment of one's own: a neural ODE learns how a pendulum swings, from noisy measurements.

    python examples/own_experiment.py --preset smoke --folder runs/pendulum/first
    torchrun --nproc-per-node 2 examples/own_experiment.py --preset smoke --folder runs/pendulum/second

Killed at any moment, either command goes on from the last checkpoint when it is given again.
"""

import dataclasses
from hashlib import sha256
from typing import ClassVar

import torch

from predoc_lib import ode, results, training
from predoc_lib.experiments.config import TrainingConfig, choose_device, option
from predoc_lib.experiments.running import experiment, main

TIMES = torch.linspace(0, 5, 21)  # a small swing takes 2 pi


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """The parameters of every training, and two of its own; each becomes an option of the command line."""

    width: int = option(64, "of the hidden layer", low=1)
    noise: float = option(0.05, "standard deviation of a measured angle (radians) and velocity", low=0)
    presets: ClassVar[dict] = {"smoke": {"steps": 150, "learning_rate": 0.01}, "book": {}, "thesis": {"width": 512}}


def pendulum(x):
    """The velocity of x = (angle, angular velocity), [B, 2]: the truth, which the model does not know."""
    return torch.stack([x[:, 1], -x[:, 0].sin()], 1)


def follow(f, start):
    """Solve x' = f(x) from [B, 2] at TIMES, [B, T, 2]; with fixed steps, so that other rows change nothing."""
    return ode.NeuralODE(lambda t, x: f(x), method="rk4")(start, TIMES.to(start.device)).transpose(0, 1)


def misfit(f, swings):
    """Mean squared difference of swings [B, T, 2] from what f makes of their first points, [B]."""
    return (follow(f, swings[:, 0]) - swings).square().mean((1, 2))


@experiment("pendulum")
def run(config, folder=None, progress=None):
    """Train on noisy swings of a pendulum, and measure on others."""
    torch.manual_seed(config.seed)
    train, validation, test = follow(pendulum, 2.8 * torch.rand(1344, 2) - 1.4).split([1024, 64, 256])
    net = torch.nn.Sequential(torch.nn.Linear(2, config.width), torch.nn.Tanh(), torch.nn.Linear(config.width, 2))

    def loss(net, batch, rows):  # rows.randn: a row's noise is the same however many processes share the batch
        return misfit(net, batch[0] + config.noise * rows.randn(*batch[0].shape[1:])).mean()

    done = training.fit(
        net, torch.utils.data.TensorDataset(train), loss, **config.training(net),
        folder=folder, progress=progress, show="error",  # and one error for each swing of this process's share:
        evaluate=lambda net, mine: {"error": misfit(net, validation[mine].to(net[0].weight.device)).sqrt()},
    )  # fmt: skip
    if done.is_main:  # of many processes one measures and writes
        rivals = {"neural ODE": net.cpu(), "small swings, x'' = -x": lambda x: torch.stack([x[:, 1], -x[:, 0]], 1)}
        return results.record(
            "pendulum", config, {name: misfit(f, test).mean().sqrt().item() for name, f in rivals.items()},
            device=choose_device(config.device), wall_time_s=done.seconds, evaluations=4 * (len(TIMES) - 1),
            data={"name": "pendulum", "sha256": sha256(train.numpy().tobytes()).hexdigest()}, history=done.history,
        )  # fmt: skip


if __name__ == "__main__":
    main(Config, run)
