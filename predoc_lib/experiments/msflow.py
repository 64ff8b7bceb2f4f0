"""Multi-scale continuous normalizing flows of images, and their single-scale baseline (report, chapter 6)."""

import dataclasses
import hashlib
import io
import math
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from predoc_lib import checkpoint, results, training
from predoc_lib.baselines import GaussianScaleMixture
from predoc_lib.batches import Rows
from predoc_lib.data import catalog
from predoc_lib.data.images import SETS, image_set
from predoc_lib.data.photos import PICTURES, photos, recoloured
from predoc_lib.experiments import features
from predoc_lib.experiments.config import TWICE, ConfigError, TrainingConfig, choose_device, option
from predoc_lib.experiments.running import experiment, main
from predoc_lib.metrics import frechet_distance
from predoc_lib.msflow import MSFlow
from predoc_lib.msflow.fields import KINDS

DATASETS = ("photos", *SETS)
FEATURES = results.RESULTS / "features" / "cifar10_subset-seed0"
EVALUATION = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5}  # half of it changes bits/dim by less than 0.001


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """What a run of this experiment is made of."""

    dataset: str = option("photos", "images: crops of embedded photographs, or CIFAR-10 (the report)", choices=DATASETS)
    path: str = option("", "an .npz or a folder of images instead; every tenth is kept for the test")
    channels: int = option(3, "3, or 1 for grey images", choices=(1, 3))
    image_size: int = option(16, "side of the square images, pixels (the report: 32 and 64)", low=4)
    scales: int = option(3, "of the pyramid; 1 is the single-scale baseline (the report: 3)", low=1)
    pyramid: str = option("haar", "orthonormal bands, or the report's Laplacians", choices=("haar", "laplacian"))
    objective: str = option(
        "flow_matching", "regression of velocities, or the report's maximum likelihood",
        choices=("flow_matching", "likelihood"),
    )  # fmt: skip
    per_scale: bool = option(False, "train coarse to fine, the others frozen (the report), instead of jointly")
    steps: int = option(4000, "optimizer steps", low=1)
    batch_size: int = option(128, "images a step", low=1)
    learning_rate: float = option(5e-3, "the highest, of Adam with warm-up and cosine decay", low=1e-8)
    clip: float = option(1.0, "longest gradient, a longer one is scaled down; 0: none is", low=0)
    ema: float = option(0.995, "decay of the moving average of the weights that is measured and kept; 0: none", low=0)
    field: str = option("conv", "network of a scale: at one resolution, or at two", choices=tuple(KINDS))
    width: int = option(48, "channels of the finest field's hidden layers", low=1)
    widen: float = option(1.0, "a scale's width over the next coarser one's", low=0.1)
    depth: int = option(2, "residual blocks of a field", low=1)
    augment: bool = option(True, "training images are mirrored too, photographs also turned and recoloured")
    lam: float = option(0.0, "lambda of the logit, eq. 6.11 (the report: 0.05); 0: no logit", low=0)
    kinetic: float = option(0.01, "weight of the kinetic energy, eq. 6.17, in a likelihood", low=0)
    jacobian: float = option(0.01, "weight of the Jacobian's norm, eq. 6.18, in a likelihood", low=0)
    steer: float = option(0.0, "half the width of the random end time in training; 0: it always ends at 1", low=0)
    tolerance: float = option(1e-3, "relative and absolute, of dopri5 in training", low=1e-12)
    n_test: int = option(64, "unseen images, of each picture, that are measured at the end", low=2)
    frechet: int = option(0, "samples in each evaluation, for their Frechet distance from images; 0: none", low=0)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 10, "batch_size": 4, "image_size": 8, "scales": 2, "width": 8, "depth": 1, "n_test": 4},
        "book": {},
        "thesis": {
            "image_size": 32, "objective": "likelihood", "pyramid": "laplacian", "per_scale": True, "steps": 100_000,
        },
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % 2 ** (self.scales - 1):
            raise ConfigError(
                f"Parameter 'image_size' must divide by {2 ** (self.scales - 1)} for {self.scales} scales, "
                f"got {self.image_size}."
            )
        if self.per_scale and self.steps < self.scales:
            raise ConfigError(f"Parameter 'steps' must be at least {self.scales}, one a scale, got {self.steps}.")
        if self.compile and self.objective == "likelihood":
            raise ConfigError(TWICE.format(self.objective))
        if self.frechet and (self.frechet == 1 or self.channels == 1):
            raise ConfigError("Parameter 'frechet' must be at least 2 and needs images of 3 channels, or be 0.")

    def require_data(self) -> None:
        """Images by path are looked at when they are read."""
        if not self.path:
            super().require_data()


