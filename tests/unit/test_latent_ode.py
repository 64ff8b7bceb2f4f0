"""The latent ODE against its equations, and what it says to bad input."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Normal

from predoc_lib.data import moving_digits
from predoc_lib.latent_ode import LatentODE, RotationField
from predoc_lib.ode import NeuralODE
from predoc_lib.video_nets import ObjectEncoder, ObjectPainter

H, W = FRAME = (8, 12)
T = 5
TIMES = torch.arange(T, dtype=torch.float64)
QUERY = torch.tensor([-2.5, 0.0, 0.75, 3.0, 6.5], dtype=torch.float64)
TIGHT = {"method": "dopri5", "rtol": 1e-11, "atol": 1e-11}
VARIANTS = {
    "objects": {"objects": 2},
    "plain": {"layout": "plain", "field": "free"},
    "gaussian": {"likelihood": "gaussian", "field": "free"},
    "colour": {"channels": 3, "objects": 2},
    "from the first": {"objects": 2, "t0": "first"},
    "plain colour": {"channels": 3, "layout": "plain", "likelihood": "gaussian"},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def small(channels=1, **options):
    """A small model in double precision whose weights are all away from zero."""
    model = LatentODE(FRAME, channels, **{"state": 6, "content": 5, "width": 16, **options}).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def build(variant, **options):
    return small(**VARIANTS[variant], **options)


def video(model, batch=3, length=T):
    return torch.rand(batch, length, model.channels, H, W, dtype=torch.float64)


def start(model, n=T):
    """t_0 of the first n of TIMES."""
    return TIMES[0 if model.t0 == "first" else n - 1]


def close(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, atol=tol, rtol=0)


# ---------------------------------------------------------------- the parts of eq. 4.4


@variants
@pytest.mark.parametrize("n_context", [None, 3])
def test_the_loss_is_what_torch_distributions_and_the_closed_form_say(variant, n_context):
    """z_0 is the latent at the last time of the context, and all frames are scored."""
    model, n = build(variant, kl_weight=2.5), n_context or T
    frames = video(model).round()  # of zeros and ones: torch's Bernoulli scores nothing else
    torch.manual_seed(1)
    found = model.negative_elbo(frames, TIMES, n_context)

    torch.manual_seed(1)
    q = model.encode(frames[:, :n], TIMES[:n])
    mean = model.decode(model.trajectory(q.rsample(), TIMES - start(model, n)))
    p = Bernoulli(mean) if model.likelihood == "bernoulli" else Normal(mean, 0.1)
    nats = sum(-p.log_prob(frames)[b].sum() for b in range(3)) / 3
    variance = q.stddev**2
    kl = sum((0.5 * (q.mean**2 + variance - 1 - variance.log()))[b].sum() for b in range(3)) / 3

    close(found["reconstruction"], nats, 1e-8)
    close(found["kl"], kl)
    close(found["loss"], nats + 2.5 * kl, 1e-8)


def test_grey_pixels_cost_their_cross_entropy():
    model = small()
    frames = video(model)
    torch.manual_seed(1)
    found = model.negative_elbo(frames, TIMES)["reconstruction"]
    torch.manual_seed(1)
    z0 = model.encode(frames, TIMES).rsample()
    mean = model.decode(model.trajectory(z0, TIMES - TIMES[-1]))
    close(found, -(frames * mean.log() + (1 - frames) * (1 - mean).log()).sum() / 3, 1e-8)


def test_a_kl_weight_of_zero_leaves_the_reconstruction():
    model = small(kl_weight=0.0)
    found = model.negative_elbo(video(model), TIMES)
    assert found["loss"] == found["reconstruction"]
    assert found["kl"] > 0


@variants
def test_every_parameter_gets_a_finite_gradient(variant):
    model = build(variant)
    model.negative_elbo(video(model), TIMES, n_context=3)["loss"].backward()
    needless = {"to_weight.bias"}  # a softmax takes it away again: what is left is rounding, or nothing
    if model.sizes[0] == 1:  # one object takes all the ink, wherever it is looked for
        needless |= {"anchors", "log_sharpness", "move.weight", "move.bias"}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        most = p.grad.abs().max()
        assert most < 1e-12 if name.removeprefix("encoder.") in needless else most > 1e-9, (name, most)


@variants
def test_the_posterior_has_the_mean_and_the_variance_of_the_encoder(variant):
    model = build(variant)
    frames = video(model)
    q = model.encode(frames, TIMES)
    read, t = (frames.flip(1), -TIMES.flip(0)) if model.t0 == "first" else (frames, TIMES)
    mean, log_variance = model.encoder(read, t.expand(3, -1), torch.ones(3, T, dtype=torch.bool))
    close(q.mean, mean.flatten(1))
    close(q.variance.log(), log_variance.flatten(1))


# ---------------------------------------------------------------- what the encoder sees


@variants
def test_frames_after_the_context_are_scored_but_not_seen(variant):
    model, other = build(variant), 3
    frames = video(model)
    changed, later = frames.clone(), TIMES.clone()
    changed[:, other:], later[other:] = torch.rand_like(frames[:, other:]), later[other:] + 0.5

    def elbo(frames, t, n):
        torch.manual_seed(1)
        return model.negative_elbo(frames, t, n_context=n)

    before, after = elbo(frames, TIMES, other), elbo(changed, later, other)
    assert before["kl"] == after["kl"]
    assert before["reconstruction"] != after["reconstruction"]
    assert elbo(frames, TIMES, None)["kl"] != elbo(changed, TIMES, None)["kl"]  # None: all are seen


@variants
def test_the_encoder_sees_every_context_frame_and_every_gap(variant):
    model = build(variant)
    frames = video(model)
    mean = model.encode(frames, TIMES).mean
    for i in range(T):
        changed = frames.clone()
        changed[:, i] = torch.rand_like(changed[:, i])
        assert (model.encode(changed, TIMES).mean - mean).abs().max() > 1e-6
    for i in range(1, T):
        t = TIMES.clone()
        t[i] += 0.3
        assert (model.encode(frames, t).mean - mean).abs().max() > 1e-6


@variants
def test_shifting_all_times_changes_nothing(variant):
    model = build(variant)
    frames = video(model)
    shift = 64.0
    close(model.predict(frames, TIMES + shift, QUERY + shift), model.predict(frames, TIMES, QUERY), 0)
    torch.manual_seed(1)
    loss = model.negative_elbo(frames, TIMES)["loss"]
    torch.manual_seed(1)
    close(model.negative_elbo(frames, TIMES - shift)["loss"], loss, 0)


def padded(frames, t, where, padding_time):
    """The same videos with frames that were not observed put in, and their mask."""
    keep = torch.ones(len(frames), len(where), dtype=torch.bool)
    keep[:, [i for i, w in enumerate(where) if w == "x"]] = False
    more = torch.rand(len(frames), len(where), *frames.shape[2:], dtype=frames.dtype)
    times = torch.full((len(frames), len(where)), padding_time, dtype=frames.dtype)
    more[keep], times[keep] = frames.flatten(0, 1), t.expand(len(frames), -1).flatten()
    return more, times, keep


@variants
@pytest.mark.parametrize(
    ("where", "padding_time"),
    [("oooooxx", 0.0), ("oooooxx", math.nan), ("xooooo", 40.25), ("oxoooxo", -7.5), ("oxoooxo", math.nan)],
)
def test_frames_that_were_not_observed_change_nothing(variant, where, padding_time):
    model, t = build(variant), TIMES + 10
    frames = video(model, 2)
    q, predicted = model.encode(frames, t), model.predict(frames, t, QUERY)
    torch.manual_seed(1)
    elbo = model.negative_elbo(frames, t)
    evaluations = model.stats["evaluations"]
    gradient = torch.autograd.grad(elbo["loss"], list(model.parameters()))

    more, t, mask = padded(frames, t, where, padding_time)
    found = model.encode(more, t, mask)
    close(found.mean, q.mean)
    close(found.stddev, q.stddev)
    close(model.predict(more, t, QUERY, mask), predicted)
    torch.manual_seed(1)
    found = model.negative_elbo(more, t, mask=mask)
    for key in elbo:
        close(found[key], elbo[key], 1e-8)
    assert model.stats["evaluations"] == evaluations  # nor is the ODE solved up to where nothing is scored
    for a, b in zip(torch.autograd.grad(found["loss"], list(model.parameters())), gradient, strict=True):
        close(a, b, 1e-6)


def test_a_context_may_lack_frames_that_are_scored_later():
    """The mask counts within the context too: z_0 is the latent at the last frame of it that was observed."""
    model = small()
    frames, mask = video(model), torch.tensor([[True, True, False, False, True]]).expand(3, -1)
    torch.manual_seed(1)
    found = model.negative_elbo(frames, TIMES, n_context=3, mask=mask)
    torch.manual_seed(1)
    keep = [0, 1, 4]
    expected = model.negative_elbo(frames[:, keep], TIMES[keep], n_context=2)
    for key in found:
        close(found[key], expected[key], 1e-8)


# ---------------------------------------------------------------- batches with their own times


@variants
def test_a_batch_gives_the_same_as_its_videos_one_by_one(variant):
    model = build(variant, **TIGHT)
    frames, lengths = video(model, 3), [5, 3, 4]
    t = (torch.rand(3, T, dtype=torch.float64) + 0.1).cumsum(1) + torch.tensor([[0.0], [10.0], [-3.0]])
    query = torch.rand(3, 4, dtype=torch.float64) * 10 - 3 + t[:, :1]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    together = model.predict(frames, t, query, mask)
    q = model.encode(frames, t, mask)
    for b, n in enumerate(lengths):
        alone = frames[b : b + 1, :n], t[b, :n]
        close(model.encode(*alone).mean[0], q.mean[b])
        close(model.predict(*alone, query[b])[0], together[b], 1e-7)


def test_the_loss_of_a_batch_is_the_mean_of_its_videos():
    model = small(**TIGHT)
    frames, t = video(model), (torch.rand(3, T, dtype=torch.float64) + 0.1).cumsum(1)
    noise = torch.randn(3, model.encode(frames, t).mean.shape[1], dtype=torch.float64)

    def elbo(b):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Normal, "rsample", lambda self: self.mean + self.stddev * noise[b])
            return model.negative_elbo(frames[b], t[b], n_context=3)

    together, alone = elbo([0, 1, 2]), [elbo([b]) for b in range(3)]
    for key in together:
        close(together[key], torch.stack([x[key] for x in alone]).mean(), 1e-6)


def test_gradients_are_the_same_with_clocks_for_all_and_for_each():
    model, gradients = small(**TIGHT), []
    s0, tau = torch.randn(2, 1, 6, dtype=torch.float64), torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    together = model.solve(s0, tau)
    alone = torch.cat([model.solve(s0[b : b + 1], tau[b : b + 1]) for b in range(2)])
    for states in (together, alone):
        gradients.append(torch.autograd.grad(states.square().sum(), list(model.ode.f.parameters())))
    for a, b in zip(*gradients, strict=True):
        close(a, b, 1e-6)


def test_clocks_for_each_cost_as_many_solves_as_times_and_no_step_is_longer_than_asked():
    model = small(method="rk4", step_size=0.5)
    s0, tau = torch.randn(50, 1, 6, dtype=torch.float64), (torch.rand(50, 4, dtype=torch.float64) + 0.1).cumsum(1)
    model.solve(s0, tau)
    longest = tau.diff(dim=1, prepend=torch.zeros(50, 1)).amax(0)
    assert model.stats["evaluations"] == 4 * (longest / 0.5).ceil().sum()


def test_times_for_all_videos_and_for_each_mean_the_same():
    model = small(objects=2)
    frames, expanded = video(model), TIMES.expand(3, -1)
    close(model.predict(frames, expanded, QUERY.expand(3, -1)), model.predict(frames, TIMES, QUERY), 0)
    close(model.encode(frames, TIMES, torch.ones(3, T, dtype=torch.bool)).mean, model.encode(frames, TIMES).mean, 0)


# ---------------------------------------------------------------- the trajectory, eq. 4.2


class LinearField(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.matrix = 0.3 * torch.randn(size, size, dtype=torch.float64)

    def forward(self, t, s):
        return s @ self.matrix.T


@pytest.mark.parametrize("options", [TIGHT, {"method": "rk4", "step_size": 0.01}])
def test_a_linear_field_moves_the_states_by_the_matrix_exponential_and_leaves_the_contents(options):
    model = small(objects=2, **options)
    model.ode.f = field = LinearField(6)
    z0 = torch.randn(3, 22, dtype=torch.float64)
    tau = torch.tensor([[-1.0, 0.0, 2.0], [0.5, 0.25, -0.75], [2.0, 2.0, 1.0]], dtype=torch.float64)
    z = model.trajectory(z0, tau)
    for b in range(3):
        for i in range(3):
            moved = torch.matrix_exp(field.matrix * tau[b, i])
            for k in range(2):  # each object: its state of 6 numbers, then its content of 5
                state, content = z0[b].view(2, 11)[k].split([6, 5])
                close(z[b, i].view(2, 11)[k], torch.cat([moved @ state, content]), 1e-8)


def test_the_rotation_field_turns_every_plane_at_a_speed_that_it_keeps():
    field = RotationField(6, 16).double()
    s0 = torch.randn(4, 6, dtype=torch.float64)
    times = torch.tensor([0.0, 1.0, 30.0], dtype=torch.float64)
    s = NeuralODE(field, method="dopri5", rtol=1e-11, atol=1e-11)(s0, times)
    z0 = torch.complex(*s0.chunk(2, -1))
    omega = field.omega(z0.abs() ** 2)
    for x, t in zip(s, times, strict=True):
        z = z0 * torch.exp(1j * omega * t)
        close(x, torch.cat([z.real, z.imag], -1), 1e-7)


@variants
def test_prediction_is_the_decoded_trajectory_of_the_mean(variant):
    model = build(variant)
    frames = video(model)
    predicted = model.predict(frames, TIMES + 2, QUERY + 2)
    close(predicted, model.decode(model.trajectory(model.encode(frames, TIMES + 2).mean, QUERY - start(model))))
    assert predicted.shape == (3, len(QUERY), model.channels, H, W)
    assert 0 < predicted.min() < predicted.max() < 1


def test_every_latent_is_decoded_for_itself():
    model = small(objects=2)
    z = torch.randn(2, 3, 22, dtype=torch.float64)
    together = model.decode(z)
    assert together.shape == (2, 3, 1, H, W)
    close(together[1, 2], model.decode(z[1, 2]))
    close(together[1], model.decode(z[1]))


@variants
def test_times_may_be_asked_for_in_any_order_and_again(variant):
    model = build(variant)
    frames, order = video(model), [3, 0, 4, 4, 1, 2, 0]
    close(model.predict(frames, TIMES, QUERY[order]), model.predict(frames, TIMES, QUERY)[:, order], 1e-12)


def test_other_times_asked_for_beside_change_nothing_beyond_the_tolerance():
    model = small(**TIGHT)
    frames = video(model)
    alone = torch.cat([model.predict(frames, TIMES, QUERY[i : i + 1]) for i in range(len(QUERY))], 1)
    close(alone, model.predict(frames, TIMES, QUERY), 1e-8)


def test_at_the_last_observed_time_the_latent_is_exact():
    model = small()
    z0 = torch.randn(3, 11, dtype=torch.float64)
    close(model.trajectory(z0, torch.tensor([3.0, 0.0, -1.0], dtype=torch.float64))[:, 1], z0, 0)
    model.trajectory(z0, torch.zeros(1, dtype=torch.float64))
    assert model.stats["evaluations"] == 0


@pytest.mark.parametrize("field", ["rotation", "free"])
def test_there_and_back_is_where_it_started(field):
    model = small(field=field, **TIGHT)
    z0 = torch.randn(3, 11, dtype=torch.float64)
    for away in (5.0, -5.0):
        there = model.trajectory(z0, torch.tensor([away], dtype=torch.float64))[:, 0]
        assert (there - z0).abs().max() > 1e-3
        close(model.trajectory(there, torch.tensor([-away], dtype=torch.float64))[:, 0], z0, 1e-7)


def test_the_adjoint_gives_the_same_loss_and_gradients():
    found = []
    for adjoint in (False, True):
        torch.manual_seed(2)
        model = small(adjoint=adjoint, **TIGHT)
        loss = model.negative_elbo(video(model), TIMES, n_context=3)["loss"]
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for direct, adjoint in zip(*found, strict=True):
        close(direct, adjoint, 1e-5)


def test_from_the_first_frame_is_the_mirror_image_in_time_of_from_the_last():
    mirrored, model = small(objects=2, t0="first"), small(objects=2)
    model.load_state_dict(mirrored.state_dict())
    frames, t = video(model), torch.tensor([0.0, 0.5, 2.0, 2.25, 7.0], dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [False] + [True] * 4, [True] * 3 + [False] * 2])
    q, r = mirrored.encode(frames, t, mask), model.encode(frames.flip(1), -t.flip(0), mask.flip(1))
    close(q.mean, r.mean)
    close(q.stddev, r.stddev)
    first = torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64)[:, None]
    later = mirrored.predict(frames, t, QUERY, mask)
    close(later, mirrored.decode(mirrored.trajectory(q.mean, QUERY - first)))


def test_evaluations_are_those_of_the_last_solve_in_both_directions():
    model = small(step_size=1.0)
    model.predict(video(model), TIMES, TIMES[-1] + torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64))
    assert model.stats["evaluations"] == 4 * (2 + 3)


# ---------------------------------------------------------------- finding and drawing objects


def ink(*centres):
    """Logarithm of the brightness of narrow blobs at (y, x) on the encoder's grid, and the grid."""
    cells = ObjectEncoder((16, 16), 1, 1, 4, 1, 16).cells
    bright = sum((-(cells - torch.tensor(c)).square().sum(-1) / 0.08).exp() for c in centres)
    return 2 * (bright + 1e-3).log()[None]


