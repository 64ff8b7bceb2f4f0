"""YOLO detectors from Darknet's files, and what their features do in time (report, section 5.1)."""

from predoc_lib.yolo.boxes import COCO, Detections, Letterbox, draw, letterbox, non_max_suppression
from predoc_lib.yolo.darknet import Darknet

__all__ = ["COCO", "Darknet", "Detections", "Letterbox", "draw", "letterbox", "non_max_suppression"]
