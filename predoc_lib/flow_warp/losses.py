"""What frames alone can tell of a flow: how alike images are, and how smooth a field is."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-2  # below it an error counts as its square, above as itself


def charbonnier(x: Float[Tensor, "*shape"], epsilon: float = EPSILON) -> Float[Tensor, "*shape"]:
    """A smooth absolute value: sqrt(x^2 + epsilon^2) - epsilon."""
    return (x.square() + epsilon**2).sqrt() - epsilon


def census(image: Float[Tensor, "B C H W"], reach: int = 1, softness: float = 0.03) -> Float[Tensor, "B _ H W"]:
    """Which neighbours are brighter, from -1 to 1 (Zabih and Woodfill 1994, made smooth): light does not change it."""
    grey, (h, w), side = image.mean(1), image.shape[-2:], 2 * reach + 1
    around = F.pad(grey[:, None], (reach,) * 4, mode="replicate")[:, 0]
    shifts = [(dy, dx) for dy in range(side) for dx in range(side) if (dy, dx) != (reach, reach)]
    difference = torch.stack([around[:, dy : dy + h, dx : dx + w] - grey for dy, dx in shifts], 1)
    return difference / (difference.square() + softness**2).sqrt()


def photometric(
    a: Float[Tensor, "B C H W"], b: Float[Tensor, "B C H W"], census_weight: float = 0.1
) -> Float[Tensor, ""]:
    """How unlike two batches of images are: colours, and, weighted, census."""
    colours = charbonnier(a - b).mean()
    if not census_weight:
        return colours
    return colours + census_weight * charbonnier(census(a) - census(b), 0.1).mean()


def edge_aware_smoothness(
    field: Float[Tensor, "B c H W"], image: Float[Tensor, "B C H W"], sharpness: float = 20.0
) -> Float[Tensor, ""]:
    """Second differences of a field, which a plane has none of; where the image has edges they cost less."""
    total = field.new_zeros(())
    for axis in (-1, -2):
        bend = field.diff(n=2, dim=axis)
        edge = image.diff(dim=axis).abs().mean(1, keepdim=True)
        n = bend.shape[axis]
        edge = torch.maximum(edge.narrow(axis, 0, n), edge.narrow(axis, 1, n))
        total = total + (torch.exp(-sharpness * edge) * charbonnier(bend)).mean()
    return total
