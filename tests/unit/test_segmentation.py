"""Masks of what is to come: the U-Net, its measures against counting, and the experiment end to end."""

import pytest
import torch

from predoc_lib import results
from predoc_lib.data.driving import driving
from predoc_lib.experiments import segmentation as experiment
from predoc_lib.experiments.segmentation import CLASSES, CONTEXT, Config, Model, class_weights, clips_of, mean_iou
from predoc_lib.experiments.yolo_clips import STEP, starts
from predoc_lib.segmentation import UNet

TINY = {"steps": 2, "batch_size": 2, "n_train": 2, "n_test": 2, "width": 8, "device": "cpu"}


def test_the_net_gives_odds_of_every_pixel_and_every_parameter_learns():
    torch.manual_seed(0)
    net = UNet(4, 8)
    logits = net(torch.rand(2, 3, 16, 24))
    assert logits.shape == (2, 4, 16, 24)
    logits.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_images_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="Sides must divide by 8"):
        UNet(4)(torch.rand(1, 3, 20, 24))


def test_intersection_over_union_is_what_counting_says():
    torch.manual_seed(0)
    true, found = (torch.randint(0, CLASSES, (3, 5, 7)) for _ in range(2))
    ratios = []
    for k in range(CLASSES):
        both = sum(a == b == k for a, b in zip(true.flatten().tolist(), found.flatten().tolist(), strict=True))
        ratios.append(both / ((true == k).sum().item() + (found == k).sum().item() - both))
    assert mean_iou(found, true) == pytest.approx(sum(ratios) / CLASSES)
    assert mean_iou(true, true) == pytest.approx(1)


def test_a_rare_class_weighs_one_over_the_root_of_its_share_and_the_mean_weight_is_one():
    masks = torch.zeros(1, 1, 10, 10, dtype=torch.uint8)
    masks[..., :1, :4] = 1
    weights = class_weights(masks)
    assert weights[1] / weights[0] == pytest.approx((0.96 / 0.04) ** 0.5)
    assert 0.96 * weights[0] + 0.04 * weights[1] == pytest.approx(1)


def test_clips_have_the_masks_of_their_frames_also_mirrored():
    data = clips_of(2, "train", torch.arange(8.0))
    assert len(data) == 2 * 2 * 3
    scene, start = driving(2, "train")[1], starts(2)[1]
    frames, masks = data[5]
    assert torch.equal(masks[3], scene.mask(start + STEP * 5).long())
    assert torch.equal((255 * frames[3]).round().byte(), scene.frame(start + STEP * 5))
    other_frames, other_masks = data[11]
    assert torch.equal(other_masks.flip(-1), masks)
    assert torch.equal(other_frames.flip(-1), frames)


def test_what_goes_past_the_bottleneck_is_of_the_last_frame_seen():
    torch.manual_seed(0)
    model, seen = Model(8, (16, 24)), torch.rand(2, CONTEXT, 3, 16, 24)
    found, logits = model.predict(seen, torch.tensor([1.0, 2.5]))
    assert logits.shape == (2, 2, CLASSES, 16, 24)
    _, skips = model.net.encode(seen[:, -1])
    for i in range(2):
        torch.testing.assert_close(logits[:, i], model.net.decode(found[:, i], skips))


def test_an_untrained_painter_gives_the_last_frame():
    torch.manual_seed(0)
    model, last = Model(8, (16, 24)), torch.rand(2, 2, 3, 16, 24)
    now, then = torch.rand(2, 2, CLASSES, 16, 24)
    torch.testing.assert_close(model.paint(last, now, then), last[:, 1], atol=1e-5, rtol=0)


def test_a_run_leaves_a_record_and_weights_that_measure_the_same(tmp_path):
    record = experiment.run(Config(**TINY), tmp_path / "run", progress=False)
    assert results.load(tmp_path / "run") == record
    model, config = experiment.load(tmp_path / "run")
    assert config == Config(**TINY)
    found = experiment.measure(model, experiment.unseen_clips(config.n_test))
    for kind in ("iou", "psnr"):
        for ahead, rows in record["metrics"][kind].items():
            assert found[kind][ahead] == pytest.approx(rows, rel=1e-3)
