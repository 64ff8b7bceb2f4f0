"""Video prediction with a latent ODE on moving digits (report, chapter 4)."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sklearn.svm
import torch
from torch import Tensor
from torch.utils.data import Dataset

from predoc_lib import checkpoint, metrics, results, training
from predoc_lib.baselines import LatentGRU, copy_last, cross_fade, mean_image
from predoc_lib.batches import Rows
from predoc_lib.data import MovingDigits, catalog, moving_digits
from predoc_lib.experiments.config import ConfigError, TrainingConfig, choose_device, option
from predoc_lib.experiments.running import experiment, main
from predoc_lib.latent_ode import FIELDS, LAYOUTS, LIKELIHOODS, STARTS, LatentODE
from predoc_lib.ode import ADAPTIVE, FIXED_STEP
from predoc_lib.render import crop

CONTEXT, FRAMES = 10, 20  # the report's: the first 10 frames are the context, the next 10 are predicted


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """What a run of this experiment is made of."""

    dataset: str = option("digits", "handwriting: embedded digits, or MNIST", choices=("digits", "mnist"))
    n_digits: int = option(1, "digits in a video (the report: 1 and 2)", choices=(1, 2))
    canvas: int = option(32, "side of the square canvas, pixels (the report: 64)", choices=(32, 64))
    stride: int = option(1, "every stride-th frame is observed and scored, the others never", choices=(1, 2))
    dynamics: str = option("ode", "what moves the latent: Neural ODE, or the GRU baseline", choices=("ode", "gru"))
    layout: str = option("objects", "latent with an object's position and content, or unstructured", choices=LAYOUTS)
    field: str = option("rotation", "what the Neural ODE's field may be", choices=tuple(FIELDS))
    t0: str = option("last", "frame seen at which the ODE starts (the report: first)", choices=STARTS)
    objective: str = option(
        "prediction", "frames scored in training: all 20, or the 10 seen (the report)",
        choices=("prediction", "reconstruction"),
    )  # fmt: skip
    n_videos: int = option(0, "training videos (the report: 10000); 0: new ones at every step", low=0)
    batch_size: int = option(32, "videos a step (the report: 128)", low=1)
    steps: int = option(3000, "optimizer steps (the report: 2000 epochs of 79 steps)", low=1)
    state: int = option(24, "numbers in an object's state, even", low=4)
    content: int = option(32, "numbers in an object's content", low=1)
    width: int = option(128, "of the hidden layers", low=16)
    kl_weight: float = option(0.02, "weight of the KL term of eq. 4.4 (the report: 1)", low=0)
    likelihood: str = option("bernoulli", "of a pixel", choices=LIKELIHOODS)
    method: str = option("rk4", "ODE solver", choices=ADAPTIVE + FIXED_STEP)
    step_size: float = option(1.0, "longest step of a fixed-step solver, frames", low=1e-3)
    tolerance: float = option(1e-4, "relative and absolute, of an adaptive solver", low=1e-12)
    adjoint: bool = option(False, "gradients by the adjoint method instead of through the solver")
    n_test: int = option(256, "unseen videos that are measured at the end", low=1)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 40, "batch_size": 16, "n_test": 32},
        "book": {},
        "thesis": {
            "dataset": "mnist", "canvas": 64, "objective": "reconstruction", "t0": "first", "n_videos": 10_000,
            "batch_size": 128, "steps": 2000 * 79, "kl_weight": 1.0,
        },
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state % 2:
            raise ConfigError(f"Parameter 'state' must be even, got {self.state}.")


def build_model(config: Config) -> LatentODE:
    """The untrained model of a Config."""
    plain = config.layout == "plain"
    options = {
        "objects": config.n_digits,
        "layout": config.layout,
        "field": config.field,
        "t0": config.t0,
        # The unstructured latent has as many numbers as the objects' states and contents together.
        "state": config.n_digits * (config.state + config.content) if plain else config.state,
        "content": config.content,
        "width": config.width,
        "likelihood": config.likelihood,
        "kl_weight": config.kl_weight,
    }
    frame = (config.canvas, config.canvas)
    if config.dynamics == "gru":
        return LatentGRU(frame, step=float(config.stride), **options)
    solver = {"rtol": config.tolerance, "atol": config.tolerance, "adjoint": config.adjoint}
    return LatentODE(frame, method=config.method, step_size=config.step_size, **solver, **options)


def load(folder: Path) -> tuple[LatentODE, Config]:
    """The trained model of a run's or a recorded result's folder, and its Config.

    Raises:
        ResultError, WeightsError: a file is absent or damaged, or the weights are of another model.
    """
    config = Config(**results.load(folder)["config"])
    return checkpoint.load_weights(build_model(config), Path(folder) / "weights.safetensors").eval(), config


def observed_times(config: Config) -> Tensor:
    """Times of the frames that the model sees: every stride-th of the first 10."""
    return torch.arange(0.0, CONTEXT, config.stride)


class Videos(Dataset):
    """Frames of training videos at the scored times: ``n_videos`` of them, or an endless supply."""

    def __init__(self, config: Config, t: Tensor) -> None:
        self.config, self.t = config, t
        if config.n_videos:
            self.videos = _videos(config, config.n_videos, (config.seed, 0))

    def __getitems__(self, numbers: list[int]) -> Tensor:
        if self.config.n_videos:
            return self.videos[torch.tensor(numbers)].frames(self.t)
        # A batch of an endless supply is drawn at once, from the number of its step; a process renders its rows of it.
        batch = self.config.batch_size
        step = 1 + numbers[0] // batch
        videos = _videos(self.config, batch, (self.config.seed, step))
        return videos[torch.tensor(numbers) % batch].frames(self.t)

    @staticmethod
    def collate(frames: Tensor) -> Tensor:
        """It is a batch already."""
        return frames


class FiniteVideos(Videos):
    """Videos that are seen again."""

    def __len__(self) -> int:
        return self.config.n_videos


@experiment("latent_ode")
def run(config: Config, folder: Path | None = None, progress: bool | None = None) -> dict[str, Any] | None:
    """Train, measure on ``n_test`` unseen videos, and return the record (see ``results.record``).

    Args:
        config: what to run.
        folder: where all is kept; a run that was stopped there goes on. None: nowhere.
        progress: show a progress bar; None: if stderr is a terminal.

    Raises:
        DataError: the data set is absent or damaged; nothing was written.
        TrainingError: training cannot go on.
    """
    data = {"name": config.dataset, "sha256": catalog.checksum(config.dataset)}
    torch.manual_seed(config.seed)
    model = build_model(config)
    seen = observed_times(config)
    scored = torch.arange(0.0, FRAMES if config.objective == "prediction" else CONTEXT, config.stride)

    def loss(model: LatentODE, frames: Tensor, rows: Rows) -> dict[str, Any]:
        noise = rows.randn(model.latent_size)
        parts = model.negative_elbo(frames, scored.to(frames.device), n_context=len(seen), noise=noise)
        return parts | {"evaluations": model.stats["evaluations"]}

    validation = _videos(config, 64, (config.seed, 0), "validation")
    done = training.fit(
        model, (FiniteVideos if config.n_videos else Videos)(config, scored), loss, **config.training(model),
        networks=model.networks, folder=folder, progress=progress, show="prediction_psnr",
        evaluate=lambda model, mine: progress_figures(model, validation[mine], seen),
    )  # fmt: skip
    if not done.is_main:
        return None
    return results.record(
        "latent_ode", config, measure(model, config), device=choose_device(config.device), wall_time_s=done.seconds,
        evaluations=round(done.history[-1]["evaluations"]), data=data, history=done.history,
    )  # fmt: skip


def _videos(config: Config, n: int, seed: tuple[int, int], split: str = "train") -> MovingDigits:
    return moving_digits(
        n, dataset=config.dataset, n_digits=config.n_digits, canvas=config.canvas, seed=seed, split=split
    )


def predictor(model: LatentODE, videos: MovingDigits, seen: Tensor):
    """A function of times [T] that gives the model's frames [B, T, C, H, W], from the observed ones alone."""
    device = next(model.parameters()).device
    context = videos.frames(seen).to(device)

    @torch.no_grad()
    def predict(t: Tensor) -> Tensor:
        return model.predict(context, seen.to(device), t.to(device)).cpu()

    return predict


