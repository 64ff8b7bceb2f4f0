"""The detector's loss, and its experiment end to end, very small."""

import pytest
import torch

from predoc_lib import results
from predoc_lib.batches import Rows
from predoc_lib.experiments.yolo_detector import Config, changed, draw_frames, load, measure, run
from predoc_lib.yolo import ROAD, Darknet, detection_loss

TINY = Config(steps=3, batch_size=4, n_train=3, n_test=4, device="cpu")


def test_a_run_leaves_darknets_files_that_are_as_good(tmp_path):
    record = run(TINY, tmp_path / "run", progress=False)
    assert results.load(tmp_path / "run") == record
    frames = draw_frames(TINY.n_test, "test", (3.0,), TINY.seed)
    network = load(tmp_path / "run")
    assert network.classes == 3
    found = measure(network, frames)
    assert {name: record["metrics"][name] for name in found} == pytest.approx(found)


@pytest.mark.slow
def test_the_recorded_detector_has_the_figures_of_its_record():
    folder = results.RESULTS / "yolo_detector/road"
    record = results.load(folder)
    frames = draw_frames(record["config"]["n_test"], "test", (3.0,), record["seed"])
    found = measure(load(folder).fused(), frames)
    assert found == pytest.approx({name: record["metrics"][name] for name in found}, abs=1e-3)
    assert found["map50"] >= 0.85


def test_logits_that_say_the_truth_have_no_loss_and_learning_finds_a_box():
    """Gradient descent on the logits alone must end where decoding gives the true box and class."""
    network = Darknet(ROAD)
    truth = torch.tensor([[0.0, 1, 0.43, 0.30, 0.65, 0.75], [1.0, 2, 0.10, 0.20, 0.145, 0.44]])
    logits = [torch.zeros(2, 24, 6, 10, requires_grad=True), torch.zeros(2, 24, 12, 20, requires_grad=True)]
    optimizer = torch.optim.Adam(logits, lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        loss = detection_loss(network, logits, truth)
        loss["loss"].backward()
        optimizer.step()
        schedule.step()
    assert loss["box"] < 0.01
    assert loss["kind"] < 0.01
    yolos = [network.layers[at + 1] for at in network.heads_at]
    found = torch.cat([yolo(x) for yolo, x in zip(yolos, logits, strict=True)], 1)
    for row in truth:
        best = found[int(row[0])][found[int(row[0]), :, 4] > 0.5]
        assert len(best) >= 1
        x, y, w, h = best[:, :4].unbind(1)
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
        assert (corners - row[2:]).abs().max() < 0.01
        assert (best[:, 5:].argmax(1) == row[1]).all()


def test_an_image_without_a_thing_costs_only_what_is_seen_in_it():
    network = Darknet(ROAD)
    logits = [torch.full((1, 24, 6, 10), -20.0), torch.full((1, 24, 12, 20), -20.0)]
    loss = detection_loss(network, logits, torch.empty(0, 6))
    assert loss["loss"] < 1e-3
    assert loss["box"] == loss["kind"] == 0


def test_a_mirrored_frame_has_mirrored_boxes():
    frames = draw_frames(16, "train", (0.0,), 0)
    images, truth = frames.__getitems__(list(range(16)))
    rows = Rows(1, 0, 16, 16, torch.Generator().manual_seed(0))
    images = images.float() / 255
    new_images, new_truth = changed(images, truth, rows)
    turned = 0
    for old, new in zip(truth, new_truth, strict=True):
        i = int(old[0])
        if torch.equal(old, new):
            continue
        turned += 1
        assert torch.allclose(new[2::2], 1 - old[[4, 2]])
        assert torch.equal(new[[0, 1, 3, 5]], old[[0, 1, 3, 5]])
        a, b = images[i].flip(-1), new_images[i]
        light = (b.mean() / a.mean()).item()
        assert (b - (a * light).clamp(0, 1)).abs().mean() < 0.02
    assert 0 < turned < len(truth)
