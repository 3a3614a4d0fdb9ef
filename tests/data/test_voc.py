import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from detkit.config import Data
from detkit.data import voc
from detkit.errors import UserError
from detkit.formats import voc_xml
from detkit.types import DIFFICULT, OCCLUDED, TRUNCATED
from tests.data.photos import BOX, CAN, make_voc, save_image, save_xml

GROCERIES = Path(__file__).parents[3] / "shared" / "data" / "groceries"


def scan(root: Path, split: str = "train", **settings: object) -> voc.DataSet:
    return voc.scan(Data(root=root, **settings), split)


def refusal(root: Path, split: str = "train", **settings: object) -> str:
    """The one line that scanning gives."""
    with pytest.raises(UserError) as caught:
        scan(root, split, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(dataset: voc.DataSet) -> list[str]:
    return [dataset.name(index) for index in range(len(dataset))]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def read_text(folder: Path, text: str | bytes) -> voc.Annotation:
    path = folder / "a.xml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return voc.read(path)


# --- one file


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
        ("<annotation>\n<object><name>a</name></object></annotation>", "line 2 has no <bndbox>"),
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


# --- layouts and splits


def test_vocs_layout(tmp_path: Path) -> None:
    dataset = scan(make_voc(tmp_path))
    assert names(dataset) == [f"JPEGImages/p{index}.jpg" for index in range(4)]
    assert dataset.classes == ("box", "can")
    assert dataset.findings == ()
    record = dataset[3]
    assert record.path == str(tmp_path / "JPEGImages" / "p3.jpg")
    assert record.hw == (48, 64)
    assert record.boxes.tolist() == [list(CAN[1]), list(BOX[1])]
    assert record.labels.tolist() == [1, 0]
    assert names(scan(tmp_path, "val")) == ["JPEGImages/p4.jpg", "JPEGImages/p5.jpg"]
    with pytest.raises(IndexError):
        dataset[4]


def test_photos_beside_or_near_their_xml_in_any_folders(tmp_path: Path) -> None:
    for name in ("top", "shop 1/a.b", "shop 2/a.b", "images/deep/c"):
        save_image(tmp_path / f"{name}.JPG", format="JPEG")
    for name in ("top", "shop 1/a.b", "shop 2/a.b", "labels/c"):
        save_xml(tmp_path / f"{name}.xml", [CAN])
    save_image(tmp_path / ".hidden" / "x.jpg")
    dataset = scan(tmp_path, val_share=0)
    assert names(dataset) == ["images/deep/c.JPG", "shop 1/a.b.JPG", "shop 2/a.b.JPG", "top.JPG"]
    assert len(dataset.boxes) == 4


def test_a_hash_split_is_stable_when_photos_are_added(tmp_path: Path) -> None:
    def both() -> tuple[set[str], set[str]]:
        return set(names(scan(tmp_path))), set(names(scan(tmp_path, "val")))

    def add(first: int, last: int) -> None:
        for index in range(first, last):
            save_image(tmp_path / f"{index}.png", (8, 8))
            save_xml(tmp_path / f"{index}.xml", [("can", (0, 0, 4, 4))], (8, 8))

    add(0, 60)
    train, val = both()
    assert not train & val
    assert len(train | val) == 60
    assert 4 <= len(val) <= 22
    add(60, 90)
    more_train, more_val = both()
    assert train <= more_train
    assert val <= more_val


@pytest.mark.parametrize(
    "text",
    [
        b"p0\r\np2\r\n",
        b"\xef\xbb\xbfp0\n\n  p2",
        b"p0  1\np2 -1\n",
        "p0\r\np2\r\n".encode("utf-16"),
        b"p0.jpg\np2.jpg\n",
        b"JPEGImages\\p0.jpg\r\nJPEGImages\\p2.jpg\r\n",
        b"./JPEGImages/p0.jpg\nAnnotations/p2.xml\n",
    ],
)
def test_split_files_as_people_write_them(tmp_path: Path, text: bytes) -> None:
    make_voc(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes(text)
    assert names(scan(tmp_path)) == ["JPEGImages/p0.jpg", "JPEGImages/p2.jpg"]


def test_a_stem_may_look_like_vocs_columns(tmp_path: Path) -> None:
    for stem in ("shelf 1", "shelf"):
        save_image(tmp_path / f"{stem}.jpg")
        save_xml(tmp_path / f"{stem}.xml", [CAN])
    (tmp_path / "train.txt").write_text("shelf 1\n")
    assert names(scan(tmp_path)) == ["shelf 1.jpg"]


def test_a_photo_listed_twice_is_used_once_and_said(tmp_path: Path) -> None:
    make_voc(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("p0\np1\np0\n")
    dataset = scan(tmp_path)
    assert len(dataset) == 2
    assert dataset.findings[0][:3] == ("listed twice", "ImageSets/Main/train.txt", "line 3: p0")


def test_wrong_splits_are_one_line(tmp_path: Path) -> None:
    make_voc(tmp_path)
    main = tmp_path / "ImageSets" / "Main"
    assert "did you mean 'train'?" in refusal(tmp_path, "trian")
    (main / "train.txt").write_text("p0\np11\n")
    assert "line 2" in refusal(tmp_path)
    assert "'p11' (did you mean 'p1'?)" in refusal(tmp_path)
    (main / "train.txt").write_text("\n")
    assert "lists no photo" in refusal(tmp_path)
    for path in main.iterdir():
        path.unlink()
    assert "'train' and 'val'" in refusal(tmp_path, "test")
    assert "val_share" in refusal(tmp_path, "val", val_share=0)


def test_missing_and_empty_folders_are_one_line(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "gone")
    assert "no images here" in refusal(tmp_path)
    save_xml(tmp_path / "a.xml", [CAN])
    assert "no images here" in refusal(tmp_path)


def test_two_photos_of_one_name_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    save_image(tmp_path / "a.png")
    save_xml(tmp_path / "a.xml", [CAN])
    assert "a.jpg" in refusal(tmp_path)
    assert "a.png" in refusal(tmp_path)


def test_a_link_to_its_own_folder_ends(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    save_xml(tmp_path / "a.xml", [CAN])
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(scan(tmp_path, val_share=0)) == 1


# --- classes


def test_classes_come_from_the_config_a_file_or_the_xml(tmp_path: Path) -> None:
    make_voc(tmp_path)
    (tmp_path / "other.txt").write_bytes(b"\xef\xbb\xbfcan\r\nbottle\r\n\r\nbox\r\n")
    assert scan(tmp_path).classes == ("box", "can")
    assert scan(tmp_path, classes=("can", "box")).classes == ("can", "box")
    for given_as in (tmp_path / "other.txt", Path("other.txt")):
        dataset = scan(tmp_path, classes=given_as)
        assert dataset.classes == ("can", "bottle", "box")
        assert dataset[0].labels.tolist() == [0, 2]
    (tmp_path / "classes.txt").write_text("can\nbox\n")
    assert scan(tmp_path).classes == ("can", "box")


def test_classes_are_those_of_all_splits(tmp_path: Path) -> None:
    make_voc(tmp_path)
    edit(tmp_path / "Annotations" / "p5.xml", ">can<", ">apple<")
    assert scan(tmp_path).classes == scan(tmp_path, "val").classes == ("apple", "box", "can")


def test_wrong_class_lists_are_one_line(tmp_path: Path) -> None:
    make_voc(tmp_path)
    message = refusal(tmp_path, classes=("cans", "box"))
    assert "p0.xml: class 'can' is not in the list (did you mean 'cans'?)" in message
    assert "twice" in refusal(tmp_path, classes=("can", "box", "can"))
    assert "no such file" in refusal(tmp_path, classes=Path("gone.txt"))
    (tmp_path / "classes.txt").write_text("\n")
    assert "lists no class" in refusal(tmp_path)


# --- nothing is changed unsaid


def test_boxes_are_clipped_or_dropped_and_each_is_listed(tmp_path: Path) -> None:
    make_voc(tmp_path)
    objects = [
        CAN,
        ("box", (-5, 10, 30, 48.5)),  # partly outside
        ("box", (30, 10, 20, 20)),  # inverted
        ("can", (5, 5, 5, 20)),  # no width
        ("can", (64, 0, 80, 20)),  # beyond the right edge
        BOX,
    ]
    save_xml(tmp_path / "Annotations" / "p1.xml", objects, flags=[0, 1, 0, 0, 0, 1])
    dataset = scan(tmp_path)
    record = dataset[1]
    assert record.boxes.tolist() == [list(CAN[1]), [0, 10, 30, 48], list(BOX[1])]
    assert record.labels.tolist() == [1, 0, 0]
    assert record.flags.tolist() == [0, DIFFICULT, DIFFICULT]
    assert [len(dataset[index].labels) for index in range(4)] == [2, 3, 2, 2]
    assert [(finding.kind, finding.action) for finding in dataset.findings] == [
        ("box partly outside", "clipped to 0 10 30 48"),
        ("box without area", "dropped"),
        ("box without area", "dropped"),
        ("box outside the image", "dropped"),
    ]
    assert all(finding.file == "Annotations/p1.xml" for finding in dataset.findings)
    assert dataset.findings[0].what == "box -5 10 30 48.5 in an image of 64x48"


def test_the_images_own_size_counts_and_a_wrong_one_is_listed(tmp_path: Path) -> None:
    make_voc(tmp_path)
    notes = tmp_path / "Annotations"
    edit(notes / "p0.xml", "<width>64</width>", "<width>640</width>")
    edit(notes / "p1.xml", "<width>64</width>", "<width>0</width>")
    edit(notes / "p2.xml", "<size>", "<sise>")
    edit(notes / "p2.xml", "</size>", "</sise>")
    turned = Image.Exif()
    turned[0x0112] = 6
    save_image(tmp_path / "JPEGImages" / "p3.jpg", (64, 48), exif=turned)
    save_xml(notes / "p3.xml", [CAN], (64, 48))
    dataset = scan(tmp_path)
    assert {dataset[index].hw for index in range(4)} == {(48, 64)}
    kinds = [finding.kind for finding in dataset.findings]
    assert kinds == ["size disagrees", "size missing", "size missing", "size disagrees"]
    assert "EXIF" in dataset.findings[3].what


def test_photos_without_xml(tmp_path: Path) -> None:
    make_voc(tmp_path)
    for name in ("p0", "p2"):
        (tmp_path / "Annotations" / f"{name}.xml").unlink()
    message = refusal(tmp_path)
    assert "p0.jpg: no XML for this image and 1 more" in message
    assert "data.unlabelled" in message
    skipped = scan(tmp_path, unlabelled="skip")
    assert names(skipped) == ["JPEGImages/p1.jpg", "JPEGImages/p3.jpg"]
    negative = scan(tmp_path, unlabelled="negative")
    assert [len(negative[index].labels) for index in range(4)] == [0, 2, 0, 2]
    for dataset in (skipped, negative):
        assert [(found.kind, found.file) for found in dataset.findings] == [
            ("image without XML", "JPEGImages/p0.jpg"),
            ("image without XML", "JPEGImages/p2.jpg"),
        ]


def test_a_photo_whose_xml_has_no_object_is_a_negative(tmp_path: Path) -> None:
    make_voc(tmp_path)
    save_xml(tmp_path / "Annotations" / "p0.xml", [])
    dataset = scan(tmp_path)
    assert len(dataset[0].labels) == 0
    assert len(dataset[1].labels) == 2
    for index in range(1, 4):
        save_xml(tmp_path / "Annotations" / f"p{index}.xml", [])
    assert "no object" in refusal(tmp_path)


def test_bad_files_are_one_line_that_names_them(tmp_path: Path) -> None:
    make_voc(tmp_path)
    photo, note = tmp_path / "JPEGImages" / "p1.jpg", tmp_path / "Annotations" / "p1.xml"
    whole_photo, whole_note = photo.read_bytes(), note.read_bytes()
    photo.write_bytes(whole_photo[:-300])
    assert f"{photo}: damaged or cut-off" in refusal(tmp_path)
    photo.unlink()
    assert f"{note}: there is no image" in refusal(tmp_path)
    photo.write_bytes(whole_photo)
    note.write_bytes(whole_note[:300])
    assert f"{note}: not XML (line" in refusal(tmp_path)


def test_what_is_in_no_split_is_let_be(tmp_path: Path) -> None:
    make_voc(tmp_path)
    save_image(tmp_path / "JPEGImages" / "spare.jpg")
    (tmp_path / "JPEGImages" / "p5.jpg").write_bytes(b"")
    assert len(scan(tmp_path)) == 4
    assert "p5.jpg" in refusal(tmp_path, "val")


def test_findings_are_summed_up_and_written(tmp_path: Path) -> None:
    findings = [
        voc.Finding("size missing", "a.xml", "the XML states no size", "64x48 is used"),
        voc.Finding("box without area", "b.xml", "Käse 1 1 1 1", "dropped"),
        voc.Finding("size missing", "c.xml", "the XML states no size", "9x9 is used"),
    ]
    lines = voc.summary(findings)
    assert len(lines) == 2
    assert lines[0].startswith("size missing: a.xml and 1 more")
    assert voc.summary([]) == []
    voc.write_findings(tmp_path / "findings.jsonl", findings)
    written = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text("utf-8").splitlines()]
    assert written == [finding._asdict() for finding in findings]


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    voc.scan(Data(root=make_voc(tmp_path)), "train", progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.skipif(not GROCERIES.is_dir(), reason="the groceries are not here")
def test_groceries() -> None:
    dataset = scan(GROCERIES, "val")
    assert len(dataset) == 656
    assert len(dataset.classes) == 25
    assert all(len(dataset[index].labels) for index in range(len(dataset)))
