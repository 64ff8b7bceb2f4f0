"""Boxes that go on along straight lines in the world: tracking by detection, the rival that is not trained."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, distance_box_iou

from predoc_lib.yolo.boxes import Detections

NEAREST = 0.25  # of the depth now: nothing is foretold to come nearer


def same_things(now: Detections, before: Detections) -> dict[int, int]:
    """Which box of the frame before each box is, {number now: number before}, if it is any.

    The pairs have the largest total overlap, as in SORT (Bewley et al. 2016); overlap is the distance IoU (Zheng et al.
    2020), which also tells near from far where two narrow boxes hardly meet, and 0 where it is less or classes differ.
    """
    overlap = distance_box_iou(now.boxes, before.boxes).nan_to_num(0).clamp(min=0)
    overlap = overlap.masked_fill(now.labels[:, None] != before.labels, 0)
    pairs = zip(*linear_sum_assignment(overlap.numpy(), maximize=True), strict=True)
    return {int(i): int(j) for i, j in pairs if overlap[i, j] > 0}


def extrapolate(seen: Sequence[Detections], t: Float[Tensor, " T"], t_query: Float[Tensor, " Q"]) -> list[Detections]:
    """Boxes at other times: those of the last frame, each at its mean velocity in space over the frames it was seen in.

    A thing's size in the picture is one over its depth. So both its depth, in units of the one now, and its box times
    its depth lie on straight lines, if the thing and the camera move evenly; the camera itself need not be known. What
    has left the picture is dropped, what sticks out of it is cut off.

    Args:
        seen: what was found in each frame, on the processor, in fractions of the image.
        t: their times, increasing.
        t_query: the times asked for.
    """
    last = seen[-1]
    first, age = last.boxes.clone(), torch.ones(len(last))
    own = {k: k for k in range(len(last))}  # number in the last frame: number in the frame at hand
    for i in reversed(range(len(seen) - 1)):
        pairs = same_things(seen[i + 1], seen[i])
        own = {k: pairs[number] for k, number in own.items() if number in pairs}
        for k, number in own.items():
            first[k], age[k] = seen[i].boxes[number], t[-1] - t[i]
    depth = (size(last.boxes) / size(first))[:, None]  # when it was first seen
    found = []
    for ahead in t_query - t[-1]:
        steps = (ahead / age)[:, None]
        boxes = (last.boxes + steps * (last.boxes - first * depth)) / (1 + steps * (1 - depth)).clamp(min=NEAREST)
        boxes = clip_boxes_to_image(boxes, (1, 1))
        there = size(boxes) > 0
        found.append(Detections(boxes[there], last.scores[there], last.labels[there]))
    return found


def size(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, " n"]:
    """The side of the square of a box's area."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=0).sqrt()
