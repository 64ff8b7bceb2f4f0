"""Figures that move: one object is a slider without a kernel, a widget with one, and a picture in print."""

import base64
import hashlib
import html
import io
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
from PIL import Image

from predoc_lib import figures

_serial = itertools.count(1)

PANELS = (
    '<div style="display: grid; grid-template-columns: repeat(auto-fit, minmax(6rem, 1fr)); gap: 0.75rem; '
    'max-width: {width}rem">{panels}</div>'
)
PANEL = (
    '<div><img class="dark-light" alt="{alt}" src="data:image/webp;base64,{source}" style="display: block; '
    'width: 100%; image-rendering: {rendering}; border: 1px solid #808080">'
    '<div style="text-align: center">{name}</div></div>'
)
PAGE = """<div id="{id}" class="predoc-scrubber" role="group" aria-label="{label}">
{panels}
<div style="display: flex; flex-wrap: wrap; align-items: center; gap: 0.25rem 0.75rem; margin-top: 0.5rem">
<label for="{id}-t">{label}</label>
<input id="{id}-t" type="range" min="0" max="{last}" step="1" value="{start}" aria-valuetext="{text}" autocomplete="off"
 style="flex: 1 1 12rem; max-width: 30rem">
<output for="{id}-t" style="flex: 0 1 {longest}ch; font-variant-numeric: tabular-nums">{text}</output>
</div>
<script>
(() => {{
  const root = document.getElementById("{id}"), data = {data};
  const slider = root.querySelector("input"), output = root.querySelector("output");
  const show = () => {{
    const i = Number(slider.value);
    root.querySelectorAll("img").forEach((image, k) => {{
      image.src = "data:image/webp;base64," + data.sources[k][i];
      image.alt = data.alts[k] + ", " + data.texts[i];
    }});
    output.value = data.texts[i];
    slider.setAttribute("aria-valuetext", data.texts[i]);
  }};
  slider.addEventListener("input", show);
  show();
}})();
</script>
</div>"""


class Scrubber:
    """What ``scrubber`` returns; a notebook shows it where it is a cell's value."""

    def __init__(self, frames, t, label, alt, live, start, unit, regions, width) -> None:
        self.t, self.frames, self.label, self.alt = t, frames, label, alt
        self.live, self.start, self.unit, self.regions, self.width = live, start, unit, regions, width
        self._number = next(_serial)

    def text(self, t: float) -> str:
        """The words beside the slider: the time and the region it lies in."""
        region = next((name for low, high, name in self.regions if low <= t <= high), None)
        return f"t = {t:.4g} {self.unit}s" + (f", {region}" if region else "")

    def html(self) -> str:
        """A slider that needs neither kernel nor network: every picture is in the page."""
        sources = [[_webp(frame) for frame in pictures] for pictures in self.frames.values()]
        data = {"sources": sources, "alts": list(self.alt.values()), "texts": [self.text(t) for t in self.t]}
        script = json.dumps(data).replace("<", "\\u003c")
        return PAGE.format(
            id=f"scrubber-{hashlib.sha256(script.encode()).hexdigest()[:10]}-{self._number}",
            label=html.escape(self.label),
            panels=self._panels({name: p[self.start] for name, p in self.frames.items()}, self.t[self.start]),
            last=len(self.t) - 1,
            start=self.start,
            text=html.escape(data["texts"][self.start]),
            longest=max(map(len, data["texts"])),  # else the slider would shrink under the pointer
            data=script,
        )

    def png(self) -> bytes:
        """A strip of at most eight times, for print."""
        chosen = np.unique(np.linspace(0, len(self.t) - 1, 8).round().astype(int))
        strip = figures.film_strip(
            {name: pictures[chosen] for name, pictures in self.frames.items()}, [f"{self.t[i]:.4g}" for i in chosen]
        )
        buffer = io.BytesIO()
        strip.savefig(buffer, format="png")
        return buffer.getvalue()

    def widget(self) -> ipywidgets.Widget:
        """A slider and a number field over continuous time that ask ``live`` for the pictures at any time between."""
        low, high = self.t[0], self.t[-1]
        options = {"min": low, "max": high, "value": self.t[self.start]}
        options["step"] = 10.0 ** math.floor(math.log10((high - low or 1) / 1000))  # so that round times are on its way
        slider = ipywidgets.FloatSlider(**options, description=self.label, readout=False)
        number = ipywidgets.BoundedFloatText(**options, description=f"t, {self.unit}s")
        ipywidgets.link((slider, "value"), (number, "value"), transform=[lambda v: round(v, 6), float])
        pictures, words = ipywidgets.HTML(), ipywidgets.HTML()

        def show(_=None) -> None:
            t = slider.value
            shown = {name: _pictures(name, np.asarray(_array(f))[None])[0] for name, f in self.live(t).items()}
            if shown.keys() != self.frames.keys():
                raise ValueError(f"live must give the panels {list(self.frames)}, gave {list(shown)}.")
            pictures.value, words.value = self._panels(shown, t), html.escape(self.text(t))

        slider.observe(show, "value")
        show()
        return ipywidgets.VBox([pictures, ipywidgets.HBox([slider, number, words])])

    def _panels(self, pictures: Mapping[str, np.ndarray], t: float) -> str:
        panels = [
            PANEL.format(
                alt=html.escape(f"{self.alt[name]}, {self.text(t)}"),
                source=_webp(picture),
                name=html.escape(name),
                rendering="pixelated" if len(picture) < 200 else "auto",  # small pictures show their pixels
            )
            for name, picture in pictures.items()
        ]
        return PANELS.format(panels="".join(panels), width=self.width * len(panels))

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        bundle = {
            "text/plain": f"{self.label}: {', '.join(self.frames)} at {len(self.t)} times",
            "text/html": self.html(),
            "image/png": base64.b64encode(self.png()).decode(),
        }
        if self.live is not None:
            bundle |= self.widget()._repr_mimebundle_()
        return bundle


