"""The experiment end to end, very small, and what it says to bad input."""

import numpy as np
import pytest
import torch
from PIL import Image

from predoc_lib import results
from predoc_lib.data import driving
from predoc_lib.data.driving import Objects
from predoc_lib.experiments.config import ConfigError
from predoc_lib.experiments.yolo_clips import AHEAD, Clips, Unseen, draw, drawn_unseen, video_unseen
from predoc_lib.experiments.yolo_dynamics import Config, data_of, load, load_detector, run
from predoc_lib.experiments.yolo_measures import futures, measure, precisions
from predoc_lib.files import FileError
from predoc_lib.yolo import Darknet
from predoc_lib.yolo.dynamics import CopyLast, Extrapolation
from predoc_lib.yolo.futures import RandomFeatureODE

TINY = Config(steps=2, batch_size=2, n_train=2, n_test=2, width=4, device="cpu")


def counted(frames, drives=1):
    """Features that say which frame of which drive they are."""
    at = 100.0 * torch.arange(drives)[:, None] + torch.arange(frames)
    return [at[:, :, None, None, None].expand(-1, -1, 2, 1, 1)]


@pytest.mark.parametrize("dynamics", ["ode", "gru"])
def test_a_run_leaves_a_record_and_weights_that_measure_the_same(tmp_path, dynamics):
    config = Config(**vars(TINY) | {"dynamics": dynamics, "gradient_weight": 0.5, "adversarial_weight": 0.1})
    record = run(config, tmp_path / "run", progress=False)
    assert results.load(tmp_path / "run") == record
    assert set(record["metrics"]["truth"]) == {f"{t:g}" for t in AHEAD.tolist()}
    model, network, again = load(tmp_path / "run")
    assert again == config
    assert {"tracked", "detector"} < set(record["metrics"]["truth"]["3"])
    assert record["metrics"]["parameters"] == sum(p.numel() for p in model.parameters())
    _, validation, test = data_of(config, network)
    predictors = {dynamics: model, "copy-last": CopyLast(), "extrapolation": Extrapolation()}
    found = measure(network, predictors, test, validation, config.labels_above)
    aside = drawn_unseen(network, 3 * config.n_test, "test", skip=config.n_test)
    assert len(aside) == 2 * config.n_test
    found["aside"] = precisions(network, predictors, aside, config.labels_above)
    flat, wanted = results.figures({"metrics": found}), results.figures(record)
    assert {name: wanted[name] for name in flat} == pytest.approx(flat, abs=1e-6)


@pytest.mark.parametrize(("balanced", "kinetic", "gradient"), [(True, 2.0, 0.5), (False, 0.0, 0.0)])
def test_the_loss_is_of_features_heads_gradient_and_energy(balanced, kinetic, gradient):
    change = {"steps": 1, "balanced": balanced, "kinetic": kinetic, "gradient_weight": gradient}
    config = Config(**vars(TINY) | change)
    row = run(config, progress=False)["history"][0]
    paid = kinetic * row.get("energy", 0) + gradient * row.get("edges", 0)
    assert row["loss"] == pytest.approx(row["mse"] + 0.5 * row["heads"] + paid)
    assert ("energy" in row, "edges" in row) == (bool(kinetic), bool(gradient))
    other = run(Config(**vars(config) | {"balanced": not balanced}), progress=False)["history"][0]
    assert other["heads"] != pytest.approx(row["heads"], rel=1e-4)


def test_a_critics_game_is_added_to_the_loss_and_changes_what_is_learned():
    plain = Config(**vars(TINY) | {"clip": 0.0})  # a clipped gradient feels every other
    config = Config(**vars(plain) | {"adversarial_weight": 0.3})
    first, last = (run(Config(**vars(config) | {"steps": n}), progress=False)["history"][0] for n in (1, 2))
    assert first["loss"] == pytest.approx(
        first["mse"] + 0.5 * first["heads"] + 2 * first["energy"] + 0.3 * first["game"]
    )
    without = run(plain, progress=False)["history"][0]
    assert last["error3"] != pytest.approx(without["error3"], rel=1e-6)


