"""What is measured: of single images, [*, C, H, W] in [0, 1], one value each, [*]; of sets of images, one value."""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from predoc_lib.mimic.scores import dci as dci
from predoc_lib.mimic.scores import mig as mig


@runtime_checkable
class Boxes(Protocol):
    """Boxes of one image: left, top, right, bottom, in any unit, and numbers of classes; those found also scores."""

    boxes: Float[Tensor, "n 4"]
    labels: Int[Tensor, " n"]


def mse(a: Float[Tensor, "*batch C H W"], b: Float[Tensor, "*batch C H W"]) -> Float[Tensor, "*batch"]:
    """Mean squared error of each image."""
    return (a - b).square().mean((-3, -2, -1))


def psnr(a: Float[Tensor, "*batch C H W"], b: Float[Tensor, "*batch C H W"]) -> Float[Tensor, "*batch"]:
    """Peak signal-to-noise ratio of each image in dB, for a peak of 1; 100 dB where the images are the same."""
    return -10 * mse(a, b).clamp(min=1e-10).log10()


def ssim(a: Float[Tensor, "*batch C H W"], b: Float[Tensor, "*batch C H W"]) -> Float[Tensor, "*batch"]:
    """Structural similarity of each image (Wang et al. 2004, Gaussian window of 11 pixels)."""
    shape = a.shape[:-3]
    a, b = (x.reshape(-1, *x.shape[-3:]) for x in torch.broadcast_tensors(a, b))
    return structural_similarity_index_measure(a, b, data_range=1.0, reduction="none").reshape(shape)


def endpoint_error(
    flow: Float[Tensor, "B 2 H W"], true: Float[Tensor, "B 2 H W"], known: Bool[Tensor, "B H W"] | None = None
) -> Float[Tensor, " B"]:
    """Mean length of the difference of two flows, in pixels, over the pixels that count; NaN where none does."""
    error = (flow - true).norm(dim=1)
    if known is None:
        return error.mean((1, 2))
    return torch.where(known, error, 0.0).sum((1, 2)) / known.sum((1, 2))


def centroid(frames: Float[Tensor, "*batch C H W"]) -> Float[Tensor, "*batch 2"]:
    """Centre of brightness (y, x) of each image, in pixels."""
    weight = frames.sum(-3) + 1e-9
    weight = weight / weight.sum((-2, -1), keepdim=True)
    y, x = (torch.arange(n, device=frames.device, dtype=frames.dtype) for n in frames.shape[-2:])
    return torch.stack([(weight.sum(-1) * y).sum(-1), (weight.sum(-2) * x).sum(-1)], -1)


@torch.no_grad()
def frechet_distance(
    real: UInt8[Tensor, "N 3 H W"], fake: UInt8[Tensor, "M 3 H W"], features: nn.Module, rows: int = 256
) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^1/2) of the Gaussians that fit two sets' features (Heusel et al. 2017).

    Only with ``predoc_lib.features.inception`` is it the FID. It is biased upwards by what the sets are too small for.

    Args:
        real, fake: two sets of images, at least 2 each.
        features: images -> [B, F], on the device it is on.
        rows: images at a time.

    Raises:
        ValueError: a set has less than two images.
    """
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"A covariance needs at least 2 images a set, got {len(real)} and {len(fake)}.")
    device = next(features.parameters(), torch.empty(0)).device
    distance = FrechetInceptionDistance(features, input_img_size=tuple(real.shape[1:])).to(device)
    for images, is_real in ((real, True), (fake, False)):
        for part in images.split(rows):
            distance.update(part.to(device), real=is_real)
    return distance.compute().item()


def mean_average_precision(found: list[Boxes], truth: list[Boxes]) -> dict[str, float]:
    """Average precision at IoU 0.5, and its mean over 0.5, 0.55, ... 0.95, both means over the classes in the truth.

    All boxes are ranked by their confidence, so no threshold is chosen; the 100 best of an image and class count.

    Args:
        found: for every image the boxes [n, 4], scores and labels.
        truth: the same; its scores are not looked at.

    Returns:
        {"map50", "map"}; not a number if there is no true box at all.
    """
    metric = MeanAveragePrecision()
    metric.warn_on_many_detections = False
    metric.update(
        [{"boxes": f.boxes, "scores": f.scores, "labels": f.labels} for f in found],
        [{"boxes": t.boxes, "labels": t.labels} for t in truth],
    )
    values = metric.compute()
    found_any = any(len(t.labels) for t in truth)
    return {name: values[key].item() if found_any else math.nan for name, key in (("map50", "map_50"), ("map", "map"))}