@pytest.mark.parametrize("centre", [(0.0, 0.0), (0.3, -0.4), (-0.5, 0.5)])
def test_k_means_finds_the_centre_of_a_blob(centre):
    encoder = ObjectEncoder((16, 16), 1, 1, 4, 1, 16)
    found = encoder.k_means(ink(centre), encoder.anchors[None])
    torch.testing.assert_close(found, torch.tensor([[centre]]), atol=0.03, rtol=0)


@pytest.mark.parametrize("centres", [((-0.5, -0.5), (0.5, 0.5)), ((0.5, -0.4), (0.5, 0.4)), ((-0.6, 0.1), (0.3, -0.2))])
def test_k_means_separates_two_blobs(centres):
    encoder = ObjectEncoder((16, 16), 1, 2, 4, 1, 16)
    found = encoder.anchors[None]
    for _ in range(3):  # as over three frames
        found = encoder.k_means(ink(*centres), found)
    both = torch.tensor(centres)
    distance = torch.cdist(found[0], both)
    assert distance.min(1).values.max() < 0.05
    assert sorted(distance.argmin(1).tolist()) == [0, 1]


def test_the_position_that_is_found_is_the_position_that_is_drawn():
    """On true frames, before any training: to about a pixel."""
    videos = moving_digits(32, canvas=32)
    frames = videos.frames(torch.arange(3.0))
    model = LatentODE((32, 32))
    nn.init.zeros_(model.encoder.to_state.weight), nn.init.zeros_(model.encoder.to_state.bias)
    state, _ = model.split(model.encode(frames, torch.arange(3.0)).mean)  # at the last time
    found = model.decoder.geometry.corner(model.decoder.position(state))[:, 0] + 1  # patches of 16, digits of 14
    assert (found - videos.position(torch.tensor([2.0]))[:, 0, 0]).norm(dim=-1).mean() < 1.5


