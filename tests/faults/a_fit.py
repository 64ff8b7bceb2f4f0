"""A small run for the fault tests to start, kill and start again: ``python a_fit.py FOLDER [KEY=VALUE ...]``."""

import sys
import time
from pathlib import Path

import torch
from torch import nn

from predoc_lib.ode import NeuralODE
from predoc_lib.training import fit, warm_up_cosine


class Field(nn.Module):
    """f(t, x)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, t, x):
        return self.net(x)


class Points:
    """64 points, and how to fail to read one."""

    def __init__(self, broken=-1):
        self.x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        self.broken = broken

    def __len__(self):
        return 64

    def __getitem__(self, i):
        if i == self.broken:
            raise OSError("sector 7 cannot be read")
        return self.x[i]


def train(folder, *, steps=40, batch_size=8, every=2, pause=0.0, seed=0, broken=-1, workers=0, dies_at=0, before=None):
    """Learn to turn points by a right angle; returns the weights."""
    torch.manual_seed(seed)
    ode = NeuralODE(Field(), method="rk4", step_size=0.5)
    optimizer = torch.optim.Adam(ode.parameters(), lr=1e-2)

    def loss(ode, x, rows):
        time.sleep(pause)
        if before is not None:
            before(rows.step)
        if rows.step == dies_at and rows.start:  # the second process
            import os

            os._exit(7)
        end = ode(x + 0.05 * rows.randn(2), torch.tensor([0.0, 1.0]))[-1]
        turned = torch.stack([-x[:, 1], x[:, 0]], 1)
        return {"loss": (end - turned).square().mean(), "evaluations": ode.stats["evaluations"]}

    done = fit(
        ode, Points(broken), loss, optimizer, schedule=warm_up_cosine(optimizer, steps), steps=steps,
        batch_size=batch_size, ema=0.9, evaluate_every=every, folder=folder, seed=seed, workers=workers, progress=False,
        evaluate=lambda ode, mine: {"error": (ode(Points().x[mine], torch.tensor([0.0, 1.0]))[-1]).square().sum(1)},
        identity={"experiment": "turn", "steps": steps, "seed": seed},
    )  # fmt: skip
    return ode.state_dict(), done


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = {key: (float if "." in value else int)(value) for key, value in (x.split("=") for x in sys.argv[2:])}
    _, done = train(Path(sys.argv[1]), **options)
    if done.is_main:
        print("losses", *(repr(row["loss"]) for row in done.history))
        print("errors", *(repr(row["error"]) for row in done.history))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
