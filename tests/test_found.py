"""Detections from files, in every way that they are written, and files that are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from detkit import config, found
from detkit.data import cache
from detkit.data.labels import DataSet
from detkit.errors import UserError
from detkit.formats import detections_dict
from detkit.runtime import record
from detkit.types import Detections

SHELF = Path(__file__).parent.parent / "datasets" / "shelf-mini"
Write = Callable[[object], Path]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    data = config.Data(root=SHELF, cache=tmp_path_factory.mktemp("cache"))
    return cache.load_split(data, "val", Console(quiet=True))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(tree: object) -> Path:
        path = tmp_path / "found.json"
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
        return path

    return write


def truth(dataset: DataSet) -> list[Detections]:
    """The ground truth as detections, the last object of each photo the surest."""
    result = []
    for photo in (dataset[i] for i in range(len(dataset))):
        scores = np.linspace(0.9, 0.3, len(photo.labels)).astype(np.float32)
        result.append(Detections(photo.boxes[::-1].astype(np.float32), scores, photo.labels[::-1], photo.hw))
    return result


def same(got: list[Detections], wanted: list[Detections]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.hw == other.hw
        assert one.labels.tolist() == other.labels.tolist()
        assert np.allclose(one.boxes, other.boxes, atol=0.01)
        assert np.allclose(one.scores, other.scores, atol=1e-4)


@pytest.mark.parametrize("way", ["path", "name", "stem", "elsewhere"])
@pytest.mark.parametrize("lines", [True, False])
def test_what_predict_writes_is_read(shelf: DataSet, write: Write, way: str, lines: bool) -> None:
    called: dict[str, Callable[[str], object]] = {
        "path": str,
        "name": lambda name: Path(name).name,
        "stem": lambda name: Path(name).stem,
        "elsewhere": lambda name: f"/other/machine/{Path(name).name}",
    }
    wanted = truth(shelf)
    entries = [detections_dict(str(called[way](shelf.name(i))), d, shelf.classes) for i, d in enumerate(wanted)]
    got = found.read(write("\n".join(map(json.dumps, entries)) if lines else entries), shelf)
    same(got.detections, wanted)
    assert got.remarks == []


def results(dataset: DataSet, photo: Callable[[int], object], label: Callable[[int], object]) -> list[dict[str, Any]]:
    rows = []
    for place, each in enumerate(truth(dataset)):
        for box, score, k in zip(each.boxes.tolist(), each.scores.tolist(), each.labels.tolist(), strict=True):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            rows.append({"image_id": photo(place), "category_id": label(k), "bbox": bbox, "score": score})
    return rows[::-1]


def test_coco_results_are_read_by_the_ids_of_their_annotations(shelf: DataSet, write: Write, tmp_path: Path) -> None:
    ids = tmp_path / "instances.json"
    photos = [{"id": 100 - i, "file_name": Path(shelf.name(i)).name} for i in range(len(shelf))]
    categories = [{"id": 7 * k, "name": name} for k, name in enumerate(shelf.classes)]
    ids.write_text(json.dumps({"images": photos, "categories": categories}))
    rows = results(shelf, lambda place: 100 - place, lambda k: 7 * k)
    same(found.read(write(rows), shelf, ids).detections, truth(shelf))
    with pytest.raises(UserError, match="--ids"):
        found.read(write(rows), shelf)


def test_coco_results_may_name_photos_and_classes_themselves(shelf: DataSet, write: Write) -> None:
    rows = results(shelf, lambda place: Path(shelf.name(place)).stem, lambda k: shelf.classes[k])
    same(found.read(write(rows), shelf).detections, truth(shelf))


@pytest.mark.parametrize("kind", ["jsonl", "coco", "csv"])
def test_every_file_of_predict_is_read(shelf: DataSet, tmp_path: Path, kind: str) -> None:
    """Of all photos together, by the program that writes them; the last photo has no detections."""
    *wanted, last = truth(shelf)
    wanted.append(last.above(1))
    with record.Record(tmp_path) as lines:
        for i, each in enumerate(wanted):
            lines.add(detections_dict(shelf.name(i), each, shelf.classes))
    got = found.read(record.write(tmp_path, kind, shelf.classes), shelf)
    same(got.detections, wanted)
    assert len(got.named) == len(shelf) - (kind == "csv")  # which has no row for such a photo
    assert bool(got.remarks) == (kind == "csv")


def test_photos_without_entry_and_entries_without_photo_are_said(shelf: DataSet, write: Write) -> None:
    entry = detections_dict(shelf.name(0), truth(shelf)[0], shelf.classes)
    got = found.read(write([entry, {"image": "elsewhere.jpg", "detections": []}]), shelf)
    assert [len(each) > 0 for each in got.detections] == [True] + [False] * (len(shelf) - 1)
    assert len(got.remarks) == 2
    assert "elsewhere.jpg" in got.remarks[0]
    assert f"{len(shelf) - 1} of the {len(shelf)} photos" in got.remarks[1]


def one(score: float = 0.5, box: tuple[float, ...] = (1, 2, 3, 4)) -> str:
    return json.dumps({"image": "shelf_00024", "detections": [{"label": "cola_classic", "score": score, "box": box}]})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{]", "line 1: not JSON"),
        ('{"image": "a.jpg"}\n{', "line 2: not JSON"),
        ("[1, 2]", "not detections"),
        ('[{"image": "a.jpg"}]', "not detections"),
        ('[{"image": "a.jpg", "detections": [{"label": "x", "score": 1, "box": [1, 2, 3]}]}]', "not detections"),
        ('[{"image_id": 1, "category_id": 1, "score": 1}]', "not detections as detkit or COCO write them (no 'bbox')"),
        ('[{"image_id": [1], "category_id": 1, "score": 1, "bbox": [1, 2, 3, 4]}]', "not detections"),
        ('[{"image": "a.jpg", "detections": [{"label": "x", "score": NaN, "box": [1, 2, 3, 4]}]}]', "not detections"),
        ('[{"image": "nowhere.jpg", "detections": []}]', "none of its photos, such as 'nowhere.jpg'"),
        ('{"images": [], "categories": [], "annotations": [{"image_id": 1}]}', "(no 'bbox')"),
        (one(score=1.5), "score 1.5 and box 1 2 3 4 in 'shelf_00024'; scores are from 0 to 1"),
        (one(score=-0.1), "score -0.1"),
        (one(box=(1, 2, 0, 4)), "boxes left, top, right, bottom"),
    ],
)
def test_other_files_are_one_line(shelf: DataSet, write: Write, content: str, words: str) -> None:
    with pytest.raises(UserError, match=r"found\.json") as error:
        found.read(write(content), shelf)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the columns image, label, score, x1, y1, x2, y2"),
        ("image,label,score,x,y,w,h\na.jpg,tin,1,1,2,3,4\n", "the columns image, label"),
        ("image,label,score,x1,y1,x2,y2\na.jpg,tin,1,1,2,3\n", "line 2: not a score and four sides"),
        ("image,label,score,x1,y1,x2,y2\n\na.jpg,tin,1,1,2,3,wide\n", "line 3: not a score and four sides"),
        ("image,label,score,x1,y1,x2,y2\na.jpg,tin,nan,1,2,3,4\n", "line 2: not a score and four sides"),
    ],
)
def test_other_tables_are_one_line(shelf: DataSet, tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "found.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        found.read(path, shelf)


def test_an_unknown_class_is_answered_with_the_nearest(shelf: DataSet, write: Write) -> None:
    entry = detections_dict(shelf.name(0), truth(shelf)[0], shelf.classes)
    entry["detections"][0]["label"] = shelf.classes[0] + "s"  # type: ignore[index]
    with pytest.raises(UserError, match=f"did you mean '{shelf.classes[0]}'"):
        found.read(write([entry]), shelf)
