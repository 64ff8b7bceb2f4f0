"""From a detector's features to the frame that they are of: decoders, and the search for an image (report, 5.3.2).

    plain        x = D(f)                                         the features alone
    last frame   x = warp(x_0, u) + m c                           u, m, c = D(x_{-1}, x_0, f_0, f)

f_0 are the features of the last frame seen, x_0, and f those of the frame that is wanted.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from predoc_lib.flow_warp import warp

Heads = list[Float[Tensor, "B _ _ _"]]
Frames = Float[Tensor, "B 3 H W"]


def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A convolution of 3 x 3 and its activation."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.SiLU())


def double(x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B c H W"]:
    """Twice the resolution, by linear interpolation."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Meet(nn.Module):
    """All heads' features on the grid of the finest, in ``width`` channels."""

    def __init__(self, shapes: list[tuple[int, int, int]], width: int) -> None:
        super().__init__()
        self.enter = nn.ModuleList(nn.Conv2d(shape[0], width, 1) for shape in shapes)
        self.grid = max(shape[1:] for shape in shapes)

    def forward(self, features: Heads) -> Float[Tensor, "B W h w"]:
        """The sum of what each head brings."""
        parts = [enter(x) for enter, x in zip(self.enter, features, strict=True)]
        return sum(F.interpolate(part, self.grid, mode="nearest") for part in parts)


class PlainDecoder(nn.Module):
    """A frame from features alone; the finest features are on a grid of an eighth of the frame's sides."""

    def __init__(self, shapes: list[tuple[int, int, int]], width: int = 64) -> None:
        super().__init__()
        self.meet = Meet(shapes, width)
        self.net = nn.ModuleList([layer(width, width), layer(width, width), layer(width, width // 2)])
        self.leave = nn.Conv2d(width // 2, 12, 3, padding=1)

    def forward(self, features: Heads) -> Frames:
        """The frame, in [0, 1]."""
        first, second, third = self.net
        x = first(F.silu(self.meet(features)))
        x = third(double(second(double(x))))
        return F.pixel_shuffle(self.leave(x), 2).sigmoid()


class LastFrameDecoder(nn.Module):
    """A frame from features and the two last frames seen: what is there moves, and what is new is painted.

    Untrained, it gives the last frame.
    """

    def __init__(self, shapes: list[tuple[int, int, int]], width: int = 48) -> None:
        super().__init__()
        self.now, self.then = Meet(shapes, width), Meet(shapes, width)
        self.down = nn.ModuleList([layer(24, 24), layer(24, 32, 2), layer(32, width, 2)])
        self.join = nn.Sequential(layer(3 * width, width), layer(width, width))
        self.up = nn.ModuleList([layer(width + 32, width), layer(width + 24, 32)])
        self.leave = nn.Conv2d(32, 6, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.leave.bias.data[2] = -3.0

    def forward(self, frames: Float[Tensor, "B 2 3 H W"], last: Heads, wanted: Heads) -> Frames:
        """The frame whose features are wanted; ``last`` are those of the last of the frames."""
        flow, share, content = self.parts(frames, last, wanted)
        moved = warp(frames[:, 1], flow)
        return moved + share * content

    def parts(
        self, frames: Float[Tensor, "B 2 3 H W"], last: Heads, wanted: Heads
    ) -> tuple[Float[Tensor, "B 2 H W"], Float[Tensor, "B 1 H W"], Frames]:
        """Flow in pixels, the share of what is painted, and what is painted: a change of what moved."""
        x, skips = F.pixel_unshuffle(frames.flatten(1, 2), 2), []
        for down in self.down:
            x = down(x)
            skips.append(x)
        x = self.join(torch.cat([x, self.now(last), self.then(wanted)], 1))
        for up, skip in zip(self.up, (skips[1], skips[0]), strict=True):
            x = up(torch.cat([double(x), skip], 1))
        flow, share, content = double(self.leave(x)).split([2, 1, 3], 1)
        return 4 * flow, share.sigmoid(), content.tanh()


class Critic(nn.Module):
    """Tells true frames from made ones, patch by patch (Isola et al. 2017)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.net = nn.Sequential(
            layer(12, width), layer(width, 2 * width, 2), layer(2 * width, 2 * width, 2), nn.Conv2d(2 * width, 1, 1)
        )

    def forward(self, frames: Frames) -> Float[Tensor, "B 1 h w"]:
        """The logit of each patch being of a true frame."""
        return self.net(F.pixel_unshuffle(frames, 2))


def total_variation(image: Frames) -> Float[Tensor, " B"]:
    """Mean absolute step from pixel to pixel."""
    return sum(image.diff(dim=axis).abs().mean((1, 2, 3)) for axis in (-2, -1))


def optimize(
    distance, start: Frames, *, steps: int = 100, rate: float = 0.02, prior: float = 0.1
) -> tuple[Frames, bool]:
    """The image whose features are nearest to given ones, by descent from a start (Mahendran and Vedaldi 2015).

    Args:
        distance: of images, [B]: how far their features are from those that are wanted.
        start: the first images; grey, or the last frames seen.
        steps: of Adam.
        rate: its learning rate.
        prior: weight of the total variation.

    Returns:
        For every image the best that was seen, and whether the search went astray: it ended worse than it began, or
        was not finite.
    """
    image = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([image], lr=rate)
    best, least = start.clone(), torch.full((len(start),), float("inf"), device=start.device)
    first = last = None
    for _ in range(steps + 1):
        loss = distance(image) + prior * total_variation(image)
        better = loss.detach() < least  # never true of NaN
        least = torch.where(better, loss.detach(), least)
        best = torch.where(better[:, None, None, None], image.detach(), best)
        last = loss.detach()
        first = last if first is None else first
        if not last.isfinite().all():
            return best, True
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        with torch.no_grad():
            image.clamp_(0, 1)
    return best, bool((last > first).any())
