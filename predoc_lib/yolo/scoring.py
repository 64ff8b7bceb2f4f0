"""Found boxes against true ones, at a threshold: what F1, precision and recall count (mAP needs no threshold)."""

import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchvision.ops import box_iou

from predoc_lib.metrics import Boxes
from predoc_lib.yolo.boxes import Detections


@dataclasses.dataclass(frozen=True)
class Matched:
    """All boxes that were found in some images, and which true objects they are.

    Attributes:
        scores: of the boxes, the most confident first.
        right: it is a true object, the first box that is.
        finds: the score of the box that finds each true object; 0: none does.
    """

    scores: Float[Tensor, " n"]
    right: Bool[Tensor, " n"]
    finds: Float[Tensor, " m"]

    def curve(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Precision and recall when the threshold is just below each of the scores."""
        hits = self.right.cumsum(0)
        return hits / torch.arange(1, len(hits) + 1), hits / max(1, len(self.finds))

    def best_threshold(self) -> float:
        """The threshold with the highest F1."""
        if not self.right.any():
            return 0.5
        precision, recall = self.curve()
        best = int((2 * precision * recall / (precision + recall).clamp(min=1e-9)).argmax())
        following = self.scores[best + 1] if best + 1 < len(self.scores) else self.scores[best] * 0
        return float((self.scores[best] + following) / 2)

    def above(self, threshold: float) -> dict[str, float]:
        """Precision, recall and F1, and how many boxes were "right" and "false", of those with a higher score."""
        kept = self.scores > threshold
        right, found = int(self.right[kept].sum()), int(kept.sum())
        return {
            "precision": right / max(1, found), "recall": right / max(1, len(self.finds)),
            "f1": 2 * right / max(1, found + len(self.finds)), "right": right, "false": found - right,
        }  # fmt: skip


def match(found: list[Detections], truth: list[Boxes], iou: float = 0.5) -> Matched:
    """Pair boxes with true objects of their class, in every image the most confident box first, as mAP does."""
    scores, right, finds = [], [], []
    for one, true in zip(found, truth, strict=True):
        overlap = box_iou(one.boxes, true.boxes) * (one.labels[:, None] == true.labels)
        mine = torch.zeros(len(true.labels))
        hit = torch.zeros(len(one.scores), dtype=torch.bool)
        for i in range(len(one.scores)) if len(true.labels) else ():
            free = overlap[i] * (mine == 0)
            if free.max() > iou:
                mine[free.argmax()], hit[i] = one.scores[i], True
        scores.append(one.scores)
        right.append(hit)
        finds.append(mine)
    scores, right = torch.cat(scores), torch.cat(right)
    order = scores.argsort(descending=True, stable=True)
    return Matched(scores[order], right[order], torch.cat(finds))
