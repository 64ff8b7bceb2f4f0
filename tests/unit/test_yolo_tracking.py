"""Boxes carried on along straight lines, by hand and by brute force."""

import itertools

import pytest
import torch
from torchvision.ops import distance_box_iou

from predoc_lib.yolo import Detections
from predoc_lib.yolo.tracking import extrapolate, same_things

T = torch.arange(3.0)


def found(*rows):
    """Detections of (left, top, label), each 0.1 x 0.2."""
    boxes = torch.tensor([[x, y, x + 0.1, y + 0.2] for x, y, _ in rows]).reshape(-1, 4)
    return Detections(
        boxes, torch.linspace(0.9, 0.5, len(rows)), torch.tensor([k for *_, k in rows], dtype=torch.int64)
    )


def test_boxes_that_move_evenly_are_where_they_will_be_also_between_frames():
    seen = [found((0.1 + 0.02 * t, 0.5, 0), (0.6, 0.4 - 0.01 * t, 1)) for t in range(3)]
    for at, one in zip((2.5, 5.0), extrapolate(seen, T, torch.tensor([2.5, 5.0])), strict=True):
        wanted = found((0.1 + 0.02 * at, 0.5, 0), (0.6, 0.4 - 0.01 * at, 1))
        assert torch.allclose(one.boxes, wanted.boxes, atol=1e-6)
        assert torch.equal(one.scores, seen[-1].scores)
        assert torch.equal(one.labels, seen[-1].labels)


@pytest.mark.parametrize("centre", [(0.5, 0.42), (0.3, 0.7)])
def test_things_that_move_evenly_in_space_are_exact_wherever_the_camera_looks(centre):
    def pictured(t):
        x, y, z = 0.2 - 0.1 * t, 0.3, 8.0 - 0.8 * t
        corners = torch.tensor([[x, y, x + 1.0, y + 0.8]]) / z
        return Detections(corners + torch.tensor(centre).repeat(2), torch.ones(1), torch.zeros(1).long())

    for ahead, one in zip(
        (3.5, 6.0), extrapolate([pictured(t) for t in range(3)], T, torch.tensor([3.5, 6.0])), strict=True
    ):
        assert torch.allclose(one.boxes, pictured(ahead).boxes.clamp(0, 1), atol=1e-5)


def test_what_leaves_the_picture_is_dropped_and_what_sticks_out_is_cut_off():
    seen = [found((0.7 + 0.05 * t, 0.5, 0), (0.3, 0.4, 1)) for t in range(3)]
    boxes = [one.boxes[:, 2].tolist() for one in extrapolate(seen, T, torch.tensor([3.0, 4.5, 7.0]))]
    assert boxes == [pytest.approx(x) for x in ([0.95, 0.4], [1.0, 0.4], [0.4])]


def test_a_thing_that_seems_to_reach_the_camera_gives_a_box_that_is_none_inside_out():
    grown = [Detections(torch.tensor([[0.5 - a, 0.5 - a, 0.5 + a, 0.5 + a]]), torch.ones(1), torch.zeros(1).long())
             for a in (0.1, 0.2, 0.3)]  # fmt: skip
    boxes = torch.cat([one.boxes for one in extrapolate(grown, T, torch.tensor([3.0, 4.0, 9.0]))])
    assert torch.isfinite(boxes).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_velocity_is_of_the_frames_in_which_a_thing_was_seen_and_nothing_new_moves():
    seen = [found(), found((0.1, 0.5, 0)), found((0.13, 0.5, 0), (0.7, 0.5, 0))]
    last = extrapolate(seen, T, torch.tensor([4.0]))[0]
    assert torch.allclose(last.boxes, found((0.19, 0.5, 0), (0.7, 0.5, 0)).boxes, atol=1e-6)


def test_a_thing_lost_in_the_frame_between_is_another():
    seen = [found((0.1, 0.5, 0)), found(), found((0.14, 0.5, 0))]
    assert torch.equal(extrapolate(seen, T, torch.tensor([3.0]))[0].boxes, seen[-1].boxes)


def test_classes_are_not_mixed_and_where_nothing_is_nothing_is_found():
    assert same_things(found((0.1, 0.5, 0)), found((0.1, 0.5, 1))) == {}
    assert same_things(found((0.1, 0.5, 0)), found((0.3, 0.5, 0))) == {}
    assert [len(x) for x in extrapolate([found()] * 3, T, torch.tensor([3.0, 4.5]))] == [0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_pairs_have_the_largest_total_overlap(seed):
    torch.manual_seed(seed)
    now, before = (found(*((x, y, 0) for x, y in (0.15 * torch.rand(4, 2)).tolist())) for _ in range(2))
    overlap = distance_box_iou(now.boxes, before.boxes).clamp(min=0)
    best = max(itertools.permutations(range(4)), key=lambda order: sum(overlap[i, j] for i, j in enumerate(order)))
    assert same_things(now, before) == {i: j for i, j in enumerate(best) if overlap[i, j] > 0}


def test_boxes_that_do_not_meet_do_not_keep_others_from_meeting():
    assert same_things(found((0.10, 0.5, 0), (0.22, 0.5, 0)), found((0.28, 0.5, 0), (0.18, 0.5, 0))) == {1: 1}
