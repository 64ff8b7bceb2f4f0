"""Segmentation by day, measured at dusk: does a layer of independent channels carry over? (report, chapter 7)."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from predoc_lib import results
from predoc_lib.batches import Rows
from predoc_lib.data import catalog
from predoc_lib.data.driving import driving
from predoc_lib.experiments.config import choose_device, option
from predoc_lib.experiments.critics import CriticConfig, Watched, describe, fit, watch
from predoc_lib.experiments.features import Labelled
from predoc_lib.experiments.running import experiment, main
from predoc_lib.experiments.segmentation import CLASSES, class_weights, mean_iou
from predoc_lib.mimic.critic import variable
from predoc_lib.mimic.penalties import decorrelation
from predoc_lib.segmentation import UNet

LAYER = "down.2"  # the U-Net's bottleneck
METHODS = ("plain", "decorrelation", "mimic")
LIGHTS = {"day": (False,), "dusk": (True,), "both": (False, True)}
TIMES = (0.0, 12.0)  # of each drive, in its intervals


@dataclasses.dataclass(frozen=True)
class Config(CriticConfig):
    """What a run of this experiment is made of."""

    method: str = option("mimic", "what the bottleneck pays for", choices=METHODS)
    light: str = option("day", "of the drives that are learned from", choices=LIGHTS)
    weight: float = option(0.03, "of what the bottleneck pays", low=0)
    width: int = option(16, "channels of the bottleneck", low=2)
    steps: int = option(500, "optimizer steps", low=1)
    batch_size: int = option(8, "images a step", low=2)
    learning_rate: float = option(3e-3, "the highest, of Adam with warm-up and cosine decay", low=1e-8)
    n_train: int = option(150, "drives that are drawn, two images each", low=1)
    n_test: int = option(60, "unseen drives", low=1)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 2, "batch_size": 2, "n_train": 2, "n_test": 2, "width": 8, "critic_width": 16},
        "book": {},
        "thesis": {"steps": 30_000, "batch_size": 32, "n_train": 4000, "n_test": 400, "width": 64},
    }


def scenes(n: int, split: str, light: str) -> tuple[UInt8[Tensor, "N 3 H W"], UInt8[Tensor, "N H W"]]:
    """Images and masks of n drives of a split, in that light: the same drives in each."""
    images, masks = [], []
    for dusk in LIGHTS[light]:
        for scene in driving(n, split):
            scene.dusk = dusk
            images += [scene.frame(t) for t in TIMES]
            masks += [scene.mask(t) for t in TIMES]
    return torch.stack(images), torch.stack(masks)


def match(images: Float[Tensor, "N 3 H W"], like: Float[Tensor, "M 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Each image with the mean and the standard deviation of its colours as they are in others: no training."""
    mean, std = images.mean((2, 3), keepdim=True), images.std((2, 3), keepdim=True)
    wanted_mean, wanted_std = like.mean((2, 3), keepdim=True).mean(0), like.std((2, 3), keepdim=True).mean(0)
    return ((images - mean) / std * wanted_std + wanted_mean).clamp(0, 1)


def build_model(config: Config) -> Watched:
    """The untrained U-Net of a Config, with its critic if the method has one."""
    net = UNet(CLASSES, config.width)
    return watch(net, (LAYER,) if config.method == "mimic" else (), torch.zeros(2, 3, 32, 32), config)


@experiment("mimic_dusk")
def run(config: Config, folder: Path | None = None, progress: bool | None = None) -> dict[str, Any] | None:
    """Train a segmentation in one light, measure it in both, and return the record.

    Args:
        config: what to run.
        folder: where all is kept; a run that was stopped there goes on. None: nowhere.
        progress: show a progress bar; None: if stderr is a terminal.

    Raises:
        TrainingError: training cannot go on.
    """
    images, masks = scenes(config.n_train, "train", config.light)
    weights = class_weights(masks).to(choose_device(config.device))
    torch.manual_seed(config.seed)
    model = build_model(config)

    def loss(model: Watched, batch: tuple[Tensor, Tensor], rows: Rows) -> dict[str, Tensor]:
        images, masks = batch
        bottleneck, skips = model.net.encode(images)
        task = F.cross_entropy(model.net.decode(bottleneck, skips).float(), masks, weights)
        found = {"task": task}
        if config.method == "mimic":
            found["interaction"] = model.mimic.interactions()[LAYER]
            return {"loss": task + config.weight * found["interaction"] + model.mimic.critic_loss()} | found
        if config.method == "decorrelation":
            return {"loss": task + config.weight * decorrelation(bottleneck, "position")} | found
        return {"loss": task} | found

    train = Labelled(images.float() / 255, masks.long())
    done = fit(model, train, loss, config, folder=folder, progress=progress, show="task")
    if not done.is_main:
        return None
    return results.record(
        "mimic_dusk", config, measure(model.cpu(), train, config.n_test), device=choose_device(config.device),
        wall_time_s=done.seconds, evaluations=1, data={"name": "driving", "sha256": catalog.checksum("driving")},
        history=done.history,
    )  # fmt: skip


@torch.no_grad()
def measure(model: Watched, train: Labelled, n: int) -> dict[str, Any]:
    """What the network makes of n unseen drives.

    Returns:
        {"iou": {row: mean intersection over union}, "bottleneck": its dependence by day, "parameters"}. Rows: "day";
        "dusk", the same drives then; "matched", dusk with the day's colours; "commonest", each pixel's commonest class
        of the training masks.
    """
    model.eval()
    (day, true), (dusk, _) = (scenes(n, "test", light) for light in ("day", "dusk"))
    day, dusk, true = day.float() / 255, dusk.float() / 255, true.long()
    looks = {"day": day, "dusk": dusk, "matched": match(dusk, train.images)}
    iou = {
        name: mean_iou(torch.cat([model.net(part).argmax(1) for part in x.split(20)]), true)
        for name, x in looks.items()
    }
    iou["commonest"] = mean_iou(train.classes.mode(0).values.expand_as(true), true)
    seen, draw = model.net.encode(day)[0], torch.Generator().manual_seed(0)
    bottleneck = torch.cat([variable(seen, "position", draw) for _ in range(10)])
    return {
        "iou": iou,
        "bottleneck": describe(bottleneck),
        "parameters": sum(p.numel() for p in model.net.parameters()),
    }


if __name__ == "__main__":
    main(Config, run)
