import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO

from detkit.data import convert
from detkit.data.convert.coco import _rle_box
from detkit.types import CROWD, DIFFICULT, OCCLUDED
from tests.data.convert.sets import kinds, put, refusal, rows
from tests.data.photos import save_image


def document(**changes: Any) -> dict[str, Any]:
    """Two images, one without objects; category ids with gaps, from 0, not in order."""
    return {
        "images": [
            {"id": 7, "file_name": "b.jpg", "width": 64, "height": 48},
            {"id": 0, "file_name": "a.jpg", "width": 64, "height": 48},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3.5, 4], "iscrowd": 0, "area": 14},
            {"id": 2, "image_id": 7, "category_id": 0, "bbox": [0.1, 0.1, 0.2, 0.2], "iscrowd": 1, "area": 1},
        ],
        "categories": [{"id": 3, "name": "can"}, {"id": 0, "name": "box"}, {"id": 1, "name": "tin"}],
    } | changes


def one(**changes: Any) -> dict[str, Any]:
    """A document with one annotation, changed; None takes a key out."""
    annotation = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4]} | changes
    return document(annotations=[{key: value for key, value in annotation.items() if value is not None}])


def read(root: Path, content: object, name: str = "annotations/instances_train.json") -> convert.Source:
    put(root / name, content)
    return convert.read("coco", root, None)


def test_ids_images_without_objects_and_unused_categories(tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "train" / "b.jpg")
    source = read(tmp_path, document())
    assert source.classes == ("box", "tin", "can")
    assert [(photo.image, rows(photo)) for photo in source.photos] == [
        ("images/train/b.jpg", [("can", (1, 2, 4.5, 6), 0), ("box", (0.1, 0.1, 0.3, 0.3), CROWD)]),
        ("", []),
    ]
    assert source.photos[0].annotation is not None
    assert source.photos[0].annotation.hw == (48, 64)
    assert source.photos[1].annotation is not None
    assert source.photos[1].annotation.filename == "a.jpg"
    assert kinds(source.findings) == ["unused category"]
    assert "tin" in source.findings[0].what


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (["annotations/instances_train2017.json", "annotations/captions_train2017.json"], ("train2017",)),
        (["annotations/instances_default.json"], ()),
        (["annotations/train.json", "annotations/val.json"], ("train", "val")),
        (["train/_annotations.coco.json", "valid/_annotations.coco.json"], ("train", "valid")),
        (["train.json", "test.json"], ("test", "train")),
        (["_annotations.coco.json"], ()),
        (["result.json"], ()),
    ],
)
def test_the_names_that_people_give_the_files(tmp_path: Path, layout: list[str], names: tuple[str, ...]) -> None:
    for name in layout:
        put(tmp_path / name, document())
    assert convert.splits("coco", tmp_path) == names
    assert convert.sniff(tmp_path) == "coco"
    for split in names or (None,):
        assert len(convert.read("coco", tmp_path, split).photos) == 2
    assert len(convert.read("coco", tmp_path, layout[0]).photos) == 2
    assert len(convert.read("coco", tmp_path / layout[0], None).photos) == 2


def test_a_split_by_its_short_name(tmp_path: Path) -> None:
    put(tmp_path / "annotations/instances_val2017.json", document())
    put(tmp_path / "annotations/instances_train2017.json", document(images=[], annotations=[]))
    assert len(convert.read("coco", tmp_path, "val").photos) == 2
    put(tmp_path / "robo/valid/_annotations.coco.json", document())
    assert len(convert.read("coco", tmp_path / "robo", "val").photos) == 2
    assert "there are: train2017, val2017" in refusal("coco", tmp_path, "test")


def test_photos_of_the_split_and_of_the_same_name_elsewhere(tmp_path: Path) -> None:
    for folder in ("train2017", "val2017"):
        save_image(tmp_path / "images" / folder / "b.jpg")
        put(tmp_path / f"annotations/instances_{folder}.json", document())
        save_image(tmp_path / "images" / folder / "extra.jpg")
    for folder in ("train2017", "val2017"):
        assert convert.read("coco", tmp_path, folder).photos[0].image == f"images/{folder}/b.jpg"
    every = convert.read("coco", tmp_path, None).photos
    bare = [photo.image for photo in every if photo.annotation is None]
    assert bare == ["images/train2017/extra.jpg", "images/val2017/extra.jpg"]


