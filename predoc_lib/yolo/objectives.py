"""What predicted features are trained with: their error, what the detector's heads make of them, and a critic."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, complete_box_iou_loss

from predoc_lib.adversarial import game
from predoc_lib.yolo.darknet import Darknet
from predoc_lib.yolo.dynamics import Features, Shapes
from predoc_lib.yolo.layers import Yolo

BOX = 5.0  # weight of the boxes in the loss of the heads, as in ``detection_loss``
FLOOR = 1e-6  # of a variance: no channel is known better
TINY = 1e-12  # keeps a quotient defined where nothing is
SOME = 0.02  # objectness of cells whose boxes are compared


def mse(predicted: Features, true: Features, scales: list[Tensor]) -> Float[Tensor, ""]:
    """Mean squared error of all heads' features, each channel in its unit (the report's loss)."""
    errors = [((x - y) / scale).square() for x, y, scale in zip(predicted, true, scales, strict=True)]
    return sum(error.sum() for error in errors) / sum(error.numel() for error in errors)


def gaussian(predicted: Features, true: Features, scales: list[Tensor]) -> Float[Tensor, ""]:
    """Negative log-likelihood of a Gaussian whose variance, one a channel, is the best there is for this batch.

    Up to a constant and in nats a number: the mean of half the logarithm of each channel's mean squared error, in the
    channel's unit. A channel that is well predicted already counts for more (Rybkin et al. 2021, sigma-VAE).
    """
    total, count = predicted[0].new_zeros(()), 0
    for x, y, scale in zip(predicted, true, scales, strict=True):
        variance = ((x - y) / scale).square().mean((0, 1, 3, 4))
        total, count = total + (variance + FLOOR).log().sum() / 2 * (x.numel() // len(variance)), count + x.numel()
    return total / count


def gradient_difference(predicted: Features, true: Features, scales: list[Tensor]) -> Float[Tensor, ""]:
    """Mean difference of the sizes of the steps from cell to cell, along both axes (Mathieu et al. 2016)."""
    total, count = predicted[0].new_zeros(()), 0
    for x, y, scale in zip(predicted, true, scales, strict=True):
        for axis in (-2, -1):
            difference = ((x / scale).diff(dim=axis).abs() - (y / scale).diff(dim=axis).abs()).abs()
            total, count = total + difference.sum(), count + difference.numel()
    return total / count


def critics(shapes: Shapes, width: int = 48) -> nn.ModuleList:
    """A network for each head that tells true features from predicted ones, cell by cell (Isola et al. 2017).

    Each looks at one frame alone, at every cell and the cells around it.

    Args:
        shapes: of the heads' features, ``Darknet.shapes``.
        width: channels of their layers.
    """
    return nn.ModuleList(
        nn.Sequential(
            nn.Conv2d(shape[0], width, 1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, 1, 1),
        )
        for shape in shapes
    )  # fmt: skip


def adversarial(critics: nn.ModuleList, predicted: Features, true: Features, scales: list[Tensor]) -> Float[Tensor, ""]:
    """What the critics minimize and the predictor maximizes, see ``adversarial.game``: the mean over the heads."""
    heads = zip(critics, predicted, true, scales, strict=True)
    games = [game(critic, (x / scale).flatten(0, 1), (y / scale).flatten(0, 1)) for critic, x, y, scale in heads]
    return sum(games) / len(games)


def heads_loss(
    network: Darknet,
    predicted: list[Float[Tensor, "B _ _ _"]],
    true: list[Float[Tensor, "B _ _ _"]],
    balanced: bool = False,
) -> dict[str, Tensor]:
    """How far what the heads find in predicted features is from what they find in the true ones.

    Objectness and classes are compared by the KL divergence from the true features' probabilities, boxes by their
    complete IoU loss (Zheng et al. 2020); classes and boxes count as much as the true features' objectness says that
    there is something.

    Args:
        network: whose heads they are.
        predicted: features of each head.
        true: the same.
        balanced: every class has the same say, as it has in mAP, so that what is rare counts for more; else every
            object has.

    Returns:
        {"loss": 5 box + object + kind, and the three of them}, each a sum over cells and anchors divided by the
        number of objects in the true features (the sum of the objectness) and one.
    """
    yolos = [network.layers[at + 1] for at in network.heads_at]
    heads = list(zip(yolos, network.logits(predicted), network.logits(true), strict=True))
    things = [thing_kinds(yolo, y) for yolo, _, y in heads]
    counts = sum(thing.flatten(0, -2).sum(0) for thing in things)
    weights = class_weights(counts) if balanced else torch.ones_like(counts)
    parts = dict.fromkeys(("box", "object", "kind"), predicted[0].new_zeros(()))
    for (yolo, x, y), thing in zip(heads, things, strict=True):
        found, there = (box_convert(yolo(z)[..., :4], "cxcywh", "xyxy") for z in (x, y))
        x, y = yolo.split(x), yolo.split(y)
        weight, thing = thing @ weights, thing.sum(-1)
        some = thing.flatten(1) > SOME
        overlap = complete_box_iou_loss(found[some], there[some], reduction="none")
        parts["box"] = parts["box"] + (weight.flatten(1)[some] * overlap).sum()
        parts["object"] = parts["object"] + ((1 - thing + weight) * divergence(x[..., 4], y[..., 4])).sum()
        parts["kind"] = parts["kind"] + (weight[..., None] * divergence(x[..., 5:], y[..., 5:])).sum()
    parts = {name: part / (1 + counts.sum()) for name, part in parts.items()}
    return {"loss": BOX * parts["box"] + parts["object"] + parts["kind"]} | parts


def thing_kinds(yolo: Yolo, logits: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B h w A K"]:
    """The objectness of every cell and anchor, shared among the classes by their probabilities."""
    values = yolo.split(logits).sigmoid()
    kinds = values[..., 5:]
    return values[..., 4:5] * kinds / kinds.sum(-1, keepdim=True).clamp(min=TINY)


def class_weights(counts: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """What an object of each class counts: all classes that are there the same in all, an object 1 in the mean."""
    share = 1 / (counts + 1)
    return share * counts.sum() / (share * counts).sum().clamp(min=TINY)


def divergence(x: Float[Tensor, "*any"], y: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The KL divergence of a Bernoulli variable with logit x from one with logit y."""
    p = y.sigmoid()
    return p * (F.logsigmoid(y) - F.logsigmoid(x)) + (1 - p) * (F.logsigmoid(-y) - F.logsigmoid(-x))