class Crops(Dataset):
    """An endless supply of training crops of the photographs."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __getitems__(self, numbers: list[int]) -> UInt8[Tensor, "B C H W"]:
        # A batch is drawn at once, from the number of its step; a process takes its rows of it.
        batch = self.config.batch_size
        seed = (self.config.seed, 1 + numbers[0] // batch)
        images = photos(batch, self.config.image_size, seed=seed)
        if self.config.augment:
            images = recoloured(images, seed)
        return images[torch.tensor(numbers) % batch]

    @staticmethod
    def collate(images: Tensor) -> Tensor:
        """It is a batch already."""
        return images


class Images(Dataset):
    """Images of a set, which are seen again; augmented, each as it is or mirrored."""

    collate = staticmethod(Crops.collate)

    def __init__(self, images: UInt8[Tensor, "N C H W"], augment: bool) -> None:
        self.images = torch.cat([images, images.flip(-1)]) if augment else images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, numbers: list[int]) -> UInt8[Tensor, "B C H W"]:
        return self.images[torch.tensor(numbers)]


def read(config: Config, split: str) -> UInt8[Tensor, "N C H W"]:
    """The training or the test images of a Config; of the photographs 20,000 training crops.

    Raises:
        DataError, FileError: they are absent or damaged.
        ConfigError: they have another size or number of channels than the Config says.
    """
    if not config.path and config.dataset == "photos":
        return photos(20_000, config.image_size, split, seed=(config.seed, 0))
    images = image_set(config.path or config.dataset, split)
    if config.path:
        tenth = torch.arange(len(images)) % 10 == 0
        images = images[tenth if split == "test" else ~tenth]
    wanted = (config.channels, config.image_size, config.image_size)
    if tuple(images.shape[1:]) != wanted:
        raise ConfigError(
            f"{config.path or config.dataset} holds images of {list(images.shape[1:])}, and parameters 'channels' and "
            f"'image_size' ask for {list(wanted)}."
        )
    return images


def unseen(config: Config) -> dict[str, UInt8[Tensor, "N C H W"]]:
    """Test images, by the name of their picture if they are of the photographs."""
    if config.path or config.dataset != "photos":
        return {"test": read(config, "test")[: config.n_test]}
    return {
        name: photos(config.n_test, config.image_size, "test", picture=name, seed=(1234, i))
        for i, name in enumerate(PICTURES["test"])
    }


def distance(model: MSFlow, config: Config) -> float:
    """Frechet distance, in a small classifier's features, of ``config.frechet`` samples and of as many real images.

    These are other crops of the training pictures, changed as in training; of a set, test images.
    """
    n, net = config.frechet, features.load(FEATURES)[0].to(next(model.parameters()).device)
    if config.path or config.dataset != "photos":
        real = read(config, "test")[:n]
    else:
        real = photos(n, config.image_size, seed=(config.seed, 0, 1))
        real = recoloured(real, (config.seed, 0, 1)) if config.augment else real
    with model.solving(method="dopri5", rtol=1e-2, atol=1e-2), torch.random.fork_rng():
        torch.manual_seed(0)
        trained = model.trained.clone()
        model.trained.fill_(True)  # coarse to fine, a scale's turn may still be to come: its bands are normal
        fake = torch.cat([model.sample(len(part)).cpu() for part in real.split(128)])
        model.trained.copy_(trained)
    return frechet_distance(real, fake, net)


def build_model(config: Config) -> MSFlow:
    """The untrained model of a Config."""
    likelihood = config.objective == "likelihood"
    return MSFlow(
        config.image_size, config.channels, config.scales, pyramid=config.pyramid, lam=config.lam or None,
        field=config.field, width=config.width, widen=config.widen, depth=config.depth,
        kinetic=config.kinetic if likelihood else 0.0,
        jacobian=config.jacobian if likelihood else 0.0, steer=config.steer if likelihood else 0.0,
        rtol=config.tolerance, atol=config.tolerance,
    )  # fmt: skip


def load(folder: Path) -> tuple[MSFlow, Config]:
    """The trained model of a run's or a recorded result's folder, and its Config.

    Raises:
        ResultError, WeightsError: a file is absent or damaged, or the weights are of another model.
    """
    config = Config(**results.load(folder)["config"])
    return checkpoint.load_weights(build_model(config), Path(folder) / "weights.safetensors").eval(), config


@experiment("msflow")
def run(config: Config, folder: Path | None = None, progress: bool | None = None) -> dict[str, Any] | None:
    """Train, measure bits/dim on unseen images, and return the record (see ``results.record``).

    Args:
        config: what to run.
        folder: where all is kept; a run that was stopped there goes on. None: nowhere.
        progress: show a progress bar; None: if stderr is a terminal.

    Raises:
        DataError, FileError: the images are absent or damaged.
        ConfigError: they have another size.
        TrainingError: training cannot go on.
    """
    train = read(config, "train")
    crops = not config.path and config.dataset == "photos"
    torch.manual_seed(config.seed)
    model = build_model(config)
    model.whiten(train[:1024])
    if choose_device(config.device).type == "cuda":
        model.to(memory_format=torch.channels_last)  # what its convolutions are fastest in

    def loss(model: MSFlow, images: Tensor, rows: Rows) -> dict[str, Any]:
        scale = config.scales * (rows.step - 1) // config.steps if config.per_scale else None
        found = model.loss(images, config.objective, scale, rows)
        evaluations = sum(flow.stats["evaluations"] for flow in model.flows) if config.objective == "likelihood" else 1
        return {"loss": found, "evaluations": evaluations}

    validation = torch.cat([images[:8] for images in unseen(config).values()])

    def followed(model: MSFlow, mine: slice) -> dict[str, Any]:
        found = {"bits_per_dim": evaluate(model, validation[mine], tolerance=1e-3)}
        return found | ({"frechet": distance(model, config)} if config.frechet else {})

    options = config.training(model)
    if config.compile and config.accumulate == 1 and config.ema:
        # A field is called once a step (what is evaluated is the average, as it was): on a GPU, a CUDA graph each way.
        options["compile"] = "reduce-overhead"
    done = training.fit(
        model, Crops(config) if crops else Images(train, config.augment), loss, **options,
        networks=model.networks, compilable=[flow.f for flow in model.flows], folder=folder, progress=progress,
        show="bits_per_dim", evaluate=followed,
    )  # fmt: skip
    if not done.is_main:
        return None
    if config.path:
        data = {"name": Path(config.path).name, "sha256": hashlib.sha256(train.numpy().tobytes()).hexdigest()}
    else:
        data = {"name": config.dataset, "sha256": catalog.checksum(config.dataset)}
    return results.record(
        "msflow", config, measure(model, config), device=choose_device(config.device), wall_time_s=done.seconds,
        evaluations=round(done.history[-1]["evaluations"]), data=data, history=done.history,
    )  # fmt: skip


@torch.no_grad()
def evaluate(
    model: MSFlow,
    images: UInt8[Tensor, "B C H W"],
    *,
    tolerance: float = EVALUATION["rtol"],
    draws: int = 1,
    rows: int | None = None,
) -> Float[Tensor, " B"]:
    """Bits/dim of images, rows at a time (None: what suits the device), with the same noise whenever it is asked."""
    device = next(model.parameters()).device
    rows = rows or (64 if device.type == "cpu" else 512)
    with model.solving(method="dopri5", rtol=tolerance, atol=tolerance), torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.cat([model.bits_per_dim(part.to(device), draws).cpu() for part in images.split(rows)])


def measure(model: MSFlow, config: Config) -> dict[str, Any]:
    """Figures of a model and of its rivals on unseen images, {picture: {"bits_per_dim", "standard_error", "png", ...}}.

    The rivals are lossless codecs and "mixture", a ``GaussianScaleMixture`` fitted to training images; of photographs
    there are two, one of augmented crops, and on each picture the better one is the rival. Besides: "parameters";
    "mixture_seconds" of the fits; seconds an image, and evaluations, of densities and of samples.
    """
    device = next(model.parameters()).device
    images, generator = unseen(config), torch.Generator(device).manual_seed(0)
    train, start = read(config, "train"), time.perf_counter()
    sets = [train] if len(train) > train[0].numel() else []  # too few for a covariance: there is no such rival
    if sets and not config.path and config.dataset == "photos":
        sets.append(recoloured(train, (config.seed, 0)))
    mixtures = [GaussianScaleMixture().fit(images.to(device), generator=generator) for images in sets]
    found: dict[str, Any] = {"mixture_seconds": time.perf_counter() - start}
    start = time.perf_counter()
    for name, x in images.items():
        bits = evaluate(model, x)
        error = (bits.std() / math.sqrt(len(bits))).item()
        found[name] = {"bits_per_dim": bits.mean().item(), "standard_error": error}
    found["seconds_density"] = (time.perf_counter() - start) / sum(map(len, images.values()))
    found["evaluations_density"] = sum(flow.stats["evaluations"] for flow in model.flows)
    for name, x in images.items():
        found[name] |= {codec: codec_bits(x, codec) for codec in CODECS}
        if mixtures:
            found[name]["mixture"] = min(m.bits_per_dim(x.to(device), generator).mean().item() for m in mixtures)
    start = time.perf_counter()
    with model.solving(**EVALUATION), torch.random.fork_rng():
        torch.manual_seed(0)
        model.sample(16)
    found["seconds_sample"] = (time.perf_counter() - start) / 16
    found["evaluations_sample"] = sum(flow.stats["evaluations"] for flow in model.flows)
    if config.frechet:
        found["frechet"] = distance(model, config)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    return found


CODECS = {"png": {"format": "png", "optimize": True}, "webp": {"format": "webp", "lossless": True, "method": 6}}


LONGEST = 16_383  # pixels a side that WebP takes


def codec_bits(images: UInt8[Tensor, "N C H W"], codec: str) -> float:
    """Bits/dim of a lossless codec, all images in one strip, so that its header is paid for once (or in a few)."""
    size = 0
    for part in images.split(LONGEST // images.shape[2]):
        strip = np.concatenate(list(part.movedim(1, -1).numpy()))
        file = io.BytesIO()
        Image.fromarray(strip.squeeze(-1) if strip.shape[-1] == 1 else strip).save(file, **CODECS[codec])
        size += file.tell()
    return 8 * size / images.numel()


if __name__ == "__main__":
    main(Config, run)
