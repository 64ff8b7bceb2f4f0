"""The experiment of MSFlow end to end, with a very small model."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from predoc_lib import results
from predoc_lib.data import photos
from predoc_lib.experiments import msflow
from predoc_lib.experiments.config import ConfigError
from predoc_lib.experiments.msflow import Config, Crops, codec_bits, evaluate, load, measure, read, run, unseen
from predoc_lib.msflow import MSFlow

TINY = Config(steps=3, batch_size=4, image_size=8, scales=2, width=8, depth=1, n_test=3, device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"scales": 1},
        {"pyramid": "laplacian"},
        {"path": "grey.npz", "channels": 1, "image_size": 4},
        {"objective": "likelihood", "tolerance": 0.1},
        {"objective": "likelihood", "tolerance": 0.1, "per_scale": True, "steps": 2},
    ],
    ids=str,
)
def test_every_kind_of_run_leaves_a_record_and_weights_that_measure_the_same(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    np.savez("grey.npz", x=np.random.default_rng(0).integers(0, 256, (60, 4, 4), np.uint8))
    config = dataclasses.replace(TINY, **change)
    rec = run(config, tmp_path / "run", progress=False)
    assert results.load(tmp_path / "run") == rec
    model, found = load(tmp_path / "run")
    assert found == config
    again = measure(model, found)
    for name in ("mixture_seconds", "seconds_density", "seconds_sample"):
        again[name] = rec["metrics"][name]
    assert again == rec["metrics"]


def test_coarse_to_fine_every_scale_is_trained_for_an_equal_share_of_the_steps(tmp_path, monkeypatch):
    trained, loss = [], MSFlow.loss

    def watched(self, images, objective, scale, noise):
        trained.append(scale)
        return loss(self, images, objective, scale, noise)

    monkeypatch.setattr(MSFlow, "loss", watched)
    run(dataclasses.replace(TINY, per_scale=True, steps=4), tmp_path / "run", progress=False)
    assert trained == [0, 0, 1, 1]


def test_crops_of_a_step_are_the_same_however_they_are_fetched():
    crops = Crops(TINY)
    whole = crops.__getitems__([4, 5, 6, 7])
    assert torch.equal(whole, torch.cat([crops.__getitems__([4, 5]), crops.__getitems__([6, 7])]))
    assert not torch.equal(whole, crops.__getitems__([8, 9, 10, 11]))


def test_bits_do_not_depend_on_what_was_drawn_before():
    torch.manual_seed(0)
    model = msflow.build_model(TINY)
    x = unseen(TINY)["chelsea"]
    first = evaluate(model, x)
    torch.randn(7)
    assert torch.equal(evaluate(model, x), first)


@pytest.mark.parametrize("codec", ["png", "webp"])
def test_a_codecs_bits_are_those_of_a_file_that_holds_the_images(codec):
    images = photos(50, 16)
    strip = np.concatenate(list(images.movedim(1, -1).numpy()))
    file = io.BytesIO()
    Image.fromarray(strip).save(file, **msflow.CODECS[codec])
    assert np.array_equal(np.asarray(Image.open(file).convert("RGB")), strip), "it is lossless"
    assert codec_bits(images, codec) == 8 * len(file.getvalue()) / strip.size
    assert 2 < codec_bits(images, codec) < 9


def test_a_side_that_cannot_be_halved_so_often_is_refused():
    with pytest.raises(ConfigError, match="must divide by 4 for 3 scales, got 10"):
        Config(image_size=10, scales=3)


def test_fewer_steps_than_scales_are_refused_where_each_is_trained_by_itself():
    with pytest.raises(ConfigError, match="at least 2, one a scale, got 1"):
        dataclasses.replace(TINY, per_scale=True, steps=1)


def test_a_likelihood_is_not_compiled():
    with pytest.raises(ConfigError, match="'compile' must be False for objective 'likelihood'"):
        dataclasses.replace(TINY, objective="likelihood", compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"accumulate": 2}], ids=str)
def test_compiled_it_learns_the_same(more):
    few = {"steps": 3, "batch_size": 4, "evaluate_every": 1, "ema": 0.9} | more
    losses = [
        [row["loss"] for row in run(dataclasses.replace(TINY, compile=way, **few), progress=False)["history"]]
        for way in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_images_of_another_size_than_the_configs_are_refused(tmp_path):
    np.savez(tmp_path / "wide.npz", x=np.zeros((20, 4, 8, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"holds images of \[3, 4, 8\].* ask for \[3, 8, 8\]"):
        run(dataclasses.replace(TINY, path=str(tmp_path / "wide.npz")))


def test_of_images_by_path_no_test_image_is_trained_on(tmp_path):
    np.savez(
        tmp_path / "x.npz", x=np.arange(30, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 8, 8, 3), np.uint8)
    )
    config = dataclasses.replace(TINY, path=str(tmp_path / "x.npz"))
    train, test = (read(config, split)[:, 0, 0, 0].tolist() for split in ("train", "test"))
    assert test == [0, 10, 20]
    assert sorted(train + test) == list(range(30))


def test_more_images_than_a_codec_takes_in_one_strip_are_coded_in_several():
    images = photos(520, 32)
    whole, parts = codec_bits(images, "webp"), [codec_bits(part, "webp") for part in images.split(511)]
    assert whole == pytest.approx((511 * parts[0] + 9 * parts[1]) / 520)
