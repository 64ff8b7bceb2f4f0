"""Darknet's detectors, YOLOv3 and its small relatives, from their ``.cfg`` and ``.weights`` files (report, 5.1)."""

import copy
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from predoc_lib.files import FileError, whole
from predoc_lib.naming import unknown
from predoc_lib.yolo.cfg import Section, read_cfg
from predoc_lib.yolo.layers import KINDS, LIMIT, Convolutional, Shape, Yolo, check


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
        check(net, (self.channels, *self.size))
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
                if self.heads_at and layer.classes != self.classes:
                    raise section.error(f"it has {layer.classes} classes, the first head {self.classes}.", "classes")
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

    def fused(self) -> "Darknet":
        """A copy for inference: the same to rounding, about 1.5 times as fast on a CPU.

        Batch norms are folded into the convolutions, the channels of a pixel lie together, nothing has a gradient.
        """
        network = copy.deepcopy(self).eval().requires_grad_(False)
        for layer in network.convolutions():
            layer.fuse()
        return network.to(memory_format=torch.channels_last)

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


def _check_images(images: Tensor, channels: int, stride: int) -> None:
    if not images.is_floating_point():
        raise ValueError(f"Images must be floats in [0, 1], got {images.dtype}: divide uint8 levels by 255.")
    if images.dim() != 4 or images.shape[1] != channels or any(side % stride or not side for side in images.shape[2:]):
        raise ValueError(
            f"Images must be [B, {channels}, H, W] with sides that divide by {stride}, got {list(images.shape)}: see "
            "`letterbox`."
        )
