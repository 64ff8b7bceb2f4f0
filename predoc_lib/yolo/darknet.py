"""Darknet's detectors, YOLOv3 and its small relatives, from their ``.cfg`` and ``.weights`` files (report, 5.1)."""

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from predoc_lib.files import FileError, whole
from predoc_lib.naming import unknown
from predoc_lib.yolo.cfg import Section, read_cfg

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
        sides = [(side + 2 * padding - size) // stride + 1 for side in sides]
        self.shape = (filters, *sides)
        self.numbers = filters * (channels // groups * size**2 + 1 + 3 * normed)
        _check(section, self.shape, self.numbers)
        modules = [nn.Conv2d(channels, filters, size, stride, padding, groups=groups, bias=not normed)]
        modules += [nn.BatchNorm2d(filters, eps=BN_EPS)] * normed
        super().__init__(*modules, *[nn.LeakyReLU(0.1)] * (activation == "leaky"))

    def arrays(self) -> list[Tensor]:
        """Its numbers, in the order of a ``.weights`` file."""
        conv = self[0]
        if conv.bias is not None:
            return [conv.bias, conv.weight]
        norm = self[1]
        return [norm.bias, norm.weight, norm.running_mean, norm.running_var, conv.weight]


class MaxPool(nn.Module):
    """Maximum over windows; what is missing of the last ones is padded right and below, one number more than left."""

    def __init__(self, section: Section, shape: Shape) -> None:
        super().__init__()
        self.stride = section.integer("stride", 1)
        self.size = section.integer("size", self.stride)
        padding = section.integer("padding", self.size - 1, low=0)
        self.pad = (padding // 2, padding - padding // 2) * 2
        self.shape = (shape[0], *((side + padding - self.size) // self.stride + 1 for side in shape[1:]))
        _check(section, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(x, self.pad, value=-math.inf), self.size, self.stride)


class Upsample(nn.Upsample):
    """Nearest neighbour."""

    def __init__(self, section: Section, shape: Shape) -> None:
        stride = section.integer("stride", 2)
        super().__init__(scale_factor=stride, mode="nearest")
        self.shape = (shape[0], stride * shape[1], stride * shape[2])
        _check(section, self.shape)


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
        _check(section, self.shape)

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


class Darknet(nn.Module):
    """A detector as its ``.cfg`` says; without ``load_weights`` its weights are random.

    Args:
        cfg_path: the file. Its height and width are what images are usually resized to; any size that divides by
            ``stride`` will do.

    Attributes:
        size: (height, width) of the ``.cfg``, pixels.
        stride: pixels a side of the coarsest head's cells.
        shapes: of each detection head's input, (channels, height, width) at that size.

    Raises:
        FileError: a line that cannot be understood, an unknown layer, layers that do not fit.
    """

    def __init__(self, cfg_path: str | Path) -> None:
        super().__init__()
        self.path = Path(cfg_path)
        net, *sections = read_cfg(self.path) or [None]
        if net is None or net.kind not in ("net", "network"):
            raise FileError(f"{cfg_path} is no network: it must begin with [net].")
        self.size = (net.integer("height"), net.integer("width"))
        self.channels = net.integer("channels", 3)
        self.layers, self.sources, self.lines = nn.ModuleList(), [], []
        self.heads_at: list[int] = []  # of the convolution before each [yolo]
        self.numbers, shapes = 0, []
        _check(net, (self.channels, *self.size))
        for i, section in enumerate(sections):
            if section.kind not in KINDS:
                raise section.error(unknown("layer", section.kind, KINDS))
            sources = _sources(section, i)
            ended = {j for at in self.heads_at for j in (at, at + 1)} & set(sources)
            if ended:
                raise section.error(f"it would go on from layer {min(ended)}, where a head ends.")
            inputs = [shapes[j] if j >= 0 else (self.channels, *self.size) for j in sources]
            if section.kind == "yolo":
                if not self.layers or not isinstance(self.layers[-1], Convolutional) or len(self.layers[-1]) > 1:
                    raise section.error("before it there must be a linear convolution without batch norm.")
                layer = Yolo(section, *inputs, self.size[0] // inputs[0][1])
                self.heads_at.append(i - 1)
            else:
                layer = KINDS[section.kind](section, *inputs)
            self.layers.append(layer)
            self.sources.append(sources)
            self.lines.append(section.line)
            shapes.append(layer.shape)
            self.numbers += getattr(layer, "numbers", 0)
            if self.numbers > LIMIT:
                raise section.error(f"the network has more than {LIMIT:,} parameters.")
        if not self.heads_at:
            raise FileError(f"{cfg_path} has no [yolo] layer, so it detects nothing.")
        self.shapes = [self._shape_before(at, shapes) for at in self.heads_at]
        self.stride = max(self.layers[at + 1].stride for at in self.heads_at)
        skipped = {j for at in self.heads_at for j in (at, at + 1)}
        self.last_use = {j: i for i, sources in enumerate(self.sources) if i not in skipped for j in sources}
        self.last_use |= {j: len(self.layers) for at in self.heads_at for j in self.sources[at]}

    def _shape_before(self, at: int, shapes: list[Shape]) -> Shape:
        source = self.sources[at][0]
        return shapes[source] if source >= 0 else (self.channels, *self.size)

    def convolutions(self) -> list[Convolutional]:
        """The layers that have weights, in order."""
        return [layer for layer in self.layers if isinstance(layer, Convolutional)]

    @property
    def classes(self) -> int:
        """How many classes it knows."""
        return self.layers[self.heads_at[0] + 1].classes

    def features(self, images: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """The input of each detection head, of images in [0, 1] (the pre-final features of the report's 5.1).

        Raises:
            ValueError: images of another type, range of channels or side; the message says what is wanted.
        """
        _check_images(images, self.channels, self.stride)
        skipped = {j for at in self.heads_at for j in (at, at + 1)}
        outputs = {-1: images}
        for i, (layer, sources) in enumerate(zip(self.layers, self.sources, strict=True)):
            if i in skipped:
                continue
            outputs[i] = layer(*(outputs[j] for j in sources))
            for j in [j for j in outputs if self.last_use.get(j, -1) <= i]:
                del outputs[j]  # a large image's layers do not all fit at once
        return [outputs[self.sources[at][0]] for at in self.heads_at]

    def logits(self, features: list[Float[Tensor, "B _ _ _"]]) -> list[Float[Tensor, "B _ _ _"]]:
        """The last convolution of each head."""
        return [self.layers[at](x) for at, x in zip(self.heads_at, features, strict=True)]

    def heads(self, features: list[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B N _"]:
        """Detections from features: x, y, w, h (fractions of the image), objectness, class probabilities.

        Rows are in the order of heads, then of (y, x, anchor). Probabilities are not multiplied by objectness.
        """
        yolos = [self.layers[at + 1] for at in self.heads_at]
        return torch.cat([yolo(x) for yolo, x in zip(yolos, self.logits(features), strict=True)], 1)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N _"]:
        """Detections of images in [0, 1]: ``heads`` of ``features``."""
        return self.heads(self.features(images))

    def load_weights(self, path: str | Path) -> "Darknet":
        """Read a Darknet ``.weights`` file, all of it or nothing; return the network.

        Raises:
            FileError: it is absent, too short or too long for this network, or holds what no network does.
        """
        path = Path(path)
        wanted = self.numbers
        try:
            with path.open("rb") as file:
                head = file.read(12)
                major, minor, _ = np.frombuffer(head, "<i4") if len(head) == 12 else (-1, -1, 0)
                if not (0 <= major < 1000 and 0 <= minor < 1000):
                    raise FileError(f"{path} is no Darknet weights file: it does not begin with a version.")
                # From version 0.2 on, the number of images seen in training has 64 bits.
                file.seek(8 if major * 10 + minor >= 2 else 4, 1)
                content = file.read(4 * wanted + 4)
                there = (path.stat().st_size - file.tell() + len(content)) / 4
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror}. Wanted: a Darknet .weights file.") from error
        if len(content) > 4 * wanted:
            raise FileError(
                f"{path} is too long: {self.path.name} takes {wanted:,} numbers, it holds {there:,.0f}. Are these the "
                "weights of another network?"
            )
        at, found = 0, []
        values = np.frombuffer(content[: len(content) // 4 * 4], "<f4")
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, Convolutional):
                continue
            where = f"layer {i} ([convolutional], line {self.lines[i]} of {self.path.name})"
            part = values[at : at + layer.numbers]
            if len(part) < layer.numbers:
                raise FileError(
                    f"{path} is too short: it ends in {where}, after {len(content) / 4:,.0f} of {wanted:,} numbers. Is "
                    "it cut off, or of another network?"
                )
            if not np.isfinite(part).all():
                raise FileError(f"{path} is damaged: not all numbers of {where} are finite.")
            at += layer.numbers
            sizes = [array.numel() for array in layer.arrays()]
            parts = torch.from_numpy(part.copy()).split(sizes)
            if len(sizes) > 2 and (parts[3] < 0).any():
                raise FileError(f"{path} is damaged: a variance of {where} is negative.")
            found += zip(layer.arrays(), parts, strict=True)
        with torch.no_grad():
            for array, part in found:
                array.copy_(part.view_as(array))
        return self

    def save_weights(self, path: str | Path) -> None:
        """Write a ``.weights`` file of Darknet's version 0.2.5."""
        with whole(Path(path)) as temporary, temporary.open("wb") as file:
            file.write(np.array([0, 2, 5], "<i4").tobytes() + np.array([0], "<u8").tobytes())
            for layer in self.convolutions():
                for array in layer.arrays():
                    file.write(array.detach().cpu().float().numpy().astype("<f4").tobytes())


def _sources(section: Section, i: int) -> list[int]:
    """The layers that layer i reads, -1 for the image; numbers below 0 in the file count backwards from it."""
    if section.kind not in ("route", "shortcut"):
        return [i - 1]
    option = "layers" if section.kind == "route" else "from"
    found = [j if j >= 0 else i + j for j in section.integers(option, low=-i)]
    if not all(0 <= j < i for j in found) or (section.kind == "shortcut" and len(found) > 1):
        raise section.error(f"{option!r} must name earlier layers, got {section.options[option][0]!r}.", option)
    return found if section.kind == "route" else [i - 1, *found]


def _check(section: Section, shape: Shape, numbers: int = 0) -> None:
    if min(shape) < 1 or math.prod(shape) > LIMIT or numbers > LIMIT:
        raise section.error(
            f"its output would be {list(shape)}, with {numbers:,} parameters; each side must be at least 1, and there "
            f"may be {LIMIT:,} numbers at most."
        )


def _check_images(images: Tensor, channels: int, stride: int) -> None:
    if not images.is_floating_point():
        raise ValueError(f"Images must be floats in [0, 1], got {images.dtype}: divide uint8 levels by 255.")
    if images.dim() != 4 or images.shape[1] != channels or any(side % stride or not side for side in images.shape[2:]):
        raise ValueError(
            f"Images must be [B, {channels}, H, W] with sides that divide by {stride}, got {list(images.shape)}: see "
            "`letterbox`."
        )
