"""Crops of photographs: real, seeded, and never of the same picture in training and test."""

import numpy as np
import pytest
import skimage.data
import torch

from predoc_lib.data import DataError, catalog, photos
from predoc_lib.data.photos import PICTURES, recoloured, reduced


@pytest.mark.parametrize("side", [8, 16, 32])
@pytest.mark.parametrize("split", PICTURES)
def test_crops_are_uint8_of_the_size_asked_for_and_repeatable(side, split):
    crops = photos(20, side, split, seed=3)
    assert crops.shape == (20, 3, side, side)
    assert crops.dtype == torch.uint8
    assert torch.equal(crops, photos(20, side, split, seed=3))
    assert not torch.equal(crops, photos(20, side, split, seed=4))
    assert crops.float().std() > 20, "no content"


def test_training_and_test_pictures_are_different_and_chelsea_is_a_test():
    assert not set(PICTURES["train"]) & set(PICTURES["test"])
    assert "chelsea" in PICTURES["test"]


def test_a_reduced_picture_is_its_means_of_2_by_2():
    picture = skimage.data.chelsea().astype(float)
    mean = picture[:300, :450].reshape(150, 2, 225, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(reduced("chelsea") - mean).max() <= 0.5


def test_every_crop_lies_in_its_picture_as_it_is_or_mirrored():
    kinds = set()
    for split, names in PICTURES.items():
        for name in names:
            windows = np.lib.stride_tricks.sliding_window_view(reduced(name)[0], (8, 8))
            for crop in photos(4, 8, split, picture=name)[:, 0].numpy():
                found = [(windows == c).all((2, 3)).any() for c in (crop, crop[:, ::-1])]
                assert any(found)
                kinds.add(found[0])
    assert kinds == {True, False}


def test_recoloured_crops_are_turned_ones_half_of_them_in_other_colours():
    crops = photos(400, 8)
    seen = recoloured(crops, seed=1)
    assert torch.equal(seen, recoloured(crops, seed=1))
    turned = [crops, crops.flip(2), crops.transpose(2, 3), crops.flip(2).transpose(2, 3)]
    exact = torch.stack([(seen == x).flatten(1).all(1) for x in turned])
    assert (exact.sum(1) > 10).all(), "every orientation"
    assert 160 < exact.any(0).sum() < 240, "half are as they were"
    changed = ~exact.any(0)
    slopes = [np.polyfit(a.ravel(), b.ravel(), 1) for a, b in zip(
        np.sort(crops[changed, 0].flatten(1).numpy().astype(float)),
        np.sort(seen[changed, 0].flatten(1).numpy().astype(float)), strict=True,
    ) if a.min() > 40 and a.max() < 170 and a.std() > 5]  # fmt: skip
    assert all(0.7 < slope < 1.3 for slope, _ in slopes)
    assert len(slopes) > 10
    assert np.std([slope for slope, _ in slopes]) > 0.08


def test_pictures_take_turns():
    both, alone = photos(6, 16, "test"), photos(6, 16, "test", picture="chelsea")
    assert torch.equal(both[::2], alone[::2])
    assert not torch.equal(both[1], alone[1])


def test_photos_are_in_the_catalogue_and_need_no_network():
    row = next(row for row in catalog.status() if row["name"] == "photos")
    assert (row["state"], row["where"]) == ("embedded", "scikit-image, scikit-learn")
    assert len(catalog.checksum("photos")) == 64


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: photos(0), ValueError, "n of at least 1 and a side of 1 to 200 pixels, got n=0, side=16"),
        (lambda: photos(1, 151, "test"), ValueError, "side of 1 to 150"),
        (lambda: photos(1, split="tset"), DataError, "Unknown split 'tset'. Did you mean 'test'"),
        (lambda: photos(1, picture="chelsea"), DataError, "Unknown train picture 'chelsea'"),
    ],
)
def test_what_there_is_not_is_refused_in_one_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call()
