"""Encoders and decoders of the latent ODE: for scenes of moving objects, and plain ones for whole frames.

An encoder maps a context (frames [B, T, C, H, W], times [B, T] and a mask [B, T] of the entries that count) to the
mean and log-variance of the latent at the last of these times, [B, K, state + content] each: the ODE starts where the
memory of the frames ends. A decoder maps states [B, T, K, state] and contents [B, 1 or T, K, content] to frames
[B, T, C, H, W] in (0, 1).
"""

import itertools
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from predoc_lib.render import crop, place

GRID = 8  # cells a side of the grid on which objects are looked for
FIRST_LOG_VARIANCE = -8.0  # a sharp posterior at first, so that positions are learned before uncertainty is


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these sizes with an activation between them."""
    layers = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), activation())]
    return nn.Sequential(*layers[:-1])


class Geometry(nn.Module):
    """Where a patch half the size of the frame lies when its centre is at p, in [-1, 1] from edge to edge."""

    def __init__(self, frame: tuple[int, int]) -> None:
        super().__init__()
        self.frame, self.patch = frame, (frame[0] // 2, frame[1] // 2)
        self.register_buffer("side", torch.tensor(frame, dtype=torch.float32), persistent=False)

    def corner(self, p: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 2"]:
        """The patch's upper left corner in pixels."""
        return (self.side - self.side.div(2, rounding_mode="floor")) / 2 + p * self.side / 2


