"""Frames from a detector's features, true and predicted (report, sections 5.2 and 5.3.2)."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from predoc_lib import checkpoint, metrics, results, training
from predoc_lib.adversarial import game
from predoc_lib.batches import Rows
from predoc_lib.experiments import yolo_dynamics
from predoc_lib.experiments.config import ConfigError, TrainingConfig, choose_device, option
from predoc_lib.experiments.frame_clips import SIZE, Clips, Unseen, training_clips, unseen_clips, video_clips
from predoc_lib.experiments.frame_models import INVERTIBLE, Model, distance
from predoc_lib.experiments.running import experiment, main
from predoc_lib.experiments.yolo_clips import AHEAD, CONTEXT, TRAINED
from predoc_lib.frames import Critic, Heads, LastFrameDecoder, PlainDecoder
from predoc_lib.irevnet import IResNet, IRevNet, gather, levels_for
from predoc_lib.precision import layers_of
from predoc_lib.yolo import Darknet, FeatureODE
from predoc_lib.yolo.dynamics import Features

METHODS = ("irevnet", "iresnet", "plain", "last_frame")
SEES = ("predicted", "true", "between")
REMAINDERS = ("true", "last", "zero", "ode")
DYNAMICS = results.RESULTS / "yolo_dynamics" / "road-ode-short-seed0"
BATCH = 20
SEEN = {"own": 3.0, "true": 3.0, "predicted +1": 1.0, "predicted +3": 3.0, "predicted +6": 6.0, "half-way": 0.5}
"""What a frame is made from, and how far ahead of the last frame seen it is; "own": an invertible network's feature."""


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """What a run of this experiment is made of."""

    steps: int = option(750, "optimizer steps", low=1)
    batch_size: int = option(4, "clips a step, of six frames each", low=1)
    learning_rate: float = option(2e-3, "the highest, of Adam with warm-up and cosine decay", low=1e-8)
    clip: float = option(1.0, "longest gradient, a longer one is scaled down; 0: none is", low=0)
    method: str = option("last_frame", "what makes the frame", choices=METHODS)
    sees: str = option(
        "predicted", "features trained on: those predicted, the true ones (the report), or the mean of the neighbours'",
        choices=SEES,
    )  # fmt: skip
    noise: float = option(0.0, "of those features, in the channels' units", low=0)
    pixel_weight: float = option(0.0, "invertible: of the frame that the inverse gives (the report: 0)", low=0)
    remainder: str = option("zero", "invertible: what stands for the remainder there", choices=REMAINDERS)
    cycle_weight: float = option(0.0, "of the distance between the frame's own features and the true ones", low=0)
    adversarial_weight: float = option(0.0, "of a critic that tells made frames from true ones", low=0)
    end_to_end: bool = option(False, "the equation of the features is trained too")
    feature_weight: float = option(1.0, "end to end: of the predicted features' error", low=0)
    hidden: int = option(24, "invertible: channels within a block of its last level", low=1)
    unit: float = option(1.0, "invertible: of its feature, for each channel's own spread", low=1e-3)
    depth: int = option(2, "invertible: blocks a level", low=1)
    video: str = option("", "a video file or folder of frames, also below PREDOC_DATA; empty: drawn drives")
    stride: int = option(4, "frames of a video from step to step, even", low=2)
    n_train: int = option(700, "drives that are drawn, each also mirrored", low=1)
    n_test: int = option(100, "unseen drives", low=1)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 4, "batch_size": 2, "n_train": 2, "n_test": 2, "hidden": 4, "depth": 1},
        "book": {},
        "thesis": {"steps": 30_000, "batch_size": 32, "n_train": 4000, "n_test": 400, "hidden": 96, "depth": 6},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride % 2:
            raise ConfigError(f"Parameter 'stride' must be even: frames half-way are measured too. Got {self.stride}.")


