import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit import imaging
from detkit.config import Data
from detkit.data import findings, scan
from detkit.data.findings import Finding
from detkit.data.labels import DataSet
from detkit.errors import UserError
from detkit.types import DIFFICULT
from tests.data.photos import BOX, CAN, make_voc, save_image, save_xml

GROCERIES = Path(__file__).parents[3] / "shared" / "data" / "groceries"


def read(root: Path, split: str = "train", **settings: object) -> DataSet:
    return scan.scan(Data(root=root, **settings), split)


def refusal(root: Path, split: str = "train", **settings: object) -> str:
    """The one line that scanning gives."""
    with pytest.raises(UserError) as caught:
        read(root, split, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def found(dataset: DataSet) -> list[Finding]:
    """The findings beside the one about coordinates that every data set has."""
    assert dataset.findings[0].kind == "coordinates"
    return list(dataset.findings[1:])


def names(dataset: DataSet) -> list[str]:
    return [dataset.name(index) for index in range(len(dataset))]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


# --- layouts and splits


def test_vocs_layout(tmp_path: Path) -> None:
    dataset = read(make_voc(tmp_path))
    assert names(dataset) == [f"JPEGImages/p{index}.jpg" for index in range(4)]
    assert dataset.classes == ("box", "can")
    assert found(dataset) == []
    record = dataset[3]
    assert record.path == str(tmp_path / "JPEGImages" / "p3.jpg")
    assert record.hw == (48, 64)
    assert record.boxes.tolist() == [list(CAN[1]), list(BOX[1])]
    assert record.labels.tolist() == [1, 0]
    assert names(read(tmp_path, "val")) == ["JPEGImages/p4.jpg", "JPEGImages/p5.jpg"]
    with pytest.raises(IndexError):
        dataset[4]


def test_photos_beside_or_near_their_xml_in_any_folders(tmp_path: Path) -> None:
    for name in ("top", "shop 1/a.b", "shop 2/a.b", "images/deep/c"):
        save_image(tmp_path / f"{name}.JPG", format="JPEG")
    for name in ("top", "shop 1/a.b", "shop 2/a.b", "labels/c"):
        save_xml(tmp_path / f"{name}.xml", [CAN])
    save_image(tmp_path / ".hidden" / "x.jpg")
    dataset = read(tmp_path, val_share=0)
    assert names(dataset) == ["images/deep/c.JPG", "shop 1/a.b.JPG", "shop 2/a.b.JPG", "top.JPG"]
    assert len(dataset.boxes) == 4


def test_a_hash_split_is_stable_when_photos_are_added(tmp_path: Path) -> None:
    def both() -> tuple[set[str], set[str]]:
        return set(names(read(tmp_path))), set(names(read(tmp_path, "val")))

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
    assert names(read(tmp_path)) == ["JPEGImages/p0.jpg", "JPEGImages/p2.jpg"]


def test_a_stem_may_look_like_vocs_columns(tmp_path: Path) -> None:
    for stem in ("shelf 1", "shelf"):
        save_image(tmp_path / f"{stem}.jpg")
        save_xml(tmp_path / f"{stem}.xml", [CAN])
    (tmp_path / "train.txt").write_text("shelf 1\n")
    assert names(read(tmp_path)) == ["shelf 1.jpg"]


def test_a_photo_listed_twice_is_used_once_and_said(tmp_path: Path) -> None:
    make_voc(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("p0\np1\np0\n")
    dataset = read(tmp_path)
    assert len(dataset) == 2
    twice = next(finding for finding in dataset.findings if finding.kind == "listed twice")
    assert (twice.file, twice.line, twice.what) == ("ImageSets/Main/train.txt", 3, "p0")


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
    assert "'train', 'val' and 'all'" in refusal(tmp_path, "test")
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
    assert len(read(tmp_path, val_share=0)) == 1


# --- classes


def test_classes_come_from_the_config_a_file_or_the_xml(tmp_path: Path) -> None:
    make_voc(tmp_path)
    (tmp_path / "other.txt").write_bytes(b"\xef\xbb\xbfcan\r\nbottle\r\n\r\nbox\r\n")
    assert read(tmp_path).classes == ("box", "can")
    assert read(tmp_path, classes=("can", "box")).classes == ("can", "box")
    for given_as in (tmp_path / "other.txt", Path("other.txt")):
        dataset = read(tmp_path, classes=given_as)
        assert dataset.classes == ("can", "bottle", "box")
        assert dataset[0].labels.tolist() == [0, 2]
    (tmp_path / "classes.txt").write_text("can\nbox\n")
    assert read(tmp_path).classes == ("can", "box")


def test_classes_are_those_of_all_splits(tmp_path: Path) -> None:
    make_voc(tmp_path)
    edit(tmp_path / "Annotations" / "p5.xml", ">can<", ">apple<")
    assert read(tmp_path).classes == read(tmp_path, "val").classes == ("apple", "box", "can")


def test_wrong_class_lists_are_one_line(tmp_path: Path) -> None:
    make_voc(tmp_path)
    message = refusal(tmp_path, classes=("cans", "box"))
    assert "p0.xml: line 13: class 'can' is not in the list (did you mean 'cans'?)" in message
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
    dataset = read(tmp_path)
    record = dataset[1]
    assert record.boxes.tolist() == [list(CAN[1]), [0, 10, 30, 48], [20, 10, 30, 20], list(BOX[1])]
    assert record.labels.tolist() == [1, 0, 0, 0]
    assert record.flags.tolist() == [0, DIFFICULT, 0, DIFFICULT]
    assert [len(dataset[index].labels) for index in range(4)] == [2, 4, 2, 2]
    assert [(finding.kind, finding.action) for finding in found(dataset)] == [
        ("box inverted", "read as 20 10 30 20"),
        ("box partly outside", "clipped to 0 10 30 48"),
        ("box without area", "dropped"),
        ("box outside the image", "dropped"),
    ]
    assert all(finding.file == "Annotations/p1.xml" for finding in found(dataset))
    assert all(finding.image == "JPEGImages/p1.jpg" for finding in found(dataset))
    clipped = found(dataset)[1]
    assert clipped.what == "box -5 10 30 48.5 in an image of 64x48"
    assert clipped.box == (-5, 10, 30, 48.5)
    lines = (tmp_path / "Annotations" / "p1.xml").read_text().splitlines()
    assert lines[clipped.line - 1].strip() == "<object>"
    assert lines[clipped.line].strip() == "<name>box</name>"


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
    dataset = read(tmp_path)
    assert {dataset[index].hw for index in range(4)} == {(48, 64)}
    assert sorted((finding.kind, finding.file) for finding in found(dataset)) == [
        ("boxes turned", "Annotations/p3.xml"),
        ("misspelt tag", "Annotations/p2.xml"),
        ("size disagrees", "Annotations/p0.xml"),
        ("size missing", "Annotations/p1.xml"),
        ("size missing", "Annotations/p2.xml"),
    ]


def test_photos_without_xml(tmp_path: Path) -> None:
    make_voc(tmp_path)
    for name in ("p0", "p2"):
        (tmp_path / "Annotations" / f"{name}.xml").unlink()
    message = refusal(tmp_path)
    assert "p0.jpg: it has no annotation (1 more error: run  detkit data audit" in message
    assert "data.unlabelled" in message
    skipped = read(tmp_path, unlabelled="skip")
    assert names(skipped) == ["JPEGImages/p1.jpg", "JPEGImages/p3.jpg"]
    negative = read(tmp_path, unlabelled="negative")
    assert [len(negative[index].labels) for index in range(4)] == [0, 2, 0, 2]
    for dataset, kind in ((skipped, "image skipped"), (negative, "image taken as negative")):
        assert [finding[:2] for finding in found(dataset)] == [
            (kind, "JPEGImages/p0.jpg"),
            (kind, "JPEGImages/p2.jpg"),
        ]


def test_a_photo_whose_xml_has_no_object_is_a_negative(tmp_path: Path) -> None:
    make_voc(tmp_path)
    save_xml(tmp_path / "Annotations" / "p0.xml", [])
    dataset = read(tmp_path)
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
    assert f"{note}: line 16: not XML (" in refusal(tmp_path)


def test_what_is_in_no_split_is_let_be(tmp_path: Path) -> None:
    make_voc(tmp_path)
    save_image(tmp_path / "JPEGImages" / "spare.jpg")
    (tmp_path / "JPEGImages" / "p5.jpg").write_bytes(b"")
    assert len(read(tmp_path)) == 4
    assert "p5.jpg" in refusal(tmp_path, "val")


def test_findings_are_summed_up_and_written(tmp_path: Path) -> None:
    some = [
        Finding("size missing", "a.xml", "the XML states no size", "64x48 is used"),
        Finding("box without area", "b.xml", "Käse 1 1 1 1", "dropped"),
        Finding("size missing", "c.xml", "the XML states no size", "9x9 is used"),
    ]
    lines = findings.summary(some)
    assert len(lines) == 2
    assert lines[0].startswith("size missing: a.xml and 1 more")
    assert findings.summary([]) == []
    findings.write(tmp_path / "findings.jsonl", some)
    written = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text("utf-8").splitlines()]
    assert written == [finding._asdict() for finding in some]


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    scan.scan(Data(root=make_voc(tmp_path)), "train", progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)] + [(done, 4) for done in range(1, 5)]


