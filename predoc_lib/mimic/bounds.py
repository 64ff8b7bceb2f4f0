"""Lower bounds of a divergence from scores of two samples (eq. 7.1), and the sample of a product of marginals."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

Scores = Float[Tensor, " B"]
BOUNDS = ("donsker_varadhan", "nwj", "info_nce")


def shuffle(x: Float[Tensor, "B F"], generator: torch.Generator | None = None) -> Float[Tensor, "B F"]:
    """Each channel permuted over the batch by a permutation of its own: a sample of the product of the marginals.

    One permutation for all channels would leave the joint distribution as it is.
    """
    order = torch.rand(x.shape, generator=generator, device=x.device).argsort(0)
    return x.gather(0, order)


def log_mean_exp(scores: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """log of the mean of e^scores over all of them."""
    return scores.flatten().logsumexp(0) - math.log(scores.numel())


def donsker_varadhan(joint: Scores, product: Scores) -> Float[Tensor, ""]:
    """E[T] under the joint minus log E[e^T] under the product, nats (eqs. 7.1, 7.2; Donsker and Varadhan 1983).

    At most the divergence for every T; of a finite batch it is biased upwards, since the logarithm is concave.
    """
    return joint.mean() - log_mean_exp(product)


def nwj(joint: Scores, product: Scores) -> Float[Tensor, ""]:
    """E[T] - E[e^(T - 1)], nats: never above 7.1's, unbiased in a batch, and it varies more (Nguyen et al. 2010)."""
    return joint.mean() - (log_mean_exp(product) - 1).exp()


def info_nce(joint: Scores, product: Scores) -> Float[Tensor, ""]:
    """How well T finds the one row of the joint among the product's, nats: at most log(B + 1) (van den Oord 2018)."""
    all_rows = torch.logaddexp(joint, product.flatten().logsumexp(0))  # of each row of the joint and the product's
    return (joint - all_rows).mean() + math.log(product.numel() + 1)


def mine_objective(joint: Scores, product: Scores, log_average: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """What has the gradient of 7.1 with less bias: E[e^T grad T] is divided by a moving average, not by the batch's.

    (Belghazi et al. 2018, section 3.2.) Its value means nothing.
    """
    return joint.mean() - (log_mean_exp(product) - log_average).exp()
