"""Autoencoders of sprites whose codes are to be taken apart: MiMIc beside the VAE family (eq. 7.2)."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from sklearn.decomposition import PCA
from torch import Tensor, nn

from predoc_lib import results
from predoc_lib.batches import Rows
from predoc_lib.data import catalog
from predoc_lib.data.factors import factors
from predoc_lib.experiments.config import choose_device, option
from predoc_lib.experiments.critics import CriticConfig, Watched, describe, fit, watch
from predoc_lib.experiments.features import Labelled
from predoc_lib.experiments.running import experiment, main
from predoc_lib.metrics import psnr
from predoc_lib.mimic import MiMIc
from predoc_lib.mimic.bounds import shuffle
from predoc_lib.mimic.penalties import decorrelation, gaussian_kl, minibatch_total_correlation
from predoc_lib.mimic.scores import all_scores

METHODS = ("plain", "decorrelation", "mimic", "vae", "beta_vae", "factor_vae", "beta_tcvae")
CRITICS = ("mimic", "factor_vae")
RANDOM = ("vae", "beta_vae", "factor_vae", "beta_tcvae")  # their codes are drawn


@dataclasses.dataclass(frozen=True)
class Config(CriticConfig):
    """What a run of this experiment is made of."""

    method: str = option("mimic", "what the codes pay for", choices=METHODS)
    weight: float = option(1.0, "of what they pay, nats of an image; of a VAE beside or in place of 1", low=0)
    codes: int = option(6, "numbers that an image is coded by", low=2)
    steps: int = option(1000, "optimizer steps", low=1)
    batch_size: int = option(128, "images a step", low=2)
    learning_rate: float = option(2e-3, "the highest, of Adam with warm-up and cosine decay", low=1e-8)
    critic_steps: int = option(2, "of the critics for one of the network", low=1)

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 10, "batch_size": 32, "critic_width": 16},
        "book": {},
        "thesis": {"steps": 100_000, "codes": 10, "critic_width": 1000},
    }


class Autoencoder(nn.Module):
    """An image to the mean and log-variance of its codes, and codes to the logits of an image: perceptrons.

    Args:
        codes: numbers that an image is coded by.
    """

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(1024, 256), nn.SiLU(), nn.Linear(256, 128), nn.SiLU())
        self.mean, self.log_var = nn.Linear(128, codes), nn.Linear(128, codes)
        self.decoder = nn.Sequential(
            nn.Linear(codes, 128), nn.SiLU(), nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 1024),
            nn.Unflatten(1, (1, 32, 32)),
        )  # fmt: skip
        self.code = nn.Identity()  # where a critic looks

    def forward(self, x: Float[Tensor, "B 1 32 32"], noise: Float[Tensor, "B Z"] | None = None) -> dict[str, Tensor]:
        """{"mean", "log_var", "code", "logits"}; the code is the mean, or drawn with the noise."""
        h = self.body(x)
        mean, log_var = self.mean(h), self.log_var(h).clamp(-12, 4)
        code = self.code(mean if noise is None else mean + (0.5 * log_var).exp() * noise)
        return {"mean": mean, "log_var": log_var, "code": code, "logits": self.decoder(code)}


def build_model(config: Config) -> Watched:
    """The untrained autoencoder of a Config, with its critic if the method has one."""
    net = Autoencoder(config.codes)
    return watch(net, ("code",) if config.method in CRITICS else (), torch.zeros(2, 1, 32, 32), config)


def objective(model: Watched, images: Tensor, config: Config, noise: Tensor) -> dict[str, Tensor]:
    """The loss of a batch, nats an image: what the reconstruction costs and what the method's codes pay."""
    out = model.net(images, noise if config.method in RANDOM else None)
    cost = nn.functional.binary_cross_entropy_with_logits(out["logits"].float(), images, reduction="none")
    loss = found = cost.flatten(1).sum(1).mean()
    kl = gaussian_kl(out["mean"], out["log_var"])
    match config.method:
        case "decorrelation":
            loss = loss + config.weight * decorrelation(out["code"])
        case "mimic":
            loss = loss + model.mimic.loss()
        case "vae":
            loss = loss + kl
        case "beta_vae":
            loss = loss + config.weight * kl
        case "beta_tcvae":  # the divergence has the total correlation in it once
            excess = minibatch_total_correlation(out["code"], out["mean"], out["log_var"])
            loss = loss + kl + (config.weight - 1) * excess
        case "factor_vae":
            loss = loss + kl + config.weight * log_ratio(model.mimic) + classification(model.mimic)
    # Codes that are not drawn have no use for a variance; processes that share a model want a gradient of all of it.
    return {"loss": loss + 0 * kl, "reconstruction": found}