@pytest.mark.skipif(not GROCERIES.is_dir(), reason="the groceries are not here")
def test_groceries() -> None:
    dataset = read(GROCERIES, "val")
    assert len(dataset) == 656
    assert len(dataset.classes) == 25
    assert all(len(dataset[index].labels) for index in range(len(dataset)))


# --- coordinates


@pytest.mark.parametrize(
    ("objects", "database", "expected", "why"),
    [
        ([CAN], "Unknown", "edges", "as LabelImg writes"),
        ([CAN], "The VOC2007 Database", "devkit", "the VOC devkit"),
        ([("can", (0, 3, 20, 30))] * 2, "The VOC2007 Database", "edges", "start below 1"),
        (
            [CAN, *[("can", (-4.0, 3.0, 20.0, 30.0))] * 2],
            "The VOC2007 Database",
            "devkit",
            "the VOC devkit",
        ),  # no format's pixels
        ([CAN], "shelves", "edges", "nothing speaks for 1-based"),
        ([("can", (1.5, 3, 20, 30))], "shelves", "edges", "decimals"),
    ],
)
def test_auto_says_how_corners_are_read_and_why(
    tmp_path: Path, objects: list[tuple[str, tuple[float, float, float, float]]], database: str, expected: str, why: str
) -> None:
    make_voc(tmp_path)
    for path in (tmp_path / "Annotations").iterdir():
        save_xml(path, objects)
        edit(path, "<database>Unknown<", f"<database>{database}<")
    dataset = read(tmp_path)
    how = dataset.findings[0]
    assert how.kind == "coordinates"
    assert why in how.what
    low = np.array(objects[0][1][:2]) - (expected == "devkit")
    assert dataset[0].boxes[0].tolist() == [*low, *objects[0][1][2:]]
    assert ("1-based" in how.action) == (expected == "devkit")
    for convention in ("edges", "devkit"):
        given = read(tmp_path, convention=convention)
        assert "coordinates" not in [finding.kind for finding in given.findings]
        assert given[0].boxes[0, 2] == objects[0][1][2]