def progress_figures(model: LatentODE, videos: MovingDigits, seen: Tensor) -> dict[str, Tensor]:
    """What is followed during training, on validation videos, one value for each.

    ``reconstruction_psnr`` and ``prediction_psnr`` in dB; ``position_error``: distance in pixels between the centres of
    brightness of predicted and true frames (with one digit: how far off the digit is), frames 11-20.
    """
    predict, later = predictor(model, videos, seen), torch.arange(float(CONTEXT), FRAMES)
    true, predicted = videos.frames(later), predict(later)
    distance = (metrics.centroid(predicted - predicted.amin((-3, -2, -1), keepdim=True)) - metrics.centroid(true)).norm(
        dim=-1
    )
    return {
        "reconstruction_psnr": metrics.psnr(predict(seen), videos.frames(seen)).mean(1),
        "prediction_psnr": metrics.psnr(predicted, true).mean(1),
        "position_error": distance.mean(1),
    }


def spans(config: Config) -> dict[str, Tensor]:
    """The times that are measured: observed, predicted (all frames 11-20), half-way between observed ones, before."""
    seen = observed_times(config)
    return {
        "reconstruction": seen,
        "prediction": torch.arange(float(CONTEXT), FRAMES),
        "half_way": (seen[:-1] + seen[1:]) / 2,
        "backwards": torch.arange(-5.0, 0),
    }


