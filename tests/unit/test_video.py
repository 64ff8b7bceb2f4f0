"""Videos from files and folders."""

import contextlib
import os

import av
import numpy as np
import pytest
import torch
from PIL import Image

from predoc_lib.data import catalog, read_video
from predoc_lib.files import FileError


def film(path, n=10, width=64):
    """n frames of 48 x width in H.264, each of one grey level, 20 higher than the one before."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
        container.start_encoding()
        for i in range(n):
            picture = np.full((48, width, 3), 20 * i + 20, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        if n:
            container.mux(stream.encode())
    return path


@pytest.fixture
def movie(tmp_path):
    return film(tmp_path / "movie.mp4")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "frames"
    path.mkdir()
    for i in (9, 10, 2):
        Image.new("RGB", (8, 6), (i, 0, 0)).save(path / f"frame{i}.png")
    (path / "notes.txt").write_text("not a frame")
    return path


def test_frames_come_in_order_with_their_rate(movie):
    video = read_video(movie)
    assert video.frames.shape == (10, 3, 48, 64)
    levels = video.frames.float().mean((1, 2, 3))
    assert torch.allclose(levels, torch.arange(20.0, 201, 20), atol=4)
    assert video.rate == 25


def test_stride_size_and_range(movie):
    video = read_video(movie, stride=3, start=1, stop=8, size=(24, 32))
    assert video.frames.shape == (3, 3, 24, 32)
    assert torch.allclose(video.frames.float().mean((1, 2, 3)), torch.tensor([40.0, 100, 160]), atol=4)
    assert video.rate == pytest.approx(25 / 3)


def test_a_folders_frames_are_in_the_order_of_their_numbers(folder):
    video = read_video(folder)
    assert video.frames[:, 0, 0, 0].tolist() == [2, 9, 10]
    assert video.rate is None


def test_clips_overlap_as_asked(folder):
    clips = read_video(folder).clips(2)
    assert clips.shape == (2, 2, 3, 6, 8)
    assert clips[:, :, 0, 0, 0].tolist() == [[2, 9], [9, 10]]
    with pytest.raises(ValueError, match="A clip needs 4 frames, the video has 3"):
        read_video(folder).clips(4)


def test_a_bad_video_is_refused_in_one_sentence(tmp_path, movie, folder):
    with pytest.raises(FileError, match=r"absent\.mp4 is not there"):
        read_video(tmp_path / "absent.mp4")
    broken = tmp_path / "broken.mp4"
    for content in (b"", b"no video at all", movie.read_bytes()[:300]):
        broken.write_bytes(content)
        with pytest.raises(FileError, match=r"broken\.mp4 cannot be decoded"):
            read_video(broken)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileError, match="has 0 frames"):
        read_video(empty)
    with pytest.raises(FileError, match="has 10 frames, none of them from 10 on"):
        read_video(movie, start=10)
    Image.new("RGB", (9, 6)).save(folder / "frame11.png")
    with pytest.raises(FileError, match="changes its size at frame 3, from 8 x 6 to 9 x 6"):
        read_video(folder)
    (folder / "frame11.png").write_bytes(b"half")
    with pytest.raises(FileError, match=r"frame11\.png cannot be read as an image"):
        read_video(folder)
    for options in ({"stride": 0}, {"start": -1}, {"start": 3, "stop": 3}):
        with pytest.raises(ValueError, match="read_video needs stride"):
            read_video(movie, **options)


def test_a_file_whose_frames_change_their_size_is_refused(tmp_path):
    parts = [film(tmp_path / f"{width}.h264", 5, width).read_bytes() for width in (64, 96)]
    (tmp_path / "both.h264").write_bytes(b"".join(parts))
    with pytest.raises(FileError, match=r"both\.h264 changes its size at frame 5, from 64 x 48 to 96 x 48"):
        read_video(tmp_path / "both.h264")
    assert len(read_video(tmp_path / "both.h264", stop=5)) == 5


def test_a_file_without_frames_is_refused(tmp_path):
    with pytest.raises(FileError, match=r"none\.mp4 holds no video"):
        read_video(film(tmp_path / "none.mp4", 0))


def test_a_damaged_video_is_an_error_or_frames(movie):
    whole, rng = movie.read_bytes(), np.random.default_rng(0)
    for _ in range(100):
        content = np.frombuffer(whole, np.uint8).copy()
        content[rng.integers(0, len(content), 4)] ^= 1 << rng.integers(0, 8, 4, dtype=np.uint8)
        movie.write_bytes(content[: rng.choice([len(content), rng.integers(0, len(content))])].tobytes())
        with contextlib.suppress(FileError):
            assert read_video(movie).frames.shape[1] == 3


@pytest.mark.data
def test_the_real_clip_is_read_whole():
    path = catalog.root() / "driving/solidWhiteRight.mp4"
    if not os.environ.get("PREDOC_DATA") or not path.is_file():
        pytest.skip("PREDOC_DATA names no folder that holds driving/solidWhiteRight.mp4")
    video = read_video(path, size=(54, 96))
    assert len(video) == 221
    assert video.rate == 25
