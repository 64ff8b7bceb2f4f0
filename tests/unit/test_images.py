"""Anyone's images: every layout that is promised, and a sentence that names the file for all others."""

import hashlib
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from predoc_lib.data import DataError, catalog, image_set
from predoc_lib.files import FileError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("key", ["x", "data", "images"])
def test_every_layout_of_an_npz_is_read(tmp_path, key):
    grey, channels_first = RGB[..., :1], RGB.transpose(0, 3, 1, 2)
    for array, expected in (
        (RGB, channels_first),
        (grey, channels_first[:, :1]),
        (grey[..., 0], channels_first[:, :1]),
        (channels_first.reshape(5, -1), channels_first),  # CIFAR's and ImageNet64's rows
        (grey.reshape(5, -1), channels_first[:, :1]),
    ):
        np.savez(tmp_path / "a.npz", **{key: array, "labels": np.arange(5)})
        found = image_set(tmp_path / "a.npz")
        assert found.dtype == torch.uint8
        assert torch.equal(found, torch.from_numpy(expected.copy()))


def test_a_folder_of_batches_is_read_in_order(tmp_path):
    for i, batch in enumerate((RGB[:2], RGB[2:])):
        np.savez(tmp_path / f"train_data_batch_{i + 1}.npz", data=batch.transpose(0, 3, 1, 2).reshape(len(batch), -1))
    assert torch.equal(image_set(tmp_path), torch.from_numpy(RGB.transpose(0, 3, 1, 2).copy()))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": RGB}, "holds no images: wanted an array named x or data or images, got y"),
        ({"x": RGB / 255.0}, "x must be uint8 levels, got float64: convert floats"),
        ({"x": RGB[..., :2]}, r"x must be \[N, H, W, C\] with 1 or 3 channels.*got \[5, 8, 8, 2\]"),
        ({"x": RGB.reshape(5, -1)[:, :-1]}, r"flat rows of square images, got \[5, 191\]"),
        ({"x": RGB[:0]}, r"got \[0, 8, 8, 3\]"),
        ({"x": np.array([{}], dtype=object)}, "Python objects, which are never unpickled"),
    ],
)
def test_an_npz_without_images_is_refused_by_name(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(FileError, match=message) as error:
        image_set(tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in str(error.value)


@pytest.fixture
def folder(tmp_path):
    """Five good images, one broken, one of another size, one file that is none."""
    (tmp_path / "sub").mkdir()
    for i, image in enumerate(RGB):
        Image.fromarray(image).save(tmp_path / ("sub" if i % 2 else ".") / f"{i}.png")
    (tmp_path / "broken.jpg").write_bytes(b"junk")
    Image.fromarray(RGB[0, :4]).save(tmp_path / "small.png")
    (tmp_path / "notes.txt").write_text("none")
    return tmp_path


def test_a_folder_with_bad_images_is_refused_by_name_or_read_without_them(folder):
    with pytest.raises(FileError, match="Refused 2 of 7 image files") as error:
        image_set(folder)
    for part in (
        str(folder),
        "broken.jpg cannot be read",
        "small.png is 4 x 8 pixels, most are 8 x 8",
        "broken='skip'",
    ):
        assert part in str(error.value)
    with pytest.warns(UserWarning, match=r"Skipped 2 of 7.*broken\.jpg.*small\.png"):
        found = image_set(folder, broken="skip")
    assert torch.equal(found, torch.from_numpy(RGB[[0, 2, 4, 1, 3]].transpose(0, 3, 1, 2).copy()))


def test_a_good_folder_is_read_without_a_word(folder, recwarn):
    (folder / "broken.jpg").unlink()
    (folder / "small.png").unlink()
    assert len(image_set(folder)) == 5
    assert not recwarn.list


def test_folders_without_images_and_unknown_names_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(FileError, match="holds no images"):
        image_set(tmp_path)
    (tmp_path / "a.png").write_bytes(b"junk")
    with pytest.warns(UserWarning, match="Skipped 1 of 1"), pytest.raises(FileError, match="holds no"):
        image_set(tmp_path, broken="skip")
    with pytest.raises(ValueError, match="Unknown way with broken images 'skpi'"):
        image_set(tmp_path, broken="skpi")
    with pytest.raises(DataError, match=r"Unknown image set 'cifar11'\. Did you mean 'cifar10'.*Nor is there a file"):
        image_set("cifar11")


def test_cifar10_is_read_from_its_verified_archive_as_torchvision_reads_it(tmp_path, monkeypatch):
    rows = RGB.repeat(16, 0).repeat(4, 1).repeat(4, 2)[:6].transpose(0, 3, 1, 2).reshape(6, -1)
    lists, names = [], ["data_batch_1", "test_batch"]
    for name, part in zip(names, (rows[:4], rows[4:]), strict=True):
        (tmp_path / name).write_bytes(pickle.dumps({"data": part, "labels": [0] * len(part)}))
        lists.append([[name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()]])
    meta = pickle.dumps({"label_names": ["plane"]})
    (tmp_path / "batches.meta").write_bytes(meta)
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        for name in [*names, "batches.meta"]:
            file.add(tmp_path / name, f"cifar-10-batches-py/{name}")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", lists[0])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", lists[1])
    described = torchvision.datasets.CIFAR10.meta | {"md5": hashlib.md5(meta).hexdigest()}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", described)
    content = archive.read_bytes()
    files = {archive.name: (len(content), hashlib.sha256(content).hexdigest())}
    monkeypatch.setitem(catalog.DATASETS, "cifar10", catalog.DataSet("small", "none", files=files, instead="photos"))
    monkeypatch.setenv("PREDOC_DATA", str(tmp_path))
    assert torch.equal(image_set("cifar10"), torch.from_numpy(rows[:4].reshape(4, 3, 32, 32)))
    assert torch.equal(image_set("cifar10", "test"), torch.from_numpy(rows[4:].reshape(2, 3, 32, 32)))
    archive.write_bytes(content[:-1] + b"?")
    with pytest.raises(DataError, match="is damaged and was not used"):
        image_set("cifar10")


def test_a_set_that_is_not_there_says_what_to_do_and_one_without_a_source_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("PREDOC_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"Fetch it with `predoc data cifar10`.*embedded 'photos'"):
        image_set("cifar10")
    for call in (lambda: image_set("cifar10_subset"), lambda: catalog.fetch("cifar10_subset")):
        with pytest.raises(DataError, match=r"not found\. Name the folder that has cifar10/cifar10_train_30000"):
            call()
    with pytest.raises(DataError, match="Unknown split 'valid'"):
        image_set("cifar10_subset", "valid")


@pytest.mark.data
def test_the_real_subset_of_cifar10_is_what_the_catalogue_says():
    if not os.environ.get("PREDOC_DATA"):
        pytest.skip("PREDOC_DATA is not set")
    if not (catalog.root() / "cifar10/cifar10_val_5000.npz").is_file():
        pytest.skip(f"no subset of CIFAR-10 in {catalog.root()}")
    test = image_set("cifar10_subset", "test")
    assert test.shape == (5000, 3, 32, 32)
    assert (test.float().mean((0, 2, 3)) / 255 - torch.tensor([0.4918, 0.4821, 0.4468])).abs().max() < 0.01
