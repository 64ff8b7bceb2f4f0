"""Boxes: suppression, letterbox and drawing, and the average precision of what was found."""

import math
import os

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from predoc_lib.data import catalog
from predoc_lib.metrics import mean_average_precision
from predoc_lib.yolo import COCO, Darknet, Detections, draw, letterbox, non_max_suppression


def boxes_of(*rows):
    """Detections of rows (left, top, right, bottom, score, label)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].long())


def test_a_better_box_of_the_same_class_suppresses_and_one_of_another_does_not():
    #              x    y    w    h    object  a    b
    rows = [
        [0.50, 0.5, 0.2, 0.2, 0.9, 0.9, 0.1],
        [0.51, 0.5, 0.2, 0.2, 0.8, 0.9, 0.1],  # the same thing
        [0.51, 0.5, 0.2, 0.2, 0.7, 0.1, 0.9],  # another class
        [0.90, 0.5, 0.2, 0.2, 0.6, 0.9, 0.1],  # elsewhere
        [0.10, 0.5, 0.2, 0.2, 0.1, 0.9, 0.1],  # too unsure
    ]
    found = non_max_suppression(torch.tensor([rows, rows]), confidence=0.25, iou=0.45)
    assert len(found) == 2
    assert found[0].labels.tolist() == [0, 1, 0]
    assert torch.allclose(found[0].scores, torch.tensor([0.81, 0.63, 0.54]))
    assert torch.allclose(found[0].boxes[0], torch.tensor([0.4, 0.4, 0.6, 0.6]))
    assert len(found[0].above(0.6)) == 2


def test_nothing_found_is_well_formed():
    found = non_max_suppression(torch.zeros(1, 7, 8))[0]
    assert (len(found), found.boxes.shape) == (0, (0, 4))
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert torch.equal(draw(image, found), image)
    truth = boxes_of((0, 0, 0.5, 0.5, 1, 0))
    assert mean_average_precision([found], [truth]) == {"map50": 0, "map": 0}
    assert all(math.isnan(value) for value in mean_average_precision([found], [found]).values())
    for options in ({"confidence": 2}, {"iou": -1}):
        with pytest.raises(ValueError, match="Thresholds must be from 0 to 1"):
            non_max_suppression(torch.zeros(1, 7, 8), **options)


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (30, 40)])
def test_a_letterbox_is_undone(size):
    image = torch.zeros(1, 3, 60, 80)
    image[..., 15:45, 20:60] = 1
    inside, place = letterbox(image, size)
    assert inside.shape == (1, 3, *size)
    rows, columns = (inside[0, 0] > 0.75).nonzero(as_tuple=True)
    h, w = size
    box = torch.tensor([[columns.min() / w, rows.min() / h, (columns.max() + 1) / w, (rows.max() + 1) / h]])
    assert torch.allclose(place.inverse(box), torch.tensor([[0.25, 0.25, 0.75, 0.75]]), atol=0.03)
    assert place.inverse(torch.tensor([[-1.0, -1, 2, 2]])).tolist() == [[0, 0, 1, 1]]


@pytest.mark.usefixtures("as_shipped")
def test_a_letterbox_of_another_type_or_size_is_refused():
    for image in (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8), torch.zeros(1, 3, 0, 8)):
        with pytest.raises(ValueError, match=r"floats in \[0, 1\], \[B, C, H, W\], got torch.*divide uint8"):
            letterbox(image, (32, 32))


def test_average_precision_of_cases_known_by_hand():
    truth = boxes_of((0, 0, 0.5, 0.5, 1, 0), (0.5, 0.5, 1, 1, 1, 0))
    both = boxes_of((0, 0, 0.5, 0.5, 0.9, 0), (0.5, 0.5, 1, 1, 0.8, 0))
    assert mean_average_precision([both], [truth]) == pytest.approx({"map50": 1, "map": 1})
    wrong_first = boxes_of(
        (0.5, 0, 1, 0.5, 0.95, 0), *torch.cat([both.boxes, both.scores[:, None], torch.zeros(2, 1)], 1).tolist()
    )
    # precision is 1/2 at the first and 2/3 at the second find: interpolated, 2/3 everywhere
    assert mean_average_precision([wrong_first], [truth])["map50"] == pytest.approx(2 / 3, abs=1e-6)
    # IoU 0.64: at 0.5, 0.55 and 0.6 it is a find, at the other seven thresholds it is none
    small = boxes_of((0, 0, 0.4, 0.4, 1, 0))
    one = boxes_of((0, 0, 0.5, 0.5, 1, 0))
    assert mean_average_precision([small], [one]) == pytest.approx({"map50": 1, "map": 0.3})


def test_boxes_are_drawn_where_they_are():
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    drawn = draw(image, boxes_of((0.25, 0.25, 0.75, 0.75, 1, 0)), names=("car",))
    assert drawn[:, 10, 40].any()
    assert not drawn[:, 25, 40].any()


@pytest.mark.data
def test_yolo_fastest_finds_the_person_and_the_dog():
    folder = catalog.root() / "yolo"
    if not os.environ.get("PREDOC_DATA") or not (folder / "images/person.jpg").is_file():
        pytest.skip("PREDOC_DATA names no folder that holds yolo/images/person.jpg")
    network = Darknet(folder / "yolo-fastest-1.1-xl.cfg").load_weights(folder / "yolo-fastest-1.1-xl.weights").eval()
    image = pil_to_tensor(Image.open(folder / "images/person.jpg"))[None] / 255
    inside, place = letterbox(image, network.size)
    with torch.no_grad():
        found = non_max_suppression(network(inside), confidence=0.4)[0]
    names = [COCO[label] for label in found.labels]
    assert {"person", "dog"} <= set(names)
    person = place.inverse(found.boxes)[names.index("person")]
    assert person.tolist() == pytest.approx([0.30, 0.22, 0.42, 0.87], abs=0.04)


@pytest.mark.data
def test_cocos_names_are_darknets_but_for_six_that_darknet_calls_otherwise():
    file = catalog.root() / "yolo/coco.names"
    if not os.environ.get("PREDOC_DATA") or not file.is_file():
        pytest.skip("PREDOC_DATA names no folder that holds yolo/coco.names")
    others = {
        "motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant",
        "dining table": "diningtable", "tv": "tvmonitor",
    }  # fmt: skip
    assert [others.get(name, name) for name in COCO] == file.read_text().split("\n")[:80]
