"""Data sets: a wrong file is never used, and a message says what to do."""

import functools
import gzip
import hashlib
import http.server
import os
import threading

import pytest
import torchvision
from darknet_cfg import yolov3, yolov3_tiny

from predoc_lib.data import catalog, sources
from predoc_lib.yolo import Darknet

FILES = {f"MNIST/raw/{name}-ubyte": os.urandom(64) for name in ("train-images-idx3", "train-labels-idx1")}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and a data set "mnist" of two small files that expects its download in it."""

    def download(into):
        for file, content in FILES.items():
            (into / file).parent.mkdir(parents=True, exist_ok=True)
            (into / file).write_bytes(content)

    files = {file: (len(content), hashlib.sha256(content).hexdigest()) for file, content in FILES.items()}
    small = catalog.DataSet("two files", "none", files=files, download=download, instead="digits")
    monkeypatch.setitem(catalog.DATASETS, "mnist", small)
    monkeypatch.setenv("PREDOC_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def state(name):
    return next(row["state"] for row in catalog.status() if row["name"] == name)


def test_embedded_data_is_always_there(folder):
    catalog.require("digits")
    assert state("digits") == "embedded"
    assert len(catalog.checksum("digits")) == 64


def test_an_unknown_name_is_refused_with_the_list_and_the_nearest():
    with pytest.raises(catalog.DataError, match=r"'minst'\. Did you mean 'mnist'\? Valid: digits, mnist"):
        catalog.require("minst")


def test_absent_data_says_what_where_how_and_what_instead(folder):
    with pytest.raises(catalog.DataError) as error:
        catalog.require("mnist")
    for part in ("two files", str(folder), "predoc data mnist", "PREDOC_DATA", "embedded 'digits'"):
        assert part in str(error.value)
    assert state("mnist") == "absent"
    assert not folder.exists(), "asking must not create anything"


def test_fetch_brings_verified_files_and_leaves_nothing_else(folder):
    assert catalog.fetch("mnist") == folder
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(FILES)
    assert state("mnist") == "present, verified"


@pytest.mark.parametrize(
    ("damage", "expected"), [(lambda b: b[:10], "10 bytes, expected 64"), (lambda b: b[:-1] + b"?", "sha256")]
)
def test_a_damaged_file_is_named_and_never_used(folder, damage, expected):
    catalog.fetch("mnist")
    file = folder / next(iter(FILES))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(catalog.DataError, match=expected) as error:
        catalog.require("mnist")
    assert str(file) in str(error.value)
    assert state("mnist") == "corrupt"
    with pytest.raises(catalog.DataError, match="damaged"):
        catalog.checksum("mnist")
    catalog.fetch("mnist")
    assert state("mnist") == "present, verified"


def test_a_download_that_is_wrong_or_fails_changes_nothing(folder, monkeypatch):
    good = catalog.DATASETS["mnist"].download

    def truncated(into):
        good(into)
        (into / next(iter(FILES))).write_bytes(b"")

    def offline(into):
        good(into)
        raise RuntimeError("Error downloading:\nno route\n")

    for download, expected in ((truncated, "0 bytes, expected 64"), (offline, "Error downloading: no route")):
        object.__setattr__(catalog.DATASETS["mnist"], "download", download)
        with pytest.raises(catalog.DataError, match=expected) as error:
            catalog.fetch("mnist")
        assert "fetching-" not in str(error.value), "a folder that is gone helps nobody"
        assert not list(folder.iterdir())


def test_mnist_is_downloaded_by_torchvision_into_the_layout_the_catalogue_expects(tmp_path, monkeypatch):
    files = list(catalog.DATASETS["mnist"].files)
    for file in files:  # idx: magic number, sizes, and here one black pixel or one label
        axes = 3 if "images" in file else 1
        content = bytes([0, 0, 8, axes]) + b"\0\0\0\x01" * axes + b"\0"
        (tmp_path / f"{os.path.basename(file)}.gz").write_bytes(gzip.compress(content))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        resources = [(f"{os.path.basename(file)}.gz", None) for file in files]
        monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
        catalog.DATASETS["mnist"].download(tmp_path / "got")
        server.shutdown()
    assert all((tmp_path / "got" / file).is_file() for file in files)


def test_files_with_an_address_are_fetched_one_by_one(folder, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    files = {"yolo/a.cfg": b"[net]", "yolo/a.weights": b"1234"}
    for file, content in files.items():
        (tmp_path / "there" / os.path.basename(file)).write_bytes(content)
    known = {file: (len(content), hashlib.sha256(content).hexdigest()) for file, content in files.items()}
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "there")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        entry = sources._detector("a", "a network", (address, address), *known.values())
        assert entry.files == known
        monkeypatch.setitem(catalog.DATASETS, "a", entry)
        catalog.fetch("a")
        server.shutdown()
    assert {file: (folder / file).read_bytes() for file in files} == files
    monkeypatch.setitem(catalog.DATASETS, "a", sources._detector("b", "another", (address, address), *known.values()))
    with pytest.raises(catalog.DataError, match="a could not be fetched"):
        catalog.fetch("a")


@pytest.mark.parametrize(("name", "text"), [("yolov3", yolov3()), ("yolov3_tiny", yolov3_tiny())])
def test_the_published_weights_have_the_size_that_the_network_takes(tmp_path, name, text):
    (tmp_path / "net.cfg").write_text(text)
    size, _ = catalog.DATASETS[name].files[f"yolo/{name.replace('_', '-')}.weights"]
    assert size == 20 + 4 * Darknet(tmp_path / "net.cfg").numbers


def test_data_that_nobody_can_fetch_says_how_to_get_it_and_use_its_path():
    assert state("bdd100k") == "by path"
    for use in (catalog.fetch, catalog.require, catalog.checksum):
        with pytest.raises(catalog.DataError, match=r"bdd100k is yours to get: register at .* give the path"):
            use("bdd100k")


def test_a_file_is_hashed_once_in_a_process_unless_it_changes(folder, monkeypatch):
    catalog.fetch("mnist")
    hashed = []
    monkeypatch.setattr(catalog.hashlib, "file_digest", lambda *args: hashed.append(args))
    catalog.require("mnist")
    assert not hashed
    file = folder / next(iter(FILES))
    os.utime(file, ns=(1, 1))
    with pytest.raises(AttributeError):  # it was hashed again, by the stand-in
        catalog.require("mnist")
    assert len(hashed) == 1


@pytest.mark.data
def test_real_mnist_is_what_the_catalogue_says():
    if not os.environ.get("PREDOC_DATA"):
        pytest.skip("PREDOC_DATA is not set")
    if state("mnist") == "absent":
        pytest.skip(f"no MNIST in {catalog.root()}")
    assert len(torchvision.datasets.MNIST(catalog.require("mnist"), train=False)) == 10_000


@pytest.mark.data
@pytest.mark.parametrize("name", ["udacity", "yolo_fastest", "yolo_fastest_xl", "yolov3_tiny", "yolov3"])
def test_real_detectors_and_drives_are_what_the_catalogue_says(name):
    if not os.environ.get("PREDOC_DATA"):
        pytest.skip("PREDOC_DATA is not set")
    if state(name) == "absent":
        pytest.skip(f"no {name} in {catalog.root()}")
    catalog.require(name)
