"""Clips of a detector's features: of drives that are drawn, or of anyone's video."""

import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from predoc_lib.data import catalog
from predoc_lib.data.driving import Objects, Scene, driving
from predoc_lib.files import FileError, whole
from predoc_lib.yolo import Darknet
from predoc_lib.yolo.dynamics import Features

CONTEXT, TRAINED, BEYOND = 3, 3, 3  # frames: seen, trained to predict, and predicted beyond (the report's)
STEP = 0.5  # of a drive, from frame to frame, in ``driving``'s intervals: 20 frames a second
AHEAD = torch.arange(0.5, TRAINED + BEYOND + 0.1, 0.5)  # what is measured, in frames after the last one seen
START = 5.0  # a drive's first frame lies before it, in intervals
DRAWN = "PREDOC_DRAWN"  # the environment variable that names a folder in which drawn frames are kept; else none are
MANY = 200  # drives that are worth a second process


class Clips(Dataset):
    """All clips of so many frames, ``stride`` apart, of drives' features [N, T, c, h, w] a head."""

    def __init__(self, features: Features, length: int, stride: int = 1) -> None:
        self.features, self.length, self.stride = features, length, stride
        self.starts = features[0].shape[1] - (length - 1) * stride
        if self.starts < 1:
            raise FileError(
                f"A clip takes {(length - 1) * stride + 1} frames, there are {features[0].shape[1]}: take a smaller "
                "stride, or a longer video."
            )

    def __len__(self) -> int:
        return len(self.features[0]) * self.starts

    def __getitems__(self, numbers: list[int]) -> Features:
        drive, start = np.divmod(np.array(numbers), self.starts)
        frame = start[:, None] + self.stride * np.arange(self.length)
        return [x[drive[:, None], frame].float() for x in self.features]

    @staticmethod
    def collate(clips: Features) -> Features:
        """They are a batch already."""
        return clips


@dataclasses.dataclass(frozen=True)
class Unseen:
    """Clips that are measured.

    Attributes:
        context: features of the frames seen.
        future: features of the true frames at ``AHEAD``.
        objects: what is truly there, [clip][time]; None: nobody knows.
    """

    context: Features
    future: Features
    objects: list[list[Objects]] | None

    def __len__(self) -> int:
        return len(self.context[0])


@torch.no_grad()
def extract(network: Darknet, frames: UInt8[Tensor, "N T 3 H W"], mirrored: bool = False) -> Features:
    """Features [N, T, c, h, w] of each head, in half precision, on the network's device."""
    device = next(network.parameters()).device
    parts = []
    for part in frames.flatten(0, 1).split(64):
        images = part.to(device).float() / 255
        parts.append([x.half() for x in network.features(images.flip(-1) if mirrored else images)])
    return [torch.cat(x).unflatten(0, frames.shape[:2]) for x in zip(*parts, strict=True)]


def starts(n: int) -> Float[np.ndarray, " n"]:
    """When each of n drives begins, in ``driving``'s intervals."""
    return np.random.default_rng(n).uniform(0, START, n)


def draw(
    n: int, split: str, t: Float[Tensor, " T"], with_objects: bool
) -> tuple[UInt8[Tensor, "n T 3 H W"], list[list[Objects]] | None]:
    """n drives, at the times t (in frames) from a random start; they are kept where ``DRAWN`` says.

    Returns:
        The frames, and the objects [drive][time] if they are wanted.
    """
    times = [STEP * float(x) for x in t]
    kept = None
    if os.environ.get(DRAWN):
        key = repr((catalog.checksum("driving"), n, split, times, with_objects))
        kept = Path(os.environ[DRAWN]) / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if kept and kept.exists():
        tensors = safetensors.torch.load_file(kept)
    else:
        drives = zip(driving(n, split), starts(n), strict=True)
        work = [(scene, start, times, with_objects) for scene, start in drives]
        cores = len(os.sched_getaffinity(0))
        if n >= MANY and cores > 1:
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(min(cores, n // 50), mp_context=spawn) as pool:
                drawn = list(pool.map(_drive, work, chunksize=8))
        else:
            drawn = list(map(_drive, work))
        rows = [np.insert(rows, 0, drive, 1) for drive, (_, rows) in enumerate(drawn)]
        frames = torch.from_numpy(np.stack([frames for frames, _ in drawn]))
        tensors = {"frames": frames, "rows": torch.from_numpy(np.concatenate(rows))}
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with whole(kept) as file:
                safetensors.torch.save_file(tensors, file)
    return tensors["frames"], _objects(tensors["rows"], n, len(times)) if with_objects else None


def _drive(work: tuple[Scene, float, list[float], bool]) -> tuple[np.ndarray, np.ndarray]:
    """Frames, and a row for each object: frame, label, identity, visible, box."""
    scene, start, times, with_objects = work
    frames, rows = [], [np.zeros((0, 8), np.float32)]
    for i, t in enumerate(times):
        frames.append(scene.frame(start + t).numpy())
        if with_objects:
            o = scene.objects(start + t)
            rows += [np.array([[i, label, who, seen, *box]], np.float32) for label, who, seen, box in _listed(o)]
    return np.stack(frames), np.concatenate(rows)


def _listed(o: Objects) -> Iterable:
    return zip(o.labels.tolist(), o.identities.tolist(), o.visible.tolist(), o.boxes.tolist(), strict=True)


def _objects(rows: Float[Tensor, "M 9"], n: int, times: int) -> list[list[Objects]]:
    place = rows[:, 0] * times + rows[:, 1]
    parts = [rows[place == i] for i in range(n * times)]
    found = [Objects(p[:, 5:], p[:, 2].long(), p[:, 3].long(), p[:, 4]) for p in parts]
    return [found[i : i + times] for i in range(0, n * times, times)]


def drawn_training(network: Darknet, n: int, length: int, extra: int = 2) -> Clips:
    """Clips of n drives and of their mirror images, ``extra`` + 1 from each."""
    frames, _ = draw(n, "train", torch.arange(float(length + extra)), False)
    both = [extract(network, frames), extract(network, frames, mirrored=True)]
    return Clips([torch.cat(x) for x in zip(*both, strict=True)], length)


def drawn_unseen(network: Darknet, n: int, split: str, skip: int = 0) -> Unseen:
    """One clip of each of n drives of a split, but for the first ``skip`` of them."""
    t = torch.cat([torch.arange(float(CONTEXT)), CONTEXT - 1 + AHEAD])
    frames, objects = draw(n, split, t, True)
    features = extract(network, frames[skip:])
    return Unseen(
        [x[:, :CONTEXT] for x in features], [x[:, CONTEXT:] for x in features],
        [drive[CONTEXT:] for drive in objects[skip:]],
    )  # fmt: skip


def video_unseen(features: Features, stride: int) -> Unseen:
    """All clips of a video's features [1, T, c, h, w]; an even ``stride`` leaves a frame half-way."""
    half = stride // 2
    clips = Clips(features, 2 * (CONTEXT + TRAINED + BEYOND) - 1, half)
    x = clips.__getitems__(list(range(len(clips))))
    seen = 2 * CONTEXT - 1
    return Unseen([y[:, :seen:2].half() for y in x], [y[:, seen:].half() for y in x], None)
