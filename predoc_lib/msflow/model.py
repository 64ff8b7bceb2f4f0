"""Multi-scale continuous normalizing flows (report, chapter 6): one conditional flow a scale, coarse to fine.

log p(x_S) = log p(x_0) + sum over s of log p(x_s | x_{s-1})     eqs. 6.1, 6.2
bits/dim   = -log2 P(image) / (C H W)                            eqs. 6.8-6.15, b bits
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from predoc_lib.cnf import CNF, Noise
from predoc_lib.msflow.fields import KINDS, Field
from predoc_lib.msflow.readings import CONDITIONS, Haar, Laplacian, Pixels
from predoc_lib.msflow.whitening import Whitening
from predoc_lib.naming import unknown

PYRAMIDS = ("laplacian", "haar")
OBJECTIVES = ("flow_matching", "likelihood")
NEAR = 0.3  # flow matching's weight of early times is 1 / (t + NEAR) instead of 1 / t


def times(u: Float[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Times t for flow matching, of u uniform in [0, 1), and the weights of the square errors there.

    In the evidence bound of the diffusion with the same marginals (Kingma et al. 2021), a velocity's square error has
    the weight (1 - t) / t. Near the data no model's error is small, dequantization noise hides the other noise, and the
    integral diverges: 1 / t becomes 1 / (t + NEAR), to which the density of t is proportional; 1 - t is left.
    """
    t = NEAR * ((1 + 1 / NEAR) ** u - 1)
    return t, 1 - t


