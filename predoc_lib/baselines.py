"""What the models are compared with: trivial predictions of video, a recurrent network in place of the ODE, and a
closed-form density of images.
"""

import math

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from predoc_lib.latent_ode import LatentODE


def mean_image(frames: Float[Tensor, "B T C H W"]) -> Float[Tensor, "C H W"]:
    """The mean of all (training) frames: the best constant prediction in mean squared error."""
    return frames.mean((0, 1))


def copy_last(
    frames: Float[Tensor, "B T C H W"], t: Float[Tensor, " T"], t_query: Float[Tensor, " Q"]
) -> Float[Tensor, "B Q C H W"]:
    """The last frame at or before each time; before the first, the first."""
    return frames[:, (torch.searchsorted(t, t_query, right=True) - 1).clamp(min=0)]


def cross_fade(
    frames: Float[Tensor, "B T C H W"], t: Float[Tensor, " T"], t_query: Float[Tensor, " Q"]
) -> Float[Tensor, "B Q C H W"]:
    """Linear interpolation in time of the two neighbouring frames; beyond the ends, the nearest frame."""
    right = torch.searchsorted(t, t_query).clamp(1, len(t) - 1)
    weight = ((t_query - t[right - 1]) / (t[right] - t[right - 1])).clamp(0, 1)[:, None, None, None]
    return (1 - weight) * frames[:, right - 1] + weight * frames[:, right]


class LatentGRU(LatentODE):
    """``LatentODE`` with recurrent networks that step from observation to observation in place of the ODE.

    Encoder and decoder are the same. From t_0 one GRU steps forwards and another one backwards, as the two decoders of
    Srivastava et al. (2015) do; between two steps the states are linear in time.

    Args:
        frame: (H, W), pixels.
        step: time between two steps: the time between two observed frames.
        options: those of ``LatentODE`` that are not about the ODE.

    Raises:
        ValueError: step is not positive, or as ``LatentODE``'s.
    """

    def __init__(self, frame: tuple[int, int], *args, step: float = 1.0, **options) -> None:
        super().__init__(frame, *args, **options)
        if not 0 < step < math.inf:
            raise ValueError(f"step must be positive, got {step}.")
        self.step, state = step, self.sizes[1]
        width = 32  # the model then has as many parameters as with the ODE, within a few hundredths
        del self.ode
        self.forwards, self.backwards = (
            nn.ModuleList([nn.Linear(state, width), nn.GRUCell(state, width), nn.Linear(width, state)])
            for _ in range(2)
        )

    @property
    def networks(self) -> list[nn.Module]:
        """The parts that may run in lower precision."""
        return [*self.encoder.networks, *self.decoder.networks]

    def solve(self, s0: Float[Tensor, "B K S"], tau: Float[Tensor, "B T"]) -> Float[Tensor, "B T K S"]:
        """States at times tau after (before, if negative) t_0."""
        position = tau / self.step
        after = self.walk(self.forwards, s0, max(1, int(position.max().ceil())))
        before = self.walk(self.backwards, s0, max(1, int((-position).max().ceil())))
        states = torch.stack([*before[::-1], s0, *after], 1)
        position = position + len(before)
        left = position.floor().long().clamp(0, states.shape[1] - 2)
        video = torch.arange(len(s0), device=left.device)[:, None]
        weight = (position - left)[:, :, None, None]
        self.stats = {"evaluations": states.shape[1] - 1}
        return (1 - weight) * states[video, left] + weight * states[video, left + 1]

    def walk(self, network: nn.ModuleList, s0: Float[Tensor, "B K S"], steps: int) -> list[Float[Tensor, "B K S"]]:
        """The states after 1, 2, ... steps of a network."""
        start, cell, change = network
        s = s0.flatten(0, 1)
        h, states = start(s).tanh(), []
        for _ in range(steps):
            h = cell(s, h)
            s = s + change(h)
            states.append(s.view_as(s0))
        return states


class GaussianScaleMixture:
    """A density of images that is hard to beat: p(z) = sum over k of w_k N(z; mean, s_k C), one covariance for all.

    Smooth and rough places differ in contrast s_k, not in the shape of their covariance. Float64 throughout.

    Args:
        components: K, the number of contrasts.
    """

    def __init__(self, components: int = 16) -> None:
        self.log_weights = torch.full((components,), -math.log(components), dtype=torch.float64)
        self.scales = torch.logspace(-2, 1, components, dtype=torch.float64)
        self.mean = self.factor = None

    def fit(
        self, images: UInt8[Tensor, "N C H W"], iterations: int = 10, generator: torch.Generator | None = None
    ) -> "GaussianScaleMixture":
        """Maximum likelihood by expectation maximization on dequantized images; returns itself.

        Raises:
            ValueError: there are not more images than numbers in one: the covariance would be singular.
        """
        z = self._dequantize(images, generator)
        self.log_weights, self.scales = self.log_weights.to(z.device), self.scales.to(z.device)
        n, d = z.shape
        if n <= d:
            raise ValueError(f"A covariance of {d} numbers needs more images than that, got {n}.")
        self.mean = z.mean(0)
        z = z - self.mean
        self.factor = torch.linalg.cholesky(z.T @ z / n)
        for _ in range(iterations):
            square = self._squares(z)
            share = self._joint(square).softmax(1)  # of every component in every image
            self.log_weights = share.mean(0).clamp(min=1e-12).log()
            self.scales = (share * square[:, None]).sum(0).clamp(min=1e-12) / (d * share.sum(0)).clamp(min=1e-12)
            weighted = z * (share / self.scales).sum(1, keepdim=True)
            self.factor = torch.linalg.cholesky(weighted.T @ z / n)
        return self

    def bits_per_dim(
        self, images: UInt8[Tensor, "B C H W"], generator: torch.Generator | None = None
    ) -> Float[Tensor, " B"]:
        """-log2 p over the numbers in an image, of one draw of uniform dequantization noise: an upper bound."""
        z = self._dequantize(images, generator) - self.mean
        nats = self._joint(self._squares(z)).logsumexp(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)
        return -(nats - self.factor.diagonal().log().sum()) / (z.shape[1] * math.log(2))

    def _dequantize(self, images: Tensor, generator: torch.Generator | None) -> Float[Tensor, "N D"]:
        z = images.flatten(1).double()
        return z + torch.rand(z.shape, generator=generator, dtype=z.dtype, device=z.device)

    def _squares(self, z: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """z^T C^-1 z."""
        return torch.linalg.solve_triangular(self.factor, z.T, upper=False).square().sum(0)

    def _joint(self, square: Float[Tensor, " N"]) -> Float[Tensor, "N K"]:
        """log of w_k N(z; s_k C) without what all components share."""
        return self.log_weights - 0.5 * (square[:, None] / self.scales + self.factor.shape[0] * self.scales.log())
