"""Vector fields f(t, x, cond) on images, convolutional, with knowledge of the time and of the coarser image."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

FREQUENCIES = 8
SMALL = 0.03  # of a band's standard deviation: about as large as dequantization noise
LARGEST = 4.0  # of |log sigma|: a band is nowhere smoother than dequantization noise leaves it


class Clock(nn.Module):
    """Features [B or 1, width] of a time t, 0-d or [B]: waves in t and, near the data, in log t."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.register_buffer("frequency", math.pi * torch.arange(1, FREQUENCIES + 1) / 2, persistent=False)

    def forward(self, t: Tensor) -> Float[Tensor, "B width"]:
        """The features."""
        late = (t**2 + 1e-4).log() / math.log(1e4) + 1  # 0 at t = 0; smooth, for solvers overshoot
        phase = torch.stack([t.reshape(-1), late.reshape(-1)], 1)[..., None] * self.frequency
        return self.net(torch.cat([phase.sin(), phase.cos()], -1).flatten(1))


class Block(nn.Module):
    """A residual block: two 3 x 3 convolutions, scaled and shifted between them by the clock."""

    def __init__(self, width: int, time: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.film = nn.Linear(time, 2 * width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, clock: Tensor) -> Tensor:
        """The shape of h."""
        scale, shift = self.film(clock)[..., None, None].chunk(2, 1)
        inner = self.first(nn.functional.silu(h)) * (1 + scale) + shift
        return h + self.second(nn.functional.silu(inner))


class ConvNet(nn.Module):
    """``depth`` residual blocks at one resolution."""

    def __init__(self, channels: int, out: int, width: int, depth: int) -> None:
        super().__init__()
        self.clock = Clock(width)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList([Block(width, width) for _ in range(depth)])
        self.leave = _zero(nn.Conv2d(width, out, 3, padding=1))

    def forward(self, t: Tensor, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        """t is 0-d or [B]."""
        clock, h = self.clock(t), self.enter(x)
        for block in self.blocks:
            h = block(h, clock)
        return self.leave(nn.functional.silu(h))


class UNet(nn.Module):
    """``depth`` residual blocks at half the resolution, one before and one after them at the full: sides are even."""

    def __init__(self, channels: int, out: int, width: int, depth: int) -> None:
        super().__init__()
        inner = 2 * width
        self.clock = Clock(width)
        self.enter, self.before = nn.Conv2d(channels, width, 3, padding=1), Block(width, width)
        self.down = nn.Conv2d(width, inner, 2, 2)
        self.blocks = nn.ModuleList([Block(inner, width) for _ in range(depth)])
        self.up = nn.ConvTranspose2d(inner, width, 2, 2)
        self.after = Block(width, width)
        self.leave = _zero(nn.Conv2d(width, out, 3, padding=1))

    def forward(self, t: Tensor, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        """As ``ConvNet``."""
        clock = self.clock(t)
        full = self.before(self.enter(x), clock)
        h = self.down(full)
        for block in self.blocks:
            h = block(h, clock)
        return self.leave(nn.functional.silu(self.after(full + self.up(h), clock)))


class Field(nn.Module):
    """f(t, x, cond): the velocity that is right for x ~ N(mu, sigma^2), mu and log sigma said by a network.

    Between data x and noise, x_t = (1 - t) x + t noise. Were x, at every pixel and channel, normal with mean mu and
    variance sigma^2, x_t would have the variance v = (1 - t)^2 sigma^2 + t^2, and the mean velocity at x_t would be

        E[noise - x | x_t] = ((t - (1 - t) sigma^2) x_t - t mu) / v.

    The network infers mu and sigma from x_t, what surrounds it, and the condition. Images are rough in some places and
    smooth in others, and what a network is asked here changes slowly, where the velocity itself is large and turns
    fast. At t = 0 and 1 the velocity is right whatever it says. Untrained (mu = 0, sigma = 1) the flow is the identity.

    Smooth places of an image have details a hundred times smaller than rough ones. So the network sees x_t in units of
    its standard deviation and of the noise in it, and of the condition what differs from the mean around it, as asinh:
    linear where small, logarithmic where large.

    Args:
        kind: one of ``KINDS``.
        channels: of x.
        cond: of the condition; 0: there is none.
        width: of the network's hidden layers.
        depth: residual blocks.
    """

    def __init__(self, kind: str, channels: int, cond: int, width: int, depth: int) -> None:
        super().__init__()
        self.net = KINDS[kind](2 * (channels + cond), 2 * channels, width, depth)

    def forward(self, t: Tensor, x: Float[Tensor, "B C H W"], cond: Tensor | None = None) -> Float[Tensor, "B C H W"]:
        """dx/dt; t is 0-d or [B]."""
        time = t.view(-1, 1, 1, 1)
        seen = [x / ((1 - time) ** 2 + time**2).sqrt(), (x / (time**2 + SMALL**2).sqrt()).asinh()]
        if cond is not None:
            around = nn.functional.avg_pool2d(cond, 3, 1, 1, count_include_pad=False)
            seen += [cond, ((cond - around) / SMALL).asinh()]
        mu, log_sigma = self.net(t, torch.cat(seen, 1)).chunk(2, 1)
        square = (2 * LARGEST * (log_sigma / LARGEST).tanh()).exp()
        v = (1 - time) ** 2 * square + time**2
        return ((time - (1 - time) * square) * x - time * mu) / v


KINDS: dict[str, Callable[..., nn.Module]] = {"conv": ConvNet, "unet": UNet}


def _zero(layer: nn.Module) -> nn.Module:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