@pytest.mark.parametrize(("horizon", "key_frames"), [(3, 1), (6, 1), (6, 2)])
def test_a_training_step_evaluates_the_field_twice_a_frame(horizon, key_frames):
    config = Config(**vars(TINY) | {"horizon": horizon, "key_frames": key_frames})
    assert run(config, progress=False)["evaluations"] == 2 * horizon


def test_key_frames_alone_are_learned(monkeypatch):
    """Every other frame of the future may be anything."""
    clips = Clips.__getitems__
    config = Config(**vars(TINY) | {"horizon": 6, "key_frames": 2})
    rows = [run(config, progress=False)["history"][0]]

    def spoiled(self, numbers):
        features = clips(self, numbers)
        for x in features:
            x[:, [3, 5, 7]] = torch.nan
        return features

    monkeypatch.setattr(Clips, "__getitems__", spoiled)
    rows.append(run(config, progress=False)["history"][0])
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"])
    assert rows[0]["error6"] == pytest.approx(rows[1]["error6"])


def test_key_frames_that_skip_the_last_frame_are_refused():
    with pytest.raises(ConfigError, match=r"'key_frames' must divide 'horizon': .* Got 2 and 3"):
        Config(key_frames=2)


@pytest.mark.parametrize("video", [False, True])
def test_futures_from_a_random_start_are_counted_and_the_best_is_found(tmp_path, video):
    change = {"dynamics": "random", "likelihood": "gaussian"}
    if video:
        scene = driving(1, "validation")[0]
        for i in range(64):
            Image.fromarray(scene.frame(i / 4).movedim(0, -1).numpy()).save(tmp_path / f"{i:03}.png")
        change |= {"video": str(tmp_path), "stride": 2}
    record = run(Config(**vars(TINY) | change), progress=False)
    assert set(record["metrics"]["futures"]) == {f"{t:g}" for t in AHEAD.tolist()}
    for row in record["metrics"]["futures"].values():
        assert 0 <= row["one"] <= 1
        assert 0 <= row["best"] <= 1
        assert row["spread"] > 0
        assert row["error"] > 0


class Known(RandomFeatureODE):
    """A random model whose k-th future is k off; features are all zero in truth."""

    scales = (torch.ones(2, 1, 1),)
    __init__ = torch.nn.Module.__init__

    def futures(self, features, t, t_query, n):
        return [[torch.full((len(features[0]), len(t_query), 2, 3, 3), float(k))] for k in (2, 1, 3)]


class Tells(Darknet):
    """Heads that find a box at the top left if the features are 1, else one elsewhere."""

    __init__ = torch.nn.Module.__init__

    def heads(self, features):
        rows = torch.tensor([[0.25, 0.25, 0.1, 0.1, 0.9, 1.0], [0.75, 0.75, 0.1, 0.1, 0.9, 1.0]])
        return torch.stack([rows[:1] if (x == 1).all() else rows[1:] for x in features[0]])


def test_the_best_future_is_the_nearest_one():
    corner = Objects(torch.tensor([[0.2, 0.2, 0.3, 0.3]]), torch.zeros(1).long(), torch.zeros(1).long(), torch.ones(1))
    zeros = [torch.zeros(2, len(AHEAD), 2, 3, 3)]
    unseen = Unseen([torch.zeros(2, 3, 2, 3, 3)], zeros, [[corner] * len(AHEAD)] * 2)
    for row in futures(Tells(), Known(), unseen, 0.3, 3, seed=0).values():
        assert row["best"] == pytest.approx(1)
        assert row["one"] == pytest.approx(1 / 3)
        assert row["spread"] == pytest.approx(1)
        assert row["error"] == pytest.approx(2)


def test_clips_are_all_runs_of_frames_a_stride_apart():
    clips = Clips(counted(9, drives=2), 3, 2)
    assert len(clips) == 2 * 5
    rows = clips.__getitems__(list(range(10)))[0][:, :, 0, 0, 0].tolist()
    assert rows == [[d + s, d + s + 2, d + s + 4] for d in (0, 100) for s in range(5)]


