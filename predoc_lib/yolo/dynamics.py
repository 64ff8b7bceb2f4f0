"""A detector's features through time: a recurrent encoder and a Neural ODE (report, section 5.1).

    h_0 = encoder(C)                  the context C = {(x_i, t_i)}, features of the frames seen; h_0 is of the last one
    d(h, s)/dt = f(h), s(t_0) = 0     the Neural ODE: in every cell a state h and how far it has moved, s
    x(t) = x_0 moved by s(t) + decoder((x_0, h(t)) moved by s(t))

x_0 are the last features seen. The decoder and ds/dt are zero at first: the untrained model is ``CopyLast``.
"""

import abc
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from predoc_lib.ode import NeuralODE
from predoc_lib.yolo.motion import splat, splat_coarse

Features = list[Float[Tensor, "_ _ _ _ _"]]  # one tensor a detection head: [B, T, c, h, w]
Shapes = list[tuple[int, int, int]]
PRIORITY = 6.0  # no cell has more than exp(2 * 6) times another's


@runtime_checkable
class Predictor(Protocol):
    """What predicts features at other times."""

    def predict(self, features: Features, t: Float[Tensor, " T"], t_query: Float[Tensor, " Q"]) -> Features:
        """Features [B, Q, c, h, w] of each head at t_query, from those [B, T, c, h, w] at the times t."""
        ...


class CopyLast:
    """Nothing moves: the last features seen."""

    def predict(self, features: Features, t: Float[Tensor, " T"], t_query: Float[Tensor, " Q"]) -> Features:
        """See ``Predictor``."""
        return [x[:, -1:].expand(-1, len(t_query), -1, -1, -1) for x in features]


class Extrapolation:
    """Every number goes on along the line through its last two."""

    def predict(self, features: Features, t: Float[Tensor, " T"], t_query: Float[Tensor, " Q"]) -> Features:
        """See ``Predictor``."""
        ahead = ((t_query - t[-1]) / (t[-1] - t[-2])).to(features[0])[:, None, None, None]
        return [x[:, -1:] + ahead * (x[:, -1:] - x[:, -2:-1]) for x in features]


