"""Moving digits: where they are at any real time, and what is drawn there."""

import numpy as np
import pytest
import sklearn.datasets
import torch
from hypothesis import given
from hypothesis import strategies as st

from predoc_lib.data import DataError, MovingDigits, catalog, moving_digits
from predoc_lib.data.digits import SPLITS, digit_images, reflect
from predoc_lib.flow_warp import warp
from predoc_lib.metrics import centroid

TIMES = torch.tensor([-31.7, -5.0, -0.25, 0.0, 0.5, 1.0, 7.3, 19.0, 64.9])


def walk(start, velocity, t, length):
    """A point that walks from wall to wall, bounce by bounce."""
    x, v = start, velocity if t >= 0 else -velocity
    left = abs(t)
    while left > 0 and v != 0:
        to_wall = ((length - x) if v > 0 else x) / abs(v)
        x, left = (x + v * left, 0) if left <= to_wall else (length if v > 0 else 0.0, left - to_wall)
        v = -v if left else v
    return x


def flat(value, side=4):
    return torch.full((side, side), value)


@given(
    length=st.floats(0.5, 100),
    fraction=st.floats(0, 1),
    speed=st.floats(-1, 1),
    t=st.floats(-60, 60),
)
def test_reflect_is_where_a_walk_between_two_walls_ends(length, fraction, speed, t):
    start, velocity = fraction * length, speed * length
    x = reflect(torch.tensor(start + velocity * t, dtype=torch.float64), length).item()
    assert x == pytest.approx(walk(start, velocity, t, length), abs=1e-9 * length)
    triangle = length / np.pi * np.arccos(np.cos(np.pi * (start + velocity * t) / length))
    assert x == pytest.approx(triangle, abs=1e-5 * length)


@pytest.mark.parametrize("n_digits", [1, 2])
def test_positions_are_those_of_a_walk_at_fractional_and_negative_times(n_digits):
    videos = moving_digits(5, n_digits=n_digits, canvas=64, seed=3)
    position = videos.position(TIMES)
    assert position.shape == (5, len(TIMES), n_digits, 2)
    for index in np.ndindex(*position.shape):
        b, i, k, axis = index
        expected = walk(videos.start[b, k, axis].item(), videos.velocity[b, k, axis].item(), TIMES[i].item(), 36)
        assert position[index].item() == pytest.approx(expected, abs=1e-3)


def test_each_video_may_have_its_own_times():
    videos, t = moving_digits(3, canvas=32), torch.rand(3, 4) * 20
    for b in range(3):
        assert torch.equal(videos.frames(t)[b], videos[b : b + 1].frames(t[b])[0])


@pytest.mark.parametrize(("canvas", "side", "speed"), [(64, 28, 3.6), (32, 14, 1.8)])
def test_the_recipe_is_moving_mnists(canvas, side, speed):
    videos = moving_digits(2000, canvas=canvas)
    assert videos.images.shape == (2000, 1, side, side)
    torch.testing.assert_close(videos.velocity.norm(dim=-1), torch.full((2000, 1), speed))
    assert 0 <= videos.start.min() < videos.start.max() <= canvas - side
    # Every direction and place is as likely as every other: means within 4 standard errors.
    assert (videos.velocity.mean(0).abs() < 4 * speed / 2**0.5 / 2000**0.5).all()
    free = canvas - side
    assert ((videos.start.mean(0) - free / 2).abs() < 4 * free / 12**0.5 / 2000**0.5).all()


def test_frames_show_the_digit_at_its_position_with_sub_pixel_precision():
    videos = moving_digits(4, canvas=64)
    seen = centroid(videos.frames(TIMES)[:, :, :, :, :])
    own = centroid(videos.images)  # [B, 2], K = 1 taken for the channel
    torch.testing.assert_close(seen, videos.position(TIMES)[:, :, 0] + own[:, None], atol=2e-3, rtol=0)


def test_frames_lie_between_zero_and_one():
    frames = moving_digits(100, n_digits=2, canvas=32).frames(TIMES)
    assert frames.shape == (100, len(TIMES), 1, 32, 32)
    assert frames.dtype == torch.float32
    assert frames.min() == 0
    assert 0.9 < frames.max() <= 1


def test_where_digits_overlap_the_brighter_one_shows():
    videos = MovingDigits(
        torch.stack([flat(0.3), flat(0.8)])[None], torch.zeros(1, 2, dtype=torch.int64),
        torch.tensor([[[0.0, 0.0], [2.0, 2.0]]]), torch.zeros(1, 2, 2), 16,
    )  # fmt: skip
    expected = torch.zeros(16, 16)
    expected[:4, :4], expected[2:6, 2:6] = 0.3, 0.8
    assert torch.equal(videos.frames(torch.zeros(1))[0, 0, 0], expected)


def test_chosen_videos_are_the_same_videos():
    videos, t = moving_digits(6, n_digits=2, canvas=32), torch.arange(3.0)
    for index in (slice(1, 4), torch.tensor([5, 0, 0]), torch.arange(6) % 2 == 1):
        assert torch.equal(videos[index].frames(t), videos.frames(t)[index])
        assert torch.equal(videos[index].labels, videos.labels[index])
        assert len(videos[index]) == len(videos.labels[index])


