"""A network that gives a velocity field at any time, from a few frames: the f of eqs. 5.2 and 5.3."""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from predoc_lib.flow_warp.transport import pixels, sampled, trace, warp

STRIDES = (8, 4, 2)  # pixels of a cell, from coarse to fine
REACH = {8: 3, 4: 3, 2: 1}  # cells to each side that are compared
MOTION = 4.0  # pixels per gap: the unit of what the layers give
Coefficients = Float[Tensor, "B K 3 h w"]


class WarpODE(nn.Module):
    """Frames move along u(t, p), a polynomial of the time in every pixel, whose coefficients are read off the context.

    From coarse to fine, features of the context's frames are warped to the last one's grid by what is known of u,
    compared with the last one's in a small neighbourhood (a cost volume), and u is corrected. The unit of time inside
    is the context's gap, its mean interval, so that slow and fast videos look alike.

    Args:
        channels: of a frame.
        width: of the layers.
        order: of the polynomial in time.
        residual: add a correction to frames beyond the context's end, where new content comes into view.
        steps: of the solver in a gap, at least 1.
        method: of ``transport.trace``.

    Attributes:
        trained: times that the loss has seen, in gaps after the context's end; others are allowed, with a warning.

    Raises:
        ValueError: width or steps below 1, or order below 0.
    """

    def __init__(
        self, channels: int = 3, *, width: int = 32, order: int = 2, residual: bool = False, steps: int = 2,
        method: str = "midpoint", trained: tuple[float, float] = (-2.0, 3.0),
    ) -> None:  # fmt: skip
        super().__init__()
        if width < 1 or order < 0 or steps < 1:
            raise ValueError(
                f"WarpODE needs width and steps of at least 1 and order of at least 0, got width={width}, "
                f"steps={steps}, order={order}."
            )
        self.order, self.steps, self.method, self.trained = order, steps, method, trained
        self.enter, self.correct = nn.ModuleList(), nn.ModuleDict()
        self.match = nn.ParameterDict({str(stride): torch.tensor([20.0, 0.5]) for stride in STRIDES})
        inputs = channels
        for stride in reversed(STRIDES):  # from the frames down
            own = max(1, width // 2) if stride == STRIDES[-1] else width
            self.enter.append(
                nn.Sequential(nn.Conv2d(inputs, own, 3, 2, 1), nn.SiLU(), nn.Conv2d(own, own, 3, 1, 1), nn.SiLU())
            )
            compared = 2 * (2 * REACH[stride] + 1) ** 2
            last = nn.Conv2d(own, 3 * (order + 1), 3, 1, 1)
            nn.init.normal_(last.weight, std=1e-3)
            nn.init.zeros_(last.bias)
            self.correct[str(stride)] = nn.Sequential(
                nn.Conv2d(own + compared + 2 + 3 * (order + 1), own, 3, 1, 1), nn.SiLU(),
                nn.Conv2d(own, own, 3, 1, 2, dilation=2), nn.SiLU(), nn.Conv2d(own, own, 3, 1, 1), nn.SiLU(), last,
            )  # fmt: skip
            inputs = own
        self.fill = None
        if residual:
            last = nn.Conv2d(16, channels, 3, 1, 1)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.fill = nn.Sequential(nn.Conv2d(2 * channels + 3, 16, 3, 1, 1), nn.SiLU(), last)

    def coefficients(self, frames: Float[Tensor, "B T C H W"], t: Float[Tensor, " T"]) -> list[Coefficients]:
        """Of each power of the time, (u_x, u_y, preference of the later frame): pixels per gap; from coarse to fine.

        The first two frames that are compared with the last one are the one before it and the context's first.
        """
        last, s = len(t) - 1, self._gaps(t, t)
        levels = [x := frames.flatten(0, 1)]
        for layers in self.enter:
            levels.append(x := layers(x))
        found, c = [], None
        for stride, x in zip(STRIDES, reversed(levels), strict=False):
            x = x.unflatten(0, frames.shape[:2])
            size, here = x.shape[-2:], x[:, last]
            if c is None:
                c = here.new_zeros(len(here), 3 * (self.order + 1), *size)
            else:
                c = F.interpolate(c, size, mode="bilinear", align_corners=False)
            field = c.unflatten(1, (self.order + 1, 3))[:, :, :2] / stride
            compared = []
            for i in (last - 1, 0):
                flow = self.displacement(field, 0.0, s[i], steps=1)
                compared.append(correlation(here, x[:, i], flow, REACH[stride]))
            # A step towards the best agreement with the frame before; the layers do the rest.
            sharpness, gain = self.match[str(stride)]
            shift = gain * expected_shift(compared[0], sharpness, REACH[stride]) * stride / -s[last - 1]
            c = c + MOTION * self.correct[str(stride)](torch.cat([here, *compared, shift / MOTION, c / MOTION], 1))
            c = c + F.pad(shift, (0, 0, 0, 0, 0, c.shape[1] - 2))
            found.append(c.unflatten(1, (self.order + 1, 3)))
        return found

    def velocity(self, coefficients: Float[Tensor, "B K c H W"], s: float) -> Float[Tensor, "B c H W"]:
        """The polynomial's value, s gaps after the context's end."""
        value = coefficients[:, -1]
        for k in reversed(range(coefficients.shape[1] - 1)):
            value = coefficients[:, k] + s * value
        return value

    def flow(
        self, frames: Float[Tensor, "B T C H W"], t: Float[Tensor, " T"], t0: float, t1: float
    ) -> Float[Tensor, "B 2 H W"]:
        """Where what is seen at t1 was at t0, on t1's grid, in pixels; either time may lie anywhere.

        Args:
            frames: the context, at least two.
            t: their times, increasing.
            t0, t1: in either order; outside ``trained`` they are allowed, with a warning.

        Raises:
            ValueError: less than two frames, times that do not increase, or sides that do not divide by 8.
        """
        self._check(frames, t)
        s = self._gaps(t, torch.tensor([float(t0), float(t1)]))
        self._warn(s)
        return self.displacement(self.enlarge(self.coefficients(frames, t)[-1], frames)[:, :, :2], s[1], s[0])

    def predict(
        self, frames: Float[Tensor, "B T C H W"], t: Float[Tensor, " T"], t_query: Float[Tensor, " Q"]
    ) -> Float[Tensor, "B Q C H W"]:
        """Frames at any times.

        Between two frames of the context both are warped and blended, by time and by what the network prefers; after
        the last one, it alone is warped; before the first, the first.

        Args, Raises: as ``flow``.
        """
        self._check(frames, t)
        s = self._gaps(t, t_query)
        self._warn(s)
        coefficients = self.enlarge(self.coefficients(frames, t)[-1], frames)
        return torch.stack([self.render(frames, self._gaps(t, t), coefficients, at) for at in s], 1)

    def render(
        self, frames: Float[Tensor, "B T C H W"], times: list[float], coefficients: Float[Tensor, "B K 3 H W"], s: float
    ) -> Float[Tensor, "B C H W"]:
        """One frame, s gaps after the context's end; ``times`` are the context's, in gaps."""
        field = coefficients[:, :, :2]

        def moved(i: int) -> Tensor:
            return warp(frames[:, i], self.displacement(field, s, times[i]))

        if s <= times[0] or s >= times[-1]:
            i = 0 if s <= times[0] else len(times) - 1
            image = moved(i)
            if self.fill is not None and s > times[-1]:
                new = torch.cat([image, frames[:, i], self.velocity(coefficients, s) / MOTION], 1)
                image = image + (s - times[-1]) * self.fill(new)
            return image
        right = next(i for i, at in enumerate(times) if at > s)
        share = (s - times[right - 1]) / (times[right] - times[right - 1])
        if share == 0:
            return frames[:, right - 1]
        preference = self.velocity(coefficients, s)[:, 2:]
        later = torch.sigmoid(preference + torch.logit(torch.tensor(share)).item())
        return (1 - later) * moved(right - 1) + later * moved(right)

    def displacement(
        self, field: Float[Tensor, "B K 2 h w"], s1: float, s0: float, steps: int | None = None
    ) -> Float[Tensor, "B 2 h w"]:
        """The flow from s1's grid to s0, times in gaps, in pixels of the field's own grid."""
        size = field.shape[-2:]
        here = pixels(field[:, 0]).expand(len(field), -1, -1, -1)
        steps = steps or max(1, round(self.steps * abs(s1 - s0)))
        u = lambda s, p: sampled(self.velocity(field, float(s)), p, size)  # noqa: E731
        return trace(u, here, s0, s1, steps=steps, method=self.method) - here

    def enlarge(self, coefficients: Coefficients, frames: Float[Tensor, "B T C H W"]) -> Float[Tensor, "B K 3 H W"]:
        """Coefficients on the frames' own grid."""
        size = frames.shape[-2:]
        fine = F.interpolate(coefficients.flatten(1, 2), size, mode="bilinear", align_corners=False)
        return fine.unflatten(1, coefficients.shape[1:3])

    def _gaps(self, t: Tensor, at: Tensor) -> list[float]:
        """Times in gaps after the context's end."""
        t = t.double().cpu()
        return ((at.double().cpu() - t[-1]) / ((t[-1] - t[0]) / (len(t) - 1))).tolist()

    def _check(self, frames: Tensor, t: Tensor) -> None:
        if frames.shape[1] != len(t) or len(t) < 2:
            raise ValueError(
                f"WarpODE needs two frames or more, with a time each: a single one cannot show how things move. Got "
                f"{frames.shape[1]} frames and {len(t)} times."
            )
        if (t.diff() <= 0).any():
            raise ValueError(f"The times of the frames must increase, got {t.tolist()}.")
        if any(side % STRIDES[0] for side in frames.shape[-2:]):
            raise ValueError(
                f"Height and width must be multiples of {STRIDES[0]} pixels, got {frames.shape[-2]} x "
                f"{frames.shape[-1]}: crop or pad the frames."
            )

    def _warn(self, s: list[float]) -> None:
        low, high = self.trained
        beyond = [x for x in s if not low - 1e-6 <= x <= high + 1e-6]
        if beyond:
            warnings.warn(
                f"The model was trained from {low:g} to {high:g} intervals after the last frame; asked for "
                f"{min(beyond):g} to {max(beyond):g}, it extrapolates.",
                stacklevel=3,
            )


def unit(x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
    """Features less what all places share, of length 1."""
    return F.normalize(x - x.mean((2, 3), keepdim=True), dim=1)


def expected_shift(agreement: Float[Tensor, "B _ h w"], sharpness: Tensor, reach: int) -> Float[Tensor, "B 2 h w"]:
    """Where the best agreement is, (dx, dy) in cells: the mean of the shifts, weighted by a softmax."""
    shifts = torch.arange(-reach, reach + 1.0, device=agreement.device)
    weights = (sharpness * agreement).softmax(1).unflatten(1, (2 * reach + 1, -1))
    return torch.stack(
        [torch.einsum("bnmhw,m->bhw", weights, shifts), torch.einsum("bnmhw,n->bhw", weights, shifts)], 1
    )


def correlation(
    a: Float[Tensor, "B C h w"], b: Float[Tensor, "B C h w"], flow: Float[Tensor, "B 2 h w"], reach: int
) -> Float[Tensor, "B _ h w"]:
    """How well a's features agree with b's where the flow points to, and up to ``reach`` cells around it."""
    moved = F.pad(warp(unit(b), flow), (reach,) * 4, mode="replicate")
    a, (h, w), side = unit(a), a.shape[-2:], 2 * reach + 1
    shifts = [(dy, dx) for dy in range(side) for dx in range(side)]
    return torch.stack([(a * moved[..., dy : dy + h, dx : dx + w]).sum(1) for dy, dx in shifts], 1)