class Overview(nn.Module):
    """Every cell hears what all say together: h + W (mean of h over the cells) + b; W and b are zero at first.

    Whether the camera turns, only the whole picture tells, and convolutions bring it to a cell step by step.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_all = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.of_all.weight)
        nn.init.zeros_(self.of_all.bias)

    def forward(self, h: Float[Tensor, "B W h w"]) -> Float[Tensor, "B W h w"]:
        """The state, in the same shape."""
        return h + self.of_all(h.mean((2, 3), keepdim=True))


class ConvGRUCell(nn.Module):
    """A gated recurrent unit whose matrices are convolutions (Ballas et al. 2016); ``inputs`` may be 0.

    With an ``overview`` the convolutions read the state through one; it still stays in (-1, 1) if it starts there.
    """

    def __init__(self, inputs: int, width: int, overview: bool = False) -> None:
        super().__init__()
        self.read = Overview(width) if overview else nn.Identity()
        self.gates = nn.Conv2d(inputs + width, 2 * width, 3, padding=1)
        self.candidate = nn.Conv2d(inputs + width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "B c h w"], h: Float[Tensor, "B W h w"]) -> Float[Tensor, "B W h w"]:
        """The next state."""
        read = self.read(h)
        reset, update = self.gates(torch.cat([x, read], 1)).sigmoid().chunk(2, 1)
        new = self.candidate(torch.cat([x, reset * read], 1)).tanh()
        return (1 - update) * h + update * new


class Field(nn.Module):
    """f: d(h, s)/dt, by convolutions of h, or of its ``Overview``; dh/dt stays in (-1, 1), so no solve explodes."""

    def __init__(self, width: int, moves: bool, overview: bool = False) -> None:
        super().__init__()
        self.width = width
        self.net = nn.Sequential(
            *([Overview(width)] if overview else []),
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=2, dilation=2), nn.SiLU(),
            nn.Conv2d(width, width + 2 * moves, 3, padding=1),
        )  # fmt: skip
        nn.init.zeros_(self.net[-1].weight[width:])
        nn.init.zeros_(self.net[-1].bias[width:])

    def forward(self, t: Tensor, z: Float[Tensor, "B _ h w"]) -> Float[Tensor, "B _ h w"]:
        """dz/dt, z = (h, s)."""
        change = self.net(z[:, : self.width])
        return torch.cat([change[:, : self.width].tanh(), change[:, self.width :]], 1)


class FeatureModel(nn.Module, abc.ABC):
    """What the ODE and its recurrent rival share: encoder, decoder, and the residual around the last features.

    The heads' features, each channel in its own unit, meet on the finest head's grid. A ConvGRU reads them frame by
    frame, with how fast they changed since the frame before.

    Args:
        shapes: of the heads' features, ``Darknet.shapes``; every side divides the finest head's.
        width: channels of the state h.
        moves: the state has a displacement s, by which the last features are moved; else they stay where they were.
        overview: every cell is told where in the frame it is, and what all cells say together (``Overview``).

    Raises:
        ValueError: sides that do not divide the finest head's, or a width below 1.
    """

    def __init__(self, shapes: Shapes, width: int = 48, moves: bool = True, overview: bool = False) -> None:
        super().__init__()
        self.shapes, self.width, self.moves = [tuple(shape) for shape in shapes], width, moves
        self.grid = max(shape[1:] for shape in self.shapes)
        if width < 1 or any(
            side % own for shape in self.shapes for side, own in zip(self.grid, shape[1:], strict=True)
        ):
            raise ValueError(
                f"width must be at least 1 and every head's sides must divide the finest's, got width={width} and "
                f"{self.shapes}."
            )
        for k, shape in enumerate(self.shapes):
            self.register_buffer(f"scale{k}", torch.ones(shape[0], 1, 1))
        channels = sum(shape[0] for shape in self.shapes)
        self.enter = nn.Sequential(nn.Conv2d(2 * channels, width, 1), nn.SiLU())
        self.cell = ConvGRUCell(width, width)
        self.place = nn.Conv2d(2, width, 1, bias=False) if overview else None
        self.register_buffer("places", places(*self.grid) if overview else None, persistent=False)
        self.overview = Overview(width) if overview else nn.Identity()
        self.priority = nn.Conv2d(width, 1, 1) if moves else None
        self.mix = nn.Sequential(
            nn.Conv2d(channels + width + 3 * moves, width, 1), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
        )  # fmt: skip
        self.leave = nn.ModuleList()
        for shape in self.shapes:
            stride = (self.grid[0] // shape[1], self.grid[1] // shape[2])
            last = nn.Conv2d(width, shape[0], 1)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.leave.append(nn.Sequential(nn.Conv2d(width, width, 3, stride, padding=1), nn.SiLU(), last))

    @property
    def scales(self) -> list[Float[Tensor, "c 1 1"]]:
        """The unit of every channel of every head."""
        return [getattr(self, f"scale{k}") for k in range(len(self.shapes))]

    def set_scales(self, features: Features) -> None:
        """Take each channel's root mean square as its unit."""
        for scale, x in zip(self.scales, features, strict=True):
            scale.copy_(x.float().square().mean((0, 1, 3, 4)).sqrt().clamp(min=1e-3)[:, None, None])

    def units(self, features: Features) -> Features:
        """Features whose every channel is in its own unit."""
        return [x / scale for x, scale in zip(features, self.scales, strict=True)]

    def meet(
        self, heads: list[Float[Tensor, "N _ _ _"]], weights: list[Float[Tensor, "W _ 1 1"]]
    ) -> Float[Tensor, "N W h w"]:
        """What a layer of 1 x 1 cells makes of all heads on the finest grid, before its bias.

        It takes each head on its own grid and repeats what comes out, which is the same and costs less.
        """
        parts = [F.conv2d(x, weight) for x, weight in zip(heads, weights, strict=True)]
        return sum(F.interpolate(part, self.grid, mode="nearest") for part in parts)

    def encode(self, units: Features, t: Float[Tensor, " T"]) -> Float[Tensor, "B W h w"]:
        """The state h at the last of the times t."""
        layer, channels = self.enter[0], [shape[0] for shape in self.shapes]
        now, speed = (torch.split(weight, channels, 1) for weight in layer.weight.chunk(2, 1))
        frames = []
        for x in units:
            rates = x.diff(dim=1) / t.diff()[:, None, None, None]
            frames.append(torch.cat([x, torch.cat([torch.zeros_like(x[:, :1]), rates], 1)], 2).flatten(0, 1))
        weights = [torch.cat(pair, 1) for pair in zip(now, speed, strict=True)]
        entered = self.meet(frames, weights) + layer.bias[:, None, None]
        if self.place is not None:
            entered = entered + self.place(self.places)
        entered = self.enter[1](entered).unflatten(0, units[0].shape[:2])
        h = entered.new_zeros(len(entered), self.width, *self.grid)
        for i in range(len(t)):
            h = self.overview(self.cell(entered[:, i], h))
        return h

    def decode(self, z: Float[Tensor, "Q B _ h w"], units: list[Float[Tensor, "B _ _ _"]]) -> Features:
        """Features at the times of the states z = (h, s), from the last ones seen."""
        times, z = z.shape[:2], z.flatten(0, 1)
        h, layer, channels = z[:, : self.width], self.mix[0], [shape[0] for shape in self.shapes]
        *weights, of_state, of_arrival = layer.weight.split([*channels, self.width, 3 * self.moves], 1)
        content = self.meet(units, weights).repeat(times[0], 1, 1, 1) + F.conv2d(h, of_state)
        units = [x.repeat(times[0], 1, 1, 1) for x in units]
        if self.moves:
            motion = z[:, self.width :], PRIORITY * self.priority(h).tanh()
            content, arrival = splat(content, *motion)
            content = content + F.conv2d(arrival, of_arrival)
            units = [
                splat(x, *motion)[0] if x.shape[2:] == self.grid else splat_coarse(x, *motion, arrival[:, 2:])
                for x in units
            ]
        mixed = self.mix[1:](content + layer.bias[:, None, None])
        found = []
        for x, scale, layers in zip(units, self.scales, self.leave, strict=True):
            found.append(((x + layers(mixed)) * scale).unflatten(0, times).transpose(0, 1))
        return found

    def start(self, h: Float[Tensor, "B W h w"]) -> Float[Tensor, "B _ h w"]:
        """The state (h, s) at the context's end."""
        return torch.cat([h, h.new_zeros(len(h), 2 * self.moves, *self.grid)], 1)

    def predict(self, features: Features, t: Float[Tensor, " T"], t_query: Float[Tensor, " Q"]) -> Features:
        """Features at other times.

        Args:
            features: of every head [B, T, c, h, w].
            t: their times, in frames, increasing.
            t_query: increasing times, none before the last of t.

        Raises:
            ValueError: features of another network, times that do not increase, or lie before the context's end.
        """
        return self.predict_with_energy(features, t, t_query)[0]

    def predict_with_energy(
        self, features: Features, t: Float[Tensor, " T"], t_query: Float[Tensor, " Q"]
    ) -> tuple[Features, Float[Tensor, ""]]:
        """``predict``, and the ``kinetic_energy`` of the state h on its way."""
        self._check(features, t, t_query)
        units = self.units(features)
        return self.ahead(self.encode(units, t), [x[:, -1] for x in units], t_query - t[-1])

    @abc.abstractmethod
    def ahead(
        self, h: Float[Tensor, "B W h w"], units: list[Float[Tensor, "B _ _ _"]], ahead: Float[Tensor, " Q"]
    ) -> tuple[Features, Float[Tensor, ""]]:
        """What is so many frames ahead of the context's end, where the state is h and the features are these.

        Returns:
            The features, and the ``kinetic_energy`` of h on its way to the last of them, or the whole frame after it.
        """

    def _check(self, features: Features, t: Tensor, t_query: Tensor) -> None:
        wanted = [(len(t), *shape) for shape in self.shapes]
        if [tuple(x.shape[1:]) for x in features] != wanted:
            raise ValueError(
                f"Features must be [B, T, c, h, w] with (T, c, h, w) of {wanted}, got "
                f"{[list(x.shape) for x in features]}."
            )
        if not (len(t) and len(t_query)) or (t.diff() <= 0).any() or (t_query.diff() <= 0).any() or t_query[0] < t[-1]:
            raise ValueError(
                f"Times must increase, and t_query must not begin before the last of t, got t={t.tolist()} and "
                f"t_query={t_query.tolist()}."
            )


