"""Many futures of one past: the state where the differential equation starts is drawn (report, section 5.3.1).

    p(z | C)    = N(m(h_0), s(h_0)^2)               the prior, in every cell, knows the context C
    q(z | C, F) = N(m(h_0, h_F), s(h_0, h_F)^2)     the posterior knows the future F too; h_F is the state after it
    h(t_0)      = h_0 + W z

It is a conditional variational autoencoder (Sohn et al. 2015), as the latent ODE is a plain one.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from predoc_lib.yolo.dynamics import FeatureODE, Features, Shapes


class RandomFeatureODE(FeatureODE):
    """A ``FeatureODE`` whose start has ``noise`` random numbers in every cell; ``predict`` takes their mean."""

    def __init__(
        self, shapes: Shapes, width: int = 48, moves: bool = True, overview: bool = False, noise: int = 8
    ) -> None:
        super().__init__(shapes, width, moves, overview)
        self.prior = nn.Conv2d(width, 2 * noise, 3, padding=1)
        self.posterior = nn.Conv2d(2 * width, 2 * noise, 3, padding=1)
        self.inject = nn.Conv2d(noise, width, 1, bias=False)

    @staticmethod
    def normal(parameters: Float[Tensor, "B _ h w"]) -> Normal:
        """Means, and standard deviations by their logarithms."""
        mean, log_std = parameters.chunk(2, 1)
        return Normal(mean, (5 * (log_std / 5).tanh()).exp())

    def predict_with_energy(
        self, features: Features, t: Float[Tensor, " T"], t_query: Float[Tensor, " Q"]
    ) -> tuple[Features, Float[Tensor, ""]]:
        """See ``FeatureModel``: the future of the prior's mean."""
        self._check(features, t, t_query)
        units = self.units(features)
        h = self.encode(units, t)
        return self.ahead(h + self.inject(self.normal(self.prior(h)).mean), [x[:, -1] for x in units], t_query - t[-1])

    def futures(
        self, features: Features, t: Float[Tensor, " T"], t_query: Float[Tensor, " Q"], n: int
    ) -> list[Features]:
        """n futures, drawn by the global generator; see ``predict``."""
        self._check(features, t, t_query)
        units = self.units(features)
        h = self.encode(units, t)
        prior, last = self.normal(self.prior(h)), [x[:, -1] for x in units]
        return [self.ahead(h + self.inject(prior.sample()), last, t_query - t[-1])[0] for _ in range(n)]

    def guided(
        self, features: Features, t: Float[Tensor, " T"], n_context: int
    ) -> tuple[Features, Float[Tensor, ""], Float[Tensor, ""]]:
        """The future that a draw from the posterior gives, a clip's mean KL divergence in nats, and the kinetic energy.

        Args:
            features: of context and future.
            t: their times.
            n_context: how many of them are the context.
        """
        units = self.units(features)
        h = self.encode([x[:, :n_context] for x in units], t[:n_context])
        prior = self.normal(self.prior(h))
        posterior = self.normal(self.posterior(torch.cat([h, self.encode(units, t)], 1)))
        last = [x[:, n_context - 1] for x in units]
        guess, energy = self.ahead(h + self.inject(posterior.rsample()), last, t[n_context:] - t[n_context - 1])
        return guess, kl_divergence(posterior, prior).sum((1, 2, 3)).mean(), energy
