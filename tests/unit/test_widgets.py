"""The scrubber: what the page shows without a kernel, what the widget asks of the model, what bad input gets told."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from predoc_lib.widgets import scrubber

TIMES = [-1.0, 0.0, 0.5, 2.0]
NOISE = np.random.default_rng(0).random((4, 8, 8))
REGIONS = [(0, 1, "observed"), (-5, 0, "before the first frame")]


def scrub(frames=NOISE, t=TIMES, **options):
    return scrubber(frames, t, **{"label": "Time", "alt": "A digit", **options})


def data_of(html: str) -> dict:
    return json.loads(re.search(r"data = (\{.*\});", html).group(1))


def decoded(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source))).convert("RGB")).astype(float) / 255


def test_the_page_holds_every_frame_in_order():
    pictures = [decoded(source)[..., 0] for source in data_of(scrub().html())["sources"][0]]
    assert np.abs(np.stack(pictures) - NOISE).mean() < 0.05


@pytest.mark.parametrize("layout", ["T H W", "T 1 H W", "T H W 3", "T 3 H W", "torch", "uint8"])
def test_every_layout_shows_the_same_picture(layout):
    smooth = np.broadcast_to(np.linspace(0, 1, 32)[None, :, None], (4, 32, 32))
    frames = {
        "T H W": smooth,
        "T 1 H W": smooth[:, None],
        "T H W 3": np.stack([smooth] * 3, -1),
        "T 3 H W": np.stack([smooth] * 3, 1),
        "torch": torch.tensor(smooth[:, None], requires_grad=True),
        "uint8": (smooth * 255).astype(np.uint8),
    }[layout]
    shown = decoded(data_of(scrub(frames).html())["sources"][0][1])
    assert np.abs(shown - smooth[0][..., None]).max() < 0.05


def test_words_name_the_time_and_the_first_region_that_holds_it():
    texts = data_of(scrub(regions=REGIONS).html())["texts"]
    assert texts == [
        "t = -1 frames, before the first frame",
        "t = 0 frames, observed",
        "t = 0.5 frames, observed",
        "t = 2 frames",
    ]


def test_the_page_starts_at_the_nearest_time_and_names_slider_and_panels():
    html = scrub({"truth": NOISE, "model <b>": NOISE}, start=0.4).html()
    assert 'value="2"' in html
    slider = re.search(r'<input id="([^"]+)"', html).group(1)
    assert f'<label for="{slider}">Time</label>' in html
    assert 'alt="A digit: truth, t = 0.5 frames"' in html
    assert "model &lt;b&gt;" in html
    assert "<b>" not in html


def test_two_figures_of_the_same_frames_have_different_names():
    assert len({re.search(r'<div id="([^"]+)"', scrub().html()).group(1) for _ in range(3)}) == 3


def test_forty_small_frames_stay_under_100_kb():
    blob = np.exp(-((np.arange(32) - 16.0) ** 2) / 20)
    frames = np.stack([np.roll(np.outer(blob, blob), shift, axis=1) for shift in range(40)])
    assert len(scrub({"a": frames, "b": frames, "c": frames}, range(40)).html()) < 100_000


def test_one_object_serves_page_and_print_and_with_a_model_a_kernel_too():
    still = scrub()._repr_mimebundle_()
    assert set(still) == {"text/plain", "text/html", "image/png"}
    assert Image.open(io.BytesIO(base64.b64decode(still["image/png"]))).width > 400
    moving = scrub(live=lambda t: {"": NOISE[0]})._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in moving
    assert moving["text/html"]


def test_the_widget_asks_the_model_at_any_time():
    asked = []

    def live(t):
        asked.append(t)
        return {"model": torch.full((1, 8, 8), (t + 1) / 3)}

    pictures, controls = scrub({"model": NOISE}, live=live, regions=REGIONS).widget().children
    slider, number, words = controls.children
    before = pictures.value
    slider.value = 0.123
    assert asked == [-1.0, 0.123]
    assert number.value == 0.123
    assert pictures.value != before
    assert "A digit: model, t = 0.123 frames, observed" in pictures.value
    assert words.value == "t = 0.123 frames, observed"
    number.value = 7  # beyond the end: as far as the slider goes
    assert asked[-1] == 2.0


def test_a_model_that_draws_other_panels_is_refused():
    with pytest.raises(ValueError, match="must give the panels"):
        scrub({"model": NOISE}, live=lambda t: {"truth": NOISE[0]}).widget()


@pytest.mark.parametrize(
    ("frames", "t", "message"),
    [
        ({}, TIMES, "at least one panel"),
        (NOISE, [], "at least one panel and one time"),
        ({"truth": NOISE[:3]}, TIMES, "'truth' has 3 frames, but there are 4 times"),
        (NOISE, [0, 1, 1, 2], "must increase"),
        (NOISE * 2, TIMES, r"values in \[0, 1\]"),
        (NOISE * np.nan, TIMES, r"values in \[0, 1\]"),
        (NOISE[0], TIMES, r"must be \[T, H, W\]"),
        (np.zeros((4, 0, 8)), TIMES, "not empty"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(frames, t, message):
    with pytest.raises(ValueError, match=message):
        scrub(frames, t)
