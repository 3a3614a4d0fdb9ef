import json
from xml.etree import ElementTree as ET

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from detkit import formats
from detkit.types import DIFFICULT, OCCLUDED, TRUNCATED, Detections


def found(*boxes: tuple[float, float, float, float]) -> Detections:
    count = len(boxes)
    scores = np.linspace(0.9, 0.5, count).astype(np.float32)
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), scores, np.arange(count), (100, 200))


@given(st.floats(-1e6, 1e6))
def test_a_number_is_written_exactly(value: float) -> None:
    text = formats.number(value)
    assert float(text) == value
    assert not text.endswith(".0")


def test_the_xml_is_what_labelimg_reads() -> None:
    text = formats.voc_xml("a&b.jpg", (48, 64), np.array([[1, 2, 3.5, 4]]), ["<can>"], [DIFFICULT | OCCLUDED])
    root = ET.fromstring(text)
    assert root.findtext("filename") == "a&b.jpg"
    assert [root.findtext(f"size/{tag}") for tag in ("width", "height", "depth")] == ["64", "48", "3"]
    item = root.find("object")
    assert item is not None
    assert item.findtext("name") == "<can>"
    assert [item.findtext(tag) for tag in ("difficult", "truncated", "occluded")] == ["1", "0", "1"]
    assert [item.findtext(f"bndbox/{tag}") for tag in ("xmin", "ymin", "xmax", "ymax")] == ["1", "2", "3.5", "4"]


def test_flags_are_told_apart() -> None:
    root = ET.fromstring(formats.voc_xml("a", (9, 9), np.array([[0, 0, 1, 1]]), ["x"], [TRUNCATED]))
    assert [root.findtext(f"object/{tag}") for tag in ("difficult", "truncated", "occluded")] == ["0", "1", "0"]


def test_detections_as_xml_are_whole_pixels_in_the_image() -> None:
    root = ET.fromstring(formats.detections_voc("a.jpg", found((-3.2, 1.6, 250.0, 99.4), (1, 1, 9, 9)), ["a", "b"]))
    assert [item.findtext("name") for item in root.iter("object")] == ["a", "b"]
    first = root.find("object/bndbox")
    assert first is not None
    assert [corner.text for corner in first] == ["0", "2", "200", "99"]


def test_detections_as_json() -> None:
    tree = json.loads(formats.detections_json("dir/ä.jpg", found((1.234, 2, 3, 4)), ["can"]))
    assert tree == {
        "image": "dir/ä.jpg",
        "height": 100,
        "width": 200,
        "detections": [{"label": "can", "score": 0.9, "box": [1.23, 2.0, 3.0, 4.0]}],
    }
    assert formats.detections_dict("x", found(), [])["detections"] == []
