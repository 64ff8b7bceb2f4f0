"""Anyone's video: a file that FFmpeg decodes, or a folder of frames in the order of their names."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from predoc_lib.data.images import SUFFIXES
from predoc_lib.files import FileError


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames at equal intervals.

    Attributes:
        frames: uint8 levels, RGB.
        rate: of these frames, 1/s, so a stride divides it; None: the folder did not say.
    """

    frames: UInt8[Tensor, "T 3 H W"]
    rate: float | None

    def __len__(self) -> int:
        return len(self.frames)

    def clips(self, length: int, step: int = 1) -> UInt8[Tensor, "N length 3 H W"]:
        """All clips of so many frames, one every ``step`` frames; they share memory with the video.

        Raises:
            ValueError: the video is shorter than a clip.
        """
        if len(self) < length:
            raise ValueError(f"A clip needs {length} frames, the video has {len(self)}: take a smaller stride.")
        return self.frames.unfold(0, length, step).movedim(-1, 1)


def read_video(
    path: str | Path, *, size: tuple[int, int] | None = None, stride: int = 1, start: int = 0, stop: int | None = None
) -> Video:
    """Every ``stride``-th frame of a video (the report's key frames, 5.3.1), resized.

    Args:
        path: a video file, or a folder of images; numbers in their names count as numbers.
        size: height and width to resize to (antialiased, proportions not kept); None: as it is.
        stride: 1 or more.
        start, stop: of the frames before the stride is taken, as in a slice.

    Raises:
        FileError: it is absent, cannot be decoded, has no frames in that range, or its frames change their size.
        ValueError: stride, start or stop out of range.
    """
    path = Path(path).expanduser()
    if stride < 1 or start < 0 or (stop is not None and stop <= start):
        raise ValueError(
            f"read_video needs stride >= 1 and 0 <= start < stop, got stride={stride}, start={start}, stop={stop}."
        )
    if not path.exists():
        raise FileError(f"{path} is not there. Wanted: a video file or a folder of images.")
    frames, seen, first, rate = [], 0, None, None
    for picture, per_second in _folder(path) if path.is_dir() else _file(path):
        if stop is not None and seen >= stop:
            break
        if seen >= start and (seen - start) % stride == 0:
            first = first or picture.size
            if picture.size != first:
                raise FileError(
                    f"{path} changes its size at frame {seen}, from {first[0]} x {first[1]} to "
                    f"{picture.size[0]} x {picture.size[1]}: cut it there."
                )
            if size is not None:
                picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            frames.append(np.asarray(picture))
        seen, rate = seen + 1, per_second
    if not frames:
        raise FileError(f"{path} has {seen} frames, none of them from {start} on.")
    return Video(torch.from_numpy(np.stack(frames)).movedim(-1, 1), rate / stride if rate else None)


def _file(path: Path) -> Iterator[tuple[Image.Image, float | None]]:
    import av  # only here, as it is the one part of the library that needs it

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise FileError(f"{path} holds no video.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate) if stream.average_rate else None
            for frame in container.decode(stream):
                yield frame.to_image(), rate
    except av.FFmpegError as error:
        raise FileError(f"{path} cannot be decoded: {error.strerror}. Wanted: a whole video file.") from error


def _folder(path: Path) -> Iterator[tuple[Image.Image, None]]:
    def in_order(file: Path) -> list:
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", file.name)]

    for file in sorted((f for f in path.iterdir() if f.suffix.lower() in SUFFIXES), key=in_order):
        try:
            with Image.open(file) as picture:
                yield picture.convert("RGB"), None
        except OSError as error:
            raise FileError(f"{file} cannot be read as an image: {error}.") from error
