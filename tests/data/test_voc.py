import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detkit.data import voc
from detkit.data.labels import Annotation
from detkit.errors import UserError
from detkit.formats import voc_xml
from detkit.types import OCCLUDED, TRUNCATED
from tests.data.photos import save_xml


def read_text(folder: Path, text: str | bytes) -> Annotation:
    path = folder / "a.xml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return voc.read(path)


NAME = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zs", "Zl", "Zp", "Cn")), min_size=1, max_size=12)
CORNER = st.floats(-1e6, 1e6)
OBJECT = st.tuples(NAME, CORNER, CORNER, CORNER, CORNER, st.integers(0, 7))


@given(st.lists(OBJECT, max_size=6), st.integers(1, 20_000), st.integers(1, 20_000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_written_is_read_back_exactly(
    tmp_path: Path, objects: list[tuple[str, float, float, float, float, int]], height: int, width: int
) -> None:
    boxes = np.array([item[1:5] for item in objects]).reshape(-1, 4)
    text = voc_xml("a.jpg", (height, width), boxes, [item[0] for item in objects], [item[5] for item in objects])
    read = read_text(tmp_path, text)
    assert read.names == tuple(item[0] for item in objects)
    assert (read.boxes == boxes).all()
    assert read.flags.tolist() == [item[5] for item in objects]
    assert (read.filename, read.hw) == ("a.jpg", (height, width))


def test_devkit_boxes_lose_one_at_the_low_edges(tmp_path: Path) -> None:
    path = save_xml(tmp_path / "a.xml", [("can", (1, 1, 64, 48.5))])
    assert voc.read(path, "devkit").boxes.tolist() == [[0, 0, 64, 48.5]]
    assert voc.read(path, "edges").boxes.tolist() == [[1, 1, 64, 48.5]]


def test_flags_parts_and_unknown_tags(tmp_path: Path) -> None:
    box = "<bndbox><ymax>4</ymax><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax></bndbox>"
    part = "<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part>"
    flags = "<truncated>1</truncated><difficult>0</difficult><occluded> 1 </occluded><pose>Left</pose>"
    text = f"<annotation><owner/><object>{part}<name> dog<!-- big --> </name>{flags}{box}</object></annotation>"
    read = read_text(tmp_path, text)
    assert read.names == ("dog",)
    assert read.boxes.tolist() == [[1, 2, 3, 4]]
    assert read.flags.tolist() == [TRUNCATED | OCCLUDED]
    assert read.hw is None
    assert read.filename == ""


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "iso-8859-1", "gb18030"])
def test_encodings_and_windows_line_ends(tmp_path: Path, encoding: str) -> None:
    name = "冰茶" if encoding == "gb18030" else "Käse"
    text = voc_xml("a.jpg", (9, 9), np.array([[0, 0, 5, 5]]), [name]).replace("\n", "\r\n")
    declared = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>\r\n{text}'
    assert read_text(tmp_path, declared.encode(encoding)).names == (name,)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not XML"),
        ("\xff\xd8 this is a JPEG", "not XML"),
        ("<annotation>\n<object>\n</annotation>", "line 3"),
        ("<annotation>&what;</annotation>", "not XML"),
        ("<html/>", "<html>"),
        ("<annotation>\n<object><name>a</name></object></annotation>", "line 2: the object has no <bndbox>"),
        ("<annotation><object><bndbox/></object></annotation>", "lacks a number"),
        ("<annotation><object><bndbox><xmin>x</xmin></bndbox></object></annotation>", "lacks a number"),
    ],
)
def test_what_is_no_annotation_is_refused_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        read_text(tmp_path, text)
    assert "a.xml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "", "12,5"])
def test_a_corner_is_a_finite_number(tmp_path: Path, value: str) -> None:
    box = f"<bndbox><xmin>{value}</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox>"
    with pytest.raises(UserError, match="lacks a number"):
        read_text(tmp_path, f"<annotation><object><name>a</name>{box}</object></annotation>")


def test_entities_are_refused_at_once(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("swordfish")
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "lol"}">' for i in range(12))
    started = time.perf_counter()
    for declared, use in (
        (f"<!DOCTYPE annotation [{laughs}]>", "&l11;"),
        (f'<!DOCTYPE annotation [<!ENTITY x SYSTEM "file://{secret}">]>', "&x;"),
        ('<!DOCTYPE annotation [<!ENTITY x "y">]>', "my&x;dog"),
        ('<!DOCTYPE annotation SYSTEM "http://localhost:1/a.dtd">', "a"),
    ):
        with pytest.raises(UserError, match=r"a\.xml") as caught:
            read_text(tmp_path, f"{declared}<annotation><object><name>{use}</name></object></annotation>")
        assert "swordfish" not in str(caught.value)
    assert time.perf_counter() - started < 0.5
