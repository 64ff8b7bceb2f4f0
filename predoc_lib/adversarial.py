"""A critic and a maker that play against each other (Goodfellow et al. 2014), trained by one backward pass."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def game(critic: nn.Module, made: Float[Tensor, "*made"], true: Float[Tensor, "*true"]) -> Float[Tensor, ""]:
    """What the critic minimizes, and the maker of what is made maximizes.

    The critic's logits say what is true. It is the game in its first form: where the critic is sure, the maker's
    gradient vanishes. The gradient changes its sign on its way back to what is made (Ganin and Lempitsky 2015), so
    critic and maker descend and climb at once, by one optimizer.
    """
    return F.softplus(-critic(true)).mean() + F.softplus(critic(Reversed.apply(made))).mean()


class Reversed(torch.autograd.Function):
    """x, whose gradient has the other sign."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """x."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Minus what comes."""
        return -gradient
