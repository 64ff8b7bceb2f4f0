"""The layers of Darknet's detectors: each reads its section of a ``.cfg``, and knows the shape of what it gives."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from predoc_lib.yolo.cfg import Section

Shape = tuple[int, int, int]  # channels, height, width
LIMIT = 1 << 26  # numbers in one layer's output, and parameters of all layers; YOLOv3 has 62 million
BN_EPS = 1e-6


class Convolutional(nn.Sequential):
    """Convolution, batch norm (or a bias), activation."""

    def __init__(self, section: Section, shape: Shape) -> None:
        filters, size = section.integer("filters", 1), section.integer("size", 1)
        stride, groups = section.integer("stride", 1), section.integer("groups", 1)
        padding = section.integer("padding", 0, low=0)
        if section.integer("pad", 0, low=0):
            padding = size // 2
        normed = bool(section.integer("batch_normalize", 0, low=0))
        activation = section.choice("activation", ("linear", "leaky"))
        channels, *sides = shape
        if channels % groups or filters % groups:
            raise section.error(f"{groups} groups do not divide {channels} channels into {filters} filters.", "groups")
        sides = [side + 2 * padding for side in sides]
        check(section, (channels, *sides))
        self.shape = (filters, *((side - size) // stride + 1 for side in sides))
        self.numbers = filters * (channels // groups * size**2 + 1 + 3 * normed)
        check(section, self.shape, self.numbers)
        modules = [nn.Conv2d(channels, filters, size, stride, padding, groups=groups, bias=not normed)]
        modules += [nn.BatchNorm2d(filters, eps=BN_EPS)] * normed
        super().__init__(*modules, *[nn.LeakyReLU(0.1, inplace=True)] * (activation == "leaky"))
        self.normed, self.fused = normed, False

    def arrays(self) -> list[Tensor]:
        """Its numbers, in the order of a ``.weights`` file.

        Raises:
            ValueError: it is fused.
        """
        if self.fused:
            raise ValueError("A fused network has no numbers of a .weights file: take the one that it was made from.")
        conv = self[0]
        if not self.normed:
            return [conv.bias, conv.weight]
        norm = self[1]
        return [norm.bias, norm.weight, norm.running_mean, norm.running_var, conv.weight]

    def fuse(self) -> None:
        """Make the batch norm, as it is in evaluation, a part of the convolution."""
        if self.normed and not self.fused:
            self[0], self[1] = fuse_conv_bn_eval(self[0], self[1]), nn.Identity()
        self.fused = True


class MaxPool(nn.Module):
    """Maximum over windows; what is missing of the last ones is padded right and below, one number more than left."""

    def __init__(self, section: Section, shape: Shape) -> None:
        super().__init__()
        self.stride = section.integer("stride", 1)
        self.size = section.integer("size", self.stride)
        padding = section.integer("padding", self.size - 1, low=0)
        self.pad = (padding // 2, padding - padding // 2) * 2
        sides = [side + padding for side in shape[1:]]
        check(section, (shape[0], *sides))
        self.shape = (shape[0], *((side - self.size) // self.stride + 1 for side in sides))
        check(section, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(x, self.pad, value=-math.inf), self.size, self.stride)


class Upsample(nn.Upsample):
    """Nearest neighbour."""

    def __init__(self, section: Section, shape: Shape) -> None:
        stride = section.integer("stride", 2)
        super().__init__(scale_factor=stride, mode="nearest")
        self.shape = (shape[0], stride * shape[1], stride * shape[2])
        check(section, self.shape)


class Route(nn.Module):
    """The channels of one or several layers behind one another; of ``groups`` equal parts of each, only one."""

    def __init__(self, section: Section, *shapes: Shape) -> None:
        super().__init__()
        self.groups, self.group = section.integer("groups", 1), section.integer("group_id", 0, low=0)
        if self.group >= self.groups or any(shape[0] % self.groups for shape in shapes):
            raise section.error(
                f"there is no part {self.group} of {self.groups} of {[s[0] for s in shapes]} channels.", "groups"
            )
        if len({shape[1:] for shape in shapes}) > 1:
            raise section.error(f"layers of other sizes cannot be joined: {[list(s) for s in shapes]}.", "layers")
        self.shape = (sum(shape[0] // self.groups for shape in shapes), *shapes[0][1:])
        check(section, self.shape)

    def forward(self, *layers: Tensor) -> Tensor:
        return torch.cat([x.chunk(self.groups, 1)[self.group] for x in layers], 1)


class Shortcut(nn.Module):
    """The sum of two layers."""

    def __init__(self, section: Section, shape: Shape, other: Shape) -> None:
        super().__init__()
        if shape != other:
            raise section.error(f"a layer {list(other)} cannot be added to one {list(shape)}.", "from")
        section.choice("activation", ("linear",))
        self.shape = shape

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other


class Dropout(nn.Dropout):
    """As it is in training; nothing in evaluation."""

    def __init__(self, section: Section, shape: Shape) -> None:
        p = section.number("probability", 0.5)
        if p >= 1:
            raise section.error(f"'probability' must be less than 1, got {p:g}.", "probability")
        super().__init__(p)
        self.shape = shape


class Yolo(nn.Module):
    """What the last convolution's numbers mean: boxes, objectness, classes."""

    def __init__(self, section: Section, shape: Shape, stride: int) -> None:
        super().__init__()
        self.classes, self.stride, self.shape = section.integer("classes", 20), stride, shape
        self.scale_xy = section.number("scale_x_y", 1.0)
        numbers = section.integers("anchors")
        mask = section.integers("mask", tuple(range(len(numbers) // 2)), low=0)
        if len(numbers) % 2 or max(mask) >= len(numbers) // 2:
            raise section.error(
                f"mask {list(mask)} asks for other anchors than the {len(numbers) / 2:g} given.", "mask"
            )
        anchors = torch.tensor(numbers, dtype=torch.float32).view(-1, 2)[list(mask)]
        self.register_buffer("anchors", anchors, persistent=False)  # widths and heights, pixels
        if stride < 1:
            raise section.error(f"its cells would be smaller than a pixel: before it there are {list(shape)}.")
        if shape[0] != len(mask) * (5 + self.classes):
            raise section.error(
                f"{len(mask)} anchors and {self.classes} classes need {len(mask) * (5 + self.classes)} filters before "
                f"them, there are {shape[0]}."
            )

    def split(self, x: Float[Tensor, "B _ h w"]) -> Float[Tensor, "B h w A _"]:
        """The numbers of every cell and anchor."""
        return x.unflatten(1, (len(self.anchors), -1)).permute(0, 3, 4, 1, 2)

    def forward(self, x: Float[Tensor, "B _ h w"]) -> Float[Tensor, "B N _"]:
        """Boxes as x, y, w, h in fractions of the image, objectness, class probabilities."""
        h, w = x.shape[2:]
        x = self.split(x)
        rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
        cell = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[:, :, None]
        size = torch.tensor([w, h], device=x.device)
        middle = (x[..., :2].sigmoid() * self.scale_xy - (self.scale_xy - 1) / 2 + cell) / size
        sides = x[..., 2:4].exp() * self.anchors / (self.stride * size)
        return torch.cat([middle, sides, x[..., 4:].sigmoid()], -1).flatten(1, 3)


KINDS = {
    "convolutional": Convolutional, "maxpool": MaxPool, "upsample": Upsample, "route": Route, "shortcut": Shortcut,
    "dropout": Dropout, "yolo": Yolo,
}  # fmt: skip


def check(section: Section, shape: Shape, numbers: int = 0) -> None:
    """Raise ``FileError`` if a layer's output or its padded input has no pixel, or too many numbers to be meant."""
    if min(shape) < 1 or math.prod(shape) > LIMIT or numbers > LIMIT:
        raise section.error(
            f"it would hold {list(shape)}, with {numbers:,} parameters; each side must be at least 1, and there may be "
            f"{LIMIT:,} numbers at most."
        )
