"""Handwritten digits that move in straight lines and bounce off the walls, known at every real time.

The recipe is Moving MNIST's (Srivastava et al. 2015): a 64 x 64 canvas, 28 x 28 digits, a tenth of the free range
(3.6 pixels) a frame. A canvas of 32 is the same scene at half the size.
"""

import dataclasses
import functools

import numpy as np
import sklearn.datasets
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchvision.datasets import mnist

from predoc_lib.data import catalog
from predoc_lib.naming import unknown
from predoc_lib.render import place

SPLITS = ("train", "validation", "test")


@functools.cache
def digit_images(dataset: str, split: str, size: int) -> tuple[Float[Tensor, "n size size"], Tensor]:
    """Images in [0, 1], resized, and labels of one split; the three splits share no image.

    "digits" is split 70 / 10 / 20 % by a fixed shuffle; "mnist" keeps its test set, and its last 5,000 training images
    are "validation".

    Raises:
        catalog.DataError: unknown data set or split, or its files are absent or damaged.
    """
    if split not in SPLITS:
        raise catalog.DataError(unknown("split", split, SPLITS))
    folder = catalog.require(dataset)
    if dataset == "digits":
        images, labels = sklearn.datasets.load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8) / 16
        order = np.random.default_rng(0).permutation(len(images))
        part = np.split(order, [len(order) * 7 // 10, len(order) * 8 // 10])[SPLITS.index(split)]
    else:
        kind = "t10k" if split == "test" else "train"
        images = mnist.read_image_file(folder / f"MNIST/raw/{kind}-images-idx3-ubyte").numpy() / 255
        labels = mnist.read_label_file(folder / f"MNIST/raw/{kind}-labels-idx1-ubyte").numpy()
        part = {"train": slice(0, 55_000), "validation": slice(55_000, None), "test": slice(None)}[split]
    images = torch.from_numpy(images[part]).float()[:, None]
    images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return images[:, 0], torch.from_numpy(np.asarray(labels[part]))


def reflect(x: Tensor, length: float | int) -> Tensor:
    """Fold the real line into [0, length]: where a point that walks to x is when walls at both ends reflect it."""
    return length - (torch.remainder(x, 2 * length) - length).abs()


@dataclasses.dataclass(frozen=True)
class MovingDigits:
    """Videos of bouncing digits; ``frames(t)`` and ``position(t)`` hold at every real time t, in frames.

    Attributes:
        images: [B, K, h, w] in [0, 1], one image a digit.
        labels: [B, K] int64.
        start: [B, K, 2] upper left corner (y, x) at t = 0, pixels.
        velocity: [B, K, 2] before the first bounce, pixels a frame.
        canvas: side of the canvas, pixels.
    """

    images: Float[Tensor, "B K h w"]
    labels: Tensor
    start: Float[Tensor, "B K 2"]
    velocity: Float[Tensor, "B K 2"]
    canvas: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index) -> "MovingDigits":
        """The chosen videos (any index of a first axis that keeps it: a slice, a tensor)."""
        fields = (self.images, self.labels, self.start, self.velocity)
        return MovingDigits(*(f[index] for f in fields), self.canvas)

    def position(self, t: Tensor) -> Float[Tensor, "B T K 2"]:
        """Upper left corners (y, x) in pixels at times t, [T] or [B, T]."""
        t = t.to(self.start).expand(len(self), t.shape[-1])[:, :, None, None]
        return reflect(self.start[:, None] + self.velocity[:, None] * t, self.canvas - self.images.shape[-1])

    def frames(self, t: Tensor) -> Float[Tensor, "B T 1 H W"]:
        """True frames in [0, 1] at times t, [T] or [B, T]; where digits overlap the brighter one shows."""
        return self._drawn(t).amax(2)[:, :, None]

    def flow(self, t0: float, t1: float) -> tuple[Float[Tensor, "B 2 H W"], Bool[Tensor, "B H W"]]:
        """Where the points seen at t1 were at t0: (dx, dy) in pixels on t1's grid, and which of them are a digit's.

        The background has no marks, so that nobody can see it move: its flow is 0.
        """
        drawn = self._drawn(torch.tensor([float(t1)]))[:, 0]
        way = (self.position(torch.tensor([float(t0)])) - self.position(torch.tensor([float(t1)])))[:, 0].flip(-1)
        level, owner = drawn.max(1)
        solid = level > 0.05
        flow = torch.stack([x.gather(1, owner.flatten(1)).view_as(level) for x in way.unbind(-1)], 1)
        return flow * solid[:, None], solid

    def _drawn(self, t: Tensor) -> Float[Tensor, "B T K H W"]:
        """Each digit alone."""
        return place(self.images[:, None], self.position(t), (self.canvas, self.canvas))


def moving_digits(
    n: int,
    *,
    dataset: str = "digits",
    n_digits: int = 1,
    canvas: int = 64,
    seed: int | tuple[int, ...] = 0,
    split: str = "train",
) -> MovingDigits:
    """n videos of ``n_digits`` bouncing digits on a ``canvas`` x ``canvas`` square, all drawn from ``seed``.

    Args:
        n: number of videos, at least 1.
        dataset: "digits" (scikit-learn's, embedded) or "mnist".
        n_digits: digits a video.
        canvas: side in pixels, a multiple of 16; a digit's side is 7/16 of it, its speed a tenth of the free range.
        seed: a number or several; the same gives the same videos.
        split: "train", "validation" or "test": three disjoint sets of digit images.

    Raises:
        ValueError: n, n_digits or canvas out of range.
        catalog.DataError: unknown data set or split, or its files are absent or damaged.
    """
    if n < 1 or n_digits < 1:
        raise ValueError(f"moving_digits needs at least 1 video and 1 digit, got n={n} and n_digits={n_digits}.")
    if canvas < 16 or canvas % 16:
        raise ValueError(f"canvas must be a positive multiple of 16 pixels, got {canvas}.")
    images, labels = digit_images(dataset, split, canvas * 7 // 16)
    rng = np.random.default_rng(seed)
    length = canvas - images.shape[-1]
    chosen = torch.from_numpy(rng.integers(len(images), size=(n, n_digits)))
    start = rng.uniform(0, length, size=(n, n_digits, 2))
    angle = rng.uniform(0, 2 * np.pi, size=(n, n_digits))
    velocity = length / 10 * np.stack([np.sin(angle), np.cos(angle)], -1)
    return MovingDigits(
        images[chosen], labels[chosen], torch.from_numpy(start).float(), torch.from_numpy(velocity).float(), canvas
    )
