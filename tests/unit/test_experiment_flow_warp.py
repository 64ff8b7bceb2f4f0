"""The experiment end to end, very small; and that its flows, times and figures mean what they say."""

import pytest
import torch
from PIL import Image

from predoc_lib import results
from predoc_lib.batches import Rows
from predoc_lib.data import driving
from predoc_lib.experiments.flow_warp import (
    AHEAD,
    FLOWS,
    HALF_WAY,
    Config,
    build_model,
    data_of,
    drawn_unseen,
    load,
    loss_of,
    measure,
    run,
    video_unseen,
)
from predoc_lib.experiments.yolo_clips import starts
from predoc_lib.files import FileError
from predoc_lib.flow_warp import WarpODE, warp

TINY = Config(steps=2, batch_size=2, n_train=2, n_test=2, width=4, device="cpu")


@pytest.mark.filterwarnings("ignore:The model was trained")
def test_a_run_leaves_a_record_and_weights_that_measure_the_same(tmp_path):
    record = run(TINY, tmp_path / "run", progress=False)
    assert results.load(tmp_path / "run") == record
    assert set(record["metrics"]["psnr"]) == {f"{t:g}" for t in (*HALF_WAY, *AHEAD)}
    model, again = load(tmp_path / "run")
    assert again == TINY
    found = results.figures({"metrics": measure(model, data_of(TINY)[2])})
    wanted = results.figures(record)
    assert {name: wanted[name] for name in found} == pytest.approx(found, abs=1e-4)


def test_the_true_flows_lie_on_the_later_grid_and_take_frames_to_frames():
    unseen, begin = drawn_unseen(2, "test"), starts(2)
    times = {0.0: 0, 1.0: 1, 2.0: 2}
    for name, (t0, t1) in FLOWS.items():
        flow, known = unseen.flows[name]
        scene = driving(2, "test")[1]
        torch.testing.assert_close(flow[1], scene.flow(begin[1] + t0, begin[1] + t1)[0])
        earlier, later = (unseen.context[:, times[t]] if t in times else unseen.frames[t] for t in (t0, t1))
        counts = known[:, None].expand_as(later)
        moved, still = ((x - later).abs()[counts].mean() for x in (warp(earlier, flow), earlier))
        assert moved < 0.8 * still, name


class Oracle(WarpODE):
    """Knows the truth."""

    def __init__(self, unseen):
        super().__init__(width=1)
        self.unseen = unseen

    def predict(self, frames, t, t_query):
        return torch.stack([self.unseen.frames[at] for at in t_query.tolist()], 1)

    def flow(self, frames, t, t0, t1):
        return self.unseen.flows[next(name for name, x in FLOWS.items() if x == (t0, t1))][0]


def test_who_knows_the_truth_has_no_error_and_who_knows_nothing_is_a_rival():
    unseen = drawn_unseen(2, "test")
    found = measure(Oracle(unseen), unseen)
    for row in found["psnr"].values():
        assert row["ode"] == pytest.approx(100)
        assert max(value for name, value in row.items() if name != "ode") < 40
    for name, row in found["error"].items():
        flow, known = unseen.flows[name]
        lengths = [flow[i].norm(dim=0)[known[i]].mean().item() for i in range(2)]
        assert row == pytest.approx({"ode": 0, "zero": sum(lengths) / 2}, abs=1e-5)
    assert {"copy-last", "cross-fade"} < set(found["psnr"]["1.5"])
    assert {"copy-last", "extrapolation", "true flow"} < set(found["psnr"]["3"])


class NeverMirrored(Rows):
    def rand(self, *shape):
        return torch.ones(self.stop - self.start, *shape)


@pytest.mark.parametrize(("step", "late"), [(1, False), (4, False), (5, True), (6, True)])
def test_speed_has_its_price_in_the_last_third_and_second_differences_have_theirs_always(step, late):
    torch.manual_seed(0)
    config = Config(**vars(TINY) | {"steps": 6})
    model = build_model(config)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.05)  # untrained, nothing moves
    grey = torch.rand(2, 9, 3, 1, 1).expand(-1, -1, -1, 96, 160)  # without edges, which may be folded
    found = loss_of(model, grey, Rows(step, 0, 2, 2, torch.Generator()), config)
    parts = {name: value.item() for name, value in found.items()}
    assert parts["slowness"] > 1e-3
    assert parts["smoothness"] > 1e-4
    total = parts["photometric"] + parts["coarse"] + config.smoothness * parts["smoothness"]
    assert parts["loss"] == pytest.approx(total + late * config.slowness * parts["slowness"], rel=1e-6)


