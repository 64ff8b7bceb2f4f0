"""What is measured; images are [*, C, H, W] in [0, 1], and every function returns one value an image, [*]."""

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


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


def centroid(frames: Float[Tensor, "*batch C H W"]) -> Float[Tensor, "*batch 2"]:
    """Centre of brightness (y, x) of each image, in pixels."""
    weight = frames.sum(-3) + 1e-9
    weight = weight / weight.sum((-2, -1), keepdim=True)
    y, x = (torch.arange(n, device=frames.device, dtype=frames.dtype) for n in frames.shape[-2:])
    return torch.stack([(weight.sum(-1) * y).sum(-1), (weight.sum(-2) * x).sum(-1)], -1)
