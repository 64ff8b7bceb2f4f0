"""A small classifier of images, whose features sets of images are compared by, in place of Inception's."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.utils.data import Dataset

from predoc_lib import checkpoint, results, training
from predoc_lib.batches import Rows
from predoc_lib.data import catalog
from predoc_lib.data.images import image_set, labels
from predoc_lib.data.photos import PICTURES, photos
from predoc_lib.experiments.config import TrainingConfig, choose_device, option
from predoc_lib.experiments.running import experiment, main
from predoc_lib.features import SmallNet


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """What a run of this experiment is made of."""

    dataset: str = option(
        "photos", "what is told apart: five embedded photographs, by crops, or the ten classes of CIFAR-10",
        choices=("photos", "cifar10_subset"),
    )  # fmt: skip
    steps: int = option(1000, "optimizer steps", low=1)
    batch_size: int = option(64, "images a step", low=1)
    learning_rate: float = option(3e-3, "the highest, of Adam with warm-up and cosine decay", low=1e-8)
    clip: float = option(1.0, "longest gradient, a longer one is scaled down; 0: none is", low=0)
    n_train: int = option(20_000, "crops of photographs; of CIFAR-10 all images", low=1)
    n_test: int = option(2000, "images that accuracy is measured on", low=2)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 10, "batch_size": 8, "n_train": 100, "n_test": 50},
        "book": {},
        "thesis": {"dataset": "cifar10_subset", "steps": 4000, "batch_size": 128, "n_test": 5000},
    }

    @property
    def classes(self) -> list[str]:
        """What is told apart."""
        if self.dataset == "photos":
            return list(PICTURES["train"])
        return ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Labelled(Dataset):
    """Images and the numbers of their classes."""

    def __init__(self, images: Shaped[Tensor, "N C H W"], classes: Int[Tensor, "N ..."]) -> None:
        self.images, self.classes = images, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[numbers], self.classes[numbers]

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """It is a batch already."""
        return batch


def read(config: Config, split: str) -> Labelled:
    """The images of a split; those of photographs are crops of the same five pictures in both.

    Raises:
        DataError: they are absent or damaged.
    """
    if config.dataset == "photos":
        n, seed = (config.n_train, 0) if split == "train" else (config.n_test, 1)
        return Labelled(photos(n, 32, seed=(config.seed, seed)), torch.arange(n) % len(config.classes))
    end = None if split == "train" else config.n_test
    return Labelled(image_set(config.dataset, split)[:end], labels(config.dataset, split)[:end])


def load(folder: Path) -> tuple[SmallNet, Config]:
    """The trained classifier of a run's or a recorded result's folder, and its Config.

    Raises:
        ResultError, WeightsError: a file is absent or damaged, or the weights are of another model.
    """
    config = Config(**results.load(folder)["config"])
    net = SmallNet(len(config.classes))
    return checkpoint.load_weights(net, Path(folder) / "weights.safetensors").eval(), config


@experiment("features")
def run(config: Config, folder: Path | None = None, progress: bool | None = None) -> dict[str, Any] | None:
    """Train, measure accuracy on other images, and return the record (see ``results.record``).

    Args:
        config: what to run.
        folder: where all is kept; a run that was stopped there goes on. None: nowhere.
        progress: show a progress bar; None: if stderr is a terminal.

    Raises:
        DataError: the images are absent or damaged.
        TrainingError: training cannot go on.
    """
    train, test = read(config, "train"), read(config, "test")
    torch.manual_seed(config.seed)
    net = SmallNet(len(config.classes))

    def loss(net: SmallNet, batch: tuple[Tensor, Tensor], rows: Rows) -> Tensor:
        images, classes = batch
        mirrored = rows.rand()[:, None, None, None] < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
        return torch.nn.functional.cross_entropy(net.logits(images).float(), classes)

    def evaluate(net: SmallNet, mine: slice) -> dict[str, Tensor]:
        device = net.head.weight.device
        found = torch.cat([net.logits(x.to(device)).argmax(1).cpu() for x in test.images[mine].split(256)])
        return {"accuracy": (found == test.classes[mine]).float()}

    done = training.fit(
        net, train, loss, **config.training(net), folder=folder, progress=progress, show="accuracy", evaluate=evaluate
    )
    if not done.is_main:
        return None
    metrics = {"accuracy": done.history[-1]["accuracy"], "parameters": sum(p.numel() for p in net.parameters())}
    return results.record(
        "features", config, metrics, device=choose_device(config.device), wall_time_s=done.seconds, evaluations=1,
        data={"name": config.dataset, "sha256": catalog.checksum(config.dataset)}, history=done.history,
    )  # fmt: skip


if __name__ == "__main__":
    main(Config, run)
