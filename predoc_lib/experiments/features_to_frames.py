"""Frames from a detector's features, true and predicted (report, sections 5.2 and 5.3.2)."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from predoc_lib import checkpoint, metrics, results, training
from predoc_lib.batches import Rows
from predoc_lib.data import catalog
from predoc_lib.experiments import yolo_dynamics
from predoc_lib.experiments.config import TrainingConfig, choose_device, option
from predoc_lib.experiments.running import experiment, main
from predoc_lib.experiments.yolo_clips import AHEAD, CONTEXT, TRAINED, draw, extract
from predoc_lib.frames import Critic, Heads, LastFrameDecoder, PlainDecoder
from predoc_lib.irevnet import IResNet, IRevNet, gather, levels_for, scatter
from predoc_lib.yolo import Darknet, FeatureODE
from predoc_lib.yolo.dynamics import Features

SIZE = (96, 160)
METHODS = ("irevnet", "iresnet", "plain", "last_frame")
INVERTIBLE = (IRevNet, IResNet)
REMAINDERS = ("true", "last", "zero", "ode")
DYNAMICS = results.RESULTS / "yolo_dynamics" / "road-ode-seed0"
BATCH = 20
SEEN = {"own": 3.0, "true": 3.0, "predicted +1": 1.0, "predicted +3": 3.0, "predicted +6": 6.0, "half-way": 0.5}
"""What a frame is made from, and how far ahead of the last frame seen it is; "own": an invertible network's feature."""


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """What a run of this experiment is made of."""

    steps: int = option(1500, "optimizer steps", low=1)
    batch_size: int = option(4, "clips a step, of six frames each", low=1)
    learning_rate: float = option(2e-3, "the highest, of Adam with warm-up and cosine decay", low=1e-8)
    clip: float = option(1.0, "longest gradient, a longer one is scaled down; 0: none is", low=0)
    method: str = option("last_frame", "what makes the frame", choices=METHODS)
    sees: str = option(
        "predicted", "features that a decoder is trained on: those predicted, or the true ones (the report)",
        choices=("predicted", "true"),
    )  # fmt: skip
    noise: float = option(0.0, "of those features, in the channels' units", low=0)
    pixel_weight: float = option(0.0, "invertible: of the frame that the inverse gives (the report: 0)", low=0)
    remainder: str = option("zero", "invertible: what stands for the remainder there", choices=REMAINDERS)
    cycle_weight: float = option(0.0, "of the distance between the frame's own features and the true ones", low=0)
    adversarial_weight: float = option(0.0, "of a critic that tells made frames from true ones", low=0)
    end_to_end: bool = option(False, "the equation of the features is trained too")
    feature_weight: float = option(1.0, "end to end: of the predicted features' error", low=0)
    hidden: int = option(24, "invertible: channels within a block of its last level", low=1)
    depth: int = option(2, "invertible: blocks a level", low=1)
    n_train: int = option(700, "drives that are drawn, each also mirrored", low=1)
    n_test: int = option(100, "unseen drives", low=1)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 4, "batch_size": 2, "n_train": 2, "n_test": 2, "hidden": 4, "depth": 1},
        "book": {},
        "thesis": {"steps": 30_000, "batch_size": 32, "n_train": 4000, "n_test": 400, "hidden": 96, "depth": 6},
    }


class Model(nn.Module):
    """What makes frames, and the equation that predicts the features.

    Args:
        maker: an ``IRevNet``, a ``PlainDecoder`` or a ``LastFrameDecoder``.
        ode: of the features; its units are the ones in which the maker sees them.
        end_to_end: the equation is trained, and kept with the weights.
        rest: an equation of the remainder, if it has its own.
        critic: of the made frames, if there is one.
    """

    def __init__(
        self,
        maker: nn.Module,
        ode: FeatureODE,
        end_to_end: bool = False,
        rest: FeatureODE | None = None,
        critic: Critic | None = None,
    ) -> None:
        super().__init__()
        self.maker, self.rest, self.critic = maker, rest, critic
        if end_to_end:
            self.ode = ode
        else:  # an attribute like any other: recorded already, it is no part of this model's weights
            object.__setattr__(self, "ode", ode.requires_grad_(False))

    def predict(self, features: Features, ahead: Float[Tensor, " Q"]) -> Features:
        """Features so many frames ahead of the context's end."""
        t = torch.arange(float(CONTEXT), device=ahead.device)
        return self.ode.predict(features, t, CONTEXT - 1 + ahead)

    def frames(
        self, last: Float[Tensor, "B 2 3 H W"], features: Heads, wanted: Heads, remainder: Tensor | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """The frames whose features are wanted.

        Args:
            last: the last two frames seen.
            features: of the last of them.
            wanted: of the frame to make.
            remainder: an i-RevNet's; None: zeros.
        """
        features, wanted = (
            [x / scale for x, scale in zip(y, self.ode.scales, strict=True)] for y in (features, wanted)
        )
        if isinstance(self.maker, INVERTIBLE):
            return self.maker.inverse(gather(wanted), remainder)
        return self.maker(wanted) if isinstance(self.maker, PlainDecoder) else self.maker(last, features, wanted)

    def remainder(self, images: Float[Tensor, "B 3 H W"]) -> Tensor | None:
        """What an invertible network leaves over of images; other makers have none."""
        return self.maker(images)[1] if isinstance(self.maker, INVERTIBLE) else None

    def remainders_ahead(
        self, seen: Float[Tensor, "B 3 3 H W"], ahead: Float[Tensor, " Q"]
    ) -> Float[Tensor, "B Q r h w"]:
        """The remainders so many frames ahead, by their own equation, from those of the frames seen."""
        t = torch.arange(float(CONTEXT), device=ahead.device)
        remainders = self.remainder(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])
        return self.rest.predict([remainders.detach()], t, CONTEXT - 1 + ahead)[0]


