"""One look for every figure: call ``figures.use()`` once in a chapter, then draw with matplotlib as usual.

A figure is a light card with dark ink, so it reads the same on a light and on a dark page. Colours are Okabe and Ito's
(told apart by colour-blind readers), each with its own marker and line style, so that none is told by colour alone.
"""

from collections.abc import Mapping

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#1A1A1A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))

PAPER, INK = "#F7F7F5", "#1A1A1A"
STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=COLOURS, marker=MARKERS, linestyle=LINES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 120,
    "figure.facecolor": PAPER,
    "figure.figsize": (6.4, 3.6),
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.markersize": 5,
    "savefig.facecolor": PAPER,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def use() -> None:
    """Make ``STYLE`` matplotlib's default for what is drawn from here on."""
    matplotlib.rcParams.update(STYLE)


def film_strip(frames: Mapping[str, np.ndarray], titles: list[str], *, width: float = 8.0) -> Figure:
    """A row of pictures for each name: frames are [T, H, W] or [T, H, W, 3], uint8, with one title a column.

    ``width`` is in inches. The figure belongs to no pyplot window: a notebook shows it where it is a cell's value.
    """
    with matplotlib.rc_context(STYLE):
        rows, columns = len(frames), len(titles)
        height, cell = next(iter(frames.values())).shape[1:3]
        figure = Figure(figsize=(width, 0.35 + rows * (width - 0.6) / columns * height / cell))
        axes = figure.subplots(rows, columns, squeeze=False)
        for row, (name, pictures) in zip(axes, frames.items(), strict=True):
            for axis, picture, title in zip(row, pictures, titles, strict=True):
                axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                if axis in axes[0]:
                    axis.set_title(title, fontsize=8)
            row[0].set_ylabel(name, fontsize=8)
    return figure


def flow_colours(flow: np.ndarray, largest: float) -> np.ndarray:
    """Flows [..., 2, H, W] as colours [..., H, W, 3], uint8: hue is direction, strength is length."""
    x, y = flow[..., 0, :, :], flow[..., 1, :, :]
    hue = np.arctan2(y, x) / (2 * np.pi) % 1
    length = np.clip(np.hypot(x, y) / largest, 0, 1)
    colours = hsv_to_rgb(np.stack([hue, length, 1 - 0.25 * length], -1))
    return np.round(255 * colours).astype(np.uint8)


def flow_picture(
    image: np.ndarray, flow: np.ndarray, largest: float, *, every: int = 16, legend: bool = True
) -> Figure:
    """A flow [2, H, W] as colours and arrows over an image [H, W, 3], with the wheel that tells what they mean.

    Args:
        image: uint8.
        flow: pixels; an arrow goes from a pixel to where the flow points.
        largest: length of the strongest colour, pixels.
        every: pixels from arrow to arrow.
        legend: draw the wheel.
    """
    height, width = flow.shape[-2:]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 4.8 * height / width), layout="none")
        axis = figure.add_axes((0, 0, 1, 1))
        grey = np.repeat(image.mean(-1, keepdims=True), 3, -1)
        axis.imshow((0.35 * grey + 0.65 * flow_colours(flow, largest)).astype(np.uint8))
        row, column = np.mgrid[every // 2 : height : every, every // 2 : width : every]
        u, v = flow[:, row, column]
        axis.quiver(
            column, row, u, v, angles="xy", scale_units="xy", scale=1, width=0.004, color=INK, headwidth=4, headlength=4
        )
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axis.axis("off")
        if legend:
            side = np.linspace(-1, 1, 65)
            x, y = np.meshgrid(side, side)
            wheel = flow_colours(np.stack([x, y]) * largest, largest)
            inset = axis.inset_axes((0.01, 0.03, 0.2 * height / width, 0.2))
            inset.imshow(np.dstack([wheel, 255 * (np.hypot(x, y) <= 1).astype(np.uint8)]))
            inset.text(32, 32, f"{largest:g} px", ha="center", va="center", fontsize=7, color=INK)
            inset.axis("off")
    return figure


def picture(figure: Figure, dpi: int = 80) -> np.ndarray:
    """A figure as pixels [H, W, 3], uint8: one frame of a ``widgets.scrubber``."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