def test_train_and_val_are_read_alike(tmp_path: Path) -> None:
    make_voc(tmp_path)
    for path in (tmp_path / "Annotations").iterdir():
        save_xml(path, [("can", (5, 6, 20, 30))])
        edit(path, "<database>Unknown<", "<database>The VOC2012 Database<")
    assert read(tmp_path, "val")[0].boxes[0].tolist() == [4, 5, 20, 30]
    save_xml(tmp_path / "Annotations" / "p0.xml", [("can", (0, 6, 20, 30))])  # of the train split; a slip
    assert read(tmp_path, "val")[0].boxes[0].tolist() == [4, 6 - 1, 20, 30]
    save_xml(tmp_path / "Annotations" / "p0.xml", [("can", (0, 6, 20, 30))] * 2)
    assert read(tmp_path, "val")[0].boxes[0].tolist() == [5, 6, 20, 30]


def test_photos_without_annotation_have_no_voice_in_how_corners_are_read(tmp_path: Path) -> None:
    make_voc(tmp_path, train=8)
    for path in sorted((tmp_path / "Annotations").iterdir()):
        edit(path, "<database>Unknown<", "<database>The VOC2012 Database<")
        if path.stem in ("p0", "p1", "p2", "p3", "p4", "p5"):
            path.unlink()
    dataset = read(tmp_path, unlabelled="skip")
    assert "1-based" in dataset.findings[0].action


