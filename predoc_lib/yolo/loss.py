"""What a detector is trained with: YOLOv3's loss, with the complete IoU for boxes."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, complete_box_iou_loss

from predoc_lib.yolo.darknet import Darknet

SHAPE = 0.4  # an anchor is responsible for a box if they have this IoU about one centre, or it has the best
IGNORED = 0.6  # a cell that is responsible for nothing may still find a thing this well: it is not blamed


def detection_loss(
    network: Darknet, logits: list[Float[Tensor, "B _ _ _"]], truth: Float[Tensor, "M 6"]
) -> dict[str, Tensor]:
    """Loss of one batch: {"loss": 5 box + object + kind, and the three of them}.

    Args:
        network: that the logits are of.
        logits: of ``Darknet.logits``.
        truth: of every true box its image in the batch, class, left, top, right, bottom (fractions). Where one cell
            and anchor is responsible for several, the first counts.
    """
    image, label, corners = truth[:, 0].long(), truth[:, 1].long(), truth[:, 2:]
    yolos = [network.layers[at + 1] for at in network.heads_at]
    pixels = logits[0].new_tensor([logits[0].shape[3], logits[0].shape[2]]) * yolos[0].stride
    middle, sides = (corners[:, :2] + corners[:, 2:]) / 2, (corners[:, 2:] - corners[:, :2]) * pixels
    anchors = torch.cat([yolo.anchors for yolo in yolos])
    overlap = torch.minimum(sides[:, None], anchors).prod(-1)
    overlap = overlap / (sides.prod(-1)[:, None] + anchors.prod(-1) - overlap)
    responsible = (overlap > SHAPE) | (overlap == overlap.amax(1, keepdim=True))
    box = kind = thing = logits[0].new_zeros(())
    count, start = 0, 0
    for yolo, x in zip(yolos, logits, strict=True):
        b, _, h, w = x.shape
        cells, found = yolo.split(x), yolo(x).view(b, h, w, len(yolo.anchors), -1)
        boxes = torch.cat([found[..., :2] - found[..., 2:4] / 2, found[..., :2] + found[..., 2:4] / 2], -1)
        row, anchor = responsible[:, start : start + len(yolo.anchors)].nonzero(as_tuple=True)
        start += len(yolo.anchors)
        row, anchor = row.flip(0), anchor.flip(0)  # of several for one place the last written is the first
        place = (middle[row] * middle.new_tensor([w, h])).long()
        at = (image[row], place[:, 1].clamp(0, h - 1), place[:, 0].clamp(0, w - 1), anchor)
        owner = torch.full(found.shape[:-1], -1, device=x.device)
        owner[at] = row
        at = (owner >= 0).nonzero(as_tuple=True)
        mine = owner[at]
        with torch.no_grad():
            blamed = torch.stack(
                [
                    box_iou(boxes[i].reshape(-1, 4), corners[image == i]).amax(1) < IGNORED
                    if (image == i).any()
                    else torch.ones(h * w * len(yolo.anchors), dtype=torch.bool, device=x.device)
                    for i in range(b)
                ]
            ).view_as(owner)
        wanted = (owner >= 0).float()
        each = F.binary_cross_entropy_with_logits(cells[..., 4], wanted, reduction="none")
        thing = thing + each[blamed | (owner >= 0)].sum()
        box = box + complete_box_iou_loss(boxes[at], corners[mine], reduction="sum")
        wanted = F.one_hot(label[mine], yolo.classes).to(x.dtype)
        kind = kind + F.binary_cross_entropy_with_logits(cells[at][:, 5:], wanted, reduction="sum")
        count += len(mine)
    parts = {"box": box / max(1, count), "object": thing / max(1, count), "kind": kind / max(1, count)}
    return {"loss": 5 * parts["box"] + parts["object"] + parts["kind"]} | parts