class ObjectEncoder(nn.Module):
    """q(z_0 | C) of K objects: a recurrent network that follows each object and looks closely at it.

    In every frame each object's position is found by soft k-means on the ink (brightness), started where the object
    was last; a glimpse there corrects it and feeds a GRU. The latent's first two numbers are the position at the last
    time; its content is read off the mean of the glimpses, where the object stands still and all else is blurred.
    """

    def __init__(
        self, frame: tuple[int, int], channels: int, objects: int, state: int, content: int, width: int
    ) -> None:
        super().__init__()
        self.objects, self.state, self.content = objects, state, content
        self.geometry = Geometry(frame)
        pixels = channels * math.prod(self.geometry.patch)
        cells = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
        self.register_buffer("cells", torch.cartesian_prod(cells, cells), persistent=False)
        angle = torch.arange(objects) * (2 * math.pi / objects) + 0.3
        spread = 0.3 if objects > 1 else 0.0  # different starting places: this is what tells the objects apart
        self.anchors = nn.Parameter(spread * torch.stack([angle.sin(), angle.cos()], -1))
        self.ink_power, self.log_sharpness = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))
        self.glimpse = nn.Sequential(mlp(pixels, width, width), nn.ReLU())
        self.correct, self.move = nn.Linear(width, 2), nn.Linear(width // 2, 2)
        for layer in (self.correct, self.move):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        self.memory = nn.GRUCell(width + 5, width // 2)
        self.to_state, self.to_weight = nn.Linear(width // 2, 2 * state), nn.Linear(width // 2, 1)
        self.to_content, self.to_content_linear = mlp(pixels, width, width, 2 * content), nn.Linear(pixels, 2 * content)
        self.networks = (self.glimpse, self.to_content)  # a tuple: they are registered already

    def forward(self, frames: Tensor, t: Tensor, mask: Bool[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z_0, [B, K, state + content] each."""
        batch, length = frames.shape[:2]
        ink = nn.functional.adaptive_avg_pool2d(frames.mean(2), GRID)
        ink = nn.functional.avg_pool2d(ink, 3, stride=1, padding=1)  # about as wide as an object
        ink = self.ink_power * (ink.flatten(2) + 1e-3).log()  # [B, T, cells]
        p = self.anchors.expand(batch, -1, -1)
        h = frames.new_zeros(batch, self.objects, self.memory.hidden_size)
        seen, before = torch.zeros_like(mask[:, 0]), t[:, 0]
        positions, memories = [], []
        for i in range(length):
            now = self.k_means(ink[:, i], p + self.move(h))
            glimpse = self.glimpse(self.look(frames[:, i], now).flatten(2))
            now = now + self.correct(glimpse)
            gap = torch.where(seen, t[:, i] - before, 0)[:, None, None].expand(-1, self.objects, 1)
            step = torch.where(seen[:, None, None], now - p, 0)
            inputs = torch.cat([glimpse, now, gap, 5 * step], -1)  # 5: a step is about as large as the rest
            new = self.memory(inputs.flatten(0, 1), h.flatten(0, 1)).unflatten(0, (batch, self.objects))
            valid = mask[:, i]
            p, h = torch.where(valid[:, None, None], now, p), torch.where(valid[:, None, None], new, h)
            before, seen = torch.where(valid, t[:, i], before), seen | valid
            positions.append(p)
            memories.append(h)
        positions, memories = torch.stack(positions, 1), torch.stack(memories, 1)
        weights = self.to_weight(memories).masked_fill(~mask[:, :, None, None], -torch.inf).softmax(1)
        mean_glimpse = (self.look(frames, positions).flatten(3) * weights).sum(1)
        content = self.to_content(mean_glimpse) + self.to_content_linear(mean_glimpse)
        moments = torch.cat([self.to_state(h).unflatten(-1, (2, -1)), content.unflatten(-1, (2, -1))], -1)
        position = nn.functional.pad(p, (0, moments.shape[-1] - 2))
        return moments[..., 0, :] + position, moments[..., 1, :] + FIRST_LOG_VARIANCE

    def k_means(self, ink: Float[Tensor, "B cells"], p: Float[Tensor, "B K 2"]) -> Float[Tensor, "B K 2"]:
        """Positions after two rounds of soft k-means on the cells, weighted by their ink."""
        for _ in range(2):
            distance = (self.cells - p[:, :, None]).square().sum(-1)
            share = (-self.log_sharpness.exp() * distance).log_softmax(1)
            p = (ink[:, None] + share).softmax(-1) @ self.cells
        return p

    def look(self, frames: Tensor, p: Tensor) -> Tensor:
        """The patches of frames [*, C, H, W] around positions [*, K, 2]: [*, K, C, h, w]."""
        corners = self.geometry.corner(p)
        return crop(frames.unsqueeze(-4), corners.unsqueeze(-2), self.geometry.patch)


class ObjectPainter(nn.Module):
    """p(x | z): one patch drawn from each object's content, placed at the position that is read off its state.

    The position starts as the state's first two numbers and is corrected by a network, which may have kinks where the
    state moves smoothly: at a wall, for one.
    """

    def __init__(self, frame: tuple[int, int], channels: int, state: int, content: int, width: int) -> None:
        super().__init__()
        self.read = mlp(state, width, width, 2)
        nn.init.zeros_(self.read[-1].weight)
        nn.init.zeros_(self.read[-1].bias)
        self.geometry, self.channels = Geometry(frame), channels
        pixels = channels * math.prod(self.geometry.patch)
        self.draw, self.draw_linear = mlp(content, width, 2 * width, pixels), nn.Linear(content, pixels)
        nn.init.constant_(self.draw_linear.bias, -2.0)  # dark at first
        self.networks = (self.draw,)

    def forward(self, state: Tensor, content: Tensor) -> Tensor:
        """Frames [B, T, C, H, W]: where objects overlap, light that misses all of them is what stays dark."""
        patches = (self.draw(content) + self.draw_linear(content)).sigmoid()
        patches = patches.unflatten(-1, (self.channels, *self.geometry.patch))
        corners = self.geometry.corner(self.position(state))
        drawn = place(patches, corners.unsqueeze(-2), self.geometry.frame)  # [B, T, K, C, H, W]
        return 1 - (1 - drawn).prod(2)

    def position(self, state: Float[Tensor, "*batch state"]) -> Float[Tensor, "*batch 2"]:
        """Where each object's centre is: (y, x) in [-1, 1] from edge to edge of the canvas."""
        return state[..., :2] + self.read(state)


def halvings(frame: tuple[int, int]) -> int:
    """How often both sides can be halved until the shorter one has 8 pixels or fewer."""
    return max(1, math.ceil(math.log2(min(frame) / 8)))


class FrameEncoder(nn.Module):
    """q(z_0 | C) without objects, as the report has it: a convolutional network on each frame and a GRU over them."""

    def __init__(self, frame: tuple[int, int], channels: int, state: int, width: int) -> None:
        super().__init__()
        n = halvings(frame)
        sizes = [channels] + [width // 8 * 2**i for i in range(n)]
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Conv2d(a, b, 4, 2, 1), nn.ReLU())]
        features = sizes[-1] * (frame[0] >> n) * (frame[1] >> n)
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, width), nn.ReLU())
        self.memory, self.head = nn.GRUCell(width + 1, width), nn.Linear(width, 2 * state)
        self.networks = (self.net,)

    def forward(self, frames: Tensor, t: Tensor, mask: Bool[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z_0, [B, 1, state] each."""
        features = self.net(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        h = frames.new_zeros(len(frames), self.memory.hidden_size)
        seen, before = torch.zeros_like(mask[:, 0]), t[:, 0]
        for i in range(frames.shape[1]):
            gap = torch.where(seen, t[:, i] - before, 0)[:, None]
            valid = mask[:, i]
            h = torch.where(valid[:, None], self.memory(torch.cat([features[:, i], gap], -1), h), h)
            before, seen = torch.where(valid, t[:, i], before), seen | valid
        mean, log_variance = self.head(h)[:, None].chunk(2, -1)
        return mean, log_variance + FIRST_LOG_VARIANCE


class FramePainter(nn.Module):
    """p(x | z) without objects: a transposed convolutional network draws the whole frame."""

    def __init__(self, frame: tuple[int, int], channels: int, state: int, width: int) -> None:
        super().__init__()
        n = halvings(frame)
        sizes = [width // 8 * 2**i for i in reversed(range(n))]
        small = (sizes[0], frame[0] >> n, frame[1] >> n)
        layers = [
            layer
            for a, b in zip(sizes, [*sizes[1:], channels], strict=True)
            for layer in (nn.ReLU(), nn.ConvTranspose2d(a, b, 4, 2, 1))
        ]
        self.net = nn.Sequential(mlp(state, width, math.prod(small)), nn.Unflatten(-1, small), *layers, nn.Sigmoid())
        self.networks = (self.net,)

    def forward(self, state: Tensor, content: Tensor) -> Tensor:
        """Frames [B, T, C, H, W]."""
        return self.net(state.flatten(0, 2)).unflatten(0, state.shape[:2])
