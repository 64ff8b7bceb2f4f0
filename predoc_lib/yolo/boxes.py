"""Boxes: from the network's numbers to things in the picture."""

import dataclasses

import torch
import torchvision
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes

from predoc_lib import figures

# The 80 classes that Darknet's COCO networks know, in their order; torchvision's list has gaps where COCO's ids do.
COCO = tuple(
    name
    for name in torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if name not in ("__background__", "N/A")
)
GREY = 0.5  # around the picture, as Darknet pads


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found in one image, the most confident first.

    Attributes:
        boxes: left, top, right, bottom, in fractions of the image.
        scores: objectness times class probability.
        labels: numbers of classes.
    """

    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.scores)

    def cpu(self) -> "Detections":
        """The same, in the processor's memory."""
        return Detections(self.boxes.cpu(), self.scores.cpu(), self.labels.cpu())

    def above(self, confidence: float) -> "Detections":
        """Those that are more confident."""
        keep = self.scores > confidence
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep])


def non_max_suppression(
    predictions: Float[Tensor, "B N _"], confidence: float = 0.25, iou: float = 0.45, most: int = 300
) -> list[Detections]:
    """For every image and class the boxes that no better one overlaps.

    Args:
        predictions: of ``Darknet.forward``.
        confidence: objectness times class probability that a box must exceed.
        iou: two boxes of a class that overlap more are one thing.
        most: boxes kept of an image.

    Raises:
        ValueError: a threshold outside [0, 1].
    """
    if not (0 <= confidence <= 1 and 0 <= iou <= 1):
        raise ValueError(f"Thresholds must be from 0 to 1, got confidence={confidence} and iou={iou}.")
    found = []
    for image in predictions.float():
        scores = image[:, 4:5] * image[:, 5:]
        row, label = (scores > confidence).nonzero(as_tuple=True)
        middle, sides = image[row, :2], image[row, 2:4]
        boxes = torch.cat([middle - sides / 2, middle + sides / 2], -1)
        keep = torchvision.ops.batched_nms(boxes, scores[row, label], label, iou)[:most]
        found.append(Detections(boxes[keep], scores[row, label][keep], label[keep]))
    return found


@dataclasses.dataclass(frozen=True)
class Letterbox:
    """Where a picture lies in the square that a network sees: its sides and corner, in fractions of the square."""

    width: float
    height: float
    left: float
    top: float

    def inverse(self, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
        """Boxes in fractions of the square as fractions of the picture, cut off at its edges."""
        corner, sides = (boxes.new_tensor(v) for v in ((self.left, self.top) * 2, (self.width, self.height) * 2))
        return ((boxes - corner) / sides).clamp(0, 1)


def letterbox(images: Float[Tensor, "B C H W"], size: tuple[int, int]) -> tuple[Float[Tensor, "B C h w"], Letterbox]:
    """Resize images with their proportions kept, and pad them with grey to (height, width).

    Raises:
        ValueError: images that are no floats, have no pixel, or are no batch.
    """
    if not images.is_floating_point() or images.dim() != 4 or not all(images.shape[2:]):
        raise ValueError(
            f"Images must be floats in [0, 1], [B, C, H, W], got {images.dtype} {list(images.shape)}: divide uint8 "
            "levels by 255."
        )
    h, w = images.shape[2:]
    scale = min(size[0] / h, size[1] / w)
    inner = max(1, round(h * scale)), max(1, round(w * scale))
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    images = F.interpolate(images, inner, mode="bilinear", antialias=True, align_corners=False)
    pad = (left, size[1] - inner[1] - left, top, size[0] - inner[0] - top)
    place = Letterbox(inner[1] / size[1], inner[0] / size[0], left / size[1], top / size[0])
    return F.pad(images, pad, value=GREY), place


def draw(
    image: UInt8[Tensor, "3 H W"], detections: Detections, names: tuple[str, ...] | None = None
) -> UInt8[Tensor, "3 H W"]:
    """The image with boxes, in a colour a class; with ``names``, their names too."""
    if not len(detections):
        return image.clone()
    h, w = image.shape[1:]
    classes = detections.labels.tolist()
    return draw_bounding_boxes(
        image,
        detections.boxes * detections.boxes.new_tensor([w, h, w, h]),
        [names[label] for label in classes] if names else None,
        [figures.COLOURS[label % len(figures.COLOURS)] for label in classes],
        width=max(1, round(h / 120)),
    )
