"""YOLO detectors from Darknet's files, and what their features do in time (report, section 5.1)."""

from pathlib import Path

from predoc_lib.yolo.boxes import COCO, Detections, Letterbox, draw, letterbox, non_max_suppression
from predoc_lib.yolo.darknet import Darknet
from predoc_lib.yolo.dynamics import FeatureODE
from predoc_lib.yolo.loss import detection_loss

ROAD = Path(__file__).with_name("road.cfg")  # the embedded detector's

__all__ = [
    "COCO",
    "ROAD",
    "Darknet",
    "Detections",
    "FeatureODE",
    "Letterbox",
    "detection_loss",
    "draw",
    "letterbox",
    "non_max_suppression",
]
