"""The embedded detector: a small YOLO of the drawn road, written as Darknet's files are."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from predoc_lib import results, training
from predoc_lib.batches import Rows
from predoc_lib.data import catalog, driving
from predoc_lib.data.driving import Objects
from predoc_lib.experiments.config import TrainingConfig, choose_device, option
from predoc_lib.experiments.running import experiment, main
from predoc_lib.metrics import mean_average_precision
from predoc_lib.yolo import ROAD, Darknet, detection_loss, non_max_suppression

FILES = ("detector.cfg", "detector.weights")


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """What a run of this experiment is made of."""

    steps: int = option(2000, "optimizer steps", low=1)
    batch_size: int = option(32, "frames a step", low=1)
    learning_rate: float = option(3e-3, "the highest, of Adam with warm-up and cosine decay", low=1e-8)
    clip: float = option(10.0, "longest gradient, a longer one is scaled down; 0: none is", low=0)
    n_train: int = option(2000, "drives, two frames of each", low=1)
    n_test: int = option(300, "unseen drives, one frame of each", low=1)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 10, "batch_size": 4, "n_train": 4, "n_test": 4},
        "book": {},
        "thesis": {"steps": 20_000, "batch_size": 64, "n_train": 20_000, "n_test": 1000},
    }


class Frames(Dataset):
    """Frames of the drawn road and their true boxes."""

    def __init__(self, images: UInt8[Tensor, "N 3 H W"], objects: list[Objects]) -> None:
        self.images, self.objects = images, objects

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        rows = []
        for i, number in enumerate(numbers):
            o = self.objects[number]
            rows.append(torch.cat([torch.full((len(o), 1), float(i)), o.labels[:, None].float(), o.boxes], 1))
        return self.images[numbers], torch.cat(rows)

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """It is a batch already."""
        return batch


def draw_frames(n: int, split: str, times: tuple[float, ...], seed: int, progress: bool | None = False) -> Frames:
    """Frames at these times of n drives."""
    images, objects = [], []
    for scene in tqdm(driving(n, split, seed=seed), desc="drawing", disable=None if progress is None else not progress):
        for t in times:
            images.append(scene.frame(t))
            objects.append(scene.objects(t))
    return Frames(torch.stack(images), objects)


def changed(
    images: Float[Tensor, "B 3 H W"], truth: Float[Tensor, "M 6"], rows: Rows
) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "M 6"]]:
    """Half of the frames mirrored, all of them lighter or darker."""
    mirrored, light = rows.rand() < 0.5, 0.7 + 0.6 * rows.rand()
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    images = (images * light[:, None, None, None]).clamp(0, 1)
    other = truth[:, [0, 1, 4, 3, 2, 5]] * truth.new_tensor([1, 1, -1, 1, -1, 1])
    other = other + truth.new_tensor([0, 0, 1, 0, 1, 0])
    return images, torch.where(mirrored[truth[:, 0].long()][:, None], other, truth)


def load(folder: Path) -> Darknet:
    """The trained detector of a run's or a recorded result's folder.

    Raises:
        FileError: a file is absent, damaged or of another network.
    """
    return Darknet(Path(folder) / FILES[0]).load_weights(Path(folder) / FILES[1]).eval()


@torch.no_grad()
def measure(network: Darknet, frames: Frames) -> dict[str, float]:
    """Mean average precision on frames; all boxes above a confidence of 0.01 are ranked."""
    device = next(network.parameters()).device
    found = [
        detections.cpu()
        for part in frames.images.split(64)
        for detections in non_max_suppression(network(part.to(device) / 255), confidence=0.01)
    ]
    return mean_average_precision(found, frames.objects)


@experiment("yolo_detector")
def run(config: Config, folder: Path | None = None, progress: bool | None = None) -> dict[str, Any] | None:
    """Train, measure on unseen drives, and return the record (see ``results.record``).

    Args:
        config: what to run.
        folder: where all is kept, the detector as ``detector.cfg`` and ``detector.weights``; a run that was stopped
            there goes on. None: nowhere.
        progress: show a progress bar; None: if stderr is a terminal.

    Raises:
        TrainingError: training cannot go on.
    """
    train = draw_frames(config.n_train, "train", (0.0, 6.0), config.seed, progress)
    test = draw_frames(config.n_test, "test", (3.0,), config.seed, progress)
    torch.manual_seed(config.seed)
    network = Darknet(ROAD)

    def loss(network: Darknet, batch: tuple[Tensor, Tensor], rows: Rows) -> dict[str, Tensor]:
        images, truth = changed(batch[0].float() / 255, batch[1], rows)
        return detection_loss(network, [x.float() for x in network.logits(network.features(images))], truth)

    done = training.fit(network, train, loss, **config.training(network), folder=folder, progress=progress, show="box")
    if not done.is_main:
        return None
    network.eval()
    metrics = measure(network, test) | {"parameters": network.numbers}
    if folder:
        shutil.copyfile(ROAD, Path(folder) / FILES[0])
        network.save_weights(Path(folder) / FILES[1])
    return results.record(
        "yolo_detector", config, metrics, device=choose_device(config.device), wall_time_s=done.seconds, evaluations=1,
        data={"name": "driving", "sha256": catalog.checksum("driving")}, history=done.history,
    )  # fmt: skip


if __name__ == "__main__":
    main(Config, run)