def grey_patches(*positions):
    """A frame with patches of brightness 0.5, half the frame's size, drawn at these positions."""
    painter = ObjectPainter((16, 24), 1, 4, 1, 16)
    with torch.no_grad():
        for layer in (painter.draw[-1], painter.draw_linear):
            layer.weight.zero_(), layer.bias.zero_()
        state = torch.tensor([[[[*p, 0.0, 0.0] for p in positions]]])
        return painter(state, torch.zeros(1, 1, len(positions), 1))[0, 0, 0]


@pytest.mark.parametrize("p", [(0.0, 0.0), (0.25, -0.3), (-0.4, 0.1)])
def test_a_patch_is_drawn_with_its_centre_at_its_position(p):
    frame = grey_patches(p)
    y, x = ((frame.sum(1 - axis) * torch.arange(n)).sum() / frame.sum() for axis, n in enumerate(frame.shape))
    assert frame.sum().item() == pytest.approx(0.5 * 8 * 12, rel=1e-5)
    # -1 and 1 are the outer edges of the outermost pixels, whose centres are 0 and size - 1.
    assert y.item() == pytest.approx((p[0] + 1) * 8 - 0.5, abs=1e-4)
    assert x.item() == pytest.approx((p[1] + 1) * 12 - 0.5, abs=1e-4)


