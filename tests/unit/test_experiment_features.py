"""The classifier of images end to end, very small, and what sets of images are compared by."""

import dataclasses
import hashlib

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from predoc_lib import results
from predoc_lib.data import catalog, photos
from predoc_lib.data.catalog import DataError
from predoc_lib.data.images import image_set, labels
from predoc_lib.experiments import features, msflow
from predoc_lib.experiments.features import Config, load, read, run
from predoc_lib.features import SmallNet, inception
from predoc_lib.metrics import frechet_distance

TINY = Config(steps=3, batch_size=8, n_train=20, n_test=30, device="cpu")


class Numbers(nn.Module):
    """Features that are the pixels."""

    def forward(self, images):
        return images.double().flatten(1)


def test_a_run_leaves_a_record_and_weights_that_are_as_accurate(tmp_path):
    rec = run(TINY, tmp_path / "run", progress=False)
    assert results.load(tmp_path / "run") == rec
    net, config = load(tmp_path / "run")
    assert config == TINY
    test = read(config, "test")
    with torch.no_grad():
        right = net.logits(test.images).argmax(1) == test.classes
    assert right.double().mean().item() == pytest.approx(rec["metrics"]["accuracy"])


def test_a_crops_class_is_its_picture():
    train = read(TINY, "train")
    assert torch.equal(train.images[3::5], photos(20, 32, seed=(0, 0))[3::5])
    assert train.classes[3::5].tolist() == [3] * 4


def test_labels_are_read_beside_the_images_of_their_split(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    arrays = {"x": rng.integers(0, 256, (50, 32, 32, 3), np.uint8), "y": rng.integers(0, 10, 50)}
    sums = {}
    for file in catalog.DATASETS["cifar10_subset"].files:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        np.savez(path, **{name: array[::-1] if "val" in file else array for name, array in arrays.items()})
        sums[file] = (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    small = catalog.DataSet("small", "none", files=sums, instead="photos")
    monkeypatch.setitem(catalog.DATASETS, "cifar10_subset", small)
    monkeypatch.setenv("PREDOC_DATA", str(tmp_path))
    for split, y in (("train", arrays["y"]), ("test", arrays["y"][::-1])):
        found = read(dataclasses.replace(TINY, dataset="cifar10_subset", n_train=50, n_test=50), split)
        assert torch.equal(found.images, image_set("cifar10_subset", split))
        assert found.classes.tolist() == y.tolist()
    with pytest.raises(DataError, match="cifar10_subset"):
        labels("cifar10")


@pytest.mark.data
def test_every_class_of_the_real_subset_of_cifar10_has_its_share():
    if not (catalog.root() / "cifar10/cifar10_train_30000.npz").is_file():
        pytest.skip("the subset of CIFAR-10 is not there")
    config = dataclasses.replace(TINY, dataset="cifar10_subset", n_train=30_000)
    train = read(config, "train")
    assert len(train.images) == len(train.classes) == 30_000
    assert train.classes.bincount().min() > 2500


def test_features_of_any_size_of_image():
    net = SmallNet()
    assert net(photos(2, 16)).shape == net(photos(2, 64)).shape == (2, 128)


def test_the_frechet_distance_is_that_of_the_gaussians_which_fit_the_features():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.integers(0, top, (n, 3, 1, 2), np.uint8)) for n, top in ((40, 256), (50, 128)))
    x, y = (images.flatten(1).double().numpy() for images in (a, b))
    c, d = np.cov(x.T), np.cov(y.T)
    truth = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    assert frechet_distance(a, b, Numbers(), rows=7) == pytest.approx(truth, rel=1e-6)
    assert frechet_distance(a, a, Numbers()) == pytest.approx(0, abs=1e-3)


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 images a set, got 1 and 3"):
        frechet_distance(photos(1, 8), photos(3, 8), Numbers())


def test_inception_is_taken_only_from_a_whole_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PREDOC_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"not there.*not found"):
        inception()
    file = tmp_path / "inception" / "pt_inception-2015-12-05-6726825d.pth"
    file.parent.mkdir()
    file.write_bytes(b"half")
    with pytest.raises(DataError, match=r"damaged.*6726825d"):
        inception()


def test_the_frechet_distance_of_msflow_is_followed_and_needs_colours(tmp_path, monkeypatch):
    run(TINY, tmp_path / "net", progress=False)
    monkeypatch.setattr(msflow, "FEATURES", tmp_path / "net")
    tiny = {"steps": 10, "batch_size": 4, "image_size": 8, "scales": 2, "width": 8, "depth": 1, "n_test": 3}
    rec = msflow.run(msflow.Config(**tiny, frechet=6, device="cpu", per_scale=True), tmp_path / "run", progress=False)
    assert rec["history"][-1]["frechet"] == pytest.approx(rec["metrics"]["frechet"])
    assert 0 < rec["metrics"]["frechet"] < float("inf")
    with pytest.raises(ValueError, match="'frechet' must be at least 2 and needs images of 3 channels"):
        msflow.Config(**tiny, frechet=6, channels=1)


def test_the_classes_names_are_as_many_as_the_networks_answers():
    for dataset in ("photos", "cifar10_subset"):
        config = dataclasses.replace(TINY, dataset=dataset)
        assert len(set(config.classes)) == len(config.classes) in (5, 10)
    assert features.SmallNet(5).head.out_features == 5
