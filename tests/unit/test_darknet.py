"""The reader of Darknet's files: against OpenCV's, on whole and on damaged files."""

import contextlib
import itertools
import os
import re
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from darknet_cfg import convolution, head, yolov3, yolov3_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from predoc_lib.data import catalog
from predoc_lib.files import FileError
from predoc_lib.results import RESULTS
from predoc_lib.yolo import Darknet

SMALL = (
    "[net]\nwidth=64\nheight=64\nchannels=3\n# a comment\n\n"
    + convolution(8, 3, 2)
    + convolution(8, 3, 1, groups=8)
    + "[dropout]\nprobability=.15\n"
    + "[shortcut]\nfrom=-3\nactivation=linear\n"
    + "[maxpool]\nsize=3\nstride=1\n[maxpool]\nsize=2\nstride=2\n[maxpool]\nsize=5\nstride=2\n"
    + convolution(16, 3, 2)
    + "[route]\nlayers=-1\ngroups=2\ngroup_id=1\n"
    + "[route]\nlayers=-1,-2\n"
    + head("0,1", "10,14, 23,27", filters=170)
)


@pytest.fixture
def write(tmp_path):
    """Write a ``.cfg`` and random weights for it; give their paths."""

    def files(text: str):
        cfg, weights = tmp_path / "net.cfg", tmp_path / "net.weights"
        cfg.write_text(text)
        network = Darknet(cfg)
        torch.manual_seed(0)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias)
                nn.init.normal_(layer.running_mean, std=0.1)
                nn.init.uniform_(layer.running_var, 0.1, 0.6)
        network.save_weights(weights)
        return cfg, weights

    return files


def opencv_logits(cfg, weights, images, lines):
    """What OpenCV computes before each [yolo] layer."""
    network = cv2.dnn.readNetFromDarknet(str(cfg), str(weights))
    network.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
    network.enableWinograd(False)
    network.setInput(images.numpy())
    return network.forward([f"conv_{at}" for at in lines])


def assert_same(cfg, weights, size):
    network = Darknet(cfg).load_weights(weights).eval()
    images = torch.rand(1, 3, size, size)
    theirs = opencv_logits(cfg, weights, images, network.heads_at)
    for ours in (network, network.fused()):
        with torch.no_grad():
            features = ours.features(images)
            found = ours.logits(features)
            assert torch.equal(ours.heads(features), ours(images))
        for a, b in zip(found, theirs, strict=True):
            assert a.shape == b.shape
            assert np.abs(a.numpy() - b).max() < 1e-4 * np.abs(b).max()


@pytest.mark.parametrize("text", [SMALL, yolov3_tiny(416)], ids=["small", "yolov3-tiny"])
def test_a_network_gives_what_opencv_gives(write, text):
    cfg, weights = write(text)
    assert_same(cfg, weights, Darknet(cfg).size[0])


@pytest.mark.slow
def test_yolov3_gives_what_opencv_gives(write):
    cfg, weights = write(yolov3(160))
    assert weights.stat().st_size == 248_007_048, "the size of the published file"
    assert_same(cfg, weights, 160)


def test_the_recorded_detector_gives_what_opencv_gives():
    assert_same(*(RESULTS / "yolo_detector/road" / f"detector.{kind}" for kind in ("cfg", "weights")), 160)


@pytest.mark.data
@pytest.mark.parametrize("name", ["yolo-fastest-1.1", "yolo-fastest-1.1-xl"])
def test_yolo_fastest_gives_what_opencv_gives(name):
    folder = catalog.root() / "yolo"
    if not os.environ.get("PREDOC_DATA") or not (folder / f"{name}.weights").is_file():
        pytest.skip(f"PREDOC_DATA names no folder that holds yolo/{name}.weights")
    assert_same(folder / f"{name}.cfg", folder / f"{name}.weights", 320)


def test_the_heads_of_the_features_are_the_detections(write):
    network = Darknet(write(SMALL)[0]).eval()
    images = torch.rand(2, 3, 128, 64)
    features = network.features(images)
    assert [f.shape[1:] for f in network.features(torch.rand(1, 3, 64, 64))] == network.shapes
    assert torch.equal(network.heads(features), network(images))
    assert network(images).shape == (2, 8 * 4 * 2, 85)