def test_the_same_seed_gives_the_same_videos_and_another_seed_others():
    t = torch.arange(2.0)
    first = moving_digits(3, seed=(1, 2)).frames(t)
    torch.rand(3), np.random.rand(3)  # nothing else matters
    assert torch.equal(first, moving_digits(3, seed=(1, 2)).frames(t))
    for seed in (0, 1, (2, 1), (1, 3)):
        assert not torch.equal(first, moving_digits(3, seed=seed).frames(t))


def test_making_videos_leaves_the_global_random_numbers_alone():
    state = torch.get_rng_state()
    moving_digits(3).frames(torch.arange(2.0))
    assert torch.equal(state, torch.get_rng_state())


def splits_of(dataset, size):
    return {split: digit_images(dataset, split, size) for split in SPLITS}


def as_set(images):
    return {image.numpy().tobytes() for image in images}


def test_no_embedded_digit_is_in_two_splits_and_each_has_its_own_label():
    original, labels = sklearn.datasets.load_digits(return_X_y=True)
    label = {image.astype("int64").tobytes(): y for image, y in zip(original, labels, strict=True)}
    splits = splits_of("digits", 8)  # at their own size, images are not resized
    sets = {split: as_set((images * 16).long().flatten(1)) for split, (images, _) in splits.items()}
    assert len(set().union(*sets.values())) == sum(len(y) for _, y in splits.values()) == 1797
    assert [len(splits[split][1]) for split in SPLITS] == [1257, 180, 360]
    for images, found in splits.values():
        for image, y in zip((images * 16).long().flatten(1), found, strict=True):
            assert label[image.numpy().tobytes()] == y
        assert len(found.unique()) == 10


def test_videos_show_digits_of_their_split_with_their_labels():
    for split in SPLITS:
        images, labels = digit_images("digits", split, 14)
        label = {image.numpy().tobytes(): int(y) for image, y in zip(images, labels, strict=True)}
        videos = moving_digits(20, n_digits=2, canvas=32, split=split)
        for image, y in zip(videos.images.flatten(0, 1), videos.labels.flatten(), strict=True):
            assert label[image.numpy().tobytes()] == y


@pytest.mark.data
def test_no_mnist_digit_is_in_two_splits():
    try:
        splits = splits_of("mnist", 28)
    except DataError as error:
        pytest.skip(str(error))
    assert [len(splits[split][1]) for split in SPLITS] == [55_000, 5_000, 10_000]
    sets = {split: as_set(images) for split, (images, _) in splits.items()}
    assert len(set().union(*sets.values())) == sum(map(len, sets.values()))
    digit_images.cache_clear()  # 220 MB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, r"at least 1 video and 1 digit, got n=0"),
        ({"n": -3}, r"at least 1 video and 1 digit, got n=-3"),
        ({"n_digits": 0}, r"got n=2 and n_digits=0"),
        ({"canvas": 24}, r"canvas must be a positive multiple of 16 pixels, got 24"),
        ({"canvas": 0}, r"canvas must be .*, got 0"),
        ({"split": "tests"}, r"Unknown split 'tests'\. Did you mean 'test'\? Valid: train, validation, test\."),
        ({"dataset": "minst"}, r"'minst'\. Did you mean 'mnist'\? Valid: digits, mnist"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        moving_digits(**{"n": 2, **options})


def test_absent_data_is_refused_with_what_to_do(tmp_path, monkeypatch):
    digit_images.cache_clear()
    monkeypatch.setenv("PREDOC_DATA", str(tmp_path))
    with pytest.raises(catalog.DataError, match=r"`predoc data mnist`.*'digits'"):
        moving_digits(2, dataset="mnist")


def test_a_flow_fetches_the_earlier_frame_where_digits_are():
    videos = moving_digits(6, n_digits=2, canvas=64, seed=1)
    flow, solid = videos.flow(2.0, 3.0)
    earlier, later = videos.frames(torch.tensor([2.0, 3.0])).unbind(1)
    off = (warp(earlier, flow) - later).abs()[:, 0]
    still = (earlier - later).abs()[:, 0]
    single = solid & (videos._drawn(torch.tensor([2.0, 3.0])) > 0.05).sum(2).amax(1).lt(2)  # of one digit, both times
    assert off[single].mean() < 0.1 * still[single].mean()
    assert (flow[~solid[:, None].expand_as(flow)] == 0).all()
    back, _ = videos.flow(3.0, 3.0)
    assert (back == 0).all()


def test_a_digits_flow_is_the_way_of_its_corner():
    videos = moving_digits(1, canvas=32, seed=0)
    flow, solid = videos.flow(0.0, 0.5)
    y, x = (videos.position(torch.tensor([0.0])) - videos.position(torch.tensor([0.5])))[0, 0, 0]
    assert solid.any()
    torch.testing.assert_close(flow[0, 0][solid[0]], x.expand(int(solid.sum())))
    torch.testing.assert_close(flow[0, 1][solid[0]], y.expand(int(solid.sum())))
