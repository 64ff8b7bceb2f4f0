"""What the models are compared with: trivial predictions of video, and a recurrent network in place of the ODE."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from predoc_lib.latent_ode import LatentODE


def mean_image(frames: Float[Tensor, "B T C H W"]) -> Float[Tensor, "C H W"]:
    """The mean of all (training) frames: the best constant prediction in mean squared error."""
    return frames.mean((0, 1))


def copy_last(
    frames: Float[Tensor, "B T C H W"], t: Float[Tensor, " T"], t_query: Float[Tensor, " Q"]
) -> Float[Tensor, "B Q C H W"]:
    """The last frame at or before each time; before the first, the first."""
    return frames[:, (torch.searchsorted(t, t_query, right=True) - 1).clamp(min=0)]


def cross_fade(
    frames: Float[Tensor, "B T C H W"], t: Float[Tensor, " T"], t_query: Float[Tensor, " Q"]
) -> Float[Tensor, "B Q C H W"]:
    """Linear interpolation in time of the two neighbouring frames; beyond the ends, the nearest frame."""
    right = torch.searchsorted(t, t_query).clamp(1, len(t) - 1)
    weight = ((t_query - t[right - 1]) / (t[right] - t[right - 1])).clamp(0, 1)[:, None, None, None]
    return (1 - weight) * frames[:, right - 1] + weight * frames[:, right]


class LatentGRU(LatentODE):
    """``LatentODE`` with recurrent networks that step from observation to observation in place of the ODE.

    Encoder and decoder are the same. From t_0 one GRU steps forwards and another one backwards, as the two decoders of
    Srivastava et al. (2015) do; between two steps the states are linear in time.

    Args:
        frame: (H, W), pixels.
        step: time between two steps: the time between two observed frames.
        options: those of ``LatentODE`` that are not about the ODE.
    """

    def __init__(self, frame: tuple[int, int], *args, step: float = 1.0, **options) -> None:
        super().__init__(frame, *args, **options)
        self.step, state = step, self.sizes[1]
        width = 32  # the model then has as many parameters as with the ODE, within a few hundredths
        del self.ode
        self.forwards, self.backwards = (
            nn.ModuleList([nn.Linear(state, width), nn.GRUCell(state, width), nn.Linear(width, state)])
            for _ in range(2)
        )

    @property
    def networks(self) -> list[nn.Module]:
        """The parts that may run in lower precision."""
        return [*self.encoder.networks, *self.decoder.networks]

    def solve(self, s0: Float[Tensor, "B K S"], tau: Float[Tensor, "B T"]) -> Float[Tensor, "B T K S"]:
        """States at times tau after (before, if negative) t_0."""
        position = tau / self.step
        after = self.walk(self.forwards, s0, max(1, int(position.max().ceil())))
        before = self.walk(self.backwards, s0, max(1, int((-position).max().ceil())))
        states = torch.stack([*before[::-1], s0, *after], 1)
        position = position + len(before)
        left = position.floor().long().clamp(0, states.shape[1] - 2)
        video = torch.arange(len(s0), device=left.device)[:, None]
        weight = (position - left)[:, :, None, None]
        self.stats = {"evaluations": states.shape[1] - 1}
        return (1 - weight) * states[video, left] + weight * states[video, left + 1]

    def walk(self, network: nn.ModuleList, s0: Float[Tensor, "B K S"], steps: int) -> list[Float[Tensor, "B K S"]]:
        """The states after 1, 2, ... steps of a network."""
        start, cell, change = network
        s = s0.flatten(0, 1)
        h, states = start(s).tanh(), []
        for _ in range(steps):
            h = cell(s, h)
            s = s + change(h)
            states.append(s.view_as(s0))
        return states
