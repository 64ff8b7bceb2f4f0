"""What every pixel will be: masks of future frames, and frames of those masks (report, section 5.3.2)."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchmetrics.functional.classification import multiclass_jaccard_index

from predoc_lib import checkpoint, metrics, results, training
from predoc_lib.batches import Rows
from predoc_lib.data import catalog
from predoc_lib.data.driving import MASK_CLASSES, driving
from predoc_lib.experiments.config import TrainingConfig, choose_device, option
from predoc_lib.experiments.features_to_frames import likeness
from predoc_lib.experiments.frame_clips import SIZE
from predoc_lib.experiments.running import experiment, main
from predoc_lib.experiments.yolo_clips import CONTEXT, STEP, TRAINED, draw, starts
from predoc_lib.frames import LastFrameDecoder
from predoc_lib.precision import layers_of
from predoc_lib.segmentation import SCALE, UNet
from predoc_lib.yolo import FeatureODE

CLASSES = len(MASK_CLASSES)
MEASURED = (1, 3, 6)  # frames after the last one seen


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """What a run of this experiment is made of."""

    steps: int = option(400, "optimizer steps", low=1)
    batch_size: int = option(2, "clips a step, of six frames each", low=1)
    learning_rate: float = option(2e-3, "the highest, of Adam with warm-up and cosine decay", low=1e-8)
    clip: float = option(1.0, "longest gradient, a longer one is scaled down; 0: none is", low=0)
    width: int = option(32, "channels of the bottleneck", low=1)
    feature_weight: float = option(0.1, "of the predicted bottleneck's squared error", low=0)
    pixel_weight: float = option(0.2, "of the frames drawn from predicted masks", low=0)
    n_train: int = option(120, "drives that are drawn, each also mirrored", low=1)
    n_test: int = option(60, "unseen drives", low=1)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 3, "batch_size": 2, "n_train": 2, "n_test": 2, "width": 8},
        "book": {},
        "thesis": {"steps": 30_000, "batch_size": 32, "n_train": 4000, "n_test": 400, "width": 128},
    }


class Model(nn.Module):
    """Masks of future frames, and the frames.

    The U-Net's bottlenecks of the frames seen go through a Neural ODE; its decoder makes masks of what comes out, and
    the painter, a ``LastFrameDecoder`` whose features are masks, makes the frames.
    """

    def __init__(self, width: int, size: tuple[int, int] = SIZE) -> None:
        super().__init__()
        cells = (size[0] // SCALE, size[1] // SCALE)
        self.net = UNet(CLASSES, width)
        self.ode = FeatureODE([(width, *cells)], width)
        self.painter = LastFrameDecoder([(CLASSES * SCALE**2, *cells)])

    def predict(
        self, seen: Float[Tensor, "B 3 3 H W"], ahead: Float[Tensor, " Q"]
    ) -> tuple[Float[Tensor, "B Q F h w"], Float[Tensor, "B Q K H W"]]:
        """The bottleneck and the masks' logits so many frames ahead; what goes past it is of the last frame seen."""
        bottleneck, skips = self.net.encode(seen.flatten(0, 1))
        t = torch.arange(float(CONTEXT), device=seen.device)
        (found,) = self.ode.predict([bottleneck.unflatten(0, seen.shape[:2])], t, CONTEXT - 1 + ahead)
        last = [x[CONTEXT - 1 :: CONTEXT].repeat_interleave(len(ahead), 0) for x in skips]
        return found, self.net.decode(found.flatten(0, 1), last).unflatten(0, found.shape[:2])

    def paint(
        self, last: Float[Tensor, "B 2 3 H W"], now: Float[Tensor, "B K H W"], then: Float[Tensor, "B K H W"]
    ) -> Float[Tensor, "B 3 H W"]:
        """The frames of masks' shares, from the last two frames and the mask of the last."""
        return self.painter(last, [F.pixel_unshuffle(now, SCALE)], [F.pixel_unshuffle(then, SCALE)])


