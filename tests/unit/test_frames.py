"""Frames from features: decoders before they are trained, and the search for an image."""

import pytest
import torch

from predoc_lib.frames import LastFrameDecoder, PlainDecoder, optimize, total_variation

SHAPES = [(5, 2, 3), (4, 4, 6)]


def problem():
    torch.manual_seed(0)
    frames = torch.rand(2, 2, 3, 32, 48)
    last, wanted = ([torch.randn(2, *shape) for shape in SHAPES] for _ in range(2))
    return frames, last, wanted


def test_an_untrained_decoder_gives_the_last_frame():
    frames, last, wanted = problem()
    torch.testing.assert_close(LastFrameDecoder(SHAPES)(frames, last, wanted), frames[:, 1], atol=1e-5, rtol=0)


def test_what_is_moved_and_painted_makes_the_frame():
    frames, last, wanted = problem()
    decoder = LastFrameDecoder(SHAPES)
    decoder.leave.bias.data[:] = torch.tensor([0.5, 0.0, 50.0, 0.3, 0.0, 0.0])  # 2 pixels to the left, all painted
    made = decoder(frames, last, wanted)
    moved = torch.cat([frames[:, 1, :, :, 2:], frames[:, 1, :, :, -1:].expand(-1, -1, -1, 2)], -1)
    painted = torch.tensor([0.3, 0.0, 0.0]).tanh()[:, None, None]
    torch.testing.assert_close(made, moved + painted, atol=1e-5, rtol=0)


def test_a_plain_decoder_gives_frames_eight_times_as_fine_as_the_finest_features():
    made = PlainDecoder(SHAPES)(problem()[2])
    assert made.shape == (2, 3, 32, 48)
    assert made.min() > 0
    assert made.max() < 1


@pytest.mark.parametrize("kind", [PlainDecoder, LastFrameDecoder])
def test_every_parameter_learns(kind):
    frames, last, wanted = problem()
    decoder = kind(SHAPES)
    for p in decoder.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    made = decoder(wanted) if kind is PlainDecoder else decoder(frames, last, wanted)
    made.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in decoder.parameters())


def test_total_variation_is_that_of_a_ramp():
    ramp = torch.arange(5.0).expand(1, 3, 4, 5)
    assert total_variation(ramp).item() == pytest.approx(1)


def test_the_search_finds_the_image_where_features_tell_it_all():
    torch.manual_seed(0)
    wanted = torch.rand(2, 3, 4, 4)
    found, astray = optimize(
        lambda x: (x - wanted).square().mean((1, 2, 3)), torch.full_like(wanted, 0.5), steps=200, prior=0.0
    )
    assert not astray
    assert (found - wanted).abs().max() < 0.01


def test_a_search_that_goes_astray_gives_the_best_and_says_so():
    start, calls = torch.full((1, 3, 2, 2), 0.5), []

    def worse(x):
        calls.append(x)
        return x.mean((1, 2, 3)) * 0 + len(calls)

    found, astray = optimize(worse, start, steps=5, prior=0.0)
    assert astray
    assert torch.equal(found, start)

    def breaks(x):
        calls.append(x)
        return x.mean((1, 2, 3)) / (0.0 if len(calls) > 10 else 1.0) - (0.0 if len(calls) <= 10 else float("inf"))

    found, astray = optimize(breaks, start, steps=50, prior=0.0)
    assert astray
    assert found.isfinite().all()
