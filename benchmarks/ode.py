"""The book's adjoint beside torchdiffeq's, and four ways to a gradient: ``python benchmarks/ode.py [--out FILE]``.

Solvers are timed in turn, round after round, so that a machine that slows down slows all of them. Gradients are
compared with those of a much tighter solve in double precision.
"""

import argparse
import copy
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchdiffeq
from torch import Tensor, nn

from predoc_lib.measure import bytes_kept
from predoc_lib.ode import integrate, odeint_adjoint
from predoc_lib.results import device_name


class Convolutions(nn.Module):
    """A field on images, [B, C, H, W], that the time enters as one more channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + 1, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        inputs = torch.cat([x, t.expand(len(x), 1, *x.shape[2:])], 1)
        return 3 * self.last(torch.tanh(self.first(inputs)))


class Perceptron(nn.Module):
    """A field in the plane, [B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return 3 * self.layers(torch.cat([x, t.expand(len(x), 1)], 1))


def gradient(solve: Callable, f: nn.Module, x0: Tensor, t: Tensor, calls: list) -> tuple[Tensor, int, int]:
    """Of all that is learned, flat, and f's evaluations forwards and backwards: one training step."""
    f.zero_grad(set_to_none=True)
    calls.clear()
    loss = solve(f, x0, t)[1:].square().sum() / len(x0)
    forwards = len(calls)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in f.parameters()]), forwards, len(calls) - forwards


def measure(solvers: dict[str, Callable], f: nn.Module, x0: Tensor, t: Tensor, rounds: int) -> dict[str, dict]:
    """{name: what a training step takes}, for each solver, all in turn."""
    calls = []
    hook = f.register_forward_pre_hook(lambda *_: calls.append(1))
    exact = functools.partial(direct, rtol=1e-10, atol=1e-10)
    double = copy.deepcopy(f).double()
    true, _, _ = gradient(exact, double, x0.double(), t.double(), calls)
    rows, seconds = {}, {name: [] for name in solvers}
    for name, solve in solvers.items():  # a round to warm up
        found, forwards, backwards = gradient(solve, f, x0, t, calls)
        rows[name] = {
            "bytes_kept": bytes_kept(lambda: solve(f, x0, t), x0.device, [*f.parameters(), x0, t]),  # noqa: B023
            "evaluations": forwards,
            "evaluations_backward": backwards,
            "gradient_error": ((found - true).norm() / true.norm()).item(),
        }
    for _ in range(rounds):
        for name, solve in solvers.items():
            started = time.perf_counter()
            gradient(solve, f, x0, t, calls)
            if x0.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    hook.remove()
    return {name: {"seconds": statistics.median(seconds[name])} | row for name, row in rows.items()}


def direct(f: nn.Module, x0: Tensor, t: Tensor, **options) -> Tensor:
    """Backpropagation through our own steps."""
    return integrate(f, x0, t, **options).x


def show(title: str, rows: dict[str, dict]) -> None:
    """Print a table, with ratios to its first row."""
    base = next(iter(rows.values()))
    print(f"\n{title}\n{'':34}{'ms':>9}{'ratio':>7}{'kept kB':>10}{'ratio':>7}{'evaluations':>13}{'error':>10}")
    for name, row in rows.items():
        ratio = {key: row[key] / base[key] for key in ("seconds", "bytes_kept")}
        evaluations = f"{row['evaluations']} + {row['evaluations_backward']}"
        print(
            f"{name:34}{1e3 * row['seconds']:9.1f}{ratio['seconds']:7.2f}{row['bytes_kept'] / 1e3:10.1f}"
            f"{ratio['bytes_kept']:7.2f}{evaluations:>13}{row['gradient_error']:10.1e}"
        )


def main() -> None:
    """Print both tables, and write them as JSON; the file appears whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    convolutions, perceptron = Convolutions(a.channels).to(device), Perceptron().to(device)
    images = torch.randn(a.batch_size, a.channels, a.side, a.side, device=device)
    points = torch.randn(64, 2, device=device)
    tolerance = {"rtol": a.tolerance, "atol": a.tolerance}
    ours = functools.partial(odeint_adjoint, **tolerance)
    theirs = functools.partial(torchdiffeq.odeint_adjoint, method="dopri5", **tolerance)

    record = {"device": device_name(device), "torchdiffeq": {}} | {k: v for k, v in vars(a).items() if k != "out"}
    for name, f, x0 in (("plane", perceptron, points), ("images", convolutions, images)):
        for times in (1, 10, 50):
            t = torch.linspace(0, 2, times + 1, device=device)
            rows = measure({"torchdiffeq's adjoint": theirs, "our adjoint": ours}, f, x0, t, a.rounds)
            show(f"{name}, {times} observation times", rows)
            record["torchdiffeq"][f"{name}, {times}"] = rows
    solvers = {
        "adjoint": ours,
        "adjoint, seminorm": functools.partial(ours, seminorm=True),
        "direct": functools.partial(direct, **tolerance),
        "direct, checkpointing": functools.partial(direct, checkpoint=True, **tolerance),
        "torchdiffeq: adjoint": theirs,
        "torchdiffeq: adjoint, seminorm": functools.partial(theirs, adjoint_options={"norm": "seminorm"}),
        "torchdiffeq: direct": functools.partial(torchdiffeq.odeint, method="dopri5", **tolerance),
    }
    record["training_step"] = measure(solvers, convolutions, images, torch.tensor([0.0, 2.0], device=device), a.rounds)
    show(f"a training step, images, {record['device']}", record["training_step"])
    temporary = a.out.with_name(f".{a.out.name}.{os.getpid()}")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(a.out)


if __name__ == "__main__":
    main()
