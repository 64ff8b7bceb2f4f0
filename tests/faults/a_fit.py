"""A small training run, for the fault tests to start and kill: ``python a_fit.py FOLDER [KEY=VALUE ...]``."""

import json
import os
import signal
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
    """64 points, a list of those that were read, and how to fail to read one."""

    def __init__(self, broken=-1):
        self.x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        self.broken, self.seen = broken, []

    def __len__(self):
        return 64

    def __getitem__(self, i):
        if i == self.broken:
            raise OSError("sector 7 cannot be read")
        self.seen.append(i)
        return self.x[i]


def train(folder, *, steps=40, every=2, pause=0.0, seed=0, broken=-1, workers=0, dies_at=0, number=0, log=0):
    """Learn to turn points by a right angle; returns the weights.

    Args:
        folder: of the run.
        steps: of the run.
        every: steps between checkpoints.
        pause: seconds that a step takes longer; one that takes more than a second says so.
        seed: of weights and data.
        broken: the number of a point that cannot be read.
        workers: that load data.
        dies_at: the step in which the second process ends: by a signal of this
        number: or at 0, of itself, with exit code 7.
        log: write what each process read and did to the folder, beside it.
    """
    torch.manual_seed(seed)
    ode, data, touched = NeuralODE(Field(), method="rk4", step_size=0.5), Points(broken), []
    optimizer = torch.optim.Adam(ode.parameters(), lr=1e-2)
    if log:
        sys.addaudithook(lambda event, arguments: touched.append(event) if changes(folder, event, arguments) else None)

    def loss(ode, x, rows):
        if pause > 1:
            print("waiting", flush=True)
        time.sleep(pause)
        if rows.step == dies_at and rows.start:  # the second process
            os.kill(os.getpid(), number) if number else os._exit(7)
        end = ode(x + 0.05 * rows.randn(2), torch.tensor([0.0, 1.0]))[-1]
        turned = torch.stack([-x[:, 1], x[:, 0]], 1)
        return {"loss": (end - turned).square().mean(), "evaluations": ode.stats["evaluations"]}

    done = fit(
        ode, data, loss, optimizer, schedule=warm_up_cosine(optimizer, steps), steps=steps, batch_size=8, ema=0.9,
        evaluate_every=every, folder=folder, seed=seed, workers=workers, progress=False,
        evaluate=lambda ode, mine: {"error": (ode(Points().x[mine], torch.tensor([0.0, 1.0]))[-1]).square().sum(1)},
        identity={"experiment": "turn", "steps": steps, "seed": seed},
    )  # fmt: skip
    if log:
        notes = {"seen": data.seen, "touched": touched, "random": torch.initial_seed()}
        folder.with_name(f"log-{os.environ.get('RANK', 0)}").write_text(json.dumps(notes))
    return ode.state_dict(), done


def changes(folder, event, arguments):
    """Whether what Python tells an audit hook is a change to a file in a folder."""
    if event not in ("open", "os.rename", "os.remove") or not str(arguments[0]).startswith(f"{folder}/"):
        return False
    return event != "open" or arguments[1] not in ("r", "rb")


def main(folder, *options):
    """What the command line asks for."""
    torch.set_num_threads(1)
    pairs = (option.split("=") for option in options)
    _, done = train(Path(folder), **{key: (float if "." in value else int)(value) for key, value in pairs})
    if done.is_main:
        print("losses", *(repr(row["loss"]) for row in done.history))
        print("errors", *(repr(row["error"]) for row in done.history))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without
    main(*sys.argv[1:])