def test_where_patches_overlap_what_both_leave_dark_stays_dark():
    frame = grey_patches((0.0, 0.0), (0.5, 0.5))  # the second is 4 pixels lower and 6 further right
    expected = torch.zeros(16, 24)
    expected[4:12, 6:18], expected[8:16, 12:24] = 0.5, 0.5
    expected[8:12, 12:18] = 1 - 0.5 * 0.5
    torch.testing.assert_close(frame, expected)


# ---------------------------------------------------------------- bad input


def one_sentence(error):
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 300
    assert message.endswith(".")


FRAMES = torch.rand(2, T, 1, H, W)
T32 = torch.arange(float(T))
EVERY = torch.ones(2, T, dtype=torch.bool)
BAD_VIDEOS = {
    "no time axis": ({"frames": FRAMES[:, 0]}, r"must be \[B, T, 1, 8, 12\], got \[2, 1, 8, 12\]"),
    "transposed": ({"frames": FRAMES.mT}, r"must be \[B, T, 1, 8, 12\], got \[2, 5, 1, 12, 8\]"),
    "three channels": ({"frames": FRAMES.expand(-1, -1, 3, -1, -1)}, r"\[B, T, 1, 8, 12\], got \[2, 5, 3, 8, 12\]"),
    "no video": ({"frames": FRAMES[:0]}, r"at least one video .*, got \[0, 5, 1, 8, 12\]"),
    "no frame": ({"frames": FRAMES[:, :0], "t": T32[:0]}, r"at least one .* frame, got \[2, 0, 1, 8, 12\]"),
    "bytes": ({"frames": (FRAMES * 255).byte()}, r"in \[0, 1\], got torch\.uint8 from \d+ to \d+"),
    "too bright": ({"frames": FRAMES * 255}, r"in \[0, 1\], got torch\.float32 from .* to 2\d\d"),
    "negative": ({"frames": FRAMES - 0.5}, r"in \[0, 1\], got torch\.float32 from -0\.\d+ to"),
    "nan": ({"frames": torch.full_like(FRAMES, math.nan)}, r"in \[0, 1\], got torch\.float32 from nan to nan"),
    "half precision": ({"frames": FRAMES.half()}, r"float32.*float16"),
    "double precision": ({"frames": FRAMES.double()}, r"float32.*float64"),
    "whole times": ({"t": T32.long()}, r"t must be floats, .*got torch\.int64 \[5\]"),
    "too few times": ({"t": T32[:4]}, r"\[5\] or \[2, 5\], got torch\.float32 \[4\]"),
    "times of other videos": ({"t": T32.expand(3, -1)}, r"\[5\] or \[2, 5\], got torch\.float32 \[3, 5\]"),
    "falling times": ({"t": T32.flip(0)}, r"increase strictly.*(3.*4|4.*3)"),
    "repeated time": ({"t": torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0])}, r"increase strictly.*1.*1"),
    "infinite time": ({"t": torch.tensor([0.0, 1.0, 2.0, 3.0, math.inf])}, r"finite.*inf"),
    "time that is nan": ({"t": torch.tensor([0.0, 1.0, math.nan, 3.0, 4.0])}, r"finite.*nan"),
    "mask of numbers": ({"mask": EVERY.float()}, r"mask must be booleans \[2, 5\], got torch\.float32 \[2, 5\]"),
    "mask of one video": ({"mask": EVERY[0]}, r"mask must be booleans \[2, 5\], got torch\.bool \[5\]"),
    "nothing observed": ({"mask": EVERY * torch.tensor([[True], [False]])}, r"at least one observed.*video 1"),
}