def places(height: int, width: int) -> Float[Tensor, "1 2 h w"]:
    """(x, y) of every cell, both from -1 to 1, left to right and top to bottom."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([x, y])[None]


def kinetic_energy(h: Float[Tensor, "Q _ _ _ _"], t: Shaped[Tensor, " Q"]) -> Float[Tensor, ""]:
    """The mean over time and over the numbers of the state of (dh/dt)^2 (eq. 6.17), from the states h at the times t.

    Between two times the state is taken to go straight, which costs least. One time: 0.
    """
    if len(t) < 2:
        return h.new_zeros(())
    squared = h.diff(dim=0).square().mean((1, 2, 3, 4))
    return (squared / t.diff()).sum() / (t[-1] - t[0])


class FeatureODE(FeatureModel):
    """Between and beyond the frames the state follows the Neural ODE; ``step_size``, in frames, is the solver's."""

    def __init__(
        self, shapes: Shapes, width: int = 48, moves: bool = True, overview: bool = False, step_size: float = 1.0
    ) -> None:
        super().__init__(shapes, width, moves, overview)
        self.ode = NeuralODE(Field(width, moves, overview), method="midpoint", step_size=step_size)

    def ahead(
        self, h: Float[Tensor, "B W h w"], units: list[Float[Tensor, "B _ _ _"]], ahead: Float[Tensor, " Q"]
    ) -> tuple[Features, Float[Tensor, ""]]:
        """See ``FeatureModel``."""
        times = ahead if ahead[0] == 0 else torch.cat([ahead.new_zeros(1), ahead])
        z = self.ode(self.start(h), times)
        return self.decode(z[len(times) - len(ahead) :], units), kinetic_energy(z[:, :, : self.width], times)


