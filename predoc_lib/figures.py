"""One look for every figure: call ``figures.use()`` once in a chapter, then draw with matplotlib as usual.

A figure is a light card with dark ink, so it reads the same on a light and on a dark page. Colours are Okabe and Ito's
(told apart by colour-blind readers), each with its own marker and line style, so that none is told by colour alone.
"""

from collections.abc import Mapping

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
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


def picture(figure: Figure, dpi: int = 80) -> np.ndarray:
    """A figure as pixels [H, W, 3], uint8: one frame of a ``widgets.scrubber``."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