# --- boxes drawn on another canvas


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_drawn_before_the_exif_turn_are_turned(tmp_path: Path, orientation: int) -> None:
    make_voc(tmp_path)
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[10:20, 5:45] = 255  # the object
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = tmp_path / "JPEGImages" / "p1.png"
    (tmp_path / "JPEGImages" / "p1.jpg").unlink()
    Image.fromarray(stored).save(photo, exif=exif)
    save_xml(tmp_path / "Annotations" / "p1.xml", [("can", (5, 10, 45, 20))], (48, 64))
    dataset = read(tmp_path)
    record = dataset[1]
    x1, y1, x2, y2 = record.boxes[0].astype(int)
    pixels = imaging.decode(photo)
    assert record.hw == pixels.shape[:2] == (64, 48)
    assert pixels[y1:y2, x1:x2].min() == 255
    assert pixels.astype(int).sum() == 255 * 3 * 400
    assert [finding.kind for finding in found(dataset)] == ["boxes turned"]


def test_boxes_drawn_on_the_turned_photo_stay(tmp_path: Path) -> None:
    make_voc(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(tmp_path / "JPEGImages" / "p1.jpg", (48, 64), exif=exif)
    save_xml(tmp_path / "Annotations" / "p1.xml", [CAN], (64, 48))
    dataset = read(tmp_path)
    assert dataset[1].boxes.tolist() == [list(CAN[1])]
    assert found(dataset) == []


def test_boxes_of_a_photo_that_was_shrunk_are_scaled_with_it(tmp_path: Path) -> None:
    make_voc(tmp_path)
    save_xml(tmp_path / "Annotations" / "p1.xml", [("can", (20, 30, 600, 400)), BOX], (480, 640))
    dataset = read(tmp_path)
    assert np.allclose(dataset[1].boxes, np.array([[20, 30, 600, 400], BOX[1]]) / 10)
    assert [(finding.kind, finding.file) for finding in found(dataset)] == [("boxes scaled", "Annotations/p1.xml")]
    # Where all boxes lie inside the photo nothing says that they were drawn on another size.
    save_xml(tmp_path / "Annotations" / "p1.xml", [CAN], (480, 640))
    dataset = read(tmp_path)
    assert dataset[1].boxes.tolist() == [list(CAN[1])]
    assert [finding.kind for finding in found(dataset)] == ["size disagrees"]


# --- everything at once


def test_a_survey_refuses_nothing(tmp_path: Path) -> None:
    make_voc(tmp_path, train=8)
    notes, photos = tmp_path / "Annotations", tmp_path / "JPEGImages"
    (notes / "p0.xml").write_text("<annotation>")
    (photos / "p1.jpg").write_bytes((photos / "p1.jpg").read_bytes()[:-200])
    (notes / "p2.xml").unlink()
    (photos / "p3.jpg").unlink()
    edit(notes / "p4.xml", ">can<", ">cann<")
    edit(notes / "p5.xml", "<xmin>2</xmin>", "<xmim>2</xmim>")
    edit(notes / "p6.xml", "<difficult>0</difficult>", "<difficult>maybe</difficult>")
    edit(notes / "p7.xml", "<difficult>0</difficult>", "<diffcult>1</diffcult>")
    (tmp_path / "classes.txt").write_text("can\nbox\n")
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("p8\np9\np10\n")
    got = scan.survey(Data(root=tmp_path))
    assert {(finding.kind, finding.file.rpartition("/")[2]) for finding in got.findings} == {
        ("coordinates", ""),
        ("annotation unreadable", "p0.xml"),
        ("image unreadable", "p1.jpg"),
        ("image without annotation", "p2.jpg"),
        ("annotation without image", "p3.xml"),
        ("unknown class", "p4.xml"),
        ("object unreadable", "p5.xml"),
        ("misspelt tag", "p5.xml"),
        ("odd value", "p6.xml"),
        ("misspelt tag", "p7.xml"),
        ("listed but missing", "val.txt"),
    }
    assert {name: len(rows) for name, rows in got.splits.items()} == {"train": 8, "val": 2}
    assert len(got.items) == len(got.labels) == len(got.headers.hw) == 10
    assert [got.items[row].image for row in got.splits["val"]] == ["JPEGImages/p8.jpg", "JPEGImages/p9.jpg"]
    assert f"(5 more errors: run  detkit data audit {tmp_path} )" in refusal(tmp_path)


def test_all_is_every_photo(tmp_path: Path) -> None:
    make_voc(tmp_path)
    assert len(read(tmp_path, "all")) == 6
