"""From pixels to real numbers and back, each with its log-determinant: what a density pays for the change of units.

b-bit images hold the levels 0 ... 2^b - 1. Uniform noise of [0, 1) makes them real numbers z in [0, 2^b].
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def to_logit(z: Tensor, lam: float, bits: int = 8) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
    """x = logit(lam + (1 - 2 lam) z / 2^b), the inverse of eq. 6.11, and log |det dx/dz| in nats (eqs. 6.12, 6.13).

    Args:
        z: [B, ...], dequantized, in [0, 2^b].
        lam: keeps the logit finite at 0 and 2^b; at least 0, less than 1/2.
        bits: b, 1 to 8.

    Raises:
        ValueError: lam, bits or z out of range, z no floats, NaN.
    """
    _check(lam, bits)
    if not z.is_floating_point():
        raise ValueError(f"z must be dequantized: floats, levels plus noise of [0, 1), got {z.dtype}.")
    top = 2.0**bits
    if not ((z >= 0) & (z <= top)).all():
        raise ValueError(f"z must lie in [0, {top:.0f}] for {bits} bits, got {z.min():.4g} to {z.max():.4g}.")
    y, rest = (lam + (1 - 2 * lam) * v / top for v in (z, top - z))  # 1 - y itself would be rounded, where y is near 1
    log_y, log_rest = y.log(), rest.log()
    return log_y - log_rest, (math.log((1 - 2 * lam) / top) - log_y - log_rest).flatten(1).sum(1)


def from_logit(x: Tensor, lam: float, bits: int = 8) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
    """z = 2^b (sigmoid(x) - lam) / (1 - 2 lam), eq. 6.11, and log |det dz/dx| in nats, for any x [B, ...].

    Where a model leaks, z lies outside of [0, 2^b]. Raises ValueError as ``to_logit`` does, and for NaN.
    """
    _check(lam, bits)
    if not x.is_floating_point() or x.isnan().any():
        raise ValueError(f"x must be floats without NaN, got {'NaN' if x.is_floating_point() else x.dtype}.")
    scale = 2.0**bits / (1 - 2 * lam)
    log_slope = torch.nn.functional.logsigmoid(x) + torch.nn.functional.logsigmoid(-x)
    return scale * (x.sigmoid() - lam), (math.log(scale) + log_slope).flatten(1).sum(1)


def quantize(images: Tensor, bits: int = 8) -> Tensor:
    """The b-bit levels, uint8, of float images in [0, 1]: 2^b intervals of equal width.

    Raises:
        ValueError: bits out of range; images are no floats, outside of [0, 1] or NaN.
    """
    _check(0.0, bits)
    if not images.is_floating_point() or not ((images >= 0) & (images <= 1)).all():
        got = f" from {images.min():.4g} to {images.max():.4g}" if images.numel() else ""
        raise ValueError(f"images must be floats in [0, 1] without NaN, got {images.dtype}{got}.")
    return (images * 2**bits).clamp(max=2**bits - 1).to(torch.uint8)


def _check(lam: float, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}.")
    if not 0 <= lam < 0.5:
        raise ValueError(f"lam must be at least 0 and less than 1/2, got {lam}.")
