"""Flow matching in the plane beside other libraries: ``pip install torchcfm zuko``, ``python benchmarks/flow2d.py``.

For each density the book's flow trains first (experiment flow2d, preset book); then each peer gets the same points,
about as many weights and as many seconds, with the optimizer and the settings of its own tutorials. All are measured
on the same unseen points: nats above the density's entropy. The peers are
    torchcfm: its conditional flow matching and its perceptron, Adam at 1e-3, 256 points a step;
    zuko: its neural spline flow, by maximum likelihood, Adam at 1e-3, 256 points a step.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import zuko
from torch import Tensor, nn
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
from torchcfm.models import MLP

from predoc_lib.cnf import CNF
from predoc_lib.data.densities import DENSITIES, density
from predoc_lib.experiments import flow2d
from predoc_lib.experiments.config import build
from predoc_lib.files import whole
from predoc_lib.results import device_name, revision


class Reversed(nn.Module):
    """A field of torchcfm, whose time runs from noise at 0 to data at 1, on the book's clock."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -self.net(torch.cat([x, 1 - t.expand(len(x), 1)], 1))


def steps(seconds: float, name: str, batch: int) -> Iterator[Tensor]:
    """New points at every step until the time is over."""
    known, generator, start = density(name), torch.Generator().manual_seed(0), time.perf_counter()
    while time.perf_counter() - start < seconds:
        yield known.sample(batch, generator)


def as_large_as(weights: int, make: Callable[[int], nn.Module]) -> nn.Module:
    """The narrowest network with as many weights."""
    return next(net for net in map(make, range(16, 1000, 4)) if sum(p.numel() for p in net.parameters()) >= weights)


def torchcfm(name: str, seconds: float, weights: int) -> Callable[[Tensor], Tensor]:
    """The log-density of a flow that torchcfm trains."""
    net, matcher = (
        as_large_as(weights, lambda width: MLP(2, w=width, time_varying=True)),
        ConditionalFlowMatcher(sigma=0.0),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for x in steps(seconds, name, 256):
        t, x_t, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
        loss = (net(torch.cat([x_t, t[:, None]], 1)) - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return CNF(Reversed(net), (2,), rtol=1e-5, atol=1e-5).log_prob


def spline(name: str, seconds: float, weights: int) -> Callable[[Tensor], Tensor]:
    """The log-density of zuko's neural spline flow."""
    flow = as_large_as(weights, lambda width: zuko.flows.NSF(2, transforms=3, hidden_features=(width, width)))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    for x in steps(seconds, name, 256):
        loss = -flow().log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow().log_prob


def main() -> None:
    """Train in turn, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    out, found = parser.parse_args().out, {}
    torch.set_num_threads(1)
    for name in DENSITIES:
        config = build(flow2d.Config, "book", density=name, evaluate_every=100_000, device="cpu")
        record = flow2d.run(config)
        seconds, weights = record["wall_time_s"], record["metrics"]["parameters"]
        x, known = density(name).sample(10_000, torch.Generator().manual_seed(99)), density(name)
        found[name] = {"seconds": seconds, "weights": weights, "ours": record["metrics"]["gap"]}
        for peer in (torchcfm, spline):
            torch.manual_seed(0)
            log_prob = peer(name, seconds, weights)
            with torch.no_grad():
                found[name][peer.__name__] = (known.log_prob(x) - log_prob(x)).mean().item()
        print(f"{name}, {seconds:.0f} s each: " + ", ".join(f"{k} {v:.3f}" for k, v in found[name].items()), flush=True)
    if out:
        made = {"device": device_name(torch.device("cpu")), "revision": revision(), "torch": torch.__version__}
        with whole(out) as temporary:
            temporary.write_text(json.dumps(made | {"nats": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