class MSFlow(nn.Module):
    """A density over b-bit images, made of a ``CNF`` for every scale.

    Args:
        image_size: side of the (square) images, pixels; divides by 2^(scales - 1).
        channels: C, 1 or 3.
        scales: S + 1 of the report; 1 is a single-scale flow of the pixels, whatever the pyramid.
        bits: b, 1 to 8: levels are 0 ... 2^b - 1.
        pyramid: "haar", orthonormal bands of one dequantized image, or "laplacian", the report's: see ``readings``.
        lam: lambda of the logit (eq. 6.11); None: no logit, an affine map, which leaks more mass out of the box.
        condition: of the Laplacian's scales: the "rounded" coarser image, or the same "dequantized" draw.
        field: "conv", "unet", or a function (channels, cond, side) -> vector field, cond the condition's channels.
        width: channels of the finest field's hidden layers.
        widen: a scale's width over the next coarser one's: the finer a scale, the more numbers it has to predict.
        depth: residual blocks of the fields.
        options: those of ``CNF``, of every scale: noise, exact, kinetic, jacobian, steer, method, rtol, atol, ...

    Raises:
        ValueError: an option that is not valid.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        scales: int,
        bits: int = 8,
        pyramid: str = "haar",
        *,
        lam: float | None = 0.05,
        condition: str = "rounded",
        field: str | Callable[[int, int, int], nn.Module] = "conv",
        width: int = 64,
        widen: float = 1.0,
        depth: int = 3,
        **options: Any,
    ) -> None:
        super().__init__()
        for what, value, valid in (
            ("pyramid", pyramid, PYRAMIDS), ("condition", condition, CONDITIONS),
            ("field", field if isinstance(field, str) else "conv", tuple(KINDS)),
        ):  # fmt: skip
            if value not in valid:
                raise ValueError(unknown(what, value, valid))
        if not 1 <= bits <= 8 or channels not in (1, 3) or scales < 1:
            raise ValueError(
                f"bits must be 1 to 8, channels 1 or 3, scales at least 1, got {bits}, {channels} and {scales}."
            )
        if image_size < 1 or image_size % 2 ** (scales - 1):
            raise ValueError(
                f"{scales} scales need an image side that divides by {2 ** (scales - 1)}, got {image_size}: "
                "crop or resize the images, or take fewer scales."
            )
        if not widen > 0:
            raise ValueError(f"widen must be more than 0, got {widen}.")
        if lam is not None and not 0 < lam < 0.5:
            raise ValueError(f"lam must lie between 0 and 1/2, or be None, got {lam}.")
        self.bits, self.shape = bits, (channels, image_size, image_size)
        pixels = Pixels(lam, bits)
        if pyramid == "haar":
            self.reading = Haar(image_size, channels, scales, pixels)
        else:
            self.reading = Laplacian(image_size, channels, scales, pixels, condition)
        self.bands, self.conds, self.flows = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for s, shape in enumerate(self.reading.shapes):
            cond = channels if s else 0
            if isinstance(field, str):
                f = Field(field, shape[0], cond, max(1, round(width / widen ** (scales - 1 - s))), depth)
            else:
                f = field(shape[0], cond, shape[1])
            self.flows.append(CNF(f, shape, **options))
            self.bands.append(Whitening(shape[0]))
            self.conds.append(Whitening(channels))
        self.register_buffer("trained", torch.zeros(scales, dtype=torch.bool))

    @property
    def networks(self) -> list[nn.Module]:
        """The parts that may run in lower precision."""
        return [flow.f.net if isinstance(flow.f, Field) else flow.f for flow in self.flows]

    @contextlib.contextmanager
    def solving(self, *, exact: bool | None = None, **solver: Any) -> Iterator[None]:
        """Inside the block all scales are solved with other options: exact, rtol, atol, method, step_size."""
        before = [(flow.solver, flow.exact) for flow in self.flows]
        for flow in self.flows:
            flow.solver, flow.exact = flow.solver | solver, flow.exact if exact is None else exact
        try:
            yield
        finally:
            for flow, (options, was_exact) in zip(self.flows, before, strict=True):
                flow.solver, flow.exact = options, was_exact

    @torch.no_grad()
    def whiten(self, images: Tensor, noise: Noise | None = None) -> None:
        """Set every band's (and condition's) mean and covariance over these images, uint8, to 0 and the identity.

        To be called once, before training: a fixed linear map, whose log-determinant is counted.
        """
        for s, (band, cond, _) in enumerate(self._read(images, noise)):
            self.bands[s].fit(band)
            if cond is not None:
                self.conds[s].fit(cond)

    def encode(self, images: Tensor, noise: Noise | None = None) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """(band, cond, log_det) of every scale, coarsest first, of one draw of the dequantization noise.

        Args:
            images: as ``bits_per_dim``'s.
            noise: an object with ``rand(*shape)`` and ``randn(*shape)``, [B, *shape]; None: torch's own.

        Returns:
            band: [B, *shape of the scale], whitened; cond: likewise, None at the coarsest scale; log_det: [B], nats,
            of the way from dequantized pixels to the band.
        """
        encoded = []
        for s, (band, cond, log_det) in enumerate(self._read(images, noise)):
            band, change = self.bands[s](band)
            encoded.append((band, cond if cond is None else self.conds[s](cond)[0], log_det + change))
        return encoded

    def log_probs(self, images: Tensor, noise: Noise | None = None, traces: int = 1) -> Float[Tensor, "scales B"]:
        """Nats of every scale given the coarser ones, for one draw of the dequantization noise (eq. 6.10 with 6.13).

        exp(sum over scales) is an unbiased estimate of an image's probability, if the divergence is exact. ``traces``
        is the number of Hutchinson's draws. Images and errors as ``bits_per_dim``'s.
        """
        encoded = self.encode(images, noise)  # of fewer scales, where the images are coarser ones
        scales = zip(self.flows, encoded, strict=False)
        return torch.stack([flow.log_prob(x, cond, traces) + log_det for flow, (x, cond, log_det) in scales])

    @torch.no_grad()
    def bits_per_dim(
        self, images: Tensor, draws: int = 1, noise: Noise | None = None, traces: int = 1
    ) -> Float[Tensor, " B"]:
        """-log2 of the probability over the number of pixels and channels: on average over noise, an upper bound.

        Args:
            images: [B, C, H, W], uint8, levels below 2^bits; for "laplacian" of any scale's size: the coarser scales
                alone are a model of coarser images.
            draws: of the dequantization noise, averaged.
            noise, traces: as ``log_probs``'.

        Raises:
            ValueError: images are no such images, draws is less than 1.
            SolverError: a solve fails.
        """
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}.")
        nats = sum(self.log_probs(images, noise, traces).sum(0) for _ in range(draws)) / draws
        return -nats / (images[0].numel() * math.log(2))

    def loss(
        self,
        images: Tensor,
        objective: str = "flow_matching",
        scale: int | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """What training minimizes, summed over scales: they share no parameters, so each is trained as if alone.

        Args:
            images: as ``bits_per_dim``'s.
            objective: "flow_matching", the square error of the velocity, weighted (see ``times``); "likelihood",
                bits/dim plus the regularizers (eqs. 6.17, 6.18), each times its weight and the share of its scale in
                all numbers.
            scale: the one that is trained, 0 the coarsest; None: all jointly.
            noise: as ``encode``'s; Hutchinson's is drawn from it too.

        Raises:
            ValueError, SolverError: as ``bits_per_dim``; an unknown objective; no such scale.
        """
        if objective not in OBJECTIVES:
            raise ValueError(unknown("objective", objective, OBJECTIVES))
        scales = range(len(self.flows)) if scale is None else [self._scale(scale)]
        encoded, noise = self.encode(images, noise), noise or _Torch(images, self)
        total = 0.0
        for s in scales:
            flow, (x, cond, log_det) = self.flows[s], encoded[s]
            share = x[0].numel() / images[0].numel()
            if objective == "flow_matching":
                eps, (t, weight) = noise.randn(*x.shape[1:]).to(x), times(noise.rand().to(x))
                part = flow.flow_matching_loss(x, cond, eps, t, weight) * share
            else:
                found = flow.loss(x, cond, noise)
                part = (found["nll"] - log_det.mean()) / (images[0].numel() * math.log(2))
                part = part + share * (flow.kinetic * found["kinetic"] + flow.jacobian * found["jacobian"])
            total = total + part
            if torch.is_grad_enabled():
                self.trained[s] = True
        return total

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, noise: Noise | None = None) -> UInt8[Tensor, "n C H W"]:
        """n images, levels below 2^bits (eq. 6.16); every scale's noise is multiplied by the temperature.

        Raises:
            ValueError: n is less than 1, the temperature is negative, a scale is not trained.
            SolverError: a solve fails.
        """
        return self.reading.pixels.levels(self.views(n, temperature, noise)[-1][-1]).to(torch.uint8)

    @torch.no_grad()
    def views(
        self,
        n: int,
        temperature: float | list[float] = 1.0,
        noise: Noise | None = None,
        t: Float[Tensor, " T"] | None = None,
    ) -> list[Float[Tensor, "T n C h w"]]:
        """Samples as they come to be: for every scale, coarsest first, at flow times t that fall from 1 to 0.

        They are dequantized pixels: real numbers, in [0, 2^bits] but for the mass that leaks. The temperature is one,
        or one for each scale. t None: 0 alone. ``reading.valid`` says which of them are images. Errors as ``sample``'s.
        """
        t = torch.tensor([1.0, 0.0]) if t is None else t
        temperatures = [temperature] * len(self.flows) if isinstance(temperature, (int, float)) else temperature
        if n < 1 or min(temperatures) < 0 or len(temperatures) != len(self.flows):
            raise ValueError(
                f"n must be at least 1 and temperatures at least 0, one or {len(self.flows)}, got {n}, {temperature}."
            )
        if not self.trained.all():
            first = int((~self.trained).int().argmax())
            raise ValueError(
                f"Scale {first} (of 0 to {len(self.flows) - 1}) is not trained, its samples would be noise: "
                "train it with loss(), or load trained weights."
            )
        noise, views, x = noise or _Torch(torch.empty(n), self), [], None
        for s, flow in enumerate(self.flows):
            cond = None if s == 0 else self.reading.condition(s, x)
            known = None if s == 0 else self.conds[s](cond)[0]
            start = temperatures[s] * noise.randn(*flow.shape).to(self.bands[s].mean)
            path = [self.reading.compose(self.bands[s].inverse(y), cond) for y in flow.carry(start, t, known)]
            views.append(torch.stack([self.reading.view(s, y) for y in path]))
            x = path[-1]
        return views

    def _read(self, images: Tensor, noise: Noise | None) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        self._check(images)
        return self.reading.encode(images.to(self.bands[0].mean.dtype), noise or _Torch(images, self))

    def _scale(self, scale: int) -> int:
        if not 0 <= scale < len(self.flows):
            raise ValueError(f"scale must lie in 0 (coarsest) to {len(self.flows) - 1}, got {scale}.")
        return scale

    def _check(self, images: Tensor) -> None:
        sides = [shape[-1] for shape in self.reading.shapes] if isinstance(self.reading, Laplacian) else self.shape[-1:]
        wanted = [(self.shape[0], side, side) for side in sides]
        if images.ndim != 4 or tuple(images.shape[1:]) not in wanted or not len(images):
            shapes = " or ".join(f"[B, {', '.join(map(str, shape))}]" for shape in wanted)
            raise ValueError(f"images must be {shapes}, B at least 1, got {list(images.shape)}.")
        if images.dtype != torch.uint8:
            raise ValueError(
                f"images must be uint8 levels, got {images.dtype}: predoc_lib.msflow.quantize makes them of floats in "
                "[0, 1]."
            )
        if int(images.max()) >= 2**self.bits:
            raise ValueError(
                f"{self.bits}-bit images must be below {2**self.bits}, got {images.max()}: shift 8-bit ones right by "
                f"{8 - self.bits}."
            )


class _Torch:
    """Noise of torch's own generator, for as many rows as there are images, in the model's type and place."""

    def __init__(self, images: Tensor, model: MSFlow) -> None:
        self.rows, self.like = len(images), model.bands[0].mean

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(self.rows, *shape, dtype=self.like.dtype, device=self.like.device)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(self.rows, *shape, dtype=self.like.dtype, device=self.like.device)
