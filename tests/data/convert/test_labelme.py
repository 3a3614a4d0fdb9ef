import json
from pathlib import Path
from typing import Any

import pytest

from detkit.data import convert
from detkit.types import CROWD, DIFFICULT, TRUNCATED
from tests.data.convert.sets import annotation, by_name, kinds, make, put, refusal, rows
from tests.data.photos import save_image


def shape(**changes: Any) -> dict[str, Any]:
    plain = {"label": "can", "points": [[1.5, 2], [9, 8]], "group_id": None, "shape_type": "rectangle", "flags": {}}
    return plain | changes


def document(*shapes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    about = {"imagePath": "a.jpg", "imageData": None, "imageHeight": 48, "imageWidth": 64}
    return {"version": "5.5.0", "flags": {}, "shapes": list(shapes)} | about | changes


def read(root: Path, *shapes: dict[str, Any], **changes: Any) -> convert.Source:
    save_image(root / "a.jpg")
    put(root / "a.json", document(*shapes, **changes))
    return convert.read("labelme", root, None)


def test_a_photo_beside_its_json(tmp_path: Path) -> None:
    save_image(tmp_path / "bare.jpg")
    source = read(tmp_path, shape(label=" can "), shape(label="box", points=[[20, 30], [10, 5]]))
    assert source.classes == ("box", "can")
    first, bare = source.photos
    assert (first.image, first.file) == ("a.jpg", "a.json")
    assert rows(first) == [("can", (1.5, 2, 9, 8), 0), ("box", (10, 5, 20, 30), 0)]
    assert first.annotation is not None
    assert (first.annotation.filename, first.annotation.hw) == ("a.jpg", (48, 64))
    assert (bare.image, bare.annotation) == ("bare.jpg", None)
    assert source.findings == []
    assert convert.sniff(tmp_path) == "labelme"
    assert convert.splits("labelme", tmp_path) == ()


@pytest.mark.parametrize(
    "path", ["..\\images\\photo.jpg", "../images/photo.jpg", "C:\\x\\images\\photo.jpg", "photo.jpg"]
)
def test_the_photo_is_where_the_path_says(tmp_path: Path, path: str) -> None:
    save_image(tmp_path / "images/photo.jpg")
    put(tmp_path / "json/one.json", document(shape(), imagePath=path))
    put(tmp_path / "settings.json", {"some": "other file"})
    (photo,) = convert.read("labelme", tmp_path, None).photos
    assert photo.image == "images/photo.jpg"


def test_a_photo_of_the_same_name_in_another_folder(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        save_image(tmp_path / folder / "x.jpg")
        put(tmp_path / folder / "x.json", document(shape(label=folder), imagePath="x.jpg"))
    assert {photo.image: rows(photo)[0][0] for photo in convert.read("labelme", tmp_path, None).photos} == {
        "one/x.jpg": "one",
        "two/x.jpg": "two",
    }


@pytest.mark.parametrize(
    ("changes", "box"),
    [
        ({"shape_type": "polygon", "points": [[1, 2], [5, 3.5], [4, 9]]}, (1, 2, 5, 9)),
        ({"shape_type": None, "points": [[1, 2], [5, 3.5], [4, 9]]}, (1, 2, 5, 9)),
        ({"shape_type": "circle", "points": [[10, 20], [13, 24]]}, (5, 15, 15, 25)),
        ({"shape_type": "linestrip", "points": [[1, 2], [5, 3]]}, (1, 2, 5, 3)),
        ({"shape_type": "mask", "points": [[1, 2], [5, 3]], "mask": "iVBO"}, (1, 2, 5, 3)),
        ({"shape_type": "rotation", "points": [[5, 0], [10, 5], [5, 10], [0, 5]]}, (0, 0, 10, 10)),
    ],
)
def test_other_shapes_become_their_boxes(tmp_path: Path, changes: dict[str, Any], box: tuple[float, ...]) -> None:
    source = read(tmp_path, shape(**changes))
    assert rows(source.photos[0]) == [("can", box, 0)]
    assert kinds(source.findings) == ["polygon"]
    assert source.findings[0].box == box


@pytest.mark.parametrize("kind", ["point", "points", "line"])
def test_shapes_without_area_are_left_out_and_said(tmp_path: Path, kind: str) -> None:
    source = read(tmp_path, shape(shape_type=kind), shape(label="box"))
    assert [name for name, _, _ in rows(source.photos[0])] == ["box"]
    assert [(finding.kind, finding.file) for finding in source.findings] == [("no box", "a.json")]


def test_rectangles_of_four_points(tmp_path: Path) -> None:
    corners = [[1, 2], [9, 2], [9, 8], [1, 8]]
    assert rows(read(tmp_path, shape(points=corners)).photos[0]) == [("can", (1, 2, 9, 8), 0)]


def test_flags_groups_and_the_rest(tmp_path: Path) -> None:
    marked = shape(
        flags={"truncated": True, "crowd": True, "occluded": False, "nice": True}, difficult=True, group_id=3
    )
    source = read(tmp_path, marked)
    assert rows(source.photos[0])[0][2] == TRUNCATED | CROWD | DIFFICULT
    assert kinds(source.findings) == ["not read", "not read"]


def test_what_is_written_has_labelmes_fields(tmp_path: Path) -> None:
    (photo,) = make(
        tmp_path / "in", {"sub/a.png": [("can", (1.5, 2.0, 9.0, 8.0), DIFFICULT), ("box", (9, 8, 1, 2), 0)]}
    )
    findings = convert.write("labelme", {"": [photo]}, ("can", "box"), tmp_path / "in", tmp_path / "out")
    written = json.loads((tmp_path / "out/sub/a.json").read_text())
    assert (written["imagePath"], written["imageHeight"], written["imageWidth"]) == ("a.png", 48, 64)
    assert written["imageData"] is None
    assert written["shapes"][0] == {
        "label": "can", "points": [[1.5, 2], [9, 8]], "group_id": None, "description": "", "shape_type": "rectangle",
        "flags": {"difficult": True},
    }  # fmt: skip
    assert kinds(findings) == ["box inverted"]  # corners may stand in any order here


def test_a_photo_that_is_not_there(tmp_path: Path) -> None:
    put(tmp_path / "a.json", document(shape(), imagePath="gone.jpg"))
    (photo,) = convert.read("labelme", tmp_path, None).photos
    assert photo.image == ""
    assert photo.annotation is not None
    assert photo.annotation.filename == "gone.jpg"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"shapes": {}}, "'shapes' is not a list"),
        ({"shapes": [1]}, "'shapes' is not a list"),
        (document(shape(label="")), "shapes[0] has no label"),
        (document(shape(label=None)), "shapes[0] has no label"),
        (document(shape(), shape(points=[])), "shapes[1] has no list of points"),
        (document(shape(points=[[1, 2], [3]])), "no list of points"),
        (document(shape(points=[[1, 2], [3, "4"]])), "no list of points"),
        (document(shape(points=[[1, 2], [3, 4], [5, 6]])), "rectangle of 3 points"),
        (document(shape(shape_type="circle", points=[[1, 2]])), "circle of 1 points"),
        (document(shape(shape_type="star")), "unknown shape_type 'star'"),
        ("{]", "not JSON"),
        ('{"shapes": ' + "[" * 100_000, "nested too deep"),
    ],
)
def test_what_cannot_be_known_is_refused(tmp_path: Path, content: object, reason: str) -> None:
    path = put(tmp_path / "a.json", content)
    message = refusal("labelme", tmp_path)
    assert message.startswith(f"{path}: ")
    assert reason in message


def test_no_annotation_at_all(tmp_path: Path) -> None:
    put(tmp_path / "a.json", {})
    assert "no LabelMe annotations" in refusal("labelme", tmp_path)


def test_a_set_of_one_keeps_its_name(tmp_path: Path) -> None:
    make(tmp_path / "in", {"a.png": []})
    photo = convert.Photo("a.png", "", annotation([("can", (0.0, 0.0, 5.0, 5.0), 0)]))
    convert.write("labelme", {"": [photo]}, ("can",), tmp_path / "in", tmp_path / "out")
    assert by_name(convert.read("labelme", tmp_path / "out", None).photos) == {"a.png": rows(photo)}
