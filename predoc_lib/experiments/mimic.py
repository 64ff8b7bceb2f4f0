"""MiMIc on classifiers: where the critics sit, what it costs, and what the layer's dependence becomes (eq. 7.2)."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from predoc_lib import checkpoint, results
from predoc_lib.batches import Rows
from predoc_lib.data import catalog
from predoc_lib.data.digits import digit_images
from predoc_lib.data.images import image_set, labels
from predoc_lib.experiments.config import choose_device, option
from predoc_lib.experiments.critics import CriticConfig, Watched, describe, fit, watch
from predoc_lib.experiments.features import Labelled
from predoc_lib.experiments.running import experiment, main
from predoc_lib.mimic import mutual_interaction
from predoc_lib.mimic.critic import variable
from predoc_lib.mimic.penalties import decorrelation

PLACES = {"none": (), "first": ("first",), "penultimate": ("penultimate",), "both": ("first", "penultimate")}
METHODS = ("mimic", "decorrelation")
LAYERS = PLACES["both"]
OTHER = {"digits": "mnist", "mnist": "digits"}


@dataclasses.dataclass(frozen=True)
class Config(CriticConfig):
    """What a run of this experiment is made of; the report names the studies and gives no numbers."""

    dataset: str = option("digits", "what is told apart", choices=("digits", "mnist", "cifar10_subset"))
    method: str = option("mimic", "what the layers pay for: a critic's word, or correlations", choices=METHODS)
    place: str = option("penultimate", "the layers that pay", choices=PLACES)
    weight: float = option(0.03, "of what they pay", low=0)
    channels: int = option(16, "of the first and of the penultimate layer", low=2)
    steps: int = option(1000, "optimizer steps", low=1)
    batch_size: int = option(256, "images a step", low=2)
    learning_rate: float = option(3e-3, "the highest, of Adam with warm-up and cosine decay", low=1e-8)
    transfer: bool = option(False, "probe the layer on the other set of digits, which must be there")

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 20, "batch_size": 32, "critic_width": 16},
        "book": {},
        "thesis": {"dataset": "cifar10_subset", "steps": 20_000, "channels": 64, "critic_width": 512},
    }


class Classifier(nn.Module):
    """Three layers of convolutions and two of products; critics look at ``first`` and ``penultimate``.

    Args:
        colours: channels of the images.
        side: of the images, in pixels.
        channels: of the first and of the penultimate layer.
    """

    def __init__(self, colours: int, side: int, channels: int) -> None:
        super().__init__()
        kernel, stride = (7, 2) if side >= 32 else (3, 1)  # wide enough for filters to be looked at
        self.first = nn.Conv2d(colours, channels, kernel, stride, kernel // 2)
        self.body = nn.Sequential(
            nn.SiLU(), nn.Conv2d(channels, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.SiLU(), nn.Flatten()
        )
        self.penultimate = nn.Linear(32 * (side // stride // 4) ** 2, channels)
        self.head = nn.Linear(channels, 10)

    def layers(self, x: Float[Tensor, "B C H W"]) -> dict[str, Tensor]:
        """What the two layers give: "first" [B, F, h, w], "penultimate" [B, F]."""
        first = self.first(x)
        return {"first": first, "penultimate": self.penultimate(self.body(first))}

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 10"]:
        """Logits of the classes."""
        return self.head(self.layers(x)["penultimate"])


def build_model(config: Config) -> Watched:
    """The untrained network of a Config, with its critics if it has any."""
    colours, side = (3, 32) if config.dataset == "cifar10_subset" else (1, 8)
    net = Classifier(colours, side, config.channels)
    watched = PLACES[config.place] if config.method == "mimic" else ()
    return watch(net, watched, torch.zeros(2, colours, side, side), config)


def read(dataset: str, split: str) -> Labelled:
    """Images in [0, 1] and classes; those of both sets of digits are 8 x 8, so that a network can read either.

    Raises:
        DataError: they are absent or damaged.
    """
    if dataset == "cifar10_subset":
        return Labelled(image_set(dataset, split).float() / 255, labels(dataset, split))
    images, classes = digit_images(dataset, split, 8)
    return Labelled(images[:, None], classes)


def load(folder: Path) -> tuple[Watched, Config]:
    """The trained network of a run's or a recorded result's folder, and its Config.

    Raises:
        ResultError, WeightsError: a file is absent or damaged, or the weights are of another model.
    """
    config = Config(**results.load(folder)["config"])
    return checkpoint.load_weights(build_model(config), Path(folder) / "weights.safetensors").eval(), config


@experiment("mimic")
def run(config: Config, folder: Path | None = None, progress: bool | None = None) -> dict[str, Any] | None:
    """Train a classifier, measure its accuracy and its layers on other images, and return the record.

    Args:
        config: what to run.
        folder: where all is kept; a run that was stopped there goes on. None: nowhere.
        progress: show a progress bar; None: if stderr is a terminal.

    Raises:
        DataError: the images are absent or damaged.
        TrainingError: training cannot go on.
    """
    train, test = read(config.dataset, "train"), read(config.dataset, "test")
    torch.manual_seed(config.seed)
    model = build_model(config)

    def loss(model: Watched, batch: tuple[Tensor, Tensor], rows: Rows) -> dict[str, Tensor]:
        images, classes = batch
        layers = model.net.layers(images)
        task = nn.functional.cross_entropy(model.net.head(layers["penultimate"]).float(), classes)
        if model.mimic is not None:
            words = model.mimic.interactions()
            paid = config.weight * sum(words.values())
            found = {f"interaction_{name}": word for name, word in words.items()}
            return {"loss": task + paid + model.mimic.critic_loss(), "task": task} | found
        if config.method == "decorrelation" and config.place != "none":
            task = task + config.weight * sum(decorrelation(layers[n], "position") for n in PLACES[config.place])
        return {"loss": task}

    def evaluate(model: Watched, mine: slice) -> dict[str, Tensor]:
        return {"accuracy": correct(model.net, test.images[mine], test.classes[mine])}

    done = fit(model, train, loss, config, folder=folder, progress=progress, show="accuracy", evaluate=evaluate)
    if not done.is_main:
        return None
    metrics = measure(model, test) | {"parameters": sum(p.numel() for p in model.net.parameters())}
    if config.transfer:
        metrics["transfer"] = transfer(model.net, config)
    return results.record(
        "mimic", config, metrics, device=choose_device(config.device), wall_time_s=done.seconds, evaluations=1,
        data={"name": config.dataset, "sha256": catalog.checksum(config.dataset)}, history=done.history,
    )  # fmt: skip


@torch.no_grad()
def correct(net: Classifier, images: Tensor, classes: Tensor) -> Tensor:
    """1 for every image that is told right, else 0."""
    device = net.head.weight.device
    found = torch.cat([net(x.to(device)).argmax(1).cpu() for x in images.split(512)])
    return (found == classes).float()


@torch.no_grad()
def features(net: Classifier, images: Tensor, layer: str) -> Float[Tensor, "N F"]:
    """A layer's channels, at one position of each image; the same ones in every call."""
    device, draw = net.head.weight.device, torch.Generator().manual_seed(0)
    return torch.cat([variable(net.layers(x.to(device))[layer].cpu(), "position", draw) for x in images.split(512)])


