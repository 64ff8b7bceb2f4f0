"""Predicting a detector's features through time, and the objects in them (report, section 5.1)."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from predoc_lib import checkpoint, results, training
from predoc_lib.batches import Rows
from predoc_lib.data import catalog, read_video
from predoc_lib.experiments import yolo_detector
from predoc_lib.experiments.config import ConfigError, TrainingConfig, choose_device, option
from predoc_lib.experiments.running import experiment, main
from predoc_lib.experiments.yolo_clips import (
    AHEAD,
    CONTEXT,
    TRAINED,
    Clips,
    Unseen,
    drawn_training,
    drawn_unseen,
    extract,
    video_unseen,
)  # fmt: skip
from predoc_lib.experiments.yolo_measures import futures, measure, precisions
from predoc_lib.precision import layers_of
from predoc_lib.yolo import Darknet
from predoc_lib.yolo.dynamics import CopyLast, Extrapolation, FeatureGRU, FeatureModel, FeatureODE, Features
from predoc_lib.yolo.futures import RandomFeatureODE
from predoc_lib.yolo.objectives import adversarial, critics, gaussian, gradient_difference, heads_loss, mse

TRAINING_SHARE = 0.7  # of a video's frames, the first; the others are measured
MODELS = {"ode": FeatureODE, "gru": FeatureGRU, "random": RandomFeatureODE}
LIKELIHOODS = {"mse": mse, "gaussian": gaussian}
ASIDE = 2  # drives set aside for each of the test's: designs were compared on them, no variant was
DRAWS = 5  # futures of a random model that are measured
BEFORE = {"balanced": False, "kinetic": 0.0}  # what was done in runs that were recorded before there was a choice


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """What a run of this experiment is made of."""

    steps: int = option(6000, "optimizer steps", low=1)
    batch_size: int = option(8, "clips a step", low=1)
    learning_rate: float = option(2e-3, "the highest, of Adam with warm-up and cosine decay", low=1e-8)
    clip: float = option(5.0, "longest gradient, a longer one is scaled down; 0: none is", low=0)
    video: str = option("", "a video file or folder of frames, also below PREDOC_DATA; empty: drawn drives")
    detector: str = option("", "a .cfg, beside it its .weights, also below PREDOC_DATA; empty: the embedded one")
    stride: int = option(4, "frames of a video from step to step, even (the report: 1)", low=2)
    dynamics: str = option(
        "ode", "what moves the state: Neural ODE, the same from a random start, or a ConvGRU", choices=tuple(MODELS)
    )
    kl_weight: float = option(1e-3, "weight of the KL divergence, for a random start", low=0)
    likelihood: str = option(
        "mse", "of the features: all channels alike (the report), or each with its variance", choices=tuple(LIKELIHOODS)
    )
    moves: bool = option(True, "the last features are moved before they are corrected (the report: no)")
    overview: bool = option(False, "every cell knows its place, and what all cells say together (the report: no)")
    width: int = option(48, "channels of the state", low=1)
    heads_weight: float = option(0.5, "weight of the loss of what the heads find (the report: 0)", low=0)
    balanced: bool = option(True, "every class has the same say in that loss, else every object has")
    kinetic: float = option(2.0, "weight of the state's kinetic energy, eq. 6.17 (the report: 0)", low=0)
    gradient_weight: float = option(0.0, "weight of the gradient difference (the report: 0)", low=0)
    adversarial_weight: float = option(0.0, "weight of the game with a critic (the report: 0)", low=0)
    horizon: int = option(TRAINED, "frames trained to predict (the report: 3)", low=1)
    key_frames: int = option(1, "of these, train on every such frame alone (the report: 1)", low=1)
    labels_above: float = option(0.3, "confidence of the detector's own boxes that count as labels", low=0)
    n_train: int = option(2000, "drives that are drawn, each also mirrored", low=1)
    n_test: int = option(100, "unseen drives", low=1)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 10, "batch_size": 4, "n_train": 4, "n_test": 4, "width": 8},
        "book": {},
        "thesis": {
            "steps": 20_000, "batch_size": 32, "n_train": 4000, "width": 96, "moves": False, "heads_weight": 0.0,
            "balanced": False, "kinetic": 0.0, "n_test": 400,
        },
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride % 2:
            raise ConfigError(f"Parameter 'stride' must be even: frames half-way are measured too. Got {self.stride}.")
        if self.horizon % self.key_frames:
            raise ConfigError(
                f"Parameter 'key_frames' must divide 'horizon': the last frame is one. Got {self.key_frames} and "
                f"{self.horizon}."
            )


def find(path: str) -> Path:
    """A path as it is, or below the data folder."""
    return Path(path) if Path(path).exists() else catalog.root() / path


def load_detector(config: Config) -> Darknet:
    """The detector of a Config, not to be trained.

    Raises:
        FileError: a file of it is absent, damaged or of another network.
    """
    if config.detector:
        cfg = find(config.detector)
        network = Darknet(cfg).load_weights(cfg.with_suffix(".weights")).eval()
    else:
        network = yolo_detector.load(results.RESULTS / "yolo_detector" / "road")
    return network.requires_grad_(False)


def build_model(config: Config, network: Darknet) -> FeatureModel:
    """The untrained model of a Config, for the detector's features; its ``critics`` are networks or None."""
    model = MODELS[config.dynamics](network.shapes, config.width, config.moves, config.overview)
    model.critics = critics(network.shapes) if config.adversarial_weight else None
    return model