def log_ratio(mimic: MiMIc) -> Float[Tensor, ""]:
    """FactorVAE's price, the mean score of a critic that is trained by ``classification`` (Kim and Mnih 2018).

    The classifier's logit is the log-ratio of joint and product, so that its mean over the joint is the divergence.
    """
    with mimic.frozen():
        return mimic.critics["code"](mimic.features["code"]).mean()


def classification(mimic: MiMIc) -> Float[Tensor, ""]:
    """What that critic minimizes: the error of telling codes from shuffled ones."""
    critic, code = mimic.critics["code"], mimic.features["code"].detach()
    return nn.functional.softplus(-critic(code)).mean() + nn.functional.softplus(critic(shuffle(code))).mean()


@experiment("mimic_sprites")
def run(config: Config, folder: Path | None = None, progress: bool | None = None) -> dict[str, Any] | None:
    """Train an autoencoder on all sprites, score its codes against the factors, and return the record.

    Args:
        config: what to run.
        folder: where all is kept; a run that was stopped there goes on. None: nowhere.
        progress: show a progress bar; None: if stderr is a terminal.

    Raises:
        TrainingError: training cannot go on.
    """
    images, values = factors()
    torch.manual_seed(config.seed)
    model = build_model(config)

    def loss(model: Watched, batch: tuple[Tensor, Tensor], rows: Rows) -> dict[str, Tensor]:
        return objective(model, batch[0], config, rows.randn(config.codes))

    critic_loss = (lambda: classification(model.mimic)) if config.method == "factor_vae" else None
    done = fit(model, Labelled(images, values), loss, config, critic_loss, folder=folder, progress=progress)
    if not done.is_main:
        return None
    return results.record(
        "mimic_sprites", config, measure(model, images, values), device=choose_device(config.device),
        wall_time_s=done.seconds, evaluations=1, data={"name": "sprites", "sha256": catalog.checksum("sprites")},
        history=done.history,
    )  # fmt: skip


@torch.no_grad()
def encode(model: Watched, images: Float[Tensor, "N 1 32 32"]) -> dict[str, Tensor]:
    """ "code", the mean [N, Z], and the "images" that it becomes."""
    model.eval()
    device = model.net.mean.weight.device
    parts = [model.net(x.to(device)) for x in images.split(512)]
    code, logits = (torch.cat([part[name].cpu() for part in parts]) for name in ("mean", "logits"))
    return {"code": code, "images": logits.sigmoid()}


def measure(model: Watched, images: Float[Tensor, "N 1 32 32"], values: Int[Tensor, "N K"]) -> dict[str, Any]:
    """The scores of the codes, their dependence, how well images come back; the scores of as many components."""
    out = encode(model, images)
    components = PCA(out["code"].shape[1], random_state=0).fit_transform(images.flatten(1).numpy())
    return {
        "scores": all_scores(out["code"].numpy(), values.numpy()),
        "components": all_scores(components, values.numpy()),
        "code": describe(out["code"]),
        "psnr": psnr(out["images"], images).mean().item(),
    }


if __name__ == "__main__":
    main(Config, run)
