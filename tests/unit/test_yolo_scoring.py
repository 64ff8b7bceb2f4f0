"""Found boxes against true ones, by hand."""

import pytest
import torch

from predoc_lib.data.driving import Objects
from predoc_lib.experiments.yolo_measures import missed
from predoc_lib.metrics import mean_average_precision
from predoc_lib.yolo import Detections
from predoc_lib.yolo.scoring import Matched, match

LEFT, RIGHT, NOWHERE = [0.0, 0.0, 0.2, 0.2], [0.6, 0.6, 0.9, 0.9], [0.3, 0.0, 0.5, 0.2]


def found(*rows):
    """Detections of (box, score, label), the most confident first."""
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.int64))


def true(*rows):
    boxes, labels = zip(*rows, strict=True) if rows else ((), ())
    n, labels = len(rows), torch.tensor(labels, dtype=torch.int64)
    return Objects(torch.tensor(boxes).reshape(-1, 4), labels, torch.arange(n), torch.ones(n))


def matched():
    """Right at 0.9, a second box of the same thing at 0.8, wrong class at 0.7; then right at 0.6, nowhere at 0.3."""
    return match(
        [
            found((LEFT, 0.9, 0), (LEFT, 0.8, 0), (RIGHT, 0.7, 0)),
            found((LEFT, 0.6, 2), (NOWHERE, 0.3, 1)),
        ],
        [true((LEFT, 0), (RIGHT, 1)), true((LEFT, 2))],
    )


def test_boxes_are_paired_by_class_and_place_and_each_object_once():
    m = matched()
    assert m.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.3])
    assert m.right.tolist() == [True, False, False, True, False]
    assert m.finds.tolist() == pytest.approx([0.9, 0.0, 0.6])


def test_precision_recall_and_f1_at_a_threshold():
    assert matched().above(0.5) == {
        "precision": 0.5, "recall": pytest.approx(2 / 3), "f1": pytest.approx(4 / 7), "right": 2, "false": 2,
    }  # fmt: skip
    assert matched().above(0.85) == {
        "precision": 1.0, "recall": pytest.approx(1 / 3), "f1": 0.5, "right": 1, "false": 0,
    }  # fmt: skip


def test_the_curve_has_these_at_every_score():
    precision, recall = matched().curve()
    assert precision.tolist() == pytest.approx([1, 1 / 2, 1 / 3, 2 / 4, 2 / 5])
    assert recall.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3])


def test_no_threshold_has_a_higher_f1_than_the_best():
    m = Matched(torch.rand(40).sort(descending=True).values, torch.rand(40) < 0.5, torch.rand(30))
    best = m.above(m.best_threshold())["f1"]
    assert best == pytest.approx(max(m.above(t)["f1"] for t in torch.linspace(0, 1, 2001).tolist()), abs=1e-6)


def test_the_better_placed_object_is_taken_and_a_poor_overlap_is_none():
    near = [0.0, 0.0, 0.2, 0.19]
    m = match([found((near, 0.9, 0))], [true((LEFT, 0), (near, 0))])
    assert m.finds.tolist() == pytest.approx([0.0, 0.9])
    half = match([found(([0.0, 0.0, 0.2, 0.09], 0.9, 0))], [true((LEFT, 0))])
    assert not half.right.any()


def test_nothing_found_and_nothing_there_are_well_formed():
    zero = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "right": 0, "false": 0}
    assert match([found()], [true((LEFT, 0))]).above(0.1) == zero
    assert match([found()], [true()]).above(0.1) == zero
    assert match([found((LEFT, 0.9, 0))], [true()]).above(0.1) == zero | {"false": 1}
    assert match([found((LEFT, 0.9, 0))], [true()]).best_threshold() == 0.5


def test_what_the_detector_missed_is_counted_with_its_price():
    """Of four objects the detector finds one above 0.5, one at 0.4, one at 0.1, one never; false boxes: 0.45, 0.2."""
    detector = Matched(
        torch.tensor([0.9, 0.45, 0.4, 0.2, 0.1]),
        torch.tensor([True, False, True, False, True]),
        torch.tensor([0.9, 0.4, 0.1, 0.0]),
    )
    other = Matched(
        torch.tensor([0.8, 0.7, 0.6]), torch.tensor([True, False, True]), torch.tensor([0.0, 0.0, 0.8, 0.6])
    )
    figures = missed({"detector": detector, "other": other}, {"detector": 0.5, "other": 0.5})
    assert figures["detector"] == {"missed": 3, "false": 0}
    # With one false box, the detector may go down to 0.2, its second, and finds the one at 0.4.
    assert figures["other"] == {"found": 2, "false": 1, "lower": 1}


def test_the_curve_has_the_average_precision_that_pycocotools_computes():
    """On boxes of one class, some near a true one, some beside, some twice: the mean over 101 levels of recall."""
    boxes, truth = [], []
    for i in range(8):
        draw = torch.Generator().manual_seed(i)
        corner = 0.6 * torch.rand(7, 2, generator=draw)
        places = torch.cat([corner, corner + 0.1 + 0.3 * torch.rand(7, 2, generator=draw)], 1)
        near = places[:4] + 0.03 * torch.randn(4, 4, generator=draw)
        scores = torch.rand(11, generator=draw).sort(descending=True).values
        kinds = torch.zeros(11, dtype=torch.int64)
        boxes.append(Detections(torch.cat([near, near + 0.01, places[4:]]), scores, kinds))
        truth.append(Detections(places[:4], torch.ones(4), kinds[:4]))
    precision, recall = match(boxes, truth).curve()
    highest = precision.flip(0).cummax(0).values.flip(0)
    place = torch.searchsorted(recall.double(), torch.linspace(0, 1, 101, dtype=torch.float64))
    average = torch.where(place < len(highest), highest[place.clamp(max=len(highest) - 1)], 0.0).mean()
    wanted = mean_average_precision(boxes, truth)["map50"]
    assert 0.2 < wanted < 0.9, "neither trivial"
    assert average.item() == pytest.approx(wanted, abs=1e-4)
