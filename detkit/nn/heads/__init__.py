"""Detection heads. `build` is the one place that knows them all."""

from __future__ import annotations

from detkit import config
from detkit.nn.contract import FeatureMaps, Head
from detkit.nn.heads.faster_rcnn import FasterRCNNHead
from detkit.nn.heads.ssd import SSDHead
from detkit.nn.heads.yolo import YOLOHead
from detkit.nn.heads.yolo_v1 import YOLOv1Head


def build(settings: config.Head, below: FeatureMaps, classes: int, canvas: tuple[int, int]) -> Head:
    """The head for a neck that gives the maps of `below`. classes: C, without background.
    canvas: height and width of the configured input. Raises ValueError, saying what to change, where they don't fit."""
    match settings:
        case config.SSD():
            return SSDHead(settings, below, classes, canvas)
        case config.YOLO():
            return YOLOHead(settings, below, classes)
        case config.YOLOv1():
            return YOLOv1Head(settings, below, classes, canvas)
        case config.FasterRCNN():
            return FasterRCNNHead(settings, below, classes)
