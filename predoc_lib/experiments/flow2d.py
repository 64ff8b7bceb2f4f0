"""A continuous normalizing flow in the plane, trained in three ways on a known density (eqs. 2.1-2.5, 3.9, 3.10)."""

import dataclasses
import hashlib
import itertools
import math
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sklearn.mixture
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from predoc_lib import checkpoint, results, training
from predoc_lib.batches import Rows
from predoc_lib.cnf import CNF
from predoc_lib.data import densities
from predoc_lib.experiments.config import TWICE, ConfigError, TrainingConfig, choose_device, option
from predoc_lib.experiments.running import experiment, main

Density = densities.Mixture | densities.Checkerboard
OBJECTIVES = ("flow_matching", "likelihood", "rnode")
COMPONENTS = (8, 16, 32, 64, 128)  # of the mixture that a held-out likelihood chooses from


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """What a run of this experiment is made of; the report has no such experiment."""

    density: str = option("gaussians", "what the points are drawn from", choices=densities.DENSITIES)
    objective: str = option(
        "flow_matching", "flow matching, maximum likelihood, or that with RNODE's regularizers", choices=OBJECTIVES
    )
    steps: int = option(8000, "optimizer steps", low=1)
    batch_size: int = option(512, "points a step, all of them new", low=1)
    learning_rate: float = option(5e-3, "the highest, of Adam with warm-up and cosine decay", low=1e-8)
    clip: float = option(10.0, "longest gradient, a longer one is scaled down; 0: none is", low=0)
    ema: float = option(0.999, "decay of the moving average of the weights that is measured and kept; 0: none", low=0)
    width: int = option(128, "of the field's three hidden layers", low=1)
    frequencies: int = option(32, "plane waves that the field sees a point through", low=0)
    frequency: float = option(2.5, "standard deviation of the waves' frequencies, radians a unit of length", low=0)
    kinetic: float = option(0.01, "weight of the kinetic energy, eq. 6.17, if the objective is rnode", low=0)
    jacobian: float = option(0.01, "weight of the Jacobian's norm, eq. 6.18, if the objective is rnode", low=0)
    steer: float = option(0.0, "half the width of the random end time in training; 0: it always ends at 1", low=0)
    tolerance: float = option(1e-3, "relative and absolute, of dopri5 in training; 1e-5 when it is measured", low=1e-12)
    n_test: int = option(20_000, "unseen points that are measured at the end", low=2)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 30, "batch_size": 64, "n_test": 256, "width": 32, "frequencies": 8},
        "book": {},
        "thesis": {"steps": 100_000, "width": 512, "batch_size": 4096, "learning_rate": 1e-3},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile and self.objective != "flow_matching":
            raise ConfigError(TWICE.format(self.objective))


class PlanarField(nn.Module):
    """f(t, x) in the plane: a perceptron of the point, of plane waves of it, and of the time.

    The waves (random Fourier features, Tancik et al. 2020) let a small network draw sharp edges.

    Args:
        width: of the three hidden layers.
        frequencies: waves.
        frequency: standard deviation of their frequencies, radians a unit of length.
    """

    def __init__(self, width: int, frequencies: int, frequency: float) -> None:
        super().__init__()
        self.register_buffer("wave", frequency * torch.randn(2, frequencies))
        self.register_buffer("clock", torch.arange(1, 5) * (math.pi / 2))
        sizes = [2 + 2 * frequencies + 8, width, width, width]
        hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))
        nn.init.zeros_(self.layers[-1].weight)  # at first nothing moves: a likelihood's solve is then cheap and stable
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, t: Float[Tensor, "..."], x: Float[Tensor, "B 2"]) -> Float[Tensor, "B 2"]:
        """The velocity; t is a 0-d tensor, or one time a point."""
        wave, clock = x @ self.wave, t.expand(len(x))[:, None] * self.clock
        return self.layers(torch.cat([x, wave.sin(), wave.cos(), clock.sin(), clock.cos()], 1))