def test_a_fused_network_is_a_copy_that_no_file_can_hold(write, tmp_path):
    cfg, weights = write(SMALL)
    network = Darknet(cfg).load_weights(weights)
    fused = network.fused().fused()
    for use in (fused.save_weights, fused.load_weights):
        with pytest.raises(ValueError, match="A fused network has no numbers"):
            use(weights)
    network.save_weights(tmp_path / "again.weights")
    assert (tmp_path / "again.weights").read_bytes() == weights.read_bytes()
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    features = [x.requires_grad_() for x in fused.features(torch.rand(1, 3, 64, 64))]
    fused.heads(features).sum().backward()
    assert all(x.grad.abs().max() > 0 for x in features), "what predicts features learns through the heads"


def test_a_box_is_decoded_as_its_definition_says(write):
    """Rows in the order (y, x, anchor); the middle from its cell's corner, sides as multiples of the anchor's."""
    network = Darknet(write(SMALL.replace("num=2", "num=2\nscale_x_y=1.2"))[0])
    yolo = network.layers[-1]
    x = torch.randn(1, 170, 3, 5)
    found = yolo(x)[0]
    row, column, anchor = 2, 4, 1
    t = x[0, 85 * anchor : 85 * (anchor + 1), row, column]
    line = found[(row * 5 + column) * 2 + anchor]
    shifted = 1.2 * t[:2].sigmoid() - 0.1
    assert torch.allclose(line[0], (column + shifted[0]) / 5)
    assert torch.allclose(line[1], (row + shifted[1]) / 3)
    assert torch.allclose(line[2], 23 * t[2].exp() / (5 * yolo.stride))
    assert torch.allclose(line[3], 27 * t[3].exp() / (3 * yolo.stride))
    assert torch.allclose(line[4:], t[4:].sigmoid())


def test_weights_are_written_as_they_are_read_and_old_headers_too(write, tmp_path):
    cfg, weights = write(SMALL)
    content = weights.read_bytes()
    old = tmp_path / "old.weights"
    old.write_bytes(np.array([0, 1, 0, 7], "<i4").tobytes() + content[20:])
    for path in (weights, old):
        network = Darknet(cfg).load_weights(path)
        network.save_weights(tmp_path / "again.weights")
        assert (tmp_path / "again.weights").read_bytes() == content


def test_weights_of_another_network_say_where(write, tmp_path):
    cfg, weights = write(SMALL)
    content = weights.read_bytes()
    network = Darknet(cfg)
    before = [p.clone() for p in network.parameters()]
    bad = tmp_path / "bad.weights"
    nan, negative = bytearray(content), bytearray(content)
    nan[-4:] = np.array([np.nan], "<f4").tobytes()
    negative[20 + 4 * 24 : 24 + 4 * 24] = np.array([-1], "<f4").tobytes()
    for wrong, message in (
        (content[:-4], r"too short: it ends in layer 10 \(\[convolutional\], line \d+ of net.cfg\)"),
        (content[:200], r"too short: it ends in layer 0 .* after 45 of"),
        (content[:22], r"too short: it ends in layer 0"),
        (content + b"1234", r"too long: net.cfg takes 5,\d+ numbers, it holds 5,\d+"),
        (content[:7], "does not begin with a version"),
        (b"", "does not begin with a version"),
        (b"\xff" * len(content), "does not begin with a version"),
        (bytes(nan), "not all numbers of layer 10"),
        (bytes(negative), "a variance of layer 0"),
    ):
        bad.write_bytes(wrong)
        with pytest.raises(FileError, match=message):
            network.load_weights(bad)
        assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    with pytest.raises(FileError, match="cannot be read: No such file"):
        network.load_weights(tmp_path / "absent.weights")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[maxpool]", "[maxpol]", r"net\.cfg, line \d+, \[maxpol\]: .*'maxpol'. Did you mean 'maxpool'"),
        ("filters=8", "filters=8x", r"line 8, \[convolutional\]: 'filters' must be whole numbers .* got '8x'"),
        ("filters=8", "filters=-8", r"'filters' must be whole numbers from 1 to 65536, got '-8'"),
        ("filters=8", "filters=8,8", r"'filters' must be one whole number"),
        ("anchors=10", "anchor=10", r"\[yolo\]: option 'anchors' is missing"),
        ("groups=8", "groups=3", "3 groups do not divide 8 channels into 8 filters"),
        ("activation=leaky", "activation=swish", r"'swish'.*linear, leaky"),
        ("from=-3", "from=-30", r"'from' must be whole numbers from -3"),
        ("from=-3", "from=3", r"'from' must name earlier layers, got '3'"),
        ("layers=-1,-2", "layers=-1,0", "layers of other sizes cannot be joined"),
        ("group_id=1", "group_id=2", "there is no part 2 of 2"),
        ("mask=0,1", "mask=0,2", r"mask \[0, 2\] asks for other anchors than the 2 given"),
        ("filters=170", "filters=171", "2 anchors and 80 classes need 170 filters"),
        ("probability=.15", "probability=nan", r"'probability' must be a positive number, got 'nan'"),
        ("probability=.15", "probability=2", "'probability' must be less than 1"),
        ("width=64", "width", r"line 2: wanted \[section\] or option=value, got 'width'"),
        ("[net]", "[network of mine]", r"it must begin with \[net\]"),
        ("width=64\nheight=64", "width=65536\nheight=65536", "there may be 67,108,864 numbers at most"),
        ("size=3\nstride=2\npad=1", "size=99\nstride=2\npad=0", "each side must be at least 1"),
        ("size=5\nstride=2", "size=65535\nstride=2", "there may be 67,108,864 numbers at most"),
        ("size=3\nstride=2\npad=1", "size=3\nstride=65536\npadding=65536", "67,108,864 numbers at most"),
        ("size=5\nstride=2", "size=5\nstride=2\n[upsample]\nstride=64", "cells would be smaller than a pixel"),
    ],
)
def test_a_bad_line_is_named(tmp_path, old, new, message):
    cfg = tmp_path / "net.cfg"
    text = SMALL.replace(old, new, 1)
    assert text != SMALL
    cfg.write_text(text)
    with pytest.raises(FileError, match=message):
        Darknet(cfg)