@pytest.mark.parametrize("method", ["encode", "predict", "negative_elbo"])
@pytest.mark.parametrize(("change", "message"), BAD_VIDEOS.values(), ids=BAD_VIDEOS)
@pytest.mark.usefixtures("as_shipped")
def test_a_bad_video_is_refused_in_one_sentence(method, change, message):
    model = LatentODE(FRAME, state=6, content=5, width=16)
    arguments = {"frames": FRAMES, "t": T32, **change}
    if method == "predict":
        arguments["t_query"] = T32
    with pytest.raises(ValueError, match=message) as error:
        getattr(model, method)(**arguments)
    one_sentence(error)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (torch.zeros(0), r"at least one .*time, .*got \[0\]"),
        (torch.zeros(2, 0), r"at least one .*time, .*got \[2, 0\]"),
        (torch.tensor(1.0), r"\[Tq\] or \[[B2], Tq\], got \[\]"),
        (torch.zeros(2, 1, 3), r"\[Tq\] or \[[B2], Tq\], got \[2, 1, 3\]"),
        (torch.zeros(3, 4), r"\[Tq\] or \[[B2], Tq\], got .*\[3, 4\]"),
        (torch.tensor([0.0, math.nan]), r"finite.*nan"),
        (torch.tensor([0.0, math.inf]), r"finite.*inf"),
    ],
    ids=["empty", "empty for each", "no axis", "three axes", "of other videos", "nan", "infinite"],
)
@pytest.mark.usefixtures("as_shipped")
def test_bad_query_times_are_refused_in_one_sentence(query, message):
    with pytest.raises(ValueError, match=message) as error:
        LatentODE(FRAME, state=6, content=5, width=16).predict(FRAMES, T32, query)
    one_sentence(error)


