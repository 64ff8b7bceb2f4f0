"""Video in continuous time: a recurrent encoder, a Neural ODE in latent space, a decoder (report, chapter 4).

    z_0 ~ q(z_0 | C)              the encoder reads the context C = {(x_i, t_i)}    eq. 4.1
    z(t) = z_0 + int_t0^t f(z)    the Neural ODE                                    eq. 4.2
    x(t) ~ p(x | z(t))            the decoder, each frame for itself                eq. 4.3

t_0 is the time of the *last* observation: an ODE runs in both directions, so the future is as near as it can be. (The
report starts at the first one: ``t0="first"``.)
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from predoc_lib.naming import unknown
from predoc_lib.ode import NeuralODE
from predoc_lib.video_nets import FrameEncoder, FramePainter, ObjectEncoder, ObjectPainter, halvings, mlp

LIKELIHOODS = ("bernoulli", "gaussian")
LAYOUTS = ("objects", "plain")
STARTS = ("last", "first")
GAUSSIAN_SCALE = 0.1  # standard deviation of a pixel's brightness under the Gaussian likelihood
SMALLEST = 1e-4  # probabilities stay this far from 0 and 1, so that one wrong pixel costs a finite number of nats


class RotationField(nn.Module):
    """f(t, s) of eq. 4.2, which turns s in state / 2 planes: (a, b)' = omega(a^2 + b^2) (-b, a), omega a network.

    Turning keeps every a^2 + b^2 and so, along a trajectory, every angular velocity: whatever the weights, nothing
    grows without bound, forwards or backwards, and the solution is known in closed form. (A solver's steps must resolve
    the turning: where omega times the step exceeds 2.8, rk4 makes radii grow.) In mechanics these are action and angle
    variables; motion between two walls, for one, has such coordinates.

    Args:
        state: numbers in s, even: first all a, then all b.
        width: of omega's two hidden layers.
    """

    def __init__(self, state: int, width: int) -> None:
        super().__init__()
        self.omega = mlp(state // 2, width, width, state // 2, activation=nn.Tanh)

    def forward(self, t: Tensor, s: Float[Tensor, "*batch state"]) -> Float[Tensor, "*batch state"]:
        """ds/dt."""
        a, b = s.chunk(2, -1)
        omega = self.omega(a**2 + b**2)
        return torch.cat([-omega * b, omega * a], -1)


class FreeField(nn.Module):
    """f(t, s) of eq. 4.2 without any structure: a network of s alone."""

    def __init__(self, state: int, width: int) -> None:
        super().__init__()
        self.net = mlp(state, width, width, state, activation=nn.Tanh)

    def forward(self, t: Tensor, s: Float[Tensor, "*batch state"]) -> Float[Tensor, "*batch state"]:
        """ds/dt."""
        return self.net(s)


FIELDS = {"rotation": RotationField, "free": FreeField}


class _Stretched(nn.Module):
    """length f(t, s), every row of s with its own length."""

    def __init__(self, f: nn.Module, length: Float[Tensor, " B"]) -> None:
        super().__init__()
        self.f, self.length = f, length[:, None, None]

    def forward(self, t: Tensor, s: Float[Tensor, "B K S"]) -> Float[Tensor, "B K S"]:
        return self.length * self.f(t, s)


class LatentODE(nn.Module):
    """A variational autoencoder of whole videos whose latent moves by a Neural ODE.

    Args:
        frame: (H, W), pixels; both even, at least 8.
        channels: C of a frame.
        objects: K, how many things move (layout "objects").
        layout: "objects": the latent is, for each object, a state that the ODE moves and a content that stays; the
            decoder draws the content at a position that it reads off the state. "plain": one unstructured state, a
            convolutional encoder and decoder of whole frames, as in the report.
        field: "rotation": a ``RotationField``; "free": a ``FreeField``, as in the report.
        t0: where the latent's own time t_0 lies: at the "last" observation, or at the "first", as in the report; the
            encoder then reads the context backwards, so that its memory ends there.
        state: numbers an object's state has (layout "plain": the whole latent has); even.
        content: numbers an object's content has (layout "objects").
        width: of the hidden layers.
        likelihood: of a pixel: "gaussian" with standard deviation 0.1, or "bernoulli", the cross-entropy, which is a
            likelihood for pixels that are 0 or 1, and for grey ones a loss only.
        kl_weight: of the KL term of eq. 4.4; 1 is the ELBO, where the likelihood is one.
        method, rtol, atol, step_size, adjoint: of the ``NeuralODE``; times are in the user's unit (frames in the book).

    Raises:
        ValueError: an option that is not valid.
    """

    def __init__(
        self,
        frame: tuple[int, int],
        channels: int = 1,
        *,
        objects: int = 1,
        layout: str = "objects",
        field: str = "rotation",
        t0: str = "last",
        state: int = 24,
        content: int = 32,
        width: int = 128,
        likelihood: str = "bernoulli",
        kl_weight: float = 1.0,
        method: str = "rk4",
        rtol: float = 1e-4,
        atol: float = 1e-4,
        step_size: float = 1.0,
        adjoint: bool = False,
    ) -> None:
        super().__init__()
        for what, value, valid in (
            ("layout", layout, LAYOUTS), ("field", field, tuple(FIELDS)), ("t0", t0, STARTS),
            ("likelihood", likelihood, LIKELIHOODS),
        ):  # fmt: skip
            if value not in valid:
                raise ValueError(unknown(what, value, valid))
        if state < 4 or state % 2:
            raise ValueError(f"state must be an even number of at least 4, got {state}.")
        if min(objects, content, channels) < 1 or width < 16 or not 0 <= kl_weight < math.inf:
            raise ValueError(
                "objects, content and channels must be at least 1, width at least 16 and kl_weight finite and at least "
                f"0, got {objects}, {content}, {channels}, {width} and {kl_weight}."
            )
        if min(frame) < 8 or frame[0] % 2 or frame[1] % 2:
            raise ValueError(f"Frames must have even sides of at least 8 pixels, got {frame}.")
        self.frame, self.channels, self.likelihood, self.kl_weight = tuple(frame), channels, likelihood, kl_weight
        self.t0 = t0
        if layout == "objects":
            self.encoder = ObjectEncoder(self.frame, channels, objects, state, content, width)
            self.decoder = ObjectPainter(self.frame, channels, state, content, width)
        else:
            if frame[0] % 2 ** halvings(frame) or frame[1] % 2 ** halvings(frame):
                raise ValueError(f"Layout 'plain' needs sides that divide by {2 ** halvings(frame)}, got {frame}.")
            objects, content = 1, 0
            self.encoder = FrameEncoder(self.frame, channels, state, width)
            self.decoder = FramePainter(self.frame, channels, state, width)
        self.sizes = (objects, state, content)
        self.latent_size = objects * (state + content)
        f = FIELDS[field](state, width // 2)
        self.ode = NeuralODE(f, method=method, rtol=rtol, atol=atol, step_size=step_size, adjoint=adjoint)
        self.stats = {"evaluations": 0}

    @property
    def networks(self) -> list[nn.Module]:
        """The parts that may run in lower precision: positions, states and likelihoods are computed outside of them."""
        return [self.ode.f, *self.encoder.networks, *self.decoder.networks]

    def encode(self, frames: Tensor, t: Tensor, mask: Tensor | None = None) -> Normal:
        """q(z_0 | C), z_0 the latent at each video's t_0 (eq. 4.1's posterior).

        Args:
            frames: [B, T, C, H, W] in [0, 1].
            t: [T] or [B, T], increasing.
            mask: [B, T], True where a frame was observed; None: all were.

        Returns:
            A Normal over [B, D], D = ``latent_size`` = objects * (state + content).

        Raises:
            ValueError: a wrong shape or range, times that do not increase, no observed frame.
            FloatingPointError: the weights are such that there is no such Normal.
        """
        t, mask = self._check(frames, t, mask)
        if self.t0 == "first":
            first = torch.where(mask, t, torch.inf).amin(1, keepdim=True)
            frames, t, mask = frames.flip(1), torch.where(mask, first - t, 0).flip(1), mask.flip(1)
        mean, log_variance = (part.flatten(1) for part in self.encoder(frames, t, mask))
        scale = (log_variance / 2).exp()
        if not ((mean + scale).isfinite() & (scale > 0)).all():
            raise FloatingPointError(
                "The encoder's mean or deviation is not finite, or a deviation is 0: its weights are too large, or NaN."
            )
        return Normal(mean, scale)

    def decode(self, z: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch C H W"]:
        """Mean frames of p(x | z), in (0, 1), each latent for itself (eq. 4.3)."""
        state, content = self.split(z.reshape(1, -1, z.shape[-1]))
        return self._paint(state, content)[0].reshape(*z.shape[:-1], self.channels, *self.frame)

    def split(self, z: Float[Tensor, "*batch D"]) -> tuple[Tensor, Tensor]:
        """The states [*, K, state], which move, and the contents [*, K, content], which do not."""
        objects, state, content = self.sizes
        return z.unflatten(-1, (objects, state + content)).split([state, content], -1)

    def solve(self, s0: Float[Tensor, "B K S"], tau: Float[Tensor, "B T"]) -> Float[Tensor, "B T K S"]:
        """States at times tau after (before, if negative) t_0 (eq. 4.2).

        Videos that have one clock share a solve. Where clocks differ, the k-th intervals of all videos do, each in
        units of its own length: ds/du = length f, u from 0 to 1. That makes T solves, not one that stops B T times.
        """
        if (tau != tau[:1]).any():
            ahead, n = self._each(s0, tau)
            back, m = self._each(s0, -tau, way=-1)
            self.stats = {"evaluations": n + m}
            return torch.where((tau > 0)[..., None, None], ahead, back)
        times, index = torch.unique(tau[0], return_inverse=True)
        zero, parts, evaluations = times.new_zeros(1), [], 0
        for away in (times[times < 0].flip(0), times[times > 0]):
            parts.append(self.ode(s0, torch.cat([zero, away]))[1:])
            evaluations += self.ode.stats["evaluations"] if len(away) else 0
        self.stats = {"evaluations": evaluations}
        states = torch.cat([parts[0].flip(0), s0[None].expand(int((times == 0).sum()), -1, -1, -1), parts[1]])
        return states[index].transpose(0, 1)

    def _each(self, s0: Tensor, away: Float[Tensor, "B T"], way: int = 1) -> tuple[Float[Tensor, "B T K S"], int]:
        """States at every video's own times away from t_0 (where negative, at t_0), and evaluations of f."""
        away, order = away.clamp(min=0).sort(1)
        lengths = away.diff(dim=1, prepend=torch.zeros_like(away[:, :1]))
        ode, s, states, evaluations = self.ode, s0, [], 0
        for length in lengths.unbind(1):
            if length.any():
                options = {
                    name: getattr(ode, name) for name in ("method", "rtol", "atol", "adjoint", "max_evaluations")
                }
                step_size = ode.step_size and ode.step_size / length.max().item()
                interval = NeuralODE(_Stretched(ode.f, way * length), step_size=step_size, **options)
                s = interval(s, torch.tensor([0.0, 1.0], dtype=s.dtype, device=s.device))[-1]
                evaluations += interval.stats["evaluations"]
            states.append(s)
        video = torch.arange(len(s0), device=order.device)[:, None]
        return torch.stack(states, 1)[video, order.argsort(1)], evaluations

    def trajectory(self, z0: Float[Tensor, "B D"], tau: Tensor) -> Float[Tensor, "B T D"]:
        """Latents at times tau, [T] or [B, T], after (before, if negative) t_0."""
        s0, content = self.split(z0)
        states = self.solve(s0, tau.expand(len(z0), tau.shape[-1]))
        return torch.cat([states, content[:, None].expand(-1, states.shape[1], -1, -1)], -1).flatten(2)

    def predict(self, frames: Tensor, t: Tensor, t_query: Tensor, mask: Tensor | None = None) -> Tensor:
        """Frames [B, Tq, C, H, W] at any times t_query, [Tq] or [B, Tq], from the mean of q(z_0 | C).

        The other arguments and the errors are those of ``encode``; t_query may lie before, between or after t.
        """
        if t_query.ndim not in (1, 2) or not t_query.numel() or (t_query.ndim == 2 and len(t_query) != len(frames)):
            raise ValueError(
                f"t_query must hold at least one time, [Tq] or [{len(frames)}, Tq], got {list(t_query.shape)}."
            )
        if not torch.isfinite(t_query).all():
            raise ValueError(f"t_query must be finite, got {t_query.tolist()}.")
        return self._frames_at(self.encode(frames, t, mask).mean, self._since_t0(t, mask, t_query, len(frames)))

    def negative_elbo(
        self,
        frames: Tensor,
        t: Tensor,
        n_context: int | None = None,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Eq. 4.4, the negative evidence lower bound, in nats a video, averaged over the batch.

        Args:
            frames: [B, T, C, H, W] in [0, 1]; all observed frames are scored.
            t: [T] or [B, T], increasing.
            n_context: the encoder sees the first n_context frames only; None: all (the report's reconstruction).
            mask: [B, T], True where a frame was observed; None: all were.
            noise: [B, D] standard normal, of which z_0 is made; None: drawn here.

        Returns:
            "loss" = "reconstruction" + kl_weight * "kl", each a scalar.
        """
        times, observed = self._check(frames, t, mask)
        n = frames.shape[1] if n_context is None else n_context
        if not 1 <= n <= frames.shape[1]:
            raise ValueError(f"n_context must lie between 1 and the {frames.shape[1]} frames given, got {n_context}.")
        q = self.encode(frames[:, :n], times[:, :n], observed[:, :n])
        tau = self._since_t0(times[:, :n], observed[:, :n], times, len(frames))
        z0 = q.rsample() if noise is None else q.mean + q.stddev * noise
        mean = self._frames_at(z0, torch.where(observed, tau, 0))
        if self.likelihood == "bernoulli":
            nats = nn.functional.binary_cross_entropy(mean, frames, reduction="none")
        else:
            nats = -Normal(mean, GAUSSIAN_SCALE).log_prob(frames)
        reconstruction = (nats.sum((2, 3, 4)) * observed).sum(1).mean()
        kl = kl_divergence(q, Normal(0.0, 1.0)).sum(1).mean()
        return {"loss": reconstruction + self.kl_weight * kl, "reconstruction": reconstruction, "kl": kl}

    def _check(self, frames: Tensor, t: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return check_video(frames, t, mask, self.frame, self.channels, next(self.parameters()).dtype)

    def _frames_at(self, z0: Tensor, tau: Tensor) -> Tensor:
        s0, content = self.split(z0)
        return self._paint(
            self.solve(s0, tau.to(z0.dtype)), content[:, None]
        )  # the content is drawn once, not at every time

    def _paint(self, state: Tensor, content: Tensor) -> Tensor:
        return SMALLEST + (1 - 2 * SMALLEST) * self.decoder(state, content)

    def _since_t0(self, t: Tensor, mask: Tensor | None, t_query: Tensor, batch: int) -> Tensor:
        t = t.expand(batch, t.shape[-1])
        observed = torch.ones_like(t, dtype=torch.bool) if mask is None else mask
        if self.t0 == "first":
            t0 = torch.where(observed, t, torch.inf).amin(1, keepdim=True)
        else:
            t0 = torch.where(observed, t, -torch.inf).amax(1, keepdim=True)
        return t_query.expand(batch, t_query.shape[-1]) - t0


def check_video(
    frames: Tensor, t: Tensor, mask: Tensor | None, frame: tuple[int, int], channels: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Times since each video's last one (0 where masked) and mask, [B, T], if all is as ``encode`` wants it.

    Raises:
        ValueError: what was expected and what was given.
    """
    wanted = (channels, *frame)
    if frames.ndim != 5 or tuple(frames.shape[2:]) != wanted:
        raise ValueError(f"frames must be [B, T, {', '.join(map(str, wanted))}], got {list(frames.shape)}.")
    batch, length = frames.shape[:2]
    if not batch or not length:
        raise ValueError(f"frames must hold at least one video and one observed frame, got {list(frames.shape)}.")
    low, high = frames.aminmax()
    if not frames.is_floating_point() or not (low >= 0 and high <= 1):
        raise ValueError(f"frames must be floats in [0, 1], got {frames.dtype} from {low:.4g} to {high:.4g}.")
    if frames.dtype != dtype:
        raise ValueError(f"frames must be {dtype}, as the model's weights are, got {frames.dtype}.")
    if t.shape not in ((length,), (batch, length)) or not t.is_floating_point():
        raise ValueError(f"t must be floats, [{length}] or [{batch}, {length}], got {t.dtype} {list(t.shape)}.")
    t = t.expand(batch, length)
    mask = torch.ones_like(t, dtype=torch.bool) if mask is None else mask
    if mask.shape != (batch, length) or mask.dtype != torch.bool:
        raise ValueError(f"mask must be booleans [{batch}, {length}], got {mask.dtype} {list(mask.shape)}.")
    if not mask.any(1).all():
        raise ValueError(
            f"Every video needs at least one observed frame; video {int(mask.any(1).int().argmin())} has none."
        )
    latest = torch.where(mask, t, -torch.inf).cummax(1).values  # of the observed times so far
    wrong = mask & ~torch.isfinite(t)
    wrong[:, 1:] |= mask[:, 1:] & ~(t[:, 1:] > latest[:, :-1])
    if wrong.any():
        video = int(wrong.any(1).int().argmax())
        raise ValueError(
            f"Observed times must be finite and increase strictly; video {video} has {t[video][mask[video]].tolist()}."
        )
    # Since the last observation, in the precision of t: as float32, seconds since 1970 would lose their minutes.
    return torch.where(mask, t - latest[:, -1:], 0).to(dtype), mask
