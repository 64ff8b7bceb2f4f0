"""Warping and the integration of velocity fields: eqs. 5.1 to 5.3.

A flow is a displacement in pixels, [B, 2, H, W] = (dx, dy). It lives on the grid of the later time and points to where
things were: x_t1(p) = x_t0(p + flow(p)). A velocity u(t, p) is a flow per unit of time, so it is minus the speed of
things, and images follow dx/dt = u . grad x.
"""

import functools
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from predoc_lib.naming import unknown
from predoc_lib.solvers import ONE_STEP

Points = Float[Tensor, "B 2 H W"]
Velocity = Callable[[Tensor, Points], Points]
"""u(t, p): at time t (0-d), at the places p in pixels (x, y)."""

MODES = ("bilinear", "bicubic", "nearest")
BORDERS = ("border", "zeros", "reflection")  # beyond the edge: its nearest pixel, black, or the picture mirrored
STATES = ("coordinates", "image")


def warp(
    image: Float[Tensor, "B C H W"], flow: Float[Tensor, "_ 2 _ _"], *, mode: str = "bilinear", border: str = "border"
) -> Float[Tensor, "B C H W"]:
    """The image moved: out(p) = image(p + flow(p)) (eq. 5.3, with a flow as f's value).

    Args:
        image: any number of channels.
        flow: (dx, dy) in pixels.
        mode: of interpolation, one of ``MODES``; "bicubic" may leave the range of the image.
        border: what lies beyond the edges, one of ``BORDERS``; ``inside`` tells what came from there.

    Raises:
        ValueError: flow and image differ in size or batch, the flow is not finite, unknown mode or border.
    """
    _check(image, flow, mode, border)
    return _sample(image, flow, mode, border)


def inside(flow: Float[Tensor, "B 2 H W"]) -> Bool[Tensor, "B 1 H W"]:
    """Which pixels' values come from within the image."""
    size = torch.tensor([flow.shape[-1] - 1, flow.shape[-2] - 1], device=flow.device)[:, None, None]
    at = pixels(flow) + flow
    return ((at >= 0) & (at <= size)).all(1, keepdim=True)


def pixels(like: Float[Tensor, "B _ H W"]) -> Float[Tensor, "1 2 H W"]:
    """The grid itself: (x, y) of every pixel."""
    return _pixels(*like.shape[-2:], like.dtype, like.device).clone()


def compose(
    before: Float[Tensor, "B 2 H W"], after: Float[Tensor, "B 2 H W"], *, mode: str = "bilinear"
) -> Float[Tensor, "B 2 H W"]:
    """One flow for two: from t1's grid to t0, then from t2's to t1, gives that from t2's grid to t0.

    psi(p) = after(p) + before(p + after(p)): the image moved by the result is the image moved by ``before``, then by
    ``after``. Beyond the edges, ``before`` is as at the edge.

    Raises:
        ValueError: as ``warp``.
    """
    return after + warp(before, after, mode=mode)


def invert(flow: Float[Tensor, "B 2 H W"], *, iterations: int = 30) -> Float[Tensor, "B 2 H W"]:
    """The flow backwards, on the other grid: the fixed point of inverse(p) = -flow(p + inverse(p)).

    It converges where the flow changes by less than a pixel from pixel to pixel; where it folds there is no inverse.
    """
    inverse = -flow
    for _ in range(iterations):
        inverse = -warp(flow, inverse)
    return inverse


def origin(flow: Float[Tensor, "B 2 H W"], p: Points, share: float, *, iterations: int = 30) -> Points:
    """The pixel q whose straight path to q + flow(q) is at p when it has gone this share of the way.

    The fixed point of q = p - share flow(q); it converges where ``invert`` does.
    """
    q, size = p - share * sampled(flow, p, flow.shape[-2:]), flow.shape[-2:]
    for _ in range(iterations - 1):
        q = p - share * sampled(flow, q, size)
    return q


def constant_speed(flow: Float[Tensor, "B 2 H W"]) -> Velocity:
    """The velocity, for t in [0, 1], whose flow from t1 = 1 to t0 = 0 is this: every point goes straight on.

    u(t, p) is the flow of the pixel of t1 that is at p at time t. It is not steady: it moves along with what moves.
    """
    return lambda t, p: sampled(flow, origin(flow, p, 1 - float(t)), flow.shape[-2:])


def sampled(field: Float[Tensor, "B c h w"], p: Float[Tensor, "B 2 H W"], size: tuple[int, int]) -> Tensor:
    """A field at places p, in pixels of an image of this size, over which the field's grid is spread evenly."""
    scale = p.new_tensor([2 / max(size[1] - 1, 1), 2 / max(size[0] - 1, 1)])
    grid = p.movedim(1, -1) * scale - 1
    return F.grid_sample(field, grid, padding_mode="border", align_corners=True)