def test_without_annotations_nothing_is_known_of_the_photos(tmp_path: Path) -> None:
    info = put(tmp_path / "annotations/image_info_test.json", {"images": document()["images"]})
    assert [photo.annotation for photo in convert.read("coco", info, None).photos] == [None, None]


def test_flags(tmp_path: Path) -> None:
    changes = {"ignore": 1, "attributes": {"occluded": True, "truncated": False, "colour": "red"}}
    assert rows(read(tmp_path, one(**changes)).photos[0])[0][2] == DIFFICULT | OCCLUDED


def test_masks_beside_boxes_are_counted(tmp_path: Path) -> None:
    source = read(tmp_path, one(segmentation=[[1, 2, 3, 4, 5, 6]]))
    assert rows(source.photos[0]) == [("can", (1, 2, 4, 6), 0)]
    assert kinds(source.findings) == ["unused category", "mask not read"]


@pytest.mark.parametrize("bbox", [None, []])
def test_labels_that_are_polygons_only(tmp_path: Path, bbox: list[float] | None) -> None:
    source = read(tmp_path, one(bbox=bbox, segmentation=[[1.5, 2, 9, 3, 4, 8.25], [0.1, 5, 2, 5, 2, 6]]))
    assert rows(source.photos[0]) == [("can", (0.1, 2, 9, 8.25), 0)]
    (finding,) = [finding for finding in source.findings if finding.kind == "polygon"]
    assert finding.box == (0.1, 2, 9, 8.25)


def test_run_length_masks_without_box(tmp_path: Path) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[10:20, 5:30] = 1
    for counts in (
        mask_tools.encode(np.asfortranarray(mask)),
        {"size": [48, 64], "counts": [250, 10] + [38, 10] * 24 + [1660]},
    ):
        if isinstance(counts["counts"], bytes):
            counts["counts"] = counts["counts"].decode()
        source = read(tmp_path, one(bbox=None, segmentation=counts))
        assert rows(source.photos[0]) == [("can", (5, 10, 30, 20), 0)]


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_the_box_of_a_run_length_mask_is_pycocotools(height: int, width: int, data: st.DataObject) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits, np.uint8).reshape(height, width)
    packed = mask_tools.encode(np.asfortranarray(mask))
    x, y, w, h = mask_tools.toBbox(packed).tolist()
    assert _rle_box({"size": packed["size"], "counts": packed["counts"].decode()}) == [x, y, x + w, y + h]


