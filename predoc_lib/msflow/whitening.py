"""A fixed linear map of the channels that makes a band's mean 0 and its covariance the identity."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Whitening(nn.Module):
    """y = L^-1 (x - mean) at every pixel, L L^T the covariance of the channels: at first the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("factor", torch.eye(channels))

    def fit(self, x: Float[Tensor, "B C H W"]) -> None:
        """Take mean and covariance of x; no direction is stretched more than a million times."""
        rows = x.movedim(1, -1).flatten(0, -2).double()
        covariance = torch.atleast_2d(rows.T.cov(correction=0))
        least = 1e-12 + 1e-6 * covariance.diagonal().mean()
        covariance = covariance + least * torch.eye(len(covariance), dtype=covariance.dtype, device=x.device)
        self.mean.copy_(rows.mean(0))
        self.factor.copy_(torch.linalg.cholesky(covariance))

    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], Tensor]:
        """y, and log |det dy/dx| in nats, a 0-d tensor: the same for every x."""
        # not inv: it looks whether the matrix is singular, for which a GPU waits
        identity = torch.eye(len(self.factor), dtype=self.factor.dtype, device=self.factor.device)
        inverse = torch.linalg.solve_triangular(self.factor, identity, upper=False)
        y = torch.einsum("ij,bjhw->bihw", inverse, x - self.mean[:, None, None])
        return y, -self.factor.diagonal().log().sum() * x.shape[-1] * x.shape[-2]

    def inverse(self, y: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """x."""
        return torch.einsum("ij,bjhw->bihw", self.factor, y) + self.mean[:, None, None]