def measure(model: LatentODE, config: Config) -> dict[str, Any]:
    """Figures of a model and of the baselines on unseen videos, {span: {method: {"mse", "psnr", "ssim"}}}.

    Besides: "parameters", and for one digit "readable", the accuracy of a digit classifier on the true and on the
    predicted last frame.
    """
    videos, seen = _videos(config, config.n_test, (1234, 0), "test"), observed_times(config)
    context, mean = videos.frames(seen), mean_image(_videos(config, 1024, (1234, 1)).frames(torch.arange(FRAMES)))
    predict = predictor(model, videos, seen)
    measured: dict[str, Any] = {}
    for span, t in spans(config).items():
        true = videos.frames(t)
        frames = {config.dynamics: predict(t), "mean image": mean.expand_as(true)}
        if span != "reconstruction":  # there, both of these are the true frame itself
            frames["copy-last"] = copy_last(context, seen, t)
        if span == "half_way":
            frames["cross-fade"] = cross_fade(context, seen, t)
        measured[span] = {
            method: {name: f(x, true).mean().item() for name, f in FIGURES.items()} for method, x in frames.items()
        }
    if config.n_digits == 1:
        last = torch.tensor([FRAMES - 1.0])
        true, predicted = readable(config, videos, videos.frames(last), predict(last))
        measured["readable"] = {"true": true, "predicted": predicted}
    measured["parameters"] = sum(p.numel() for p in model.parameters())
    return measured


FIGURES = {"mse": metrics.mse, "psnr": metrics.psnr, "ssim": metrics.ssim}


def readable(config: Config, videos: MovingDigits, *frames: Tensor) -> list[float]:
    """Accuracies of a digit classifier on the place where the digit truly is in last frames, [B, 1, 1, H, W] each.

    A support vector machine, trained on true last frames of other digits, each looked at up to one pixel off its place.
    """
    t = torch.tensor([FRAMES - 1.0])
    side = videos.images.shape[-1] + 2

    def look(v: MovingDigits, x: Tensor, jitter: float = 0.0) -> np.ndarray:
        offset = (torch.rand(len(v), 2, generator=torch.Generator().manual_seed(0)) * 2 - 1) * jitter - 1
        return crop(x[:, 0, 0], v.position(t)[:, 0, 0] + offset, (side, side)).flatten(1).numpy()

    train = _videos(config, 4096, (1234, 2))
    machine = sklearn.svm.SVC(C=10.0).fit(look(train, train.frames(t), jitter=1.0), train.labels[:, 0].numpy())
    return [float(machine.score(look(videos, x), videos.labels[:, 0].numpy())) for x in frames]


if __name__ == "__main__":
    main(Config, run)