@dataclasses.dataclass
class Clips(Dataset):
    """Six frames in a row of drives, and their features: half of the clips are mirrored."""

    frames: Tensor
    features: list[Features]  # as they are, and mirrored

    @property
    def starts(self) -> int:
        """Clips of a drive."""
        return self.frames.shape[1] - CONTEXT - TRAINED + 1

    def __len__(self) -> int:
        return 2 * len(self.frames) * self.starts

    def __getitems__(self, numbers: list[int]) -> dict[str, Any]:
        mirrored, rest = np.divmod(np.array(numbers), len(self) // 2)
        drive, start = np.divmod(rest, self.starts)
        at = start[:, None] + np.arange(CONTEXT + TRAINED)
        frames = self.frames[drive[:, None], at].float() / 255
        flip = torch.from_numpy(mirrored.astype(bool))[:, None, None, None, None]
        parts = []
        for plain, other in zip(*self.features, strict=True):
            x = torch.where(flip, other[drive[:, None], at], plain[drive[:, None], at])
            parts.append(x.float())
        return {"frames": torch.where(flip, frames.flip(-1), frames), "features": parts}

    @staticmethod
    def collate(clips: dict[str, Any]) -> dict[str, Any]:
        """They are a batch already."""
        return clips


@dataclasses.dataclass(frozen=True)
class Unseen:
    """Clips that are measured: frames [N, 3 + AHEAD, 3, H, W] in bytes and their features."""

    frames: Tensor
    features: Features


def training_clips(network: Darknet, n: int) -> Clips:
    """Of n drives."""
    frames, _ = draw(n, "train", torch.arange(float(CONTEXT + TRAINED + 2)), False)
    return Clips(frames, [extract(network, frames), extract(network, frames, mirrored=True)])


def unseen_clips(network: Darknet, n: int, split: str = "test") -> Unseen:
    """Of n drives of a split."""
    frames, _ = draw(n, split, torch.cat([torch.arange(float(CONTEXT)), CONTEXT - 1 + AHEAD]), True)
    return Unseen(frames, extract(network, frames))


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
    return Model(maker, ode, config.end_to_end, rest, Critic() if config.adversarial_weight else None), network


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
            units = [x / scale for x, scale in zip(true, model.ode.scales, strict=True)]
            parts["match"] = (found - gather(units)).square().mean()
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
                parts["game"] = model.critic.game(made, target)
                total = total + config.adversarial_weight * parts["game"]
        return {"loss": total} | parts

    return loss


def distance(model: Model, x: Heads, y: Heads) -> Float[Tensor, " B"]:
    """Mean squared difference of features, each channel in its unit."""
    parts = [((a - b) / scale).square().flatten(1) for a, b, scale in zip(x, y, model.ode.scales, strict=True)]
    return torch.cat(parts, 1).mean(1)


def wanted_features(model: Model, unseen: Unseen, rows: slice, seen: str) -> tuple[Heads, int]:
    """The features that frames are to be made from, and the number of the frame that they stand for."""
    at = CONTEXT + AHEAD.tolist().index(SEEN[seen])
    features = [x[rows].float() for x in unseen.features]
    if seen == "own":
        own = scatter(model.maker(unseen.frames[rows, at].float() / 255)[0], model.ode.shapes)
        return [x * scale for x, scale in zip(own, model.ode.scales, strict=True)], at
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
                begun = time.perf_counter()
                made[name] = model.frames(last, now, wanted, remainder).clamp(0, 1)
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


@experiment("features_to_frames")
def run(config: Config, folder: Path | None = None, progress: bool | None = None) -> dict[str, Any] | None:
    """Train, measure on unseen drives, and return the record (see ``results.record``).

    Args:
        config: what to run.
        folder: where all is kept; a run that was stopped there goes on. None: nowhere.
        progress: show a progress bar; None: if stderr is a terminal.

    Raises:
        TrainingError: training cannot go on.
    """
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    model, network = build_model(config)
    for module in (model, model.ode, network):
        module.to(device)
    clips, unseen = training_clips(network, config.n_train), unseen_clips(network, config.n_test)
    validation = unseen_clips(network, max(2, config.n_test // 4), "validation")
    unseen, validation = (dataclasses.replace(x, frames=x.frames.to(device)) for x in (unseen, validation))

    def follow(model: Model, mine: slice) -> dict[str, Tensor]:
        """PSNR from predicted features, at the last frame trained."""
        wanted, at = wanted_features(model, validation, mine, "predicted +3")
        frames = validation.frames[mine].float() / 255
        last, now = frames[:, CONTEXT - 2 : CONTEXT], [x[mine, CONTEXT - 1].float() for x in validation.features]
        made = model.frames(last, now, wanted, model.remainder(last[:, 1]))
        return {"psnr": metrics.psnr(made.clamp(0, 1), frames[:, at])}

    done = training.fit(
        model, clips, objective(config, network), **config.training(model), folder=folder, progress=progress,
        show="match" if isinstance(model.maker, INVERTIBLE) else "pixels", evaluate=follow,
    )  # fmt: skip
    if not done.is_main:
        return None
    mean = clips.frames.float().mean((0, 1)).to(device) / 255
    figures = {"frames": measure(model.eval(), network, unseen, mean)}
    figures["parameters"] = sum(p.numel() for p in model.maker.parameters())
    return results.record(
        "features_to_frames", config, figures, device=device, wall_time_s=done.seconds,
        evaluations=model.ode.ode.stats["evaluations"], data={"name": "driving", "sha256": catalog.checksum("driving")},
        history=done.history,
    )  # fmt: skip


if __name__ == "__main__":
    main(Config, run)
