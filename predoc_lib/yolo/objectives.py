"""What predicted features are trained with: their own error, and what the detector's heads make of them."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, complete_box_iou_loss

from predoc_lib.yolo.darknet import Darknet
from predoc_lib.yolo.dynamics import Features

BOX = 5.0  # weight of the boxes in the loss of the heads, as in ``detection_loss``
FLOOR = 1e-6  # of a variance: no channel is known better
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


def heads_loss(
    network: Darknet, predicted: list[Float[Tensor, "B _ _ _"]], true: list[Float[Tensor, "B _ _ _"]]
) -> dict[str, Tensor]:
    """How far what the heads find in predicted features is from what they find in the true ones.

    Objectness and classes are compared by the KL divergence from the true features' probabilities, boxes by their
    complete IoU loss (Zheng et al. 2020); classes and boxes count as much as the true features' objectness says that
    there is something.

    Args:
        network: whose heads they are.
        predicted: features of each head.
        true: the same.

    Returns:
        {"loss": 5 box + object + kind, and the three of them}, each a sum over cells and anchors divided by the
        number of objects in the true features (the sum of the objectness) and one.
    """
    parts = dict.fromkeys(("box", "object", "kind"), predicted[0].new_zeros(()))
    things = 1.0
    yolos = [network.layers[at + 1] for at in network.heads_at]
    for yolo, x, y in zip(yolos, network.logits(predicted), network.logits(true), strict=True):
        found, there = (box_convert(yolo(z)[..., :4], "cxcywh", "xyxy") for z in (x, y))
        x, y = yolo.split(x), yolo.split(y)
        thing = y[..., 4].sigmoid()
        some = thing.flatten(1) > SOME
        overlap = complete_box_iou_loss(found[some], there[some], reduction="none")
        parts["box"] = parts["box"] + (thing.flatten(1)[some] * overlap).sum()
        parts["object"] = parts["object"] + divergence(x[..., 4], y[..., 4]).sum()
        parts["kind"] = parts["kind"] + (thing[..., None] * divergence(x[..., 5:], y[..., 5:])).sum()
        things = things + thing.sum()
    parts = {name: part / things for name, part in parts.items()}
    return {"loss": BOX * parts["box"] + parts["object"] + parts["kind"]} | parts


def divergence(x: Float[Tensor, "*any"], y: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The KL divergence of a Bernoulli variable with logit x from one with logit y."""
    p = y.sigmoid()
    return p * (F.logsigmoid(y) - F.logsigmoid(x)) + (1 - p) * (F.logsigmoid(-y) - F.logsigmoid(-x))
