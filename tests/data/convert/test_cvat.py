from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from detkit.data import convert
from detkit.types import CROWD, DIFFICULT, OCCLUDED, TRUNCATED
from tests.data.convert.sets import by_name, kinds, make, put, refusal, rows
from tests.data.photos import save_image

META = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><id>5</id><name>shelf</name><mode>annotation</mode><labels>
    <label><name>tin</name><color>#fff</color><type>any</type><attributes/></label>
    <label><name>can</name><attributes><attribute><name>colour</name></attribute></attributes></label>
  </labels></task></meta>
"""
PLACE = 'xtl="1.50" ytl="2.00" xbr="9.00" ybr="8.00"'
CUBOID = (
    '<cuboid label="can" xtl1="1" ytl1="2" xbl1="1" ybl1="8" xtr1="5" ytr1="2" xbr1="5" ybr1="8" '
    'xtl2="6" ytl2="1" xbl2="6" ybl2="7" xtr2="7" ytr2="1" xbr2="7" ybr2="7"/>'
)
BOX = f'<box label="can" source="manual" occluded="0" {PLACE} z_order="0"></box>'


def xml(*images: str) -> str:
    return META + "".join(images) + "</annotations>\n"


def image(inside: str = "", name: str = "a.jpg", subset: str = "") -> str:
    more = f' subset="{subset}"' if subset else ""
    return f'<image id="0" name="{name}"{more} width="64" height="48">\n{inside}\n</image>\n'


def read(root: Path, *inside: str) -> convert.Source:
    save_image(root / "images/a.jpg")
    put(root / "annotations.xml", xml(image("\n".join(inside))))
    return convert.read("cvat", root, None)


def test_boxes_images_without_objects_and_labels(tmp_path: Path) -> None:
    save_image(tmp_path / "images/sub/b.jpg")
    save_image(tmp_path / "images/sub/unlisted.jpg")
    save_image(tmp_path / "images/a.jpg")
    put(tmp_path / "annotations.xml", xml(image(BOX), image(name="sub/b.jpg")))
    source = convert.read("cvat", tmp_path, None)
    assert source.classes == ("tin", "can")
    assert by_name(source.photos) == {"a.jpg": [("can", (1.5, 2, 9, 8), 0)], "b.jpg": []}
    assert source.photos[-1] == ("images/sub/unlisted.jpg", "", None)
    first = source.photos[0].annotation
    assert first is not None
    assert (first.hw, first.filename, first.lines.tolist()) == ((48, 64), "a.jpg", [9])
    assert kinds(source.findings) == ["unused category"]
    assert convert.splits("cvat", tmp_path) == ()


def test_subsets_are_splits(tmp_path: Path) -> None:
    put(tmp_path / "annotations.xml", xml(*(image(BOX, f"{index}.jpg", subset) for index, subset in enumerate("ABA"))))
    assert convert.splits("cvat", tmp_path) == ("A", "B")
    found = convert.read("cvat", tmp_path, "A").photos
    assert [photo.annotation.filename for photo in found if photo.annotation] == ["0.jpg", "2.jpg"]
    assert "there are: A, B" in refusal("cvat", tmp_path, "C")


def test_flags(tmp_path: Path) -> None:
    marks = "".join(
        f'<attribute name="{name}">{value}</attribute>'
        for name, value in (("difficult", "true"), ("truncated", "1"), ("is_crowd", "true"), ("colour", "red"))
    )
    box = BOX.replace('occluded="0"', 'occluded="1"').replace("></box>", f">{marks}</box>")
    source = read(tmp_path, box)
    assert rows(source.photos[0])[0][2] == DIFFICULT | TRUNCATED | CROWD | OCCLUDED
    assert "not read" in kinds(source.findings)


@pytest.mark.parametrize(
    ("element", "box"),
    [
        ('<polygon label="can" occluded="0" points="1.00,2.00;5.00,3.50;4.00,9.00" z_order="0"/>', (1, 2, 5, 9)),
        ('<polyline label="can" points="1,2;5,3.5"/>', (1, 2, 5, 3.5)),
        ('<ellipse label="can" cx="10" cy="20" rx="4" ry="2"/>', (6, 18, 14, 22)),
        ('<ellipse label="can" cx="10" cy="20" rx="4" ry="2" rotation="90"/>', (8, 16, 12, 24)),
        ('<mask label="can" rle="1,2" left="3" top="4" width="5" height="6"/>', (3, 4, 8, 10)),
        (CUBOID, (1, 1, 7, 8)),
    ],
)  # fmt: skip
def test_other_shapes_become_their_boxes(tmp_path: Path, element: str, box: tuple[float, ...]) -> None:
    source = read(tmp_path, element)
    assert rows(source.photos[0])[0][1] == pytest.approx(box, abs=1e-12)
    assert kinds(source.findings) == ["polygon", "unused category"]
    assert source.findings[0].line == 9


def test_turned_boxes(tmp_path: Path) -> None:
    place = 'xtl="10" ytl="20" xbr="30" ybr="24"'
    source = read(tmp_path, *(f'<box label="can" {place} rotation="{turn}"/>' for turn in ("90.0", "0", "180", "45")))
    boxes = [box for _, box, _ in rows(source.photos[0])]
    assert boxes[0] == pytest.approx((18, 12, 22, 32))
    assert boxes[1] == boxes[2] == (10, 20, 30, 24)
    half = (20 + 4) / 2 / 2**0.5
    assert boxes[3] == pytest.approx((20 - half, 22 - half, 20 + half, 22 + half))
    assert kinds(source.findings).count("rotated box") == 3


@pytest.mark.parametrize(
    "element", ['<points label="can" points="1,2"/>', '<tag label="can"/>', '<skeleton label="can"/>']
)
def test_what_has_no_area_is_left_out_and_said(tmp_path: Path, element: str) -> None:
    source = read(tmp_path, element, BOX)
    assert len(rows(source.photos[0])) == 1
    assert (source.findings[0].kind, source.findings[0].line) == ("no box", 9)


def test_what_is_written(tmp_path: Path) -> None:
    photos = make(tmp_path / "in", {"a<b>&'\"ü.png": [("a<b>&'\"ü", (1.5, 2.0, 9.0, 8.0), 15)]})
    convert.write("cvat", {"train": photos}, ("a<b>&'\"ü",), tmp_path / "in", tmp_path / "out")
    root = ET.parse(tmp_path / "out/annotations.xml").getroot()
    assert root.findtext("version") == "1.1"
    assert [label.text for label in root.iterfind("meta/task/labels/label/name")] == ["a<b>&'\"ü"]
    (element,) = root.iterfind("image")
    assert {key: element.get(key) for key in ("id", "subset", "width", "height")} == {
        "id": "0", "subset": "train", "width": "64", "height": "48",
    }  # fmt: skip
    (box,) = element
    assert {key: box.get(key) for key in ("xtl", "ytl", "xbr", "ybr", "occluded")} == {
        "xtl": "1.5", "ytl": "2", "xbr": "9", "ybr": "8", "occluded": "1",
    }  # fmt: skip
    assert {mark.get("name"): mark.text for mark in box} == dict.fromkeys(
        ("difficult", "truncated", "is_crowd"), "true"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (xml(image('<box xtl="1" ytl="1" xbr="2" ybr="2"/>')), "line 9: <box> has no label"),
        (xml(image('<box label="can" xtl="1" ytl="1" xbr="2"/>')), "line 9: <box> lacks a number"),
        (xml(image('<box label="can" xtl="nan" ytl="1" xbr="2" ybr="2"/>')), "lacks a number"),
        (xml(image('<box label="can" xtl="1" ytl="1" xbr="2" ybr="1e400"/>')), "lacks a number"),
        (xml(image('<polygon label="can" points="1,2;3"/>')), "lacks a number"),
        (xml(image('<polygon label="can" points=""/>')), "lacks a number"),
        (xml(image('<blob label="can"/>')), "<blob> is not known"),
        (xml('<image id="0" width="1" height="1"/>'), "an <image> has no name"),
        (xml('<track id="0" label="can"><box frame="0"/></track>'), "CVAT for video"),
        (xml(image(BOX))[:-30], "not XML"),
        (xml(image("&what;")), "not XML"),
        ('<!DOCTYPE annotations [<!ENTITY a "b">]><annotations/>', "a DOCTYPE is not allowed"),
        ("<annotations>" + "<a>" * 100_000, "not XML"),
    ],
)
def test_what_cannot_be_known_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = put(tmp_path / "annotations.xml", content)
    message = refusal("cvat", tmp_path)
    assert message.startswith(f"{path}: ")
    assert reason in message


def test_no_annotation_at_all(tmp_path: Path) -> None:
    put(tmp_path / "annotations.xml", "<annotation/>")
    assert "no CVAT annotations" in refusal("cvat", tmp_path)
