"""Image pyramids on [B, C, H, W], coarsest first: Laplacian (eq. 6.3) and orthonormal Haar, each with its inverse."""

import torch
from jaxtyping import Float
from torch import Tensor

Image = Float[Tensor, "B C H W"]


def halve(x: Image) -> Float[Tensor, "B C h w"]:
    """D: the mean of every square of 2 x 2 pixels."""
    return torch.nn.functional.avg_pool2d(x, 2)


def double(x: Image) -> Float[Tensor, "B C 2*H 2*W"]:
    """U: twice as many pixels a side, bilinear."""
    return torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def laplacian(x: Image, scales: int) -> list[Float[Tensor, "B C _ _"]]:
    """The coarsest image and, for every finer scale, x_s - U(x_{s-1}) (eq. 6.3), in real numbers: x_{s-1} = D(x_s)."""
    bands = []
    for _ in range(scales - 1):
        coarse = halve(x)
        bands, x = [x - double(coarse), *bands], coarse
    return [x, *bands]


def from_laplacian(bands: list[Float[Tensor, "B C _ _"]]) -> Image:
    """The image of which ``laplacian`` makes these bands."""
    x, *finer = bands
    for band in finer:
        x = band + double(x)
    return x


def rounded(levels: Image, scales: int) -> list[Float[Tensor, "B C _ _"]]:
    """The images themselves at every scale, levels again: each pixel the mean of 2 x 2, half a level rounded up."""
    images = [levels]
    for _ in range(scales - 1):
        images.insert(0, (halve(images[0]) + 0.5).floor())
    return images


def split(x: Image) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B _ _ _"]]:
    """One orthonormal Haar step: twice the mean of every 2 x 2 pixels, and three details of each, D = 3C."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    details = torch.cat([a - b + c - d, a + b - c - d, a - b - c + d], 1)
    return (a + b + c + d) / 2, details / 2


def merge(coarse: Float[Tensor, "B C h w"], details: Float[Tensor, "B D h w"]) -> Image:
    """The inverse of ``split``, which is its transpose."""
    h, v, d = details.chunk(3, 1)
    rows = [
        torch.stack([coarse + h + v + d, coarse - h + v - d], -1).flatten(-2),
        torch.stack([coarse + h - v - d, coarse - h - v + d], -1).flatten(-2),
    ]
    return torch.stack(rows, -2).flatten(-3, -2) / 2


def haar(x: Image, scales: int) -> list[Float[Tensor, "B _ _ _"]]:
    """The coarsest image, times 2^(scales - 1), and the details of every finer scale: |det| = 1."""
    bands = []
    for _ in range(scales - 1):
        x, details = split(x)
        bands.insert(0, details)
    return [x, *bands]


def from_haar(bands: list[Float[Tensor, "B _ _ _"]]) -> Image:
    """The image of which ``haar`` makes these bands."""
    x, *finer = bands
    for details in finer:
        x = merge(x, details)
    return x
