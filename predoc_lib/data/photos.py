"""Crops of the photographs that scikit-image and scikit-learn ship: real images, always there.

Training and test crops come of different pictures, which are named: pictures differ by 2 bits/dim and more.
"""

import functools
import importlib.resources
from importlib.resources.abc import Traversable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from predoc_lib.data import catalog
from predoc_lib.naming import unknown

# Every pixel is the mean of 2 x 2 of the picture's: crops of 16 or 32 pixels then have content, less noise, and no
# traces of JPEG's blocks.
REDUCE = 2
PICTURES = {
    "train": ("astronaut", "coffee", "rocket", "motorcycle", "china"),
    "test": ("chelsea", "flower"),
}
FILES = {"rocket": "rocket.jpg", "motorcycle": "motorcycle_left.png", "motorcycle_disp": "motorcycle_disp.npz"}


def photos(
    n: int, side: int = 16, split: str = "train", *, picture: str | None = None, seed: int | tuple[int, ...] = 0
) -> UInt8[Tensor, "n 3 side side"]:
    """n crops, each at a place of its own, half of them mirrored, all drawn from ``seed``.

    Args:
        n: at least 1; the split's pictures take turns.
        side: pixels of the reduced picture; at most 150.
        split: "train" or "test": different pictures.
        picture: one of the split's ``PICTURES`` alone; None: all of them.
        seed: a number or several; the same gives the same crops.

    Raises:
        ValueError: n or side out of range.
        catalog.DataError: unknown split or picture.
    """
    if split not in PICTURES:
        raise catalog.DataError(unknown("split", split, PICTURES))
    if picture is not None and picture not in PICTURES[split]:
        raise catalog.DataError(unknown(f"{split} picture", picture, PICTURES[split]))
    pictures = [reduced(name) for name in ([picture] if picture else PICTURES[split])]
    largest = min(min(p.shape[1:]) for p in pictures)
    if n < 1 or not 1 <= side <= largest:
        raise ValueError(f"photos needs n of at least 1 and a side of 1 to {largest} pixels, got n={n}, side={side}.")
    rng = np.random.default_rng(seed)
    crops = np.empty((n, 3, side, side), np.uint8)
    for i, (y, x, mirrored) in enumerate(rng.random((n, 3))):
        p = pictures[i % len(pictures)]
        top, left = int(y * (p.shape[1] - side + 1)), int(x * (p.shape[2] - side + 1))
        crop = p[:, top : top + side, left : left + side]
        crops[i] = crop[:, :, ::-1] if mirrored < 0.5 else crop
    return torch.from_numpy(crops)


def recoloured(
    crops: UInt8[Tensor, "n 3 side side"], seed: int | tuple[int, ...] = 0
) -> UInt8[Tensor, "n 3 side side"]:
    """The crops seen otherwise: five pictures hold few directions and few colours, and a model would learn just these.

    Every crop is flipped upside down or not, transposed or not; half of them have the contrast (0.75 to 1.25) and the
    brightness (by -30 to 30 levels) of every channel changed, with dither.
    """
    rng = np.random.default_rng(seed)
    n = len(crops)
    upside, turned, same = torch.from_numpy(rng.random((3, n)) < 0.5)[:, :, None, None, None]
    crops = torch.where(upside, crops.flip(2), crops)
    crops = torch.where(turned, crops.transpose(2, 3), crops)
    contrast, brightness = torch.from_numpy(rng.random((2, n, 3, 1, 1), np.float32))
    dither = torch.from_numpy(rng.random(crops.shape, np.float32))
    changed = crops * (0.75 + 0.5 * contrast) + 60 * (brightness - 0.5) + dither
    return torch.where(same, crops, changed.clamp(0, 255).to(torch.uint8))


@functools.cache
def reduced(name: str) -> np.ndarray:
    """A picture at half its size, uint8 [3, H, W]."""
    with file(name).open("rb") as opened:
        p = torch.from_numpy(np.array(Image.open(opened).convert("RGB"))).permute(2, 0, 1)
    return torch.nn.functional.avg_pool2d(p.float(), REDUCE).round().byte().numpy()


def file(name: str) -> Traversable:
    """Where a picture lies."""
    if name in ("china", "flower"):
        return importlib.resources.files("sklearn.datasets") / "images" / f"{name}.jpg"
    return importlib.resources.files("skimage.data") / FILES.get(name, f"{name}.png")


def content() -> bytes:
    """The pictures' files, all of them."""
    return b"".join(file(name).read_bytes() for names in PICTURES.values() for name in names)
