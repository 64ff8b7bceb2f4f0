"""Sets of small images as uint8 levels [N, C, H, W]: known ones by name, anyone's by path."""

import collections
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from predoc_lib.data import catalog
from predoc_lib.files import FileError, extract, read_npz
from predoc_lib.naming import unknown

KEYS = ("x", "data", "images")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
BROKEN = ("refuse", "skip")
SETS = ("cifar10", "cifar10_subset")


def image_set(source: str | Path, split: str = "train", broken: str = "refuse") -> UInt8[Tensor, "N C H W"]:
    """All images of one split of a named set, or of a path (whatever the split).

    Args:
        source: "cifar10" (the official split), "cifar10_subset" (30,000 and 5,000 of its 60,000 images, split anew), or
            a path: an ``.npz``, a folder of ``.npz`` batches (ImageNet64's official ones), a folder of image files.
        split: "train" or "test".
        broken: of image files that cannot be read or have another size than most: "refuse" them, or "skip" them with a
            warning that counts and names them.

    Raises:
        catalog.DataError: an unknown set or split, files absent or damaged.
        FileError: a path that holds no such images; the message names the file.
    """
    if source in SETS:
        if split not in ("train", "test"):
            raise catalog.DataError(unknown("split", split, ("train", "test")))
        return _to_tensor(_cifar10(split) if source == "cifar10" else _cifar10_subset(split)["x"])
    path = Path(source).expanduser()
    if path.is_dir():
        batches = sorted(path.glob("*.npz"))
        return torch.cat([read_images(file) for file in batches]) if batches else read_folder(path, broken)
    if not path.exists():
        raise catalog.DataError(
            f"{unknown('image set', str(source), SETS)} Nor is there a file or folder of that name."
        )
    return read_images(path)


def labels(source: str, split: str = "train") -> Int[Tensor, " N"]:
    """The classes, 0 to 9, of the images of "cifar10_subset"; errors as ``image_set``'s."""
    if source != "cifar10_subset":
        raise catalog.DataError(unknown("image set with labels", source, ("cifar10_subset",)))
    return torch.from_numpy(_cifar10_subset(split)["y"].astype(np.int64))


def read_images(path: Path) -> UInt8[Tensor, "N C H W"]:
    """The images of an ``.npz``: uint8 under "x", "data" or "images".

    [N, H, W, C], [N, H, W] (grey), or flat rows [N, C H W] of square images, channel after channel, as CIFAR's and
    ImageNet64's are.

    Raises:
        FileError: there are no such images.
    """
    arrays = read_npz(path)
    name = next((key for key in KEYS if key in arrays), None)
    if name is None:
        raise FileError(f"{path} holds no images: wanted an array named {' or '.join(KEYS)}, got {', '.join(arrays)}.")
    found = arrays[name]
    if found.dtype != np.uint8:
        raise FileError(f"{path}: {name} must be uint8 levels, got {found.dtype}: convert floats in [0, 1] beforehand.")
    if found.ndim == 2:
        channels = next((c for c in (3, 1) if found.shape[1] and (found.shape[1] / c) ** 0.5 % 1 == 0), None)
        if channels:
            side = round((found.shape[1] / channels) ** 0.5)
            found = found.reshape(-1, channels, side, side).transpose(0, 2, 3, 1)
    elif found.ndim == 3:
        found = found[..., None]
    if found.ndim != 4 or found.shape[-1] not in (1, 3) or not found.size:
        raise FileError(
            f"{path}: {name} must be [N, H, W, C] with 1 or 3 channels, [N, H, W], or flat rows of square images, "
            f"got {list(arrays[name].shape)}."
        )
    return _to_tensor(found)


def read_folder(path: Path, broken: str = "refuse") -> UInt8[Tensor, "N 3 H W"]:
    """The image files below a folder, in the order of their names, as RGB; arguments and errors as ``image_set``'s."""
    if broken not in BROKEN:
        raise ValueError(unknown("way with broken images", broken, BROKEN))
    images, bad = {}, {}
    for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES):
        try:
            with Image.open(file) as opened:
                images[file] = np.asarray(opened.convert("RGB"))
        except Exception as error:  # a damaged file may raise anything
            bad[file] = f"cannot be read ({type(error).__name__})"
    sizes = collections.Counter(image.shape[:2] for image in images.values())
    if sizes:
        size = sizes.most_common(1)[0][0]
        odd = {file: image.shape[:2] for file, image in images.items() if image.shape[:2] != size}
        bad |= {file: f"is {h} x {w} pixels, most are {size[0]} x {size[1]}" for file, (h, w) in odd.items()}
    if bad:
        few = "; ".join(f"{file.relative_to(path)} {why}" for file, why in list(bad.items())[:5])
        message = f"{len(bad)} of {len(bad.keys() | images.keys())} image files in {path}: {few}"
        if broken == "refuse":
            raise FileError(f"Refused {message}. Repair or resize them, or skip them with broken='skip'.")
        warnings.warn(f"Skipped {message}.", stacklevel=2)
    good = [image for file, image in images.items() if file not in bad]
    if not good:
        raise FileError(f"{path} holds no images: wanted files that end in {', '.join(SUFFIXES)}, or .npz batches.")
    return _to_tensor(np.stack(good))


def _cifar10(split: str) -> np.ndarray:
    archive = catalog.require("cifar10") / "cifar-10-python.tar.gz"
    with tempfile.TemporaryDirectory() as folder:  # verified, so that torchvision may unpickle what is in it
        extract(archive, Path(folder))
        return torchvision.datasets.CIFAR10(folder, train=split == "train").data


def _cifar10_subset(split: str) -> dict[str, np.ndarray]:
    name = {"train": "cifar10_train_30000", "test": "cifar10_val_5000"}[split]
    return read_npz(catalog.require("cifar10_subset") / f"cifar10/{name}.npz")


def _to_tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