def build_model(config: Config) -> tuple[Model, Darknet]:
    """The untrained model of a Config, with the recorded equation of the features; and the detector."""
    ode, network, _ = yolo_dynamics.load(DYNAMICS)
    shapes = network.shapes
    one = gather([torch.empty(1, *shape) for shape in shapes])
    rest = None
    if config.method in ("irevnet", "iresnet"):
        levels = levels_for((3, *SIZE), shapes)
        hidden = tuple(max(8, config.hidden // 2 ** (levels - 1 - level)) for level in range(levels))
        blocks, channels = (config.depth,) * levels, one.shape[1]
        if config.method == "irevnet":
            maker = IRevNet(3, blocks, channels, hidden, norm=False)
        else:
            maker = IResNet(3, blocks, channels, hidden)
        if config.remainder == "ode":
            rest = FeatureODE([(maker.out_channels - channels, *one.shape[2:])], moves=False)
    else:
        maker = {"plain": PlainDecoder, "last_frame": LastFrameDecoder}[config.method](shapes)
    critic = Critic() if config.adversarial_weight else None
    unit = config.unit if config.method in ("irevnet", "iresnet") else 1.0
    return Model(maker, ode, config.end_to_end, rest, critic, unit), network


def data_of(config: Config, network: Darknet) -> tuple[Clips, Unseen, Unseen]:
    """Clips for training, for validation and for the test; a video's are validated on what they are trained on."""
    if config.video:
        return video_clips(network, yolo_dynamics.find(config.video), config.stride)
    validation = unseen_clips(network, max(2, config.n_test // 4), "validation")
    return training_clips(network, config.n_train), validation, unseen_clips(network, config.n_test)


def load(folder: Path) -> tuple[Model, Darknet, Config]:
    """The trained model of a run's or a recorded result's folder, the detector, and the Config.

    Raises:
        ResultError, WeightsError, FileError: a file is absent or damaged, or the weights are of another model.
    """
    config = Config(**results.load(folder)["config"])
    model, network = build_model(config)
    return checkpoint.load_weights(model, Path(folder) / "weights.safetensors").eval(), network, config


def likeness(x: Float[Tensor, "B 3 H W"], y: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
    """Half the mean logarithm of the images' mean squared errors: PSNR, upside down, in nats a pixel."""
    return (metrics.mse(x, y) + 1e-6).log().mean() / 2


def objective(config: Config, network: Darknet) -> Callable[[Model, dict[str, Any], Rows], dict[str, Tensor]]:
    """The loss of a Config."""
    ahead = torch.arange(1.0, TRAINED + 1)

    def loss(model: Model, clips: dict[str, Any], rows: Rows) -> dict[str, Tensor]:
        frames, features = clips["frames"], clips["features"]
        target = frames[:, CONTEXT:].flatten(0, 1)
        true = [x[:, CONTEXT:].flatten(0, 1) for x in features]
        parts: dict[str, Tensor] = {}
        total = target.new_zeros(())
        wanted = true
        if config.sees == "between":
            wanted = between(features)
        if config.sees == "predicted" or config.end_to_end:
            guess = model.predict([x[:, :CONTEXT] for x in features], ahead.to(frames.device))
            wanted = [x.flatten(0, 1) for x in guess]
        if config.end_to_end:
            parts["features"] = distance(model, wanted, true).mean()
            total = total + config.feature_weight * parts["features"]
        if config.noise:
            wanted = [
                x + config.noise * scale * torch.randn_like(x)
                for x, scale in zip(wanted, model.ode.scales, strict=True)
            ]
        last = frames[:, CONTEXT - 2 : CONTEXT].repeat_interleave(TRAINED, 0)
        now = [x[:, CONTEXT - 1].repeat_interleave(TRAINED, 0) for x in features]
        remainder = None
        invertible = isinstance(model.maker, INVERTIBLE)
        if invertible:
            found, rest = model.maker(target)
            parts["match"] = ((found - gather(model.units(true))) / config.unit).square().mean()
            total = total + parts["match"]
            if config.remainder == "true":
                remainder = rest
            elif config.remainder == "last":
                remainder = model.maker(last[:, 1])[1]
            elif config.remainder == "ode":
                remainder = model.remainders_ahead(frames[:, :CONTEXT], ahead.to(frames.device)).flatten(0, 1)
                parts["rest"] = (remainder - rest.detach()).square().mean()
                total = total + parts["rest"]
        if not invertible or config.pixel_weight:
            made = model.frames(last, now, wanted, remainder)
            parts["pixels"] = likeness(made, target)
            total = total + (config.pixel_weight if invertible else 1.0) * parts["pixels"]
            if config.cycle_weight:
                parts["cycle"] = distance(model, network.features(made.clamp(0, 1)), true).mean()
                total = total + config.cycle_weight * parts["cycle"]
            if config.adversarial_weight:
                parts["game"] = game(model.critic, made, target)
                total = total + config.adversarial_weight * parts["game"]
        return {"loss": total} | parts

    return loss


def between(features: Features) -> Heads:
    """Of each frame after the context the mean of its neighbours' features; the last of the clip keeps its own."""
    means = [torch.cat([(x[:, CONTEXT - 1 : -2] + x[:, CONTEXT + 1 :]) / 2, x[:, -1:]], 1) for x in features]
    return [x.flatten(0, 1) for x in means]


def wanted_features(model: Model, unseen: Unseen, rows: slice, seen: str) -> tuple[Heads, int]:
    """The features that frames are to be made from, and the number of the frame that they stand for."""
    at = CONTEXT + AHEAD.tolist().index(SEEN[seen])
    features = [x[rows].float() for x in unseen.features]
    if seen == "own":
        return model.own(unseen.frames[rows, at].float() / 255), at
    if seen == "half-way":
        whole = CONTEXT + AHEAD.tolist().index(1.0)
        return [(x[:, CONTEXT - 1] + x[:, whole]) / 2 for x in features], at
    if seen == "true":
        return [x[:, at] for x in features], at
    ahead = torch.tensor([SEEN[seen]], device=features[0].device)
    return [x[:, 0] for x in model.predict([x[:, :CONTEXT] for x in features], ahead)], at


@torch.no_grad()
def measure(model: Model, network: Darknet, unseen: Unseen, mean: Float[Tensor, "3 H W"]) -> dict[str, Any]:
    """How near made frames are to the true ones.

    Returns:
        {what they are made from, of ``SEEN``: {row: {"psnr", "ssim", "distance", "seconds"}}}. The rows are the
        method's (for an invertible network one for each of ``REMAINDERS`` that it can have), "copy-last", "mean image"
        and, half-way, "cross-fade". "distance" is that of the detector's features of the made frame from those of the
        true one, root mean square in the channels' units; "seconds" is the making of a frame, its features not counted.
    """
    kinds = [seen for seen in SEEN if seen != "own" or isinstance(model.maker, INVERTIBLE)]
    found: dict[str, dict[str, list[Tensor]]] = {seen: {} for seen in kinds}
    spent: dict[str, float] = {}
    for start in range(0, len(unseen.frames), BATCH):
        rows = slice(start, start + BATCH)
        frames = unseen.frames[rows].float() / 255
        last, now = frames[:, CONTEXT - 2 : CONTEXT], [x[rows, CONTEXT - 1].float() for x in unseen.features]
        for seen in kinds:
            wanted, at = wanted_features(model, unseen, rows, seen)
            true = frames[:, at]
            made = {}
            treatments = {"": None}
            if isinstance(model.maker, INVERTIBLE):
                treatments = {"true": model.remainder(true), "last": model.remainder(last[:, 1]), "zero": None}
            if model.rest is not None:
                ahead = torch.tensor([SEEN[seen]], device=frames.device)
                treatments["ode"] = model.remainders_ahead(frames[:, :CONTEXT], ahead)[:, 0]
            for name, remainder in treatments.items():
                _wait(frames.device)
                begun = time.perf_counter()
                made[name] = model.frames(last, now, wanted, remainder).clamp(0, 1)
                _wait(frames.device)
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - begun
            made["copy-last"] = last[:, 1]
            made["mean image"] = mean.expand_as(true)
            if seen == "half-way":
                made["cross-fade"] = (last[:, 1] + frames[:, CONTEXT + AHEAD.tolist().index(1.0)]) / 2
            truth = [x[rows, at].float() for x in unseen.features]
            for name, image in made.items():
                away = distance(model, network.features(image), truth).sqrt()
                figures = torch.stack([metrics.psnr(image, true), metrics.ssim(image, true), away], 1)
                found[seen].setdefault(name, []).append(figures)
    table: dict[str, Any] = {}
    for seen, made in found.items():
        table[seen] = {}
        for name, parts in made.items():
            figures = dict(zip(("psnr", "ssim", "distance"), torch.cat(parts).mean(0).tolist(), strict=True))
            figures["seconds"] = spent.get(name, 0.0) / len(unseen.frames) / len(kinds)
            table[seen][name or "made"] = figures
    return table


def _wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked for, so that it can be timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@experiment("features_to_frames")
def run(config: Config, folder: Path | None = None, progress: bool | None = None) -> dict[str, Any] | None:
    """Train, measure on unseen drives, and return the record (see ``results.record``).

    Args:
        config: what to run.
        folder: where all is kept; a run that was stopped there goes on. None: nowhere.
        progress: show a progress bar; None: if stderr is a terminal.

    Raises:
        FileError: the video cannot be read, or is shorter than a clip.
        TrainingError: training cannot go on.
    """
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    model, network = build_model(config)
    for module in (model, model.ode, network):
        module.to(device)
    clips, validation, unseen = data_of(config, network)
    unseen, validation = (dataclasses.replace(x, frames=x.frames.to(device)) for x in (unseen, validation))

    def follow(model: Model, mine: slice) -> dict[str, Tensor]:
        """PSNR from predicted features, at the last frame trained."""
        wanted, at = wanted_features(model, validation, mine, "predicted +3")
        frames = validation.frames[mine].float() / 255
        last, now = frames[:, CONTEXT - 2 : CONTEXT], [x[mine, CONTEXT - 1].float() for x in validation.features]
        made = model.frames(last, now, wanted, model.remainder(last[:, 1]))
        return {"psnr": metrics.psnr(made.clamp(0, 1), frames[:, at])}

    done = training.fit(
        model, clips, objective(config, network), **config.training(model),
        networks=layers_of(model), folder=folder, progress=progress,
        show="match" if isinstance(model.maker, INVERTIBLE) else "pixels", evaluate=follow,
    )  # fmt: skip
    if not done.is_main:
        return None
    mean = clips.frames.float().mean((0, 1)).to(device) / 255
    figures = {"frames": measure(model.eval(), network, unseen, mean)}
    figures["parameters"] = sum(p.numel() for p in model.maker.parameters())
    return results.record(
        "features_to_frames", config, figures, device=device, wall_time_s=done.seconds,
        evaluations=model.ode.ode.stats["evaluations"], data=yolo_dynamics.checksum(config.video),
        history=done.history,
    )  # fmt: skip


if __name__ == "__main__":
    main(Config, run)