class FeatureGRU(FeatureModel):
    """The rival: a ConvGRU steps from whole frame to whole frame; features between two lie on the line between them."""

    def __init__(self, shapes: Shapes, width: int = 48, moves: bool = False, overview: bool = False) -> None:
        super().__init__(shapes, width, moves, overview)
        self.step = ConvGRUCell(0, width, overview)
        self.velocity = nn.Conv2d(width, 2, 3, padding=1) if moves else None
        if moves:
            nn.init.zeros_(self.velocity.weight)
            nn.init.zeros_(self.velocity.bias)

    def ahead(
        self, h: Float[Tensor, "B W h w"], units: list[Float[Tensor, "B _ _ _"]], ahead: Float[Tensor, " Q"]
    ) -> tuple[Features, Float[Tensor, ""]]:
        """See ``FeatureModel``."""
        z, states = self.start(h), []
        for _ in range(int(ahead[-1].ceil()) + 1):
            states.append(z)
            h, s = z[:, : self.width], z[:, self.width :]
            h = self.step(h[:, :0], h)
            z = torch.cat([h, s + self.velocity(h) if self.moves else s], 1)
        whole = torch.stack(states)
        energy = kinetic_energy(whole[:, :, : self.width], torch.arange(len(whole), device=h.device))
        # Only the frames that are asked for, or lie beside a time that is, need decoding.
        low, high = ahead.floor().long(), ahead.ceil().long()
        needed, place = torch.unique(torch.cat([low, high]), return_inverse=True)
        decoded = self.decode(whole[needed], units)
        share = (ahead - low)[:, None, None, None]
        before, after = place.chunk(2)
        return [(1 - share) * y[:, before] + share * y[:, after] for y in decoded], energy
