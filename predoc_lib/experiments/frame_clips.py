"""Frames and their features: of drives that are drawn, or of anyone's video."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from predoc_lib.data import read_video
from predoc_lib.experiments.yolo_clips import AHEAD, BEYOND, CONTEXT, TRAINED, draw, extract
from predoc_lib.experiments.yolo_dynamics import TRAINING_SHARE
from predoc_lib.files import FileError
from predoc_lib.yolo import Darknet
from predoc_lib.yolo.dynamics import Features

SIZE = (96, 160)


@dataclasses.dataclass
class Clips(Dataset):
    """Six frames of drives, ``stride`` apart, and their features: half of the clips are mirrored."""

    frames: UInt8[Tensor, "N T 3 H W"]
    features: list[Features]  # as they are, and mirrored
    stride: int = 1

    @property
    def starts(self) -> int:
        """Clips of a drive."""
        return self.frames.shape[1] - (CONTEXT + TRAINED - 1) * self.stride

    def __len__(self) -> int:
        return 2 * len(self.frames) * self.starts

    def __getitems__(self, numbers: list[int]) -> dict[str, Any]:
        mirrored, rest = np.divmod(np.array(numbers), len(self) // 2)
        drive, start = np.divmod(rest, self.starts)
        at = start[:, None] + self.stride * np.arange(CONTEXT + TRAINED)
        frames = self.frames[drive[:, None], at].float() / 255
        flip = torch.from_numpy(mirrored.astype(bool))[:, None, None, None, None]
        parts = []
        for plain, other in zip(*self.features, strict=True):
            x = torch.where(flip.to(plain.device), other[drive[:, None], at], plain[drive[:, None], at])
            parts.append(x.float())
        return {"frames": torch.where(flip, frames.flip(-1), frames), "features": parts}

    @staticmethod
    def collate(clips: dict[str, Any]) -> dict[str, Any]:
        """They are a batch already."""
        return clips


@dataclasses.dataclass(frozen=True)
class Unseen:
    """Clips that are measured: frames [N, 3 + AHEAD, 3, H, W] in bytes and their features."""

    frames: UInt8[Tensor, "N T 3 H W"]
    features: Features


def training_clips(network: Darknet, n: int) -> Clips:
    """Of n drives."""
    frames, _ = draw(n, "train", torch.arange(float(CONTEXT + TRAINED + 2)), False)
    return Clips(frames, [extract(network, frames), extract(network, frames, mirrored=True)])


def unseen_clips(network: Darknet, n: int, split: str = "test") -> Unseen:
    """Of n drives of a split."""
    frames, _ = draw(n, split, torch.cat([torch.arange(float(CONTEXT)), CONTEXT - 1 + AHEAD]), True)
    return Unseen(frames, extract(network, frames))


def video_clips(network: Darknet, path: Path, stride: int) -> tuple[Clips, Unseen, Unseen]:
    """Of a video, all clips: of its first part, for training and for validation, and of its last, to be measured.

    Raises:
        FileError: it cannot be read, or its last part is shorter than a clip.
    """
    frames = read_video(path, size=SIZE).frames
    end = round(TRAINING_SHARE * len(frames))
    first = frames[None, :end]
    clips = Clips(first, [extract(network, first), extract(network, first, mirrored=True)], stride)
    return clips, _windows(network, frames[:end], stride), _windows(network, frames[end:], stride)


def _windows(network: Darknet, frames: UInt8[Tensor, "T 3 H W"], stride: int) -> Unseen:
    half = stride // 2  # of AHEAD's frames every second lies half-way
    at = half * torch.cat([2 * torch.arange(CONTEXT), 2 * (CONTEXT - 1) + (2 * AHEAD).long()])
    count = len(frames) - half * 2 * (CONTEXT - 1 + TRAINED + BEYOND)
    if count < 1:
        raise FileError(
            f"A clip takes {len(frames) - count + 1} frames, a part of the video has {len(frames)}: take a smaller "
            "stride, or a longer video."
        )
    rows = torch.arange(count)[:, None] + at
    features = [x[0][rows.to(x.device)] for x in extract(network, frames[None])]
    return Unseen(frames[rows], features)