@dataclasses.dataclass
class Clips(Dataset):
    """Six frames in a row of drives, and their true masks: half of the clips are mirrored."""

    frames: UInt8[Tensor, "N T 3 H W"]
    masks: UInt8[Tensor, "N T H W"]

    def __len__(self) -> int:
        return 2 * len(self.frames) * (self.frames.shape[1] - CONTEXT - TRAINED + 1)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        mirrored, rest = divmod(number, len(self) // 2)
        drive, start = divmod(rest, len(self) // 2 // len(self.frames))
        span = slice(start, start + CONTEXT + TRAINED)
        frames, masks = self.frames[drive, span].float() / 255, self.masks[drive, span].long()
        return (frames.flip(-1), masks.flip(-1)) if mirrored else (frames, masks)


def clips_of(n: int, split: str, t: Float[Tensor, " T"]) -> Clips:
    """n drives of a split at the times t, in frames."""
    frames, _ = draw(n, split, t, False)
    masks = [
        np.stack([scene.mask(start + STEP * float(x)) for x in t])
        for scene, start in zip(driving(n, split), starts(n), strict=True)
    ]
    return Clips(frames, torch.from_numpy(np.stack(masks)))


def unseen_clips(n: int, split: str = "test") -> Clips:
    """The frames seen and those of ``MEASURED``, of n drives of a split."""
    return clips_of(n, split, torch.tensor([*range(CONTEXT), *(CONTEXT - 1 + ahead for ahead in MEASURED)]).float())


def load(folder: Path) -> tuple[Model, Config]:
    """The trained model of a run's or a recorded result's folder, and the Config.

    Raises:
        ResultError, WeightsError, FileError: a file is absent or damaged, or the weights are of another model.
    """
    config = Config(**results.load(folder)["config"])
    return checkpoint.load_weights(Model(config.width), Path(folder) / "weights.safetensors").eval(), config


def mean_iou(found: Integer[Tensor, "N H W"], true: Integer[Tensor, "N H W"]) -> float:
    """Intersection over union of each class in all images together, its mean over the classes that are there."""
    return multiclass_jaccard_index(found, true, num_classes=CLASSES, average="macro").item()


@torch.no_grad()
def measure(model: Model, unseen: Clips) -> dict[str, Any]:
    """How well masks and frames are foretold.

    Returns:
        {"iou": {ahead: {row: mean intersection over union}}, "psnr": {ahead: {row: dB}}}. Rows of masks: "ode";
        "still", the last bottleneck; "copy-last", the true mask of the last frame seen; "seen", the U-Net on the true
        frame. Rows of frames: those drawn from predicted masks, "ode", from true ones, "true masks", and "copy-last".
    """
    ahead = torch.tensor([float(x) for x in MEASURED], device=unseen.frames.device)
    masks: dict[str, list[Tensor]] = {"ode": [], "still": [], "seen": []}
    frames: dict[str, list[Tensor]] = {"ode": [], "true masks": [], "copy-last": []}
    for images, true in zip(unseen.frames.split(10), unseen.masks.split(10), strict=True):
        images, true = images.float() / 255, true.long()
        _, logits = model.predict(images[:, :CONTEXT], ahead)
        now = model.net(images[:, CONTEXT - 1])
        masks["ode"].append(logits.argmax(2))
        masks["still"].append(now.argmax(1)[:, None].expand_as(masks["ode"][-1]))
        masks["seen"].append(model.net(images[:, CONTEXT:].flatten(0, 1)).argmax(1).unflatten(0, logits.shape[:2]))
        last = images[:, CONTEXT - 2 : CONTEXT]
        for i in range(len(MEASURED)):
            known = F.one_hot(true[:, CONTEXT + i], CLASSES).movedim(-1, 1).float()
            painted = {
                "ode": model.paint(last, now.softmax(1), logits[:, i].softmax(1)),
                "true masks": model.paint(last, now.softmax(1), known),
                "copy-last": last[:, 1],
            }
            for row, x in painted.items():
                frames[row].append(metrics.psnr(x.clamp(0, 1), images[:, CONTEXT + i]))
    found: dict[str, Any] = {"iou": {}, "psnr": {}}
    for i, number in enumerate(MEASURED):
        true = unseen.masks[:, CONTEXT + i].long()
        rows = {row: mean_iou(torch.cat(parts)[:, i], true) for row, parts in masks.items()}
        found["iou"][str(number)] = rows | {"copy-last": mean_iou(unseen.masks[:, CONTEXT - 1].long(), true)}
        found["psnr"][str(number)] = {
            row: torch.cat(parts[i :: len(MEASURED)]).mean().item() for row, parts in frames.items()
        }
    return found


def class_weights(masks: UInt8[Tensor, "N *T H W"]) -> Float[Tensor, " K"]:
    """One over the root of each class's share: else a road user that is small is not worth finding."""
    share = torch.bincount(masks.flatten(), minlength=CLASSES) / masks.numel()
    weights = share.clamp(min=1e-4).rsqrt()
    return weights / (weights * share).sum()


def objective(config: Config, weights: Float[Tensor, " K"]) -> Callable[[Model, list[Tensor], Rows], dict[str, Tensor]]:
    """The loss of a Config, where an error counts as much as its class's weight."""
    ahead = torch.arange(1.0, TRAINED + 1, device=weights.device)
    share = {"seen": 1.0, "masks": 1.0, "bottleneck": config.feature_weight, "pixels": config.pixel_weight}

    def loss(model: Model, clips: list[Tensor], rows: Rows) -> dict[str, Tensor]:
        frames, masks = clips
        bottleneck, skips = model.net.encode(frames.flatten(0, 1))
        logits = model.net.decode(bottleneck, skips).unflatten(0, frames.shape[:2])
        found, future = model.predict(frames[:, :CONTEXT], ahead)
        # the equation follows the bottleneck, the bottleneck does not wait for it
        true = bottleneck.detach().unflatten(0, frames.shape[:2])[:, CONTEXT:]
        last = frames[:, CONTEXT - 2 : CONTEXT].repeat_interleave(TRAINED, 0)
        now = logits[:, CONTEXT - 1].detach().softmax(1).repeat_interleave(TRAINED, 0)
        made = model.paint(last, now, future.detach().flatten(0, 1).softmax(1))
        parts = {
            "seen": F.cross_entropy(logits.flatten(0, 1), masks.flatten(0, 1), weights),
            "masks": F.cross_entropy(future.flatten(0, 1), masks[:, CONTEXT:].flatten(0, 1), weights),
            "bottleneck": (found - true).square().mean(),
            "pixels": likeness(made, frames[:, CONTEXT:].flatten(0, 1)),
        }
        return {"loss": sum(share[name] * part for name, part in parts.items())} | parts

    return loss


@experiment("segmentation")
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
    model = Model(config.width).to(device)
    clips = clips_of(config.n_train, "train", torch.arange(float(CONTEXT + TRAINED + 2)))
    unseen = unseen_clips(config.n_test)
    unseen = Clips(unseen.frames.to(device), unseen.masks.to(device))
    done = training.fit(
        model, clips, objective(config, class_weights(clips.masks).to(device)), **config.training(model),
        networks=layers_of(model), folder=folder,
        progress=progress, show="masks",
    )  # fmt: skip
    if not done.is_main:
        return None
    figures = measure(model.eval(), unseen)
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    return results.record(
        "segmentation", config, figures, device=device, wall_time_s=done.seconds,
        evaluations=model.ode.ode.stats["evaluations"], data={"name": "driving", "sha256": catalog.checksum("driving")},
        history=done.history,
    )  # fmt: skip


if __name__ == "__main__":
    main(Config, run)