def test_boxes_and_images_are_pycocotools(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [
        {"id": int(index), "file_name": f"{index}.jpg", "width": 640, "height": 480} for index in rng.permutation(50)
    ]
    annotations = [
        {"id": index, "image_id": int(rng.integers(50)), "category_id": int(rng.integers(3)),
         "bbox": np.round(rng.uniform(0, 300, 4), int(rng.integers(7))).tolist(), "iscrowd": int(rng.integers(2)),
         "area": 1}
        for index in range(500)
    ]  # fmt: skip
    categories = [{"id": index, "name": f"c{index}"} for index in range(3)]
    path = put(tmp_path / "a.json", {"images": images, "annotations": annotations, "categories": categories})
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(path)
    photos = convert.read("coco", tmp_path, None).photos
    assert [photo.annotation.filename for photo in photos if photo.annotation] == [
        image["file_name"] for image in images
    ]
    for image, photo in zip(images, photos, strict=True):
        own = reference.loadAnns(reference.getAnnIds(image["id"]))
        assert photo.annotation is not None
        boxes = photo.annotation.boxes.copy()
        boxes[:, 2:] -= boxes[:, :2]
        np.testing.assert_allclose(boxes, np.array([item["bbox"] for item in own]).reshape(-1, 4), rtol=0, atol=1e-9)
        assert list(photo.annotation.names) == [f"c{item['category_id']}" for item in own]
        assert photo.annotation.flags.tolist() == [CROWD * item["iscrowd"] for item in own]


def test_pycocotools_reads_what_is_written(tmp_path: Path) -> None:
    save_image(tmp_path / "in/b.jpg")
    read(tmp_path / "in", document())
    convert.convert(tmp_path / "in", tmp_path / "out", "coco")
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(tmp_path / "out/annotations/instances_train.json")
    (first, second) = reference.loadAnns(reference.getAnnIds())
    assert (first["bbox"], first["area"], first["iscrowd"]) == ([1, 2, 3.5, 4], 14, 0)
    assert (second["bbox"], second["iscrowd"]) == ([0.1, 0.1, 0.2, 0.2], 1)
    assert [category["name"] for category in reference.loadCats([1, 2, 3])] == ["box", "tin", "can"]
    assert len(reference.getImgIds()) == 2


def test_a_class_under_two_ids_and_names_that_are_numbers(tmp_path: Path) -> None:
    categories = [{"id": 3, "name": " 7up "}, {"id": 0, "name": "7up"}, {"id": 1, "name": 12}]
    source = read(tmp_path, document(categories=categories))
    assert source.classes == ("7up", "12")
    assert "class listed twice" in kinds(source.findings)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not JSON"),
        ("{", "line 1: not JSON"),
        (b"\xff\x00\xfe", "not JSON"),
        ("[" * 100_000, "nested too deep"),
        ('{"images": [],\n"images": []}', "'images' twice"),
        ('{"images": [], "a": NaN}', "NaN"),
        ('{"images": [], "a": ' + "9" * 5000 + "}", "not JSON"),
        ([], "no list 'images'"),
        ({"images": {}}, "no list 'images'"),
        ({"images": [], "annotations": [3], "categories": []}, "no list 'annotations'"),
        ({"images": [], "annotations": []}, "no list 'categories'"),
        (document(images=[{"id": 7, "file_name": ""}]), "images[0] (id 7) has no file_name"),
        (document(images=[{"file_name": "a.jpg"}]), "images[0] has no id"),
        (document(images=[{"id": [7], "file_name": "a.jpg"}]), "images[0] has no id"),
        (document(images=document()["images"] * 2), "images[2] has the id 7, which another one has"),
        (document(categories=[{"id": 3}]), "categories[0] has no name or id"),
        (document(categories=[{"id": 3, "name": ["can"]}]), "categories[0] has no name or id"),
        (document(categories=[{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]), "categories[1] has the id 3"),
        (one(image_id=5), "annotations[0] (id 1): no image has the id 5"),
        (one(image_id=[5]), "annotations[0] (id 1): no image has the id a list"),
        (one(category_id=5), "annotations[0] (id 1): no category has the id 5"),
        (one(category_id=None), "annotations[0] (id 1): no category has the id None"),
        (one(bbox=[1, 2, 3]), "annotations[0] (id 1): its bbox is not four numbers"),
        (one(bbox=[1, 2, 3, "4"]), "its bbox is not four numbers"),
        (one(bbox=[1, 2, 3, True]), "its bbox is not four numbers"),
        (one(bbox=[1, 2, 3, 1e300]), "its bbox is not four numbers"),
        (one(bbox=None), "neither bbox nor segmentation"),
        (one(bbox=None, segmentation=[[1, 2, 3]]), "its segmentation can't be read"),
        (one(bbox=None, segmentation={"size": [0, 4], "counts": [0]}), "its segmentation can't be read"),
        (one(bbox=None, segmentation={"size": [4, 4], "counts": [3, 2]}), "its segmentation can't be read"),
        (one(bbox=None, segmentation={"size": [4, 4], "counts": "~~~"}), "its segmentation can't be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_known_is_refused(tmp_path: Path, content: object, reason: str) -> None:
    path = put(tmp_path / "annotations/instances_train.json", content)
    message = refusal("coco", tmp_path)
    assert message.startswith(f"{path}: ")
    assert reason in message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    text = json.dumps(document(categories=[{"id": 3, "name": "Käse"}, {"id": 0, "name": "冰茶"}]), ensure_ascii=False)
    source = read(tmp_path, text.replace("\n", "\r\n").encode(encoding))
    assert source.classes == ("冰茶", "Käse")


@given(st.floats(-1e3, 1e3), st.floats(0, 1e3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_x_plus_w(tmp_path: Path, x: float, w: float) -> None:
    ((_, box, _),) = rows(read(tmp_path, one(bbox=[x, x, w, w])).photos[0])
    assert box[0] == box[1] == x
    assert box[2] == box[3] == pytest.approx(x + w, abs=1e-9)
