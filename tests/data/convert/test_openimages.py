from pathlib import Path

import pytest

from detkit.data import convert
from detkit.types import CROWD, OCCLUDED, TRUNCATED
from tests.data.convert.sets import by_name, kinds, put, refusal, rows
from tests.data.photos import save_image

HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
)
LIST = "ImageID,Subset,OriginalURL,Rotation\n"
CLASSES = "/m/01,Tin can\n/m/02,Cereal box\n/m/03,Bottle\n"
ROW = "000a,xclick,/m/02,1,0.25,0.75,0.125,0.5,0,0,0,0,0\n"


def make_set(root: Path, boxes: str = HEADER + ROW, classes: str = CLASSES) -> Path:
    save_image(root / "train/000a.jpg")
    save_image(root / "train/000b.jpg")
    put(root / "train-annotations-bbox.csv", boxes)
    put(root / "class-descriptions-boxable.csv", classes)
    return root


def test_boxes_and_classes(tmp_path: Path) -> None:
    source = convert.read("openimages", make_set(tmp_path), "train")
    assert source.classes == ("Tin can", "Cereal box", "Bottle")
    (photo,) = source.photos
    assert (photo.image, photo.file) == ("train/000a.jpg", "train-annotations-bbox.csv")
    assert rows(photo) == [("Cereal box", (16, 6, 48, 24), 0)]
    assert photo.annotation is not None
    assert photo.annotation.lines.tolist() == [2]
    assert kinds(source.findings) == ["unused category"]
    assert convert.splits("openimages", tmp_path) == ("train",)


@pytest.mark.parametrize("name", ["train-images-boxable-with-rotation.csv", "train-image_ids_and_rotation.csv"])
def test_listed_images_without_boxes_have_no_object(tmp_path: Path, name: str) -> None:
    make_set(tmp_path)
    put(tmp_path / name, LIST + "000b,train,http://x,0.0\n000a,train,http://y,\n")
    source = convert.read("openimages", tmp_path, "train")
    assert by_name(source.photos) == {"000b.jpg": [], "000a.jpg": [("Cereal box", (16, 6, 48, 24), 0)]}


def test_other_photos_of_the_folder_have_no_annotation(tmp_path: Path) -> None:
    assert convert.read("openimages", make_set(tmp_path), None).photos[1] == ("train/000b.jpg", "", None)


def test_marks(tmp_path: Path) -> None:
    marks = ("1,0,0,0,0", "0,1,0,0,0", "0,0,1,0,0", "-1,-1,-1,0,0", "0,0,0,1,1")
    boxes = HEADER + "".join(f"000a,xclick,/m/01,1,0,1,0,1,{mark}\n" for mark in marks)
    source = convert.read("openimages", make_set(tmp_path, boxes), "train")
    assert [flags for _, _, flags in rows(source.photos[0])] == [OCCLUDED, TRUNCATED, CROWD, 0, 0]
    assert kinds(source.findings).count("not read") == 2


@pytest.mark.parametrize("name", ["oidv6-train-annotations-bbox.csv", "annotations/train-annotations-bbox.csv"])
def test_names_of_the_files(tmp_path: Path, name: str) -> None:
    make_set(tmp_path)
    (tmp_path / "train-annotations-bbox.csv").unlink()
    put(tmp_path / name, HEADER + ROW)
    put(tmp_path / "class-descriptions-boxable.csv", "LabelName,DisplayName\n" + CLASSES)
    assert convert.splits("openimages", tmp_path) == ("train",)
    assert len(rows(convert.read("openimages", tmp_path, "train").photos[0])) == 1
    assert convert.sniff(tmp_path) == "openimages"


def test_without_descriptions_labels_are_names(tmp_path: Path) -> None:
    make_set(tmp_path)
    (tmp_path / "class-descriptions-boxable.csv").unlink()
    assert convert.read("openimages", tmp_path, "train").classes == ("/m/02",)


def test_photos_that_were_not_downloaded_are_counted(tmp_path: Path) -> None:
    boxes = HEADER + ROW + ROW.replace("000a", "gone") * 3
    source = convert.read("openimages", make_set(tmp_path, boxes), "train")
    assert len(source.photos) == 1
    absent = [finding.what for finding in source.findings if finding.kind == "photo absent"]
    assert [what.split()[0] for what in absent] == ["1", "3"]
    none = make_set(tmp_path / "none", HEADER + ROW.replace("000a", "gone"))
    assert "none of its 1 photos is there, such as 'gone'" in refusal("openimages", none, "train")


def test_numbers_are_the_nearest_to_exact(tmp_path: Path) -> None:
    boxes = HEADER + "000a,xclick,/m/01,1,0.1,0.7,0.01,0.3,0,0,0,0,0\n"
    ((_, box, _),) = rows(convert.read("openimages", make_set(tmp_path, boxes), "train").photos[0])
    assert box == (6.4, 0.48, 44.8, 14.4)  # 0.7 * 64 is 44.8, in floats 44.799999999999997


@pytest.mark.parametrize(
    ("boxes", "classes", "reason"),
    [
        ("", CLASSES, "an empty file"),
        ("ImageID,LabelName\n", CLASSES, "line 1: the header has no column XMin"),
        (HEADER + "000a,x,/m/02\n", CLASSES, "line 2: 3 columns, the header has 13"),
        (HEADER + ROW + ROW.replace("/m/02", "/m/09"), CLASSES, "line 3: label '/m/09' is in no class description"),
        (HEADER + ROW.replace("000a", ""), CLASSES, "line 2: the row names no image"),
        (HEADER + ROW.replace("0.75", "wide"), CLASSES, "line 2: 'wide' is not a share"),
        (HEADER + ROW.replace("0.75", "inf"), CLASSES, "line 2: 'inf' is not a share"),
        (HEADER + ROW, "/m/02\n", "line 1: not a label and its name"),
    ],
)
def test_what_cannot_be_known_is_refused(tmp_path: Path, boxes: str, classes: str, reason: str) -> None:
    make_set(tmp_path, boxes, classes)
    message = refusal("openimages", tmp_path, "train")
    assert message.startswith(f"{tmp_path}/")
    assert reason in message
