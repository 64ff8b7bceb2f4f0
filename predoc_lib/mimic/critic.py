"""The network that tells a layer's channels from the same channels shuffled, and so measures how they depend."""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from predoc_lib.mimic import bounds
from predoc_lib.naming import unknown

VARIABLES = ("pooled", "position")


class CriticError(ValueError):
    """Features that no critic can judge, or a critic whose word is not a number: the message says which."""


def variable(features: Tensor, kind: str = "pooled", generator: torch.Generator | None = None) -> Float[Tensor, "B F"]:
    """One row of channels an image, so that the rows of a batch are independent: positions of an image are not.

    Args:
        features: vectors [B, F] as they are, or maps [B, F, H, W] (any number of axes of positions).
        kind: "pooled", the mean over positions, or "position", the channels at one random position of each image.
        generator: of the positions.

    Raises:
        CriticError: not a tensor of floats, no axis of channels, less than two channels or rows.
    """
    if not isinstance(features, Tensor) or not features.is_floating_point() or features.ndim < 2:
        what = f"{list(features.shape)} of {features.dtype}" if isinstance(features, Tensor) else type(features)
        raise CriticError(f"Features must be a tensor of floats [B, F, ...], got {what}.")
    if kind not in VARIABLES:
        raise CriticError(unknown("variable of a feature map:", kind, VARIABLES))
    if features.shape[1] < 2:
        raise CriticError(
            f"Interaction needs at least two channels, got {features.shape[1]}: choose a layer with more."
        )
    if len(features) < 2:
        raise CriticError("A batch of one cannot be shuffled: give at least two samples.")
    if features.ndim == 2:
        return features
    flat = features.flatten(2)
    if kind == "pooled":
        return flat.mean(2)
    at = torch.randint(flat.shape[2], (len(flat), 1, 1), generator=generator, device=flat.device)
    return flat.gather(2, at.expand(-1, flat.shape[1], 1))[..., 0]


def standardize(x: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
    """Every channel with mean 0 and variance 1 in the batch; one that is constant becomes 0.

    Dependence does not know units. Without it a model could shrink its features until the critic sees nothing.
    """
    centred = x - x.mean(0)
    least = 1e-10 * x.detach().square().mean(0) + 1e-30  # what rounding makes of a constant
    return centred * (centred.square().mean(0) + least).rsqrt()


class Critic(nn.Module):
    """T of eq. 7.2: a perceptron from one row of channels to one score.

    Args:
        channels: F, at least 2.
        width: of the hidden layers.
        depth: hidden layers.
        kind: what the variable of a feature map is, see ``variable``.
        bound: one of ``bounds.BOUNDS``.
        spectral: normalize every layer's spectral norm to 1 (Miyato et al. 2018).
        average: decay of the moving average that MINE's gradient is divided by, between 0 and 1.

    Raises:
        CriticError: less than two channels, an unknown kind or bound.
    """

    def __init__(
        self, channels: int, width: int = 128, depth: int = 2, *, kind: str = "pooled",
        bound: str = "donsker_varadhan", spectral: bool = False, average: float = 0.99,
    ) -> None:  # fmt: skip
        super().__init__()
        if channels < 2:
            raise CriticError(f"Interaction needs at least two channels, got {channels}: choose a layer with more.")
        if bound not in bounds.BOUNDS:
            raise CriticError(unknown("bound", bound, bounds.BOUNDS))
        if kind not in VARIABLES:
            raise CriticError(unknown("variable of a feature map:", kind, VARIABLES))
        self.kind, self.bound, self.average = kind, bound, average
        sizes = [channels] + [width] * depth
        hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(sizes[-1], 1))
        if spectral:
            for layer in self.layers[::2]:
                nn.utils.parametrizations.spectral_norm(layer)
        self.register_buffer("log_average", torch.tensor(0.0))

    def forward(self, x: Float[Tensor, "B F"]) -> Float[Tensor, " B"]:
        """T(x), one score a row."""
        return self.layers(x)[:, 0]

    def scores(
        self, features: Float[Tensor, "B F ..."], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """T of the rows as they are, and of the same rows with every channel shuffled on its own; float32.

        Raises:
            CriticError: see ``variable``; another number of channels than the critic's; scores that are not finite.
        """
        device = features.device.type if isinstance(features, Tensor) else "cpu"
        with torch.autocast(device, enabled=False):  # e^T of half precision overflows early
            x = variable(features, self.kind, generator)
            if x.shape[1] != self.layers[0].in_features:
                raise CriticError(f"The critic was made for {self.layers[0].in_features} channels, got {x.shape[1]}.")
            x = standardize(x.to(self.log_average.dtype))
            joint, product = self(torch.cat([x, bounds.shuffle(x, generator)])).chunk(2)
        if not (joint.isfinite().all() and product.isfinite().all()):
            raise CriticError(
                "The critic's scores are not finite: lower its learning rate, or use spectral normalization."
            )
        return joint, product

    def loss(
        self, features: Float[Tensor, "B F ..."], penalty: float = 0.0, generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        """What the critic minimizes; no gradient reaches the features.

        Args:
            features: of a batch.
            penalty: weight of (|grad T| - 1)^2 between the two samples (Gulrajani et al. 2017); 0: none.
            generator: of the shuffles.
        """
        features = features.detach() if isinstance(features, Tensor) else features
        joint, product = self.scores(features, generator)
        if self.bound == "donsker_varadhan":
            batch = bounds.log_mean_exp(product.detach())
            if self.training:
                old, new = self.log_average + math.log(self.average), batch + math.log1p(-self.average)
                self.log_average.copy_(torch.logaddexp(old, new))
            loss = -bounds.mine_objective(joint, product, self.log_average)
        else:
            loss = -getattr(bounds, self.bound)(joint, product)
        return loss + penalty * self.gradient_penalty(features, generator) if penalty else loss

    def gradient_penalty(
        self, features: Float[Tensor, "B F ..."], generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        """Mean of (|grad T| - 1)^2 at random places on the lines between rows and shuffled rows."""
        with torch.autocast(features.device.type, enabled=False):
            x = standardize(variable(features.detach(), self.kind, generator).to(self.log_average.dtype))
            share = torch.rand(len(x), 1, generator=generator, device=x.device)
            between = torch.lerp(x, bounds.shuffle(x, generator), share).requires_grad_()
            (slope,) = torch.autograd.grad(self(between).sum(), between, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean()


def mutual_interaction(
    critic: Critic, features: Float[Tensor, "B F ..."], generator: torch.Generator | None = None
) -> Float[Tensor, ""]:
    """The critic's word on how much the channels depend on each other, nats (the bound in eq. 7.2).

    For a perfect critic and endless data it is the total correlation, the divergence of the joint distribution from
    the product of its marginals; for any other critic it is less, by nobody knows how much.

    Raises:
        CriticError: see ``Critic.scores``.
    """
    joint, product = critic.scores(features, generator)
    return getattr(bounds, critic.bound)(joint, product)