def scrubber(
    frames: Mapping[str, Any] | Any,
    t: Sequence[float] | Any,
    *,
    label: str,
    alt: str,
    live: Callable[[float], Mapping[str, Any]] | None = None,
    start: float | int | None = None,
    unit: str = "frame",
    regions: Sequence[tuple[float | int, float | int, str]] = (),
    width: float | int = 14,
) -> Scrubber:
    """Pictures side by side and one slider through time.

    Args:
        frames: {panel name: array}, or one array: [T, H, W], [T, H, W, 3], or channels first [T, 1 or 3, H, W]; uint8,
            or floats in [0, 1].
        t: [T] times of the frames, increasing.
        label: the slider's name, "Time" for example.
        alt: what the pictures show, in words; a panel's alternative text is these, its name and the time.
        live: in a running kernel, live(t) gives {panel name: one frame} at any real t between the first and the last.
        start: the time shown first (the nearest frame; the first if None).
        unit: of t, in the singular.
        regions: (start, end, name) of spans of time, named beside the slider, such as (0, 9, "observed"); the first
            that holds a time names it.
        width: of a panel, at most, in widths of a letter (rem).

    Raises:
        ValueError: no frames, lengths that differ, times that do not increase, values outside the range.
    """
    if not isinstance(frames, Mapping):
        frames = {"": frames}
    times = [float(value) for value in _array(t)]
    if not frames or not times:
        raise ValueError("A scrubber needs at least one panel and one time, got none.")
    if any(b <= a for a, b in itertools.pairwise(times)):
        raise ValueError("The times of a scrubber must increase.")
    pictures = {name: _pictures(name, np.asarray(_array(f))) for name, f in frames.items()}
    for name, p in pictures.items():
        if len(p) != len(times):
            raise ValueError(f"Panel {name!r} has {len(p)} frames, but there are {len(times)} times.")
    first = 0 if start is None else int(np.abs(np.asarray(times) - start).argmin())
    texts = {name: f"{alt}: {name}" if name else alt for name in frames}
    return Scrubber(pictures, times, label, texts, live, first, unit, regions, width)


def _array(values: Any) -> Any:
    return values.detach().cpu() if hasattr(values, "detach") else values


def _pictures(name: str, frames: np.ndarray) -> np.ndarray:
    """[T, H, W] or [T, H, W, 3] as uint8, whatever of the accepted layouts came in."""
    if frames.ndim == 4 and frames.shape[-1] != 3 and frames.shape[1] in (1, 3):
        frames = np.moveaxis(frames, 1, -1)
    if frames.ndim == 4 and frames.shape[-1] == 1:
        frames = frames[..., 0]
    if not (frames.ndim == 3 or (frames.ndim == 4 and frames.shape[-1] == 3)) or frames.size == 0:
        raise ValueError(
            f"Panel {name!r} must be [T, H, W], [T, H, W, 3] or [T, 1 or 3, H, W], not empty, got {list(frames.shape)}."
        )
    if frames.dtype == np.uint8:
        return frames
    if not (frames.min() >= 0 and frames.max() <= 1):  # also refuses NaN
        raise ValueError(
            f"Panel {name!r} must hold uint8 or values in [0, 1], got {frames.min():.3g} to {frames.max():.3g}."
        )
    return np.round(frames * 255).astype(np.uint8)


def _webp(frame: np.ndarray) -> str:
    """One frame in base64: lossless where that is as small, else at a quality where small digits show no blocks."""
    encoded = []
    for options in ({"lossless": True}, {"quality": 85}):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, format="webp", method=6, **options)
        encoded.append(buffer.getvalue())
    return base64.b64encode(min(encoded, key=len)).decode()
