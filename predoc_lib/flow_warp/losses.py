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
    a: Float[Tensor, "B C H W"], b: Float[Tensor, "B C H W"], census_weight: float = 0.1, halvings: int = 0
) -> Float[Tensor, ""]:
    """How unlike two batches of images are: colours, and, weighted, census.

    The difference of colours can also count after its sides are halved, again and again, with EPSILON halved alike:
    noise averages out, and a texture too faint to be seen in one pixel, as a road's, begins to tell where it went.

    Args:
        a, b: the images.
        census_weight: of the census; 0: it is not computed.
        halvings: how often the sides are halved; 2^halvings must not exceed them.
    """
    total = charbonnier(a - b).mean()
    for k in range(1, halvings + 1):
        total = total + charbonnier(F.avg_pool2d(a - b, 2**k), EPSILON / 2**k).mean()
    if census_weight:
        total = total + census_weight * charbonnier(census(a) - census(b), 0.1).mean()
    return total


def edge_aware_smoothness(
    field: Float[Tensor, "B c H W"], image: Float[Tensor, "B C H W"], sharpness: float = 20.0
) -> Float[Tensor, ""]:
    """Second differences of a field along both axes; where the image has edges they cost less.

    A ramp costs nothing: the flow of a road that one drives along grows from row to row (second-order smoothness:
    Jonschkowski et al. 2020).
    """
    total = field.new_zeros(())
    for axis in (-1, -2):
        edge = image.diff(dim=axis).abs().mean(1, keepdim=True)
        edge = torch.maximum(edge.narrow(axis, 0, edge.shape[axis] - 1), edge.narrow(axis, 1, edge.shape[axis] - 1))
        total = total + (torch.exp(-sharpness * edge) * charbonnier(field.diff(n=2, dim=axis))).mean()
    return total


def slowness(field: Float[Tensor, "B 2 H W"], scale: float = 1.0) -> Float[Tensor, ""]:
    """The mean of |u|^2 / (|u|^2 + scale^2): of the fields that explain the frames, the slow one.

    The tails are heavy, as those of the prior for speed that people have (Stocker and Simoncelli 2006): what is far
    faster than the scale, pixels per gap, is hardly slowed down, and what nothing holds comes to rest.
    """
    squared = field.square().sum(1)
    return (squared / (squared + scale**2)).mean()