def test_a_network_without_layers_or_heads_is_none(tmp_path):
    cfg = tmp_path / "net.cfg"
    for text, message in (
        ("", r"must begin with \[net\]"),
        ("[net]\nwidth=64\nheight=64\n", r"has no \[yolo\] layer"),
        ("[net]\nwidth=64\nheight=64\n[yolo]\nanchors=1,2\n", "before it there must be a linear convolution"),
        (SMALL + "[dropout]\n", "it would go on from layer 11, where a head ends"),
        (
            SMALL + "[route]\nlayers=-4\n" + head("0", "1,2", 8).replace("classes=80", "classes=3"),
            "has 3 classes, the first",
        ),
        (SMALL + "#" * 2**20, "larger than any .cfg file"),
    ):
        cfg.write_text(text)
        with pytest.raises(FileError, match=message):
            Darknet(cfg)
    with pytest.raises(FileError, match="cannot be read"):
        Darknet(tmp_path / "absent.cfg")


@pytest.mark.usefixtures("as_shipped")
def test_images_of_another_type_or_size_are_refused(write):
    network = Darknet(write(SMALL)[0])
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got torch.uint8"):
        network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    for shape in ((1, 3, 60, 64), (3, 64, 64), (1, 1, 64, 64), (1, 3, 0, 64)):
        with pytest.raises(ValueError, match=r"must be \[B, 3, H, W\] with sides that divide by 16"):
            network(torch.zeros(shape))


@contextlib.contextmanager
def little_memory(more=2**30):
    """Whoever asks for more than so many bytes gets another error than FileError."""
    import resource  # only Linux and macOS have it

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


NUMBERS = ("", "-1", "0", "7", "4096", "65535", "99999999999", "1e9", "nan", "-3,-1", "٣")
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")


@only_linux
def test_any_other_number_anywhere_is_an_error_or_a_valid_network(tmp_path):
    cfg, valid, places = tmp_path / "net.cfg", 0, list(re.finditer(r"(?<==)[-.\d]+", SMALL))
    for place, number in itertools.product(places, NUMBERS):
        cfg.write_text(SMALL[: place.start()] + number + SMALL[place.end() :])
        with little_memory():
            try:
                network = Darknet(cfg).eval()
            except FileError:
                continue
            network(torch.rand(1, network.channels, network.stride, network.stride))
        valid += 1
    assert valid > len(places) / 2


@only_linux
@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_file_is_an_error_or_a_valid_network(tmp_path_factory, data):
    """Cut off anywhere and with any bits flipped: never another exception, a hang, a huge allocation."""
    folder = tmp_path_factory.mktemp("fuzz")
    cfg, weights = folder / "net.cfg", folder / "net.weights"
    cfg.write_text(SMALL)
    Darknet(cfg).save_weights(weights)
    for file in (cfg, weights):
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        end = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
        file.write_bytes(content[:end])
    started = time.perf_counter()
    with little_memory():
        try:
            network = Darknet(cfg)
        except FileError:
            return
        with contextlib.suppress(FileError):
            network.load_weights(weights)
        found = network.eval()(torch.rand(1, network.channels, network.stride, network.stride))
    assert found.shape[2] == 5 + network.classes
    assert time.perf_counter() - started < 20
