"""Boxes that go on along straight lines: tracking by detection, the rival that is not trained."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import distance_box_iou

from predoc_lib.yolo.boxes import Detections


def same_things(now: Detections, before: Detections) -> dict[int, int]:
    """Which box of the frame before each box is, {number now: number before}, if it is any.

    The pairs have the largest total overlap, as in SORT (Bewley et al. 2016); overlap is the distance IoU (Zheng et al.
    2020), which also tells near from far where two narrow boxes hardly meet; it is above 0 for one thing.
    """
    near = distance_box_iou(now.boxes, before.boxes)
    near = near.masked_fill(now.labels[:, None] != before.labels, -1.0)
    pairs = zip(*linear_sum_assignment(near.numpy(), maximize=True), strict=True)
    return {int(i): int(j) for i, j in pairs if near[i, j] > 0}


def extrapolate(seen: Sequence[Detections], t: Float[Tensor, " T"], t_query: Float[Tensor, " Q"]) -> list[Detections]:
    """Boxes at other times: those of the last frame, each moved on at its mean velocity over the frames it was seen in.

    Args:
        seen: what was found in each frame, on the processor.
        t: their times, increasing.
        t_query: the times asked for.
    """
    last = seen[-1]
    velocity = torch.zeros_like(last.boxes)
    own = {k: k for k in range(len(last))}  # number in the last frame: number in the frame at hand
    for i in reversed(range(len(seen) - 1)):
        pairs = same_things(seen[i + 1], seen[i])
        own = {k: pairs[number] for k, number in own.items() if number in pairs}
        for k, number in own.items():
            velocity[k] = (last.boxes[k] - seen[i].boxes[number]) / (t[-1] - t[i])
    return [Detections(last.boxes + velocity * ahead, last.scores, last.labels) for ahead in t_query - t[-1]]