def load(folder: Path) -> tuple[FeatureModel, Darknet, Config]:
    """The trained model of a run's or a recorded result's folder, its detector, and its Config.

    Raises:
        ResultError, WeightsError, FileError: a file is absent or damaged, or the weights are of another model.
    """
    config = Config(**BEFORE | results.load(folder)["config"])
    network = load_detector(config)
    model = checkpoint.load_weights(build_model(config, network), Path(folder) / "weights.safetensors")
    model.critics = None  # they predict nothing
    return model.eval(), network, config


def data_of(config: Config, network: Darknet) -> tuple[Clips, Unseen, Unseen]:
    """Clips for training, for validation and for the test; a video's are validated on what they are trained on."""
    length = CONTEXT + config.horizon
    if not config.video:
        training = drawn_training(network, config.n_train, length)
        half = max(1, config.n_test // 2)
        return training, drawn_unseen(network, half, "validation"), drawn_unseen(network, config.n_test, "test")
    video = read_video(find(config.video), size=network.size)
    features = extract(network, video.frames[None])
    end = round(TRAINING_SHARE * len(video))
    first, last = [x[:, :end] for x in features], [x[:, end:] for x in features]
    first = [torch.cat(x) for x in zip(first, extract(network, video.frames[None, :end], mirrored=True), strict=True)]
    validation = video_unseen([x[:1] for x in first], config.stride)
    return Clips(first, length, config.stride), validation, video_unseen(last, config.stride)


def checksum(video: str) -> dict[str, str]:
    """Name and sha256 of the data: of a video, or of the drawn drives if it is empty."""
    if not video:
        return {"name": "driving", "sha256": catalog.checksum("driving")}
    path, digest = find(video), hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return {"name": path.name, "sha256": digest.hexdigest()}


@experiment("yolo_dynamics")
def run(config: Config, folder: Path | None = None, progress: bool | None = None) -> dict[str, Any] | None:
    """Train, measure on unseen clips, and return the record (see ``results.record``).

    Args:
        config: what to run.
        folder: where all is kept; a run that was stopped there goes on. None: nowhere.
        progress: show a progress bar; None: if stderr is a terminal.

    Raises:
        FileError: the video or the detector cannot be read.
        TrainingError: training cannot go on.
    """
    device = choose_device(config.device)
    network = load_detector(config).to(device)
    clips, validation, test = data_of(config, network)
    torch.manual_seed(config.seed)
    model = build_model(config, network).to(device)
    model.set_scales([x[:256] for x in clips.features])
    t = torch.arange(float(CONTEXT + config.horizon), device=device)
    trained = [*range(CONTEXT), *range(CONTEXT + config.key_frames - 1, len(t), config.key_frames)]

    def loss(model: FeatureModel, features: Features, rows: Rows) -> dict[str, Any]:
        features, times = [x[:, trained] for x in features], t[trained]
        context, future = [x[:, :CONTEXT] for x in features], [x[:, CONTEXT:] for x in features]
        parts, total = {}, 0.0
        if config.dynamics == "random":
            guess, parts["kl"], energy = model.guided(features, times, CONTEXT)
            total = config.kl_weight * parts["kl"]
        else:
            guess, energy = model.predict_with_energy(context, times[:CONTEXT], times[CONTEXT:])
        parts[config.likelihood] = LIKELIHOODS[config.likelihood](guess, future, model.scales)
        total = total + parts[config.likelihood]
        if config.heads_weight:
            flat = ([x.flatten(0, 1) for x in y] for y in (guess, future))
            parts["heads"] = heads_loss(network, *flat, config.balanced)["loss"]
            total = total + config.heads_weight * parts["heads"]
        if config.kinetic:
            parts["energy"] = energy
            total = total + config.kinetic * energy
        if config.gradient_weight:
            parts["edges"] = gradient_difference(guess, future, model.scales)
            total = total + config.gradient_weight * parts["edges"]
        if config.adversarial_weight:
            parts["game"] = adversarial(model.critics, guess, future, model.scales)
            total = total + config.adversarial_weight * parts["game"]
        return {"loss": total} | parts

    def follow(model: FeatureModel, mine: slice) -> dict[str, Tensor]:
        """The error of validation features, in the channels' units, at three frames ahead and at the last."""
        context, future = ([x[:64][mine].float() for x in y] for y in (validation.context, validation.future))
        ends = [i for i, ahead in enumerate(AHEAD.tolist()) if ahead in (TRAINED, AHEAD[-1])]
        guess = model.predict(context, t[:CONTEXT], CONTEXT - 1 + AHEAD[ends].to(device))
        errors = [
            ((x - y[:, ends]) / scale).square().mean((2, 3, 4))
            for x, y, scale in zip(guess, future, model.scales, strict=True)
        ]
        return {f"error{AHEAD[i]:g}": x for i, x in zip(ends, (sum(errors) / len(errors)).unbind(1), strict=True)}

    done = training.fit(
        model, clips, loss, **config.training(model), networks=layers_of(model), folder=folder, progress=progress,
        show="heads", evaluate=follow,
    )  # fmt: skip
    if not done.is_main:
        return None
    model.eval()
    with torch.no_grad():
        model.predict([x[:1].float() for x in test.context], t[:CONTEXT], t[CONTEXT:])
    evaluations = config.horizon if config.dynamics == "gru" else model.ode.stats["evaluations"]
    predictors = {config.dynamics: model, "copy-last": CopyLast(), "extrapolation": Extrapolation()}
    metrics = measure(network, predictors, test, validation, config.labels_above)
    if not config.video:
        aside = drawn_unseen(network, (1 + ASIDE) * config.n_test, "test", skip=config.n_test)
        metrics["aside"] = precisions(network, predictors, aside, config.labels_above)
    if config.dynamics == "random":
        metrics["futures"] = futures(network, model, test, config.labels_above, DRAWS, config.seed)
    model.critics = None  # they predict nothing
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    return results.record(
        "yolo_dynamics", config, metrics, device=device, wall_time_s=done.seconds,
        evaluations=evaluations, data=checksum(config.video), history=done.history,
    )  # fmt: skip


if __name__ == "__main__":
    main(Config, run)
