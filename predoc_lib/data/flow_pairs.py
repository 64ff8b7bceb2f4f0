"""Pairs of real photographs with true optical flow, and Middlebury's ``.flo`` files."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from predoc_lib.data import catalog
from predoc_lib.data.photos import file
from predoc_lib.files import FileError, whole
from predoc_lib.naming import unknown

MAGIC = 202021.25  # reads "PIEH"
UNKNOWN = 1e9  # a longer flow means that nobody knows it
LARGEST = 99_999  # pixels a side: Middlebury's own limit
PAIRS = {"motorcycle": "motorcycle", "RubberWhale": "rubber_whale"}  # and the data set that each belongs to


@dataclasses.dataclass(frozen=True)
class FlowPair:
    """Two pictures of one scene: image0(p) = image1(p + flow(p)) where the pixel is seen in both.

    Attributes:
        image0, image1: uint8 levels, RGB.
        flow: on image0's grid, in pixels; 0 where it is not known.
        known: where it is.
        visible: where image1 shows the point too, as far as the known flow tells; None: nobody says.
    """

    image0: UInt8[Tensor, "3 H W"]
    image1: UInt8[Tensor, "3 H W"]
    flow: Float[Tensor, "2 H W"]
    known: Bool[Tensor, "H W"]
    visible: Bool[Tensor, "H W"] | None

    def batch(self) -> tuple[Float[Tensor, "1 3 H W"], Float[Tensor, "1 3 H W"]]:
        """The images as a model takes them."""
        return self.image0[None].float() / 255, self.image1[None].float() / 255


def flow_pairs(name: str = "motorcycle") -> FlowPair:
    """One of ``PAIRS``: "motorcycle", two cameras side by side (embedded); "RubberWhale", two times (Middlebury).

    Raises:
        DataError: unknown pair, or its files are absent or damaged.
    """
    if name not in PAIRS:
        raise catalog.DataError(unknown("pair", name, PAIRS))
    folder = catalog.require(PAIRS[name])
    if name == "motorcycle":
        return stereo_pair(
            _picture(file("motorcycle")), _picture(file("motorcycle_right")), torch.from_numpy(_disparity())
        )
    folder = folder / "flow" / name
    flow, known = read_flo(folder / "flow10.flo")
    return FlowPair(_picture(folder / "frame10.png"), _picture(folder / "frame11.png"), flow, known, None)


def stereo_pair(
    left: UInt8[Tensor, "3 H W"], right: UInt8[Tensor, "3 H W"], disparity: Float[Tensor, "H W"]
) -> FlowPair:
    """The pair of two cameras: what the left one sees at x, the right one sees at x - disparity; not finite: unknown.

    A point is hidden if a nearer one, with a disparity larger by more than a pixel, is seen at its place.
    """
    known = disparity.isfinite()
    d = torch.where(known, disparity, 0.0)
    width = d.shape[1]
    at = torch.arange(width) - d
    nearest = torch.full_like(d, -1.0)
    for column in (at.floor().long(), at.floor().long() + 1):
        counts = known & (column >= 0) & (column < width)
        nearest = nearest.scatter_reduce(1, column.clamp(0, width - 1), torch.where(counts, d, -1.0), "amax")
    inside = (at >= 0) & (at <= width - 1)
    visible = known & inside & (d >= nearest.gather(1, at.round().long().clamp(0, width - 1)) - 1)
    return FlowPair(left, right, torch.stack([-d, torch.zeros_like(d)]), known, visible)


def halved(pair: FlowPair) -> FlowPair:
    """The same at half the size, for quick fits: means of 2 x 2 pixels, of the flow those that are all known."""

    def mean(x: Tensor) -> Tensor:
        h, w = (n // 2 * 2 for n in x.shape[-2:])
        return torch.nn.functional.avg_pool2d(x[None, ..., :h, :w].float(), 2)[0]

    image0, image1 = (mean(x).round().byte() for x in (pair.image0, pair.image1))
    known = mean(pair.known[None])[0] == 1
    visible = None if pair.visible is None else mean(pair.visible[None])[0] == 1
    return FlowPair(image0, image1, torch.where(known, mean(pair.flow) / 2, 0.0), known, visible)


def read_flo(path: str | Path) -> tuple[Float[Tensor, "2 H W"], Bool[Tensor, "H W"]]:
    """The flow of a ``.flo`` file, 0 where it is not known, and where it is.

    Raises:
        FileError: it is absent, no ``.flo`` file, of an impossible size, or truncated.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}. Wanted: a Middlebury .flo file.") from error
    if len(content) < 12 or np.frombuffer(content, "<f4", 1)[0] != MAGIC:
        raise FileError(f"{path} does not begin with {MAGIC}, as a Middlebury .flo file does: convert it to one.")
    width, height = (int(n) for n in np.frombuffer(content, "<i4", 2, 4))
    if not (0 < width <= LARGEST and 0 < height <= LARGEST):
        raise FileError(f"{path} says that it is {width} x {height} pixels: it is damaged, fetch or write it again.")
    wanted = 12 + 8 * width * height
    if len(content) != wanted:
        raise FileError(
            f"{path} has {len(content):,} bytes, but {width} x {height} pixels take {wanted:,}: fetch it again."
        )
    flow = torch.from_numpy(np.frombuffer(content, "<f4", offset=12).reshape(height, width, 2).copy()).movedim(-1, 0)
    known = (flow.abs() < UNKNOWN).all(0)  # not of NaN either
    return torch.where(known, flow, 0.0), known


def write_flo(path: str | Path, flow: Float[Tensor, "2 H W"], known: Bool[Tensor, "H W"] | None = None) -> None:
    """Write a ``.flo`` file; the flow that is not known, or not finite, as Middlebury marks it."""
    usable = flow.isfinite().all(0) if known is None else known & flow.isfinite().all(0)
    values = torch.where(usable, flow, 10 * UNKNOWN).movedim(0, -1).cpu().numpy().astype("<f4")
    height, width = values.shape[:2]
    header = np.float32(MAGIC).astype("<f4").tobytes() + np.array([width, height], "<i4").tobytes()
    with whole(Path(path)) as temporary:
        temporary.write_bytes(header + values.tobytes())


def content() -> bytes:
    """The embedded pair's files, all of them."""
    files = [file("motorcycle"), file("motorcycle_right"), file("motorcycle_disp")]
    return b"".join(f.read_bytes() for f in files)


def _picture(path: Path) -> UInt8[Tensor, "3 H W"]:
    with path.open("rb") as opened:
        return torch.from_numpy(np.array(Image.open(opened).convert("RGB"))).movedim(-1, 0)


def _disparity() -> Float[np.ndarray, "H W"]:
    with file("motorcycle_disp").open("rb") as opened:
        return np.load(opened)["arr_0"].astype(np.float32)
