"""Sprites whose factors are known: a shape of a size and a brightness at a place, all combinations of them."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from predoc_lib.files import FileError, read_npz

NAMES = ("shape", "size", "brightness", "x", "y")
SIZES = (3, 4, 4, 8, 8)
SHAPES = ("square", "disc", "triangle")


def factors(source: str | Path = "sprites") -> tuple[Float[Tensor, "N 1 H W"], Int[Tensor, "N K"]]:
    """Images in [0, 1] and the number of each factor's value.

    Args:
        source: "sprites", the 3,072 combinations of ``NAMES``, 32 x 32; or the path of dSprites' ``.npz``, of which
            the colour, which is always the same, is left out.

    Raises:
        FileError: a path that is no such file.
    """
    if str(source) != "sprites":
        arrays = read_npz(Path(source).expanduser())
        if not {"imgs", "latents_classes"} <= arrays.keys():
            raise FileError(f"{source} is not dSprites: wanted imgs and latents_classes, got {', '.join(arrays)}.")
        values = torch.from_numpy(arrays["latents_classes"].astype(np.int64))
        return torch.from_numpy(arrays["imgs"]).float()[:, None], values[:, (values != values[0]).any(0)]
    values = torch.cartesian_prod(*map(torch.arange, SIZES))
    return sprites(values), values


def sprites(values: Int[Tensor, "N 5"] | Float[Tensor, "N 5"]) -> Float[Tensor, "N 1 32 32"]:
    """The images of numbers of values, in the order of ``NAMES``; sizes, brightnesses and places may be between two."""
    shape, size, brightness, x, y = values.float().T[..., None, None]
    radius = 3 + size
    line = torch.arange(32.0)
    dx, dy = line - (7.5 + x * 17 / 7), line[:, None] - (7.5 + y * 17 / 7)
    square = torch.maximum(dx.abs(), dy.abs()) - 0.85 * radius
    disc = (dx.square() + dy.square()).sqrt() - radius
    triangle = torch.maximum(dx.abs() * 0.87 - dy * 0.5, dy) - 0.54 * radius
    outside = torch.where(shape < 0.5, square, torch.where(shape < 1.5, disc, triangle))
    return ((0.5 - outside).clamp(0, 1) * (0.4 + 0.2 * brightness))[:, None]
