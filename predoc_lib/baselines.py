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
    """``LatentODE`` with a GRU that steps from observation to observation in place of the ODE.

    Encoder and decoder are the same. The states are linear in time between two steps; before the first observation they
    go on as the line through the first two steps.

    Args:
        frame: (H, W), pixels.
        step: time between two steps: the time between two observed frames.
        options: those of ``LatentODE`` that are not about the ODE.
    """

    def __init__(self, frame: tuple[int, int], *args, step: float = 1.0, **options) -> None:
        super().__init__(frame, *args, **options)
        self.step, state = step, self.sizes[1]
        width = 32  # the model then has as many parameters as with the ODE, within a hundredth
        del self.ode
        self.start, self.cell, self.change = nn.Linear(state, width), nn.GRUCell(state, width), nn.Linear(width, state)

    def solve(self, s0: Float[Tensor, "B K S"], tau: Float[Tensor, "B T"]) -> Float[Tensor, "B T K S"]:
        """States at times tau after the first observation."""
        position = tau / self.step
        s = s0.flatten(0, 1)
        h, states = self.start(s).tanh(), [s0]
        for _ in range(max(1, int(position.max().ceil()))):
            h = self.cell(s, h)
            s = s + self.change(h)
            states.append(s.view_as(s0))
        states = torch.stack(states, 1)
        left = position.floor().long().clamp(0, states.shape[1] - 2)
        video = torch.arange(len(s0), device=left.device)[:, None]
        weight = (position - left)[:, :, None, None]
        self.stats = {"evaluations": states.shape[1] - 1}
        return (1 - weight) * states[video, left] + weight * states[video, left + 1]