@pytest.mark.parametrize("n", [0, -1, 6])
def test_a_context_that_is_empty_or_too_long_is_refused(n):
    with pytest.raises(ValueError, match=rf"n_context must lie between 1 and the 5 frames given, got {n}") as error:
        LatentODE(FRAME, state=6, content=5, width=16).negative_elbo(FRAMES, T32, n_context=n)
    one_sentence(error)


@pytest.mark.parametrize("weight", [math.nan, 1e30])
def test_weights_that_ran_away_are_named(weight):
    model = LatentODE(FRAME, state=6, content=5, width=16)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(weight)
    with pytest.raises(FloatingPointError, match="weights are too large, or NaN") as error:
        model.negative_elbo(FRAMES, T32)
    one_sentence(error)


@pytest.mark.parametrize(
    ("dtype", "shift"), [(torch.float64, 0.0), (torch.float16, 0.0), (torch.float64, 2.0**31)], ids=str
)
@pytest.mark.usefixtures("as_shipped")
def test_times_of_another_precision_than_the_frames_serve_too(dtype, shift):
    """NumPy's times are float64, and may be seconds since 1970, whose differences float32 would lose."""
    model = LatentODE(FRAME, state=6, content=5, width=16)
    t = T32.to(dtype) + shift
    close(model.predict(FRAMES, t, t - 0.5), model.predict(FRAMES, T32, T32 - 0.5), 1e-6)
    torch.manual_seed(1)
    expected = model.negative_elbo(FRAMES, T32, n_context=3)["loss"]
    torch.manual_seed(1)
    close(model.negative_elbo(FRAMES, t, n_context=3)["loss"], expected, 1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "object"}, r"Unknown layout 'object'\. Did you mean 'objects'\? Valid: objects, plain\."),
        ({"t0": "frist"}, r"Unknown t0 'frist'\. Did you mean 'first'\?"),
        ({"field": "rotate"}, r"Unknown field 'rotate'\. Did you mean 'rotation'\?"),
        ({"likelihood": "gauss"}, r"Unknown likelihood 'gauss'\. Did you mean 'gaussian'\?"),
        ({"method": "rk5"}, r"Unknown ODE method 'rk5'\. Did you mean 'rk4'\?"),
        ({"objects": 0}, r"objects, content and channels must be at least 1.*, got 0, 32, 1, 128 and 1\.0"),
        ({"width": 4, "layout": "plain"}, r"width at least 16 .*, got 1, 32, 1, 4 and"),
        ({"kl_weight": -1.0}, r"kl_weight finite and at least 0, .* and -1\.0"),
        ({"kl_weight": float("nan")}, r"kl_weight finite .* and nan"),
        ({"state": 7}, r"state must be an even number of at least 4, got 7"),
        ({"state": 2}, r"state must be .*, got 2"),
        ({"frame": (8, 9)}, r"even sides of at least 8 pixels, got \(8, 9\)"),
        ({"frame": (6, 8)}, r"even sides of at least 8 pixels, got \(6, 8\)"),
        ({"frame": (36, 64), "layout": "plain"}, r"'plain'.* 8, got \(36, 64\)"),  # 36 / 8 is not whole
        ({"rtol": -1.0}, r"must be positive, got -1\.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LatentODE(**{"frame": FRAME, **options})


@pytest.mark.parametrize(
    ("layout", "frame"),
    [("objects", (8, 8)), ("objects", (10, 14)), ("objects", (36, 64)), ("plain", (10, 14)), ("plain", (64, 48))],
)
def test_frames_come_out_as_large_as_they_went_in(layout, frame):
    model = LatentODE(frame, layout=layout, width=16)
    assert model.predict(torch.rand(1, 2, 1, *frame), T32[:2], T32[:3]).shape == (1, 3, 1, *frame)
