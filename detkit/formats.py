"""Annotations and detections as the files other programs read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
from numpy.typing import NDArray

from detkit.types import DIFFICULT, OCCLUDED, TRUNCATED, Detections


def number(value: float) -> str:
    """A coordinate as text: without a point where it is whole, else with the decimals it needs and no more."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def voc_xml(
    filename: str,
    hw: tuple[int, int],
    boxes: NDArray[np.floating],
    names: Sequence[str],
    flags: Sequence[int] | None = None,
    scores: Sequence[float | None] | None = None,
) -> str:
    """One photo's annotation as Pascal-VOC XML (VOC 2012 devkit, as LabelImg reads and writes it).

    boxes: [G, 4] x1 y1 x2 y2, pixels, 0-based edges, written as they are (setting ``data.convention: edges``).
    names: the class name of each box. flags: DIFFICULT, TRUNCATED, OCCLUDED bits. scores: written as a comment field
    that labelling tools ignore; None: of no detection.
    """
    root = ET.Element("annotation")

    def put(parent: ET.Element, tag: str, text: str = "") -> ET.Element:
        element = ET.SubElement(parent, tag)
        element.text = text or None
        return element

    put(root, "folder", "JPEGImages")
    put(root, "filename", filename)
    put(put(root, "source"), "database", "Unknown")
    size = put(root, "size")
    for tag, value in (("width", hw[1]), ("height", hw[0]), ("depth", 3)):
        put(size, tag, str(value))
    put(root, "segmented", "0")
    for index, (box, name) in enumerate(zip(boxes, names, strict=True)):
        flag = flags[index] if flags is not None else 0
        item = put(root, "object")
        put(item, "name", name)
        put(item, "pose", "Unspecified")
        put(item, "truncated", str(int(bool(flag & TRUNCATED))))
        put(item, "difficult", str(int(bool(flag & DIFFICULT))))
        put(item, "occluded", str(int(bool(flag & OCCLUDED))))
        score = scores[index] if scores is not None else None
        if score is not None:
            put(item, "comment", f"score {score:.4f}")
        bndbox = put(item, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            put(bndbox, tag, number(float(value)))
    ET.indent(root, "\t")
    return ET.tostring(root, encoding="unicode") + "\n"


def whole_pixels(boxes: NDArray[np.floating], hw: tuple[int, int]) -> NDArray[np.floating]:
    """Boxes [K, 4] in whole pixels (LabelImg reads nothing else), inside an image of that height and width."""
    limit = np.array(hw[::-1])
    low = np.clip(np.rint(boxes[:, :2]), 0, limit - 1)
    high = np.clip(np.rint(boxes[:, 2:]), low + 1, limit)
    return np.concatenate([low, high], 1)


def detections_voc(filename: str, found: Detections, classes: Sequence[str]) -> str:
    """Detections as Pascal-VOC XML, in whole pixels."""
    boxes = whole_pixels(found.boxes, found.hw)
    return voc_xml(filename, found.hw, boxes, [classes[i] for i in found.labels], scores=found.scores.tolist())


def detections_dict(path: str | Path, found: Detections, classes: Sequence[str]) -> dict[str, object]:
    """Detections as the JSON object that ``detkit predict`` writes: boxes in pixels of the original photo."""
    return {
        "image": str(path),
        "height": found.hw[0],
        "width": found.hw[1],
        "detections": [
            {"label": classes[label], "score": round(score, 4), "box": [round(side, 2) for side in box]}
            for box, score, label in zip(
                found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
            )
        ],
    }


def detections_json(path: str | Path, found: Detections, classes: Sequence[str]) -> str:
    """`detections_dict` as indented JSON text."""
    return json.dumps(detections_dict(path, found, classes), indent=1, ensure_ascii=False) + "\n"


def detections_yolo(found: Detections) -> str:
    """Detections as YOLO's text file: a line an object, class number, centre, width and height as shares of the photo,
    and the score, as Ultralytics writes and reads it."""
    height, width = found.hw
    lines = []
    for (x1, y1, x2, y2), score, label in zip(found.boxes.tolist(), found.scores, found.labels, strict=True):
        shares = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(f"{label} {' '.join(f'{share:.6f}' for share in shares)} {score:.4f}\n")
    return "".join(lines)
