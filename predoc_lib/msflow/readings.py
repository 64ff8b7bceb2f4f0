"""The two valid ways to give an image a likelihood over its pyramid; each must count what it does to the density.

An encoded scale is (band, cond, log_det): what a flow models, what it is given, and the log-determinant, [B] in nats,
of the way from the dequantized pixels that this scale accounts for.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from predoc_lib.cnf import Noise
from predoc_lib.msflow import logit, pyramid

Encoded = tuple[Tensor, Tensor | None, Tensor]
CONDITIONS = ("rounded", "dequantized")


class Pixels:
    """Dequantized pixels z in [0, 2^b] <-> real numbers x: the logit, or, if lam is None, x = z / 2^(b-1) - 1."""

    def __init__(self, lam: float | None, bits: int) -> None:
        self.lam, self.bits = lam, bits

    def to_real(self, z: Float[Tensor, "B C H W"]) -> tuple[Tensor, Tensor]:
        """x, and log |det dx/dz| in nats, [B]."""
        if self.lam is None:
            return z / 2 ** (self.bits - 1) - 1, z.new_full((len(z),), z[0].numel() * (1 - self.bits) * math.log(2))
        return logit.to_logit(z, self.lam, self.bits)

    def from_real(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """z, outside of [0, 2^b] where the model leaks."""
        return (x + 1) * 2 ** (self.bits - 1) if self.lam is None else logit.from_logit(x, self.lam, self.bits)[0]

    def inside(self, z: Float[Tensor, "B C H W"]) -> Bool[Tensor, " B"]:
        """Which rows lie in the box, all of them."""
        return ((z >= 0) & (z < 2**self.bits)).flatten(1).all(1)

    def levels(self, z: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Whole numbers 0 ... 2^b - 1: the floor, clipped."""
        return z.floor().clamp(0, 2**self.bits - 1)


class Haar:
    """Orthonormal Haar bands of ONE dequantized image: log-determinant 0, so the pixels' correction counts ONCE.

    A scale's condition is the coarser image, real-valued.
    """

    def __init__(self, image_size: int, channels: int, scales: int, pixels: Pixels) -> None:
        coarsest = image_size >> (scales - 1)
        self.scales, self.pixels = scales, pixels
        sides = [coarsest, *(coarsest << s for s in range(scales - 1))]
        self.shapes = [((channels if s == 0 else 3 * channels), n, n) for s, n in enumerate(sides)]

    def encode(self, images: Tensor, noise: Noise) -> list[Encoded]:
        """Images at the finest scale, levels as floats -> every scale, coarsest first."""
        x, log_det = self.pixels.to_real(images + noise.rand(*images.shape[1:]).to(images))
        encoded = []
        for _ in range(self.scales - 1):
            x, details = pyramid.split(x)
            encoded.insert(0, (details, x, log_det))
            log_det = torch.zeros_like(log_det)
        return [(x, None, log_det), *encoded]

    def condition(self, s: int, coarse: Tensor) -> Tensor:
        """What scale s is given, of x one scale below."""
        return coarse

    def compose(self, band: Tensor, cond: Tensor | None) -> Tensor:
        """x of a scale."""
        return band if cond is None else pyramid.merge(cond, band)

    def view(self, s: int, x: Tensor) -> Tensor:
        """x of scale s as dequantized pixels: below the finest scale, of the mean."""
        return self.pixels.from_real(x / 2 ** (self.scales - 1 - s))

    def valid(self, views: list[Tensor]) -> Bool[Tensor, " B"]:
        """Which samples are images: the finest view lies in the box."""
        return self.pixels.inside(views[-1])


class Laplacian:
    """The report's: an image at EVERY scale, each dequantized with its own noise and corrected for its own pixels.

    The pyramid is rounded in pixels. A band is x_s - U(x_{s-1}), a shift, so that its log-determinant is 0. What is
    subtracted, and is the condition, comes of the coarser image as it is known: "rounded", at the middle of its levels,
    or "dequantized", the same draw that was scored one scale below.
    """

    def __init__(self, image_size: int, channels: int, scales: int, pixels: Pixels, condition: str) -> None:
        self.shapes = [(channels, image_size >> s, image_size >> s) for s in reversed(range(scales))]
        self.pixels, self.known = pixels, condition

    def encode(self, images: Tensor, noise: Noise) -> list[Encoded]:
        """Images of any scale, levels as floats -> that scale and the coarser ones, coarsest first."""
        scales = 1 + next(s for s, shape in enumerate(self.shapes) if shape == images.shape[1:])
        encoded, cond = [], None
        for levels in pyramid.rounded(images, scales):
            x, log_det = self.pixels.to_real(levels + noise.rand(*levels.shape[1:]).to(levels))
            encoded.append((x if cond is None else x - cond, cond, log_det))
            cond = self._upsampled(levels, x)
        return encoded

    def _upsampled(self, levels: Tensor, x: Tensor) -> Tensor:
        return pyramid.double(self.pixels.to_real(levels + 0.5)[0] if self.known == "rounded" else x)

    def condition(self, s: int, coarse: Tensor) -> Tensor:
        """What scale s is given, of x one scale below: floor and clip between scales where rounded images are known."""
        return self._upsampled(self.pixels.levels(self.view(s - 1, coarse)), coarse)

    def compose(self, band: Tensor, cond: Tensor | None) -> Tensor:
        """x of a scale."""
        return band if cond is None else band + cond

    def view(self, s: int, x: Tensor) -> Tensor:
        """x of scale s as dequantized pixels."""
        return self.pixels.from_real(x)

    def valid(self, views: list[Tensor]) -> Bool[Tensor, " B"]:
        """Which samples are images: in range at every scale, and every coarser image the rounded one of the finest."""
        inside = torch.stack([self.pixels.inside(z) for z in views]).all(0)
        finest = self.pixels.levels(views[-1])
        same = [
            (self.pixels.levels(z) == n).flatten(1).all(1)
            for z, n in zip(views, pyramid.rounded(finest, len(views)), strict=True)
        ]
        return inside & torch.stack(same).all(0)
