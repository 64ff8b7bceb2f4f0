"""The i-RevNet (Jacobsen, Smeulders and Oyallon 2018): an image as a feature and a remainder, and back without loss.

Pixels are rearranged, never thrown away: S trades 2 x 2 pixels for 4 times the channels. The channels are in two
halves, and each block changes one of them by what a network F makes of the other:

    (x1, x2)  ->  (S x2, S x1 + F(x2))        undone by  x2 = S^-1 a,  x1 = S^-1 (b - F(x2))  of (a, b)
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

Image = Float[Tensor, "B _ _ _"]


class Block(nn.Module):
    """One additive coupling. F is a bottleneck of three convolutions: ``outer`` x ``outer``, 3 x 3, and as the first.

    Args:
        channels: of both halves together, as they come in.
        hidden: channels within F.
        stride: 2: S rearranges 2 x 2 pixels; 1: S does nothing.
        outer: 1, or 3 to see more.
        norm: batch normalization before every activation, and of the input unless ``first`` (the paper's). The inverse
            is then exact in evaluation mode only, since a batch's own statistics are not known afterwards.
        first: the input is an image, which is neither normalized nor rectified.
    """

    def __init__(
        self, channels: int, hidden: int, stride: int = 1, outer: int = 3, norm: bool = True, first: bool = False
    ) -> None:
        super().__init__()
        self.stride = stride
        half, out = channels // 2, channels // 2 * stride**2

        def before(n: int) -> list[nn.Module]:
            return [nn.BatchNorm2d(n), nn.ReLU()] if norm else [nn.ReLU()]

        self.net = nn.Sequential(
            *([] if first else before(half)),
            nn.Conv2d(half, hidden, outer, padding=outer // 2, bias=not norm), *before(hidden),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, bias=not norm), *before(hidden),
            nn.Conv2d(hidden, out, outer, padding=outer // 2, bias=not norm),
        )  # fmt: skip

    def forward(self, x1: Image, x2: Image) -> tuple[Image, Image]:
        """(S x2, S x1 + F(x2))."""
        return F.pixel_unshuffle(x2, self.stride), F.pixel_unshuffle(x1, self.stride) + self.net(x2)

    def inverse(self, a: Image, b: Image) -> tuple[Image, Image]:
        """(x1, x2) of ``forward``'s result."""
        x2 = F.pixel_shuffle(a, self.stride)
        return F.pixel_shuffle(b - self.net(x2), self.stride), x2


class IRevNet(nn.Module):
    """An image [B, C, H, W] as (feature, remainder), and back.

    S comes once before the first block and once in the first block of every level, so sides have to divide by
    2^(levels + 1); the result has C 4^(levels + 1) channels (more with ``pad``) on a grid that much smaller. The first
    ``features`` of them are the feature.

    Args:
        channels: C of the images; any number.
        blocks: how many in each level; the paper's: (6, 16, 72, 6).
        features: channels of the feature; None: all, and the remainder is empty.
        hidden: channels within F in each level; None: a quarter of half the channels (the paper's).
        pad: channels of zeros put behind the first S's, which makes the map injective instead of bijective.
        outer: see ``Block``.
        norm: see ``Block``.

    Raises:
        ValueError: no level, more features than channels, or padding that leaves an odd number of channels.
    """

    def __init__(
        self,
        channels: int = 3,
        blocks: tuple[int, ...] = (2, 2, 2),
        features: int | None = None,
        hidden: tuple[int, ...] | None = None,
        pad: int = 0,
        outer: int = 3,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.channels, self.pad, self.scale = channels, pad, 2 ** (len(blocks) + 1)
        inner = 4 * channels + pad
        if not blocks or min(blocks) < 1 or pad < 0 or inner % 2 or (hidden and len(hidden) != len(blocks)):
            raise ValueError(
                "An i-RevNet needs at least one block in each level, one number of hidden channels a level, and an "
                f"even number of channels after padding; got blocks={blocks}, hidden={hidden} and {inner} channels."
            )
        layers, first = [], True
        for level, count in enumerate(blocks):
            for i in range(count):
                stride = 2 if i == 0 else 1
                width = hidden[level] if hidden else max(1, inner // 2 * stride**2 // 4)
                layers.append(Block(inner, width, stride, outer, norm, first))
                inner, first = inner * stride**2, False
        self.blocks = nn.ModuleList(layers)
        self.features = inner if features is None else features
        if not 0 < self.features <= inner:
            raise ValueError(f"The feature can have 1 to {inner} channels, got {features}.")
        self.out_channels = inner

    def forward(self, image: Image) -> tuple[Float[Tensor, "B f h w"], Float[Tensor, "B r h w"]]:
        """Feature and remainder.

        Raises:
            ValueError: another number of channels, or sides that do not divide.
        """
        _check_image(image, self.channels, self.scale)
        x = F.pad(F.pixel_unshuffle(image, 2), (0, 0, 0, 0, 0, self.pad))
        x1, x2 = x.chunk(2, 1)
        for block in self.blocks:
            x1, x2 = block(x1, x2)
        x = torch.cat([x1, x2], 1)
        return x[:, : self.features], x[:, self.features :]

    def inverse(self, feature: Float[Tensor, "B f h w"], remainder: Float[Tensor, "B r _ _"] | None = None) -> Image:
        """The image of a feature and a remainder; None: a remainder of zeros.

        Raises:
            ValueError: other numbers of channels, or sizes that differ.
        """
        x1, x2 = _joined(feature, remainder, self.features, self.out_channels).chunk(2, 1)
        for block in reversed(self.blocks):
            x1, x2 = block.inverse(x1, x2)
        x = torch.cat([x1, x2], 1)
        return F.pixel_shuffle(x[:, : 4 * self.channels], 2)


class ResidualBlock(nn.Module):
    """x + g(x), where g shrinks every distance to ``contraction`` at most (i-ResNet, Behrmann et al. 2019).

    g is two convolutions of 3 x 3 with ReLU before each; the norm of such a convolution is at most 3 times that of its
    kernel as a matrix, which is what spectral normalization fixes. The inverse is the fixed point of x = y - g(x).
    """

    def __init__(self, channels: int, hidden: int, contraction: float = 0.9) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            parametrizations.spectral_norm(nn.Conv2d(a, b, 3, padding=1))
            for a, b in ((channels, hidden), (hidden, channels))
        )
        self.factor, self.contraction = contraction / 9, contraction

    def g(self, x: Image) -> Image:
        """What is added."""
        for convolution in self.convolutions:
            x = convolution(x.relu())
        return self.factor * x

    def forward(self, x: Image) -> Image:
        """x + g(x)."""
        return x + self.g(x)

    def inverse(self, y: Image, steps: int) -> Image:
        """The fixed point, to a relative error of ``contraction ** steps``."""
        x = y
        for _ in range(steps):
            x = y - self.g(x)
        return x


class IResNet(nn.Module):
    """An image as (feature, remainder), and back, as ``IRevNet``, by contractive residual blocks.

    Args:
        channels: of the images.
        blocks: how many in each level; before each level pixels are rearranged, once more before the first.
        features: channels of the feature.
        hidden: channels within a block, in each level.
        steps: of the fixed-point iteration of the inverse.

    Raises:
        ValueError: no level, or more features than channels.
    """

    def __init__(
        self, channels: int, blocks: tuple[int, ...], features: int, hidden: tuple[int, ...], steps: int = 30
    ) -> None:
        super().__init__()
        self.channels, self.scale = channels, 2 ** (len(blocks) + 1)
        self.features, self.steps, self.out_channels = features, steps, channels * self.scale**2
        if not blocks or not 0 < features <= self.out_channels:
            raise ValueError(
                f"An i-ResNet needs a level, and a feature of 1 to {self.out_channels} channels; got "
                f"blocks={blocks} and {features}."
            )
        self.levels = nn.ModuleList()
        for level, (count, width) in enumerate(zip(blocks, hidden, strict=True)):
            inner = channels * 4 ** (level + 2)
            self.levels.append(nn.ModuleList(ResidualBlock(inner, width) for _ in range(count)))

    def forward(self, image: Image) -> tuple[Float[Tensor, "B f h w"], Float[Tensor, "B r h w"]]:
        """Feature and remainder; errors as ``IRevNet``'s."""
        _check_image(image, self.channels, self.scale)
        x = F.pixel_unshuffle(image, 2)
        for blocks in self.levels:
            x = F.pixel_unshuffle(x, 2)
            for block in blocks:
                x = block(x)
        return x[:, : self.features], x[:, self.features :]

    def inverse(self, feature: Float[Tensor, "B f h w"], remainder: Float[Tensor, "B r _ _"] | None = None) -> Image:
        """The image, by fixed points; None: a remainder of zeros. Errors as ``IRevNet``'s."""
        x = _joined(feature, remainder, self.features, self.out_channels)
        for blocks in reversed(self.levels):
            for block in reversed(blocks):
                x = block.inverse(x, self.steps)
            x = F.pixel_shuffle(x, 2)
        return F.pixel_shuffle(x, 2)


def _check_image(image: Image, channels: int, scale: int) -> None:
    if image.shape[1] != channels or image.shape[2] % scale or image.shape[3] % scale:
        raise ValueError(
            f"Images must have {channels} channels and sides that divide by {scale}, got {list(image.shape)}: "
            "resize or pad them."
        )


def _joined(feature: Image, remainder: Image | None, features: int, channels: int) -> Image:
    """Feature and remainder in one tensor; None: zeros."""
    if remainder is None:
        remainder = feature.new_zeros(len(feature), channels - features, *feature.shape[2:])
    wanted = (features, channels - features)
    if (feature.shape[1], remainder.shape[1]) != wanted or feature.shape[2:] != remainder.shape[2:]:
        raise ValueError(
            f"Feature and remainder must have {wanted[0]} and {wanted[1]} channels on the same grid, got "
            f"{list(feature.shape)} and {list(remainder.shape)}."
        )
    return torch.cat([feature, remainder], 1)


def levels_for(image: tuple[int, int, int], shapes: list[tuple[int, int, int]]) -> int:
    """How many levels of an ``IRevNet`` reach the grid of the coarsest of a detector's features.

    Args:
        image: channels, height and width.
        shapes: the same of each head's features.

    Raises:
        ValueError: no number of levels does, a head's grid is not the coarsest's times a power of 2, or the features
            have more numbers than the image.
    """
    channels, height, width = image
    coarsest = min(shapes, key=lambda shape: shape[1] * shape[2])
    grids = {(coarsest[1] * 2**k, coarsest[2] * 2**k) for k in range(10)}
    if odd := [shape[1:] for shape in shapes if shape[1:] not in grids]:
        raise ValueError(
            f"Heads of {odd[0][0]} x {odd[0][1]} and {coarsest[1]} x {coarsest[2]} cells cannot be joined: each must "
            "be as large as the coarsest, times a power of 2."
        )
    reached = {}
    for levels in range(1, 10):
        scale = 2 ** (levels + 1)
        if height % scale or width % scale:
            break
        reached[height // scale, width // scale] = levels
    needed = sum(math.prod(shape) for shape in shapes)
    if coarsest[1:] not in reached:
        grids = ", ".join(f"{h} x {w}" for h, w in reached) or "none"
        raise ValueError(
            f"No depth takes an image of {height} x {width} to features of {coarsest[1]} x {coarsest[2]}; it can "
            f"reach {grids}."
        )
    if needed > channels * height * width:
        raise ValueError(
            f"The features have {needed} numbers and the image {channels * height * width}: a feature that is a part "
            "of the image rearranged cannot be larger than it."
        )
    return reached[coarsest[1:]]


def gather(features: list[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B f h w"]:
    """All heads' features as one, on the coarsest grid: finer ones are rearranged as pixels are."""
    height = min(x.shape[2] for x in features)
    return torch.cat([F.pixel_unshuffle(x, x.shape[2] // height) for x in features], 1)


def scatter(feature: Float[Tensor, "B f h w"], shapes: list[tuple[int, int, int]]) -> list[Float[Tensor, "B _ _ _"]]:
    """What ``gather`` made one, in parts again, of these shapes (channels, height, width)."""
    height, parts = feature.shape[2], []
    for channels, side, _ in shapes:
        factor = side // height
        part, feature = feature[:, : channels * factor**2], feature[:, channels * factor**2 :]
        parts.append(F.pixel_shuffle(part, factor))
    return parts
