"""The experiment end to end, very small, and its measures against what they must be."""

import numpy as np
import pytest
import torch
from PIL import Image

from predoc_lib import results
from predoc_lib.experiments.config import ConfigError
from predoc_lib.experiments.features_to_frames import (
    METHODS,
    SEEN,
    Clips,
    Config,
    between,
    build_model,
    data_of,
    distance,
    load,
    measure,
    run,
    training_clips,
    unseen_clips,
    wanted_features,
)  # fmt: skip

TINY = {"steps": 2, "batch_size": 2, "n_train": 2, "n_test": 2, "hidden": 4, "depth": 1, "device": "cpu"}
CHANGES = {
    "report": {"method": "irevnet"},
    "pixels": {"method": "irevnet", "pixel_weight": 0.1, "remainder": "last", "noise": 0.1},
    "joint": {"method": "irevnet", "pixel_weight": 0.1, "remainder": "true", "end_to_end": True},
    "between": {"method": "irevnet", "pixel_weight": 0.1, "sees": "between"},
    "quiet": {"method": "irevnet", "unit": 0.2},
    "own": {"method": "irevnet", "remainder": "ode"},
    "contractive": {"method": "iresnet", "pixel_weight": 0.1},
    "plain": {"method": "plain", "sees": "true"},
    "last": {"method": "last_frame", "cycle_weight": 0.5, "adversarial_weight": 0.1},
}


@pytest.fixture(scope="module")
def clips():
    model, network = build_model(Config(**TINY))
    return model, network, unseen_clips(network, 2)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_run_leaves_a_record_and_weights_that_measure_the_same(tmp_path, change):
    config = Config(**TINY | change)
    record = run(config, tmp_path / "run", progress=False)
    assert results.load(tmp_path / "run") == record
    model, network, again = load(tmp_path / "run")
    assert again == config
    clips = training_clips(network, config.n_train)
    found = measure(model, network, unseen_clips(network, config.n_test), clips.frames.float().mean((0, 1)) / 255)
    for seen, rows in record["metrics"]["frames"].items():
        for name, row in rows.items():
            for key in ("psnr", "ssim", "distance"):
                assert found[seen][name][key] == pytest.approx(row[key], rel=1e-4), (seen, name, key)


def test_a_mirrored_clip_has_the_features_of_its_own_frames(clips):
    _, network, _ = clips
    data = training_clips(network, 2)
    assert len(data) == 2 * 2 * 3
    for number in (4, 10):
        clip = data.__getitems__([number])
        for x, y in zip(network.features(clip["frames"][0]), clip["features"], strict=True):
            torch.testing.assert_close(y[0], x, atol=0.02, rtol=0.01)


def test_features_half_way_are_the_mean_of_the_neighbours_and_true_ones_are_those_of_the_frame(clips):
    model, network, unseen = clips
    rows = slice(0, 2)
    for seen, frame in (("true", 8), ("half-way", 3)):
        wanted, at = wanted_features(model, unseen, rows, seen)
        assert at == frame
        if seen == "true":
            found = network.features(unseen.frames[rows, at].float() / 255)
            assert distance(model, found, wanted).max() < 1e-4
        else:
            for x, y in zip(wanted, unseen.features, strict=True):
                torch.testing.assert_close(x, (y[:, 2].float() + y[:, 4].float()) / 2)
    assert {seen: wanted_features(model, unseen, rows, seen)[1] for seen in SEEN if seen != "own"} == {
        "true": 8, "predicted +1": 4, "predicted +3": 8, "predicted +6": 14, "half-way": 3,
    }  # fmt: skip


def test_features_between_are_the_mean_of_the_neighbours():
    x = torch.randn(2, 6, 4, 3, 2)
    (found,) = between([x])
    wanted = torch.stack([(x[:, 2] + x[:, 4]) / 2, (x[:, 3] + x[:, 5]) / 2, x[:, 5]], 1).flatten(0, 1)
    torch.testing.assert_close(found, wanted)


def film(folder, length):
    """Frames of one colour each, which says their number."""
    folder.mkdir()
    for i in range(length):
        Image.fromarray(np.full((96, 160, 3), i, np.uint8)).save(folder / f"{i:03}.png")
    return Config(**TINY | {"video": str(folder), "stride": 2})


def test_a_videos_clips_have_their_frames_at_the_right_times_and_train_and_test_share_none(tmp_path, clips):
    config = film(tmp_path / "film", 80)
    training, validation, test = data_of(config, clips[1])
    number = training.__getitems__([3])["frames"][0, :, 0, 0, 0] * 255
    assert number.round().tolist() == [3, 5, 7, 9, 11, 13]
    assert len(training) == 2 * (56 - 10)
    assert test.frames[1, :, 0, 0, 0].tolist() == [57, 59, 61, *range(62, 74)]
    assert test.frames.max() == 79
    assert validation.frames.max() == 55
    torch.testing.assert_close(
        test.features[0][1, 3].float(), clips[1].features(test.frames[1, 3:4].float() / 255)[0][0], atol=0.02, rtol=0.01
    )


def test_a_video_that_is_too_short_and_an_odd_stride_are_refused(tmp_path, clips):
    config = film(tmp_path / "film", 40)
    with pytest.raises(ValueError, match="A clip takes 17 frames, a part of the video has 12"):
        data_of(config, clips[1])
    with pytest.raises(ConfigError, match="'stride' must be even"):
        Config(stride=3)


def test_a_run_on_a_video_is_measured_and_trains_the_equation_too(tmp_path):
    config = Config(**vars(film(tmp_path / "film", 64)) | {"end_to_end": True})
    record = run(config, tmp_path / "run", progress=False)
    assert record["data"]["name"] == "film"
    assert set(record["metrics"]["frames"]["half-way"]) == {"made", "copy-last", "mean image", "cross-fade"}
    assert any(name.startswith("ode.") for name in load(tmp_path / "run")[0].state_dict())


def test_a_perfect_maker_is_measured_as_perfect(clips):
    """An i-RevNet that is given its own feature and the true remainder, in the place of the detector's."""
    _, network, unseen = clips
    model, _ = build_model(Config(**TINY | {"method": "irevnet"}))
    images = unseen.frames[:, 8].float() / 255
    feature, remainder = model.maker(images)
    assert (model.maker.inverse(feature, remainder) - images).abs().max() < 1e-4
    table = measure(model, network, unseen, torch.zeros(3, 96, 160))
    assert set(table["true"]) == {"true", "last", "zero", "copy-last", "mean image"}
    assert set(table["half-way"]) == {*table["true"], "cross-fade"}
    assert table["own"]["true"]["psnr"] > 80, "its own feature and remainder: nothing is lost"
    quiet, _ = build_model(Config(**TINY | {"method": "irevnet", "unit": 0.2}))
    quiet.maker = model.maker
    for x, y in zip(quiet.own(images), model.own(images), strict=True):
        torch.testing.assert_close(x, 5 * y)
    made = quiet.frames(unseen.frames[:, 1:3].float() / 255, quiet.own(images), quiet.own(images), remainder)
    assert (made - images).abs().max() < 1e-4, "units there and back"
    assert table["true"]["copy-last"] == table["predicted +3"]["copy-last"]


def test_every_method_has_a_name_that_is_tested():
    assert {change["method"] for change in CHANGES.values()} == set(METHODS)
    assert Clips.collate({"frames": 1}) == {"frames": 1}