def departure(u: Velocity, t: float, dt: float, p: Points, method: str) -> Points:
    """Where what is at p at time t + dt was at time t: one step back along the characteristic.

    Euler takes the field at the step's beginning, as eq. 5.2; the others are Runge and Kutta's, of order 2 and 4.
    """
    start, end, h = (torch.tensor(x, dtype=p.dtype) for x in (t, t + dt, dt))
    if method == "euler":
        return p + h * u(start, p)
    return ONE_STEP[method](lambda s, q: -u(s, q), end, p, -h)


def trace(u: Velocity, p: Points, t0: float, t1: float, *, steps: int = 1, method: str = "midpoint") -> Points:
    """Where what is at p at t1 was at t0: Phi(p), all steps composed with no interpolation between them.

    Phi_(t+dt) = Phi_t o (id + dt u_t): the last step comes first. A loop that moves p along u(t) from t0 on, in the
    order of time, solves dPhi/dt = u(Phi, t), which is right only for a steady u.

    Args:
        u: velocity, u(t, p) in pixels per unit of time.
        p: places at t1, such as ``pixels``.
        t0, t1: in either order.
        steps: of equal length, in the whole of the interval.
        method: "euler", "midpoint", "heun" or "rk4".

    Raises:
        ValueError: unknown method, or steps below 1.
    """
    if method not in ONE_STEP:
        raise ValueError(unknown("method", method, ONE_STEP))
    if steps < 1:
        raise ValueError(f"trace needs steps of at least 1, got {steps}.")
    dt = (t1 - t0) / steps
    for i in reversed(range(steps)):
        p = departure(u, t0 + i * dt, dt, p, method)
    return p


def advect(
    u: Velocity,
    image: Float[Tensor, "B C H W"],
    t0: float,
    t1: float,
    *,
    steps: int = 1,
    method: str = "midpoint",
    state: str = "coordinates",
    mode: str = "bicubic",
    border: str = "border",
) -> Float[Tensor, "B C H W"]:
    """The image at t1 from that at t0, by semi-Lagrangian steps: eq. 5.2 as often as asked.

    Args:
        u: velocity.
        image: at t0.
        t0, t1: in either order.
        steps, method: as ``trace``.
        state: what is integrated. "coordinates": places, and the image is warped once, at the end; "image": the image
            itself, warped in every step (the report's), so that every step blurs it.
        mode, border: as ``warp``.

    Raises:
        ValueError: as ``trace`` and ``warp``, or unknown state.
    """
    if state not in STATES:
        raise ValueError(unknown("state", state, STATES))
    here = pixels(image).expand(len(image), -1, -1, -1)
    if steps < 1:
        raise ValueError(f"advect needs steps of at least 1, got {steps}.")
    if state == "coordinates":
        return warp(image, trace(u, here, t0, t1, steps=steps, method=method) - here, mode=mode, border=border)
    dt = (t1 - t0) / steps
    for i in range(steps):
        step = trace(u, here, t0 + i * dt, t0 + (i + 1) * dt, method=method) - here
        image = warp(image, step, mode=mode, border=border)
    return image


def _sample(image: Tensor, flow: Tensor, mode: str, border: str) -> Tensor:
    """``warp`` with nothing checked: one multiplication and addition more than ``grid_sample`` alone."""
    height, width = image.shape[-2:]
    grid = torch.addcmul(*_normalized(height, width, flow.dtype, flow.device), flow)
    return F.grid_sample(image, grid.movedim(1, -1), mode=mode, padding_mode=border, align_corners=True)


def _check(image: Tensor, flow: Tensor, mode: str, border: str) -> None:
    if image.shape[-2:] != flow.shape[-2:] or len(image) != len(flow):
        raise ValueError(
            f"Image and flow must have the same batch, height and width, got {list(image.shape)} and "
            f"{list(flow.shape)}: resize the flow, and scale its values by the same factors."
        )
    if mode not in MODES:
        raise ValueError(unknown("mode", mode, MODES))
    if border not in BORDERS:
        raise ValueError(unknown("border", border, BORDERS))
    # A sum is as fast as memory is, and not finite if one of them is not; in half precision it overflows.
    if not flow.detach().sum(dtype=torch.promote_types(flow.dtype, torch.float32)).isfinite():
        raise ValueError(
            f"The flow must be finite, but {(~flow.isfinite()).sum().item()} of its numbers are not. Where it is "
            "unknown, set it to 0 and leave these pixels out of what you measure."
        )


@functools.lru_cache(maxsize=32)
def _pixels(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is kept for later calls, which may want gradients
        y, x = (torch.arange(n, dtype=dtype, device=device) for n in (height, width))
        return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)])[None]


@functools.lru_cache(maxsize=32)
def _normalized(height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The grid in ``grid_sample``'s unit, from -1 at the first pixel's middle to 1 at the last's, and a pixel in it."""
    with torch.inference_mode(False):
        pixel = torch.tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1)], dtype=dtype, device=device)[:, None, None]
        return _pixels(height, width, dtype, device) * pixel - 1, pixel