def test_the_loss_vanishes_for_the_velocity_that_clips_have():
    """Stripes move to the right by 4 pixels a frame, out of black and into black."""
    torch.manual_seed(0)
    model = build_model(TINY)

    def knows(speed):
        def coefficients(frames, t):
            levels = [torch.zeros(2, model.order + 1, 3, 96 // k, 160 // k) for k in (8, 4, 2)]
            for level in levels:
                level[:, 0, 0] = -speed * (t[1] - t[0])
            return levels

        return coefficients

    stripes = torch.exp(-(((torch.arange(160.0) - 60) / 12) ** 2)).expand(2, 3, 96, 160)
    clips = torch.stack([stripes.roll(4 * i, -1) for i in range(9)], 1)
    for step in (1, 2, 3, 4):
        rows = NeverMirrored(step, 0, 2, 2, torch.Generator())
        model.coefficients = knows(4.0)
        right = loss_of(model, clips, rows, TINY)
        assert right["photometric"] < 1e-3
        assert right["coarse"] < 5e-3, "on coarse grids they move by half pixels"
        assert right["smoothness"] == 0
        for speed in (0.0, -4.0):
            model.coefficients = knows(speed)
            wrong = loss_of(model, clips, rows, TINY)
            assert wrong["photometric"] > 10 * right["photometric"] + 1e-3
            assert wrong["coarse"] > 3 * right["coarse"]


@pytest.mark.filterwarnings("ignore:The model was trained")
def test_a_folder_of_frames_is_a_video(tmp_path):
    scene = driving(1, "validation")[0]
    for i in range(44):
        Image.fromarray(scene.frame(i / 4).movedim(0, -1).numpy()).save(tmp_path / f"{i:03}.png")
    record = run(Config(**vars(TINY) | {"video": str(tmp_path)}), progress=False)
    assert record["metrics"]["error"] == {}
    assert record["metrics"]["psnr"]["3"]["ode"] > 10
    with pytest.raises(FileError, match="A clip takes 13 frames"):
        video_unseen(torch.zeros(12, 3, 96, 160, dtype=torch.uint8))


def test_a_videos_clips_take_every_other_frame():
    frames = torch.arange(16, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    unseen = video_unseen(frames)
    assert len(unseen) == 4
    levels = (unseen.context[:, :, 0, 0, 0] * 255).round()
    assert levels.tolist() == [[i, i + 2, i + 4] for i in range(4)]
    assert {t: round(x[0, 0, 0, 0].item() * 255) for t, x in unseen.frames.items()} == {
        t: int(2 * t) for t in (*HALF_WAY, *AHEAD)
    }


@pytest.mark.filterwarnings("ignore:The model was trained")
def test_recorded_weights_are_better_than_what_costs_nothing():
    """A few drives do not give the record's figures, but they tell a trained model from none."""
    model, _ = load(results.RESULTS / "flow_warp" / "road-seed0")
    found = measure(model, drawn_unseen(4, "test"))
    for t, rival in (("0.5", "cross-fade"), ("1.5", "cross-fade"), ("3", "copy-last"), ("5", "copy-last")):
        assert found["psnr"][t]["ode"] > found["psnr"][t][rival] + 1
    for row in found["error"].values():
        assert row["ode"] < 0.4 * row["zero"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The model was trained")
def test_recorded_weights_have_the_figures_of_their_record():
    folder = results.RESULTS / "flow_warp" / "road-seed0"
    model, config = load(folder)
    found = results.figures({"metrics": measure(model, drawn_unseen(config.n_test, "test"))})
    wanted = results.figures(results.load(folder))
    assert {name: wanted[name] for name in found} == pytest.approx(found, abs=0.03)
