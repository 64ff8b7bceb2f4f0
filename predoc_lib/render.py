"""Drawing small patches on a canvas at real-valued positions, and cutting them out again."""

import torch
from jaxtyping import Float
from torch import Tensor


def _hats(size: int, patch_size: int, corner: Tensor) -> Tensor:
    """[..., size, patch_size] weights max(0, 1 - |i - corner - j|) of linear interpolation along one axis."""
    pixel = torch.arange(size, device=corner.device, dtype=corner.dtype)[:, None]
    cell = torch.arange(patch_size, device=corner.device, dtype=corner.dtype)
    return (1 - (pixel - cell - corner[..., None, None]).abs()).clamp(min=0)


def place(
    patches: Float[Tensor, "... h w"], corners: Float[Tensor, "... 2"], canvas: tuple[int, int]
) -> Float[Tensor, "... H W"]:
    """Draw each patch with its upper left corner at (y, x) = ``corners``, in pixels, by linear interpolation.

    Linear interpolation is separable, so placing is two small matrix products with hat functions. It is differentiable
    in the patch and in the position (a spatial transformer that only translates; Jaderberg et al. 2015). What falls
    outside the canvas is cut off. Leading axes broadcast.
    """
    rows = _hats(canvas[0], patches.shape[-2], corners[..., 0])
    columns = _hats(canvas[1], patches.shape[-1], corners[..., 1])
    return rows @ patches @ columns.transpose(-1, -2)


def crop(
    images: Float[Tensor, "... H W"], corners: Float[Tensor, "... 2"], patch: tuple[int, int]
) -> Float[Tensor, "... h w"]:
    """Cut the patch with its upper left corner at (y, x) = ``corners``, in pixels, out of each image.

    It is the transpose of ``place``, and so linear interpolation of the image at real-valued positions; outside the
    image is zero. Leading axes broadcast.
    """
    rows = _hats(images.shape[-2], patch[0], corners[..., 0])
    columns = _hats(images.shape[-1], patch[1], corners[..., 1])
    return rows.transpose(-1, -2) @ images @ columns