def measure(model: Watched, test: Labelled) -> dict[str, Any]:
    """Accuracy on unseen images and what both layers are like there; of a critic, also its last word."""
    model.eval()
    found: dict[str, Any] = {"accuracy": correct(model.net, test.images, test.classes).mean().item()}
    for layer in LAYERS:
        x = features(model.net, test.images, layer)
        found[layer] = describe(x)
        if model.mimic is not None and layer in model.mimic.critics:
            with torch.no_grad():
                x = x.to(next(model.parameters()).device)
                draw = torch.Generator(x.device).manual_seed(0)
                word = mutual_interaction(model.mimic.critics[layer], x, draw)
            found[layer]["critic"] = word.item()
    return found


def transfer(net: Classifier, config: Config) -> dict[str, float]:
    """On the other set of digits: accuracy as it is, of a linear probe of the layer, of one of the pixels."""
    train, test = (read(OTHER[config.dataset], split) for split in ("train", "test"))
    n = 2000  # as few as the smaller set has; a probe of more would learn the set from the pixels alone
    probes = {"probe": lambda x: features(net, x, "penultimate"), "pixels": lambda x: x.flatten(1)}
    found = {"as_it_is": correct(net, test.images, test.classes).mean().item()}
    for name, see in probes.items():
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probe.fit(see(train.images[:n]).numpy(), train.classes[:n].numpy())
        found[name] = float(probe.score(see(test.images).numpy(), test.classes.numpy()))
    return found


if __name__ == "__main__":
    main(Config, run)