class Points(Dataset):
    """An endless supply of points of a density."""

    def __init__(self, config: Config) -> None:
        self.config, self.density = config, densities.density(config.density)

    def __getitems__(self, numbers: list[int]) -> Tensor:
        # A batch is drawn at once, from the number of its step; a process takes its rows of it.
        batch = self.config.batch_size
        points = _points(self.density, batch, (self.config.seed, 1 + numbers[0] // batch))
        return points[torch.tensor(numbers) % batch]

    @staticmethod
    def collate(points: Tensor) -> Tensor:
        """It is a batch already."""
        return points


def _points(density: Density, n: int, seed: tuple[int, int]) -> Tensor:
    number = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return density.sample(n, torch.Generator().manual_seed(number))


def build_model(config: Config) -> CNF:
    """The untrained flow of a Config."""
    regular = config.objective == "rnode"
    return CNF(
        PlanarField(config.width, config.frequencies, config.frequency), (2,),
        kinetic=config.kinetic if regular else 0.0, jacobian=config.jacobian if regular else 0.0, steer=config.steer,
        rtol=config.tolerance, atol=config.tolerance,
    )  # fmt: skip


def load(folder: Path) -> tuple[CNF, Config]:
    """The trained flow of a run's or a recorded result's folder, at the tolerance of measurements, and its Config.

    Raises:
        ResultError, WeightsError: a file is absent or damaged, or the weights are of another model.
    """
    config = Config(**results.load(folder)["config"])
    return precise(checkpoint.load_weights(build_model(config), Path(folder) / "weights.safetensors").eval()), config


def precise(model: CNF) -> CNF:
    """The same flow, solved at the tolerance of measurements."""
    return CNF(model.f, model.shape, rtol=1e-5, atol=1e-5)


@experiment("flow2d")
def run(config: Config, folder: Path | None = None, progress: bool | None = None) -> dict[str, Any] | None:
    """Train a flow, measure it on ``n_test`` unseen points, and return the record (see ``results.record``).

    Args:
        config: what to run.
        folder: where all is kept; a run that was stopped there goes on. None: nowhere.
        progress: show a progress bar; None: if stderr is a terminal.

    Raises:
        TrainingError: training cannot go on.
    """
    torch.manual_seed(config.seed)
    model, data = build_model(config), Points(config)

    def loss(model: CNF, x: Tensor, rows: Rows) -> dict[str, Any]:
        if config.objective == "flow_matching":
            # One time in each of B equal parts of [0, 1]: less noise in the gradient than from B independent times.
            t = (torch.arange(rows.start, rows.stop, device=x.device) + rows.rand()) / rows.batch
            return {"loss": model.flow_matching_loss(x, noise=rows.randn(2), t=t), "evaluations": 1}
        return model.loss(x) | {"evaluations": model.stats["evaluations"]}

    validation = _points(data.density, 1024, (config.seed, 0))
    done = training.fit(
        model, data, loss, **config.training(model), networks=[model.f], folder=folder, progress=progress, show="gap",
        evaluate=lambda model, mine: {"gap": gap(precise(model), data.density, validation[mine])},
    )  # fmt: skip
    if not done.is_main:
        return None
    source = hashlib.sha256(Path(densities.__file__).read_bytes()).hexdigest()
    return results.record(
        "flow2d", config, measure(model, config), device=choose_device(config.device), wall_time_s=done.seconds,
        evaluations=round(done.history[-1]["evaluations"]), data={"name": config.density, "sha256": source},
        history=done.history,
    )  # fmt: skip


@torch.no_grad()
def gap(model: CNF, density: Density, x: Float[Tensor, "B 2"]) -> Float[Tensor, " B"]:
    """log p(x) - log q(x) in nats; its mean over points of p is the divergence KL(p | q), at least 0, 0 if q = p."""
    device = next(model.parameters()).device
    return density.log_prob(x) - model.log_prob(x.to(device)).cpu()


def measure(model: CNF, config: Config) -> dict[str, Any]:
    """Figures of a flow on unseen points, and of a mixture of Gaussians fitted to as many.

    ``entropy`` of the density, ``gap`` (nats above it) with its standard error, evaluations of the field for a density
    and for samples, "parameters"; the mixture's ``gap``, ``seconds`` and ``components``.
    """
    density, model = densities.density(config.density), precise(model)
    x = _points(density, config.n_test, (1234, 0))
    above = gap(model, density, x)
    found = {"entropy": density.entropy(), "gap": above.mean().item(), "gap_se": _standard_error(above)}
    found["evaluations_density"] = model.stats["evaluations"]
    device = next(model.parameters()).device
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)).to(device)
    model.sample(len(noise), noise=noise)
    found["evaluations_sample"] = model.stats["evaluations"]
    found["parameters"] = sum(p.numel() for p in model.parameters())
    return found | {"mixture": fit_mixture(config, density, x)}


def fit_mixture(config: Config, density: Density, x: Tensor) -> dict[str, float]:
    """The plain baseline: scikit-learn's mixture of Gaussians, its size chosen by likelihood on held-out points."""
    train, held_out = (_points(density, config.n_test, (1234, i)).numpy() for i in (1, 2))
    start = time.perf_counter()
    fits = [
        sklearn.mixture.GaussianMixture(k, random_state=config.seed, reg_covar=1e-5).fit(train)
        for k in COMPONENTS
        if k < len(train)
    ]
    best = max(fits, key=lambda mixture: mixture.score(held_out))
    above = density.log_prob(x).numpy() - best.score_samples(x.numpy())
    return {"gap": float(above.mean()), "seconds": time.perf_counter() - start, "components": best.n_components}


def _standard_error(values: Tensor) -> float:
    return (values.std() / math.sqrt(len(values))).item()


if __name__ == "__main__":
    main(Config, run)