def test_a_videos_unseen_clips_have_frames_half_way():
    unseen = video_unseen(counted(40), stride=4)
    context, future = unseen.context[0][0, :, 0, 0, 0], unseen.future[0][0, :, 0, 0, 0]
    assert context.tolist() == [0, 4, 8]
    assert future.tolist() == [8 + 4 * t for t in AHEAD.tolist()]
    assert unseen.objects is None


@pytest.mark.parametrize("folder", ["kept", ""])
def test_drives_are_kept_in_the_folder_that_is_named_and_nowhere_if_none_is(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREDOC_DRAWN", folder)
    frames, objects = draw(2, "test", torch.arange(2.0), True)
    kept = list(tmp_path.rglob("*.safetensors"))
    assert [path.parent.name for path in kept] == [folder] * bool(folder)
    if folder:
        monkeypatch.setattr("predoc_lib.experiments.yolo_clips._drive", None)  # nothing is drawn again
    again, same = draw(2, "test", torch.arange(2.0), True)
    assert torch.equal(frames, again)
    assert [[o.boxes.tolist() for o in drive] for drive in objects] == [
        [o.boxes.tolist() for o in drive] for drive in same
    ]


def test_an_odd_stride_is_refused():
    with pytest.raises(ConfigError, match="'stride' must be even: frames half-way are measured too"):
        Config(stride=3)


def test_a_video_that_is_shorter_than_a_clip_is_refused(tmp_path):
    with pytest.raises(FileError, match="A clip takes 21 frames, there are 20: take a smaller stride, or a longer"):
        Clips(counted(20), 6, 4)
    scene = driving(1)[0]
    for i in range(8):
        Image.fromarray(scene.frame(i).movedim(0, -1).numpy()).save(tmp_path / f"{i}.png")
    with pytest.raises(FileError, match="A clip takes"):
        run(Config(**vars(TINY) | {"video": str(tmp_path)}), progress=False)


def test_a_folder_of_frames_is_a_video(tmp_path):
    scene = driving(1, "validation")[0]
    for i in range(64):
        Image.fromarray(scene.frame(i / 4).movedim(0, -1).numpy()).save(tmp_path / f"{i:03}.png")
    record = run(Config(**vars(TINY) | {"video": str(tmp_path), "stride": 2}), progress=False)
    assert "truth" not in record["metrics"]
    assert record["metrics"]["missed"] == {"trained": {}, "beyond": {}} or not any(record["metrics"]["missed"].values())
    assert all(row["detector"]["map50"] in (0.0, pytest.approx(1.0)) for row in record["metrics"]["own"].values())
    assert len(record["data"]["sha256"]) == 64


def test_an_absent_detector_is_named():
    with pytest.raises(FileError, match="nowhere"):
        load_detector(Config(detector="nowhere.cfg"))


@pytest.mark.parametrize("name", ["road-ode-seed0", "road-gru-seed0"])
def test_recorded_weights_are_better_than_copy_last(name):
    """A few drives do not give the record's figures, but they tell a trained model from none."""
    model, network, config = load(results.RESULTS / "yolo_dynamics" / name)
    _, _, test = data_of(Config(**vars(config) | {"n_train": 1, "n_test": 6}), network)
    figures = measure(network, {"model": model, "copy": CopyLast()}, test, test, config.labels_above)["truth"]
    gain = np.mean([figures[t]["model"]["map50"] - figures[t]["copy"]["map50"] for t in ("2", "3", "6")])
    assert gain > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["road-ode-seed0", "road-gru-seed0"])
def test_recorded_weights_have_the_figures_of_their_record(name):
    folder = results.RESULTS / "yolo_dynamics" / name
    model, network, config = load(folder)
    _, validation, test = data_of(Config(**vars(config) | {"n_train": 1}), network)
    found = measure(network, {config.dynamics: model}, test, validation, config.labels_above)["truth"]
    recorded = results.load(folder)["metrics"]["truth"]
    for t in found:
        assert found[t][config.dynamics]["map50"] == pytest.approx(recorded[t][config.dynamics]["map50"], abs=5e-3)
