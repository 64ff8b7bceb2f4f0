"""Optical flow of one pair or clip by fitting: no network and no data set, only the frames (the classical use).

The energy has a robust data term, of colours and of their gradients, and a robust smoothness term (Brox et al. 2004).
From coarse to fine, the images are warped by what is known of the flow, the energy is linearized around it, and the
linear systems that reweighting makes of it are solved by conjugate gradients. A weighted median follows every warp (Sun
et al. 2010). Both directions are fitted at once: where they disagree the pixel is hidden in the other image, and its
data term counts little.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from predoc_lib.flow_warp.transport import compose, inside, warp

Images = Float[Tensor, "B C H W"]
Flows = Float[Tensor, "B 2 H W"]

FACTOR, COARSEST = 0.75, 14  # from a level of the pyramid to the next; pixels of the shorter side of the last one
BLUR = 0.5  # of the images before all else: the standard deviation in pixels
WARPS, REWEIGHTINGS, ITERATIONS = 5, 2, 30  # a level; a warp; of conjugate gradients in each of these
EXPONENT = 0.45  # of the penalties (x^2 + e^2)^0.45: a little below the absolute value
DATA_EPSILON, SMOOTHNESS_EPSILON = 3e-3, 0.1  # e, in levels of brightness and in pixels
COLOURS, GRADIENTS = 0.3, 1.0  # weights of the two data terms
SMOOTHNESS = 0.005
LIMIT = 1.0  # pixels that a warp may change the flow by
REACH, NEAR, ALIKE = 3, 7.0, 0.03  # of the median: pixels to each side; widths of its weights, in pixels and in colour
HIDDEN = 0.02  # weight of a pixel's data term where the directions disagree


@torch.no_grad()
def fit_pair(image0: Images, image1: Images, *, smoothness: float = SMOOTHNESS) -> Flows:
    """The flow from image0's grid to image1, image0(p) = image1(p + flow(p)): Middlebury's direction.

    Args:
        image0, image1: the same scenes at two times, in [0, 1].
        smoothness: weight of the smoothness term; no other setting should need a change.

    Raises:
        ValueError: images of different size, not finite, or smaller than 16 pixels.
    """
    return fit_both(image0, image1, smoothness=smoothness)[0]


@torch.no_grad()
def fit_clip(frames: Float[Tensor, "T C H W"], *, smoothness: float = SMOOTHNESS) -> Float[Tensor, "T-1 2 H W"]:
    """The flows between neighbouring frames, each on the later one's grid: frames[i + 1] = frames[i] warped by flow[i].

    Raises:
        ValueError: a single frame, or as ``fit_pair``.
    """
    if len(frames) < 2:
        raise ValueError(f"A flow needs two frames, got {len(frames)}.")
    pairs = zip(frames[1:], frames[:-1], strict=True)
    return torch.cat([fit_pair(later[None], earlier[None], smoothness=smoothness) for later, earlier in pairs])


@torch.no_grad()
def fit_both(image0: Images, image1: Images, *, smoothness: float = SMOOTHNESS) -> tuple[Flows, Flows]:
    """The flow from image0's grid to image1, and that from image1's to image0.

    Args, Raises: as ``fit_pair``.
    """
    if image0.shape != image1.shape or min(image0.shape[-2:]) < 16 or not (image0 + image1).sum().isfinite():
        raise ValueError(
            f"A pair needs two finite images of the same size, at least 16 pixels a side, got {list(image0.shape)} and "
            f"{list(image1.shape)}."
        )
    levels = pyramid(gaussian(torch.cat([image0, image1]), BLUR))
    flow = levels[-1].new_zeros(len(levels[-1]), 2, *levels[-1].shape[-2:])
    for images in reversed(levels):
        flow = enlarged(flow, images.shape[-2:])
        certainty = torch.where(agree(flow), 1.0, HIDDEN)
        for _ in range(WARPS):
            flow = flow + increment(images, flow, certainty, smoothness).clamp(-LIMIT, LIMIT)
            flow = weighted_median(flow, images, certainty)
    return tuple(flow.chunk(2))


def other(x: Tensor) -> Tensor:
    """The two halves of a batch exchanged: of each image its partner, of each flow that of the other direction."""
    return torch.cat(x.chunk(2)[::-1])


def agree(flow: Flows) -> Float[Tensor, "B 1 H W"]:
    """Where there and back ends near where it began: elsewhere the pixel is hidden in the other image."""
    round_trip, back = compose(other(flow), flow), warp(other(flow), flow)
    length = (flow.square() + back.square()).sum(1, keepdim=True)
    return round_trip.square().sum(1, keepdim=True) < 0.01 * length + 0.5


def increment(images: Images, flow: Flows, certainty: Float[Tensor, "B 1 H W"], smoothness: float) -> Flows:
    """What to add to the flow: the minimum of the energy with the warped images linearized in it."""
    counts, terms = certainty * inside(flow), []
    for weight, x in ((COLOURS, images), (GRADIENTS, torch.cat(derivatives(images), 1))):
        moved = warp(other(x), flow, mode="bicubic")
        slopes = [(a + b) / 2 for a, b in zip(derivatives(x), derivatives(moved), strict=True)]
        terms.append((weight / x.shape[1], moved - x, *slopes))
    change = torch.zeros_like(flow)
    for _ in range(REWEIGHTINGS):
        a = b = c = right_x = right_y = 0.0
        for weight, error, dx, dy in terms:
            residual = error + dx * change[:, :1] + dy * change[:, 1:]
            w = weight * counts * reweighted(residual.square().mean(1, keepdim=True), DATA_EPSILON)
            a, b, c = a + w * total(dx * dx), b + w * total(dx * dy), c + w * total(dy * dy)
            right_x, right_y = right_x - w * total(dx * error), right_y - w * total(dy * error)
        bends = [(flow + change).diff(dim=axis).square() for axis in (-1, -2)]
        springs = [smoothness * reweighted(total(bend), SMOOTHNESS_EPSILON) for bend in bends]
        right = torch.cat([right_x, right_y], 1) - pull(flow, springs)
        change = conjugate_gradients((a, b, c), springs, right, change)
    return change


def conjugate_gradients(matrix: tuple[Tensor, Tensor, Tensor], springs: list[Tensor], right: Flows, x: Flows) -> Flows:
    """Solve (data term + springs) x = right; the matrix is [[a, b], [b, c]] in every pixel, and so is its inverse."""
    a, b, c = matrix
    own = F.pad(springs[0], (1, 0)) + F.pad(springs[0], (0, 1))
    own = own + F.pad(springs[1], (0, 0, 1, 0)) + F.pad(springs[1], (0, 0, 0, 1)) + 1e-9
    determinant = (a + own) * (c + own) - b * b

    def times(v: Tensor) -> Tensor:
        return torch.cat([a * v[:, :1] + b * v[:, 1:], b * v[:, :1] + c * v[:, 1:]], 1) + pull(v, springs)

    def precondition(r: Tensor) -> Tensor:
        return torch.cat([(c + own) * r[:, :1] - b * r[:, 1:], (a + own) * r[:, 1:] - b * r[:, :1]], 1) / determinant

    def dot(p: Tensor, q: Tensor) -> Tensor:
        return (p * q).sum((1, 2, 3), keepdim=True)

    r = right - times(x)
    z = precondition(r)
    p, rz = z, dot(r, z)
    for _ in range(ITERATIONS):
        ap = times(p)
        step = rz / (dot(p, ap) + 1e-20)
        x, r = x + step * p, r - step * ap
        z = precondition(r)
        rz, before = dot(r, z), rz
        p = z + rz / (before + 1e-20) * p
    return x


def pull(v: Flows, springs: list[Tensor]) -> Flows:
    """How springs between neighbours pull at each pixel."""
    across, down = springs[0] * v.diff(dim=-1), springs[1] * v.diff(dim=-2)
    return F.pad(across, (1, 0)) - F.pad(across, (0, 1)) + F.pad(down, (0, 0, 1, 0)) - F.pad(down, (0, 0, 0, 1))


def reweighted(square: Tensor, epsilon: float) -> Tensor:
    """The weight that makes a square of the robust penalty (x^2 + epsilon^2)^EXPONENT."""
    return (square + epsilon**2) ** (EXPONENT - 1)


def total(x: Tensor) -> Tensor:
    """Over the channels."""
    return x.sum(1, keepdim=True)


def weighted_median(flow: Flows, images: Images, certainty: Float[Tensor, "B 1 H W"]) -> Flows:
    """The median of the flow around each pixel, weighted by nearness in place and in colour, and by certainty."""
    side = 2 * REACH + 1
    y, x = torch.meshgrid(*[torch.arange(-REACH, REACH + 1.0, device=flow.device)] * 2, indexing="ij")
    far = ((x.square() + y.square()) / (2 * NEAR**2)).reshape(-1, 1).to(flow)

    def around(z: Tensor) -> Float[Tensor, "c n HW"]:
        return F.unfold(F.pad(z, (REACH,) * 4, mode="replicate"), side).reshape(z.shape[1], side**2, -1)

    found = []
    for f, image, sure in zip(flow.split(1), images.split(1), certainty.split(1), strict=True):  # it takes much memory
        unlike = (around(image) - image.flatten(2).transpose(0, 1)).square().mean(0)
        weights = torch.exp(-unlike / (2 * ALIKE**2) - far) * (around(sure)[0] + 1e-3)
        for values in around(f):
            values, order = values.sort(0)
            sums = weights.gather(0, order).cumsum(0)
            found.append(values.gather(0, (sums < sums[-1:] / 2).sum(0, keepdim=True)))
    return torch.stack(found).view_as(flow)


def pyramid(images: Images) -> list[Images]:
    """The images, and smaller and smaller ones."""
    height, width = images.shape[-2:]
    levels, scale = [images], FACTOR
    while min(height, width) * scale >= COARSEST:
        small = gaussian(levels[-1], (FACTOR**-2 - 1) ** 0.5 / 2)
        levels.append(resized(small, (round(height * scale), round(width * scale))))
        scale *= FACTOR
    return levels


def enlarged(flow: Flows, size: torch.Size) -> Flows:
    """A flow on another grid, in its pixels."""
    scale = flow.new_tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]])[:, None, None]
    return resized(flow, size) * scale


def resized(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear interpolation."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def derivatives(x: Images) -> tuple[Images, Images]:
    """Along x and along y, by central differences of order 4."""
    kernel = x.new_tensor([1.0, -8, 0, 8, -1]) / 12
    return filtered(x, kernel, 0), filtered(x, kernel, 1)


def gaussian(x: Images, deviation: float) -> Images:
    """Blur along both axes."""
    reach = max(1, round(3 * deviation))
    kernel = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * deviation**2)).to(x)
    kernel = kernel / kernel.sum()
    return filtered(filtered(x, kernel, 0), kernel, 1)


def filtered(x: Images, kernel: Float[Tensor, " n"], axis: int) -> Images:
    """Convolution of every channel along x (axis 0) or y (axis 1)."""
    c, reach = x.shape[1], len(kernel) // 2
    shape, pad = ((1, 1, 1, -1), (reach, reach, 0, 0)) if axis == 0 else ((1, 1, -1, 1), (0, 0, reach, reach))
    return F.conv2d(F.pad(x, pad, mode="replicate"), kernel.view(shape).repeat(c, 1, 1, 1), groups=c)
