"""Video prediction with a latent ODE on moving digits (report, chapter 4)."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sklearn.svm
import torch
from torch import Tensor

from predoc_lib import metrics, results, training
from predoc_lib.baselines import LatentGRU, copy_last, cross_fade, mean_image
from predoc_lib.data import MovingDigits, catalog, moving_digits
from predoc_lib.experiments.config import DEVICES, ConfigError, check, choose_device, main, option
from predoc_lib.latent_ode import FIELDS, LAYOUTS, LIKELIHOODS, STARTS, LatentODE
from predoc_lib.ode import ADAPTIVE, FIXED_STEP
from predoc_lib.render import crop

CONTEXT, FRAMES = 10, 20  # the report's: the first 10 frames are the context, the next 10 are predicted


@dataclasses.dataclass(frozen=True)
class Config:
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
    learning_rate: float = option(3e-3, "the highest, of Adam with warm-up and cosine decay", low=1e-8)
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
    seed: int = option(0, "of the weights, the videos and the latent noise", low=0)
    device: str = option("auto", "auto: a GPU if there is one", choices=DEVICES)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 40, "batch_size": 16, "n_test": 32},
        "book": {},
        "thesis": {
            "dataset": "mnist", "canvas": 64, "objective": "reconstruction", "t0": "first", "n_videos": 10_000,
            "batch_size": 128, "steps": 2000 * 79, "kl_weight": 1.0,
        },
    }  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
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
    return training.load_weights(build_model(config), Path(folder) / "weights.safetensors").eval(), config


def observed_times(config: Config) -> Tensor:
    """Times of the frames that the model sees: every stride-th of the first 10."""
    return torch.arange(0.0, CONTEXT, config.stride)


def run(config: Config, folder: Path | None = None, progress: bool | None = None) -> dict[str, Any]:
    """Train, measure on ``n_test`` unseen videos, and return the record (see ``results.record``).

    Args:
        config: what to run.
        folder: where metrics.json and weights.safetensors are written; None: nowhere.
        progress: show a progress bar; None: if stderr is a terminal.

    Raises:
        DataError: the data set is absent or damaged; nothing was written.
        TrainingError: the loss is not finite.
    """
    data = {"name": config.dataset, "sha256": catalog.checksum(config.dataset)}
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    model = build_model(config).to(device)
    seen = observed_times(config)
    scored = torch.arange(0.0, FRAMES if config.objective == "prediction" else CONTEXT, config.stride)
    videos = _videos(config, config.n_videos, (config.seed, 0)) if config.n_videos else None
    evaluations = 0

    def loss(step: int) -> Tensor:
        nonlocal evaluations
        if videos is None:
            batch = _videos(config, config.batch_size, (config.seed, step))
        else:
            batch = videos[np.random.default_rng((config.seed, step)).integers(len(videos), size=config.batch_size)]
        frames = batch.frames(scored).to(device)
        value = model.negative_elbo(frames, scored.to(device), n_context=len(seen))["loss"]
        evaluations = model.stats["evaluations"]
        return value

    validation = _videos(config, 64, (config.seed, 0), "validation")
    history, seconds = training.fit(
        model, loss, steps=config.steps, learning_rate=config.learning_rate, folder=folder, progress=progress,
        evaluate=lambda: progress_figures(model, validation, seen), evaluate_every=max(10, config.steps // 40),
        show="prediction_psnr",
    )  # fmt: skip
    measured = measure(model, config)
    rec = results.record(
        "latent_ode", config, measured, device=device, wall_time_s=seconds, evaluations=evaluations, data=data,
        history=history,
    )  # fmt: skip
    if folder is not None:
        results.save(Path(folder), rec)
    return rec


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


def progress_figures(model: LatentODE, videos: MovingDigits, seen: Tensor) -> dict[str, float]:
    """What is followed during training, on validation videos.

    ``reconstruction_psnr`` and ``prediction_psnr`` in dB; ``position_error``: distance in pixels between the centres of
    brightness of predicted and true frames (with one digit: how far off the digit is), frames 11-20.
    """
    predict, later = predictor(model, videos, seen), torch.arange(float(CONTEXT), FRAMES)
    true, predicted = videos.frames(later), predict(later)
    distance = (metrics.centroid(predicted - predicted.amin()) - metrics.centroid(true)).norm(dim=-1)
    return {
        "reconstruction_psnr": metrics.psnr(predict(seen), videos.frames(seen)).mean().item(),
        "prediction_psnr": metrics.psnr(predicted, true).mean().item(),
        "position_error": distance.mean().item(),
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
        measured["readable"] = {
            "true": readable(config, videos, videos.frames(last)), "predicted": readable(config, videos, predict(last))
        }  # fmt: skip
    measured["parameters"] = sum(p.numel() for p in model.parameters())
    return measured


FIGURES = {"mse": metrics.mse, "psnr": metrics.psnr, "ssim": metrics.ssim}


def readable(config: Config, videos: MovingDigits, frames: Tensor) -> float:
    """Accuracy of a digit classifier on the place where the digit truly is in the last frame, [B, 1, 1, H, W].

    A support vector machine, trained on true last frames of other digits, each looked at up to one pixel off its place.
    """
    t = torch.tensor([FRAMES - 1.0])
    side = videos.images.shape[-1] + 2

    def look(v: MovingDigits, x: Tensor, jitter: float = 0.0) -> np.ndarray:
        offset = (torch.rand(len(v), 2, generator=torch.Generator().manual_seed(0)) * 2 - 1) * jitter - 1
        return crop(x[:, 0, 0], v.position(t)[:, 0, 0] + offset, (side, side)).flatten(1).numpy()

    train = _videos(config, 4096, (1234, 2))
    machine = sklearn.svm.SVC(C=10.0).fit(look(train, train.frames(t), jitter=1.0), train.labels[:, 0].numpy())
    return float(machine.score(look(videos, frames), videos.labels[:, 0].numpy()))


if __name__ == "__main__":
    main(Config, run)
