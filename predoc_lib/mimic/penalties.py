"""What else can be paid for dependence: the plain baseline of MiMIc, and the total correlations of the VAE family."""

import torch
from jaxtyping import Float
from torch import Tensor

from predoc_lib.mimic.critic import standardize, variable


def decorrelation(features: Float[Tensor, "B F ..."], kind: str = "pooled") -> Float[Tensor, ""]:
    """Half the sum of the squared correlations of different channels, 0 for a white layer: no critic, only pairs.

    For weak correlations it is the Gaussian total correlation: -1/2 log det R is 1/4 of the sum over ordered pairs.
    """
    x = standardize(variable(features, kind))
    correlation = x.T @ x / len(x)
    return (correlation - correlation.diagonal().diag()).square().sum() / 4


def gaussian_kl(mean: Float[Tensor, "B Z"], log_var: Float[Tensor, "B Z"]) -> Float[Tensor, ""]:
    """Mean divergence of the encoder's Gaussians from N(0, I), nats."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()


def minibatch_total_correlation(
    z: Float[Tensor, "B Z"], mean: Float[Tensor, "B Z"], log_var: Float[Tensor, "B Z"]
) -> Float[Tensor, ""]:
    """E[log q(z) - sum of log q(z_j)], q being the mixture of the batch's own Gaussians (Chen et al. 2018).

    Its weights leave out a constant that depends on the size of the data alone.
    """
    each = torch.distributions.Normal(mean[None], (0.5 * log_var)[None].exp()).log_prob(z[:, None])  # [B, B, Z]
    n = torch.tensor(float(len(z)), device=z.device).log()
    return (each.sum(2).logsumexp(1) - n - (each.logsumexp(1) - n).sum(1)).mean()
