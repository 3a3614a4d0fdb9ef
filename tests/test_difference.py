"""`detkit data diff` on labels that were changed by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from detkit import difference, matches
from detkit.config import Data
from detkit.data import cache, voc
from detkit.errors import UserError
from detkit.types import DIFFICULT, Detections, Record
from tests.test_cli import SHELF
from tests.test_cli import run as run

OBJECT = np.array([[10, 10, 50, 60]], np.float64)


def told(tmp_path: Path, photos: int = 3) -> tuple[Path, Data, list[str]]:
    """Detections in the first photos of shelf-mini: what is labelled, but that one object each is missed, one is called
    something else, and one is where there is none."""
    data = Data(root=SHELF, cache=tmp_path / "cache")
    dataset, lines, names = cache.load(data, "all"), [], []
    for place in range(photos):
        record = dataset[place]
        assert len(record.labels) >= 3
        assert not (record.flags[:2] & DIFFICULT).any()
        rows = [
            {"label": dataset.classes[label], "score": 0.9, "box": box}
            for label, box in zip(record.labels.tolist(), record.boxes.tolist(), strict=True)
        ]
        rows[1]["label"] = dataset.classes[(record.labels[1] + 1) % len(dataset.classes)]
        rows.append({"label": dataset.classes[0], "score": 0.6, "box": [0.0, 0.0, 3.0, 3.0]})
        lines.append(json.dumps({"image": dataset.name(place), "detections": rows[1:]}))
        names.append(dataset.name(place))
    lines.append(json.dumps({"image": dataset.name(photos), "error": "can't be decoded"}))
    folder = tmp_path / "found"
    folder.mkdir()
    (folder / "detections.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder, data, names


def test_each_change_is_found(tmp_path: Path) -> None:
    folder, data, names = told(tmp_path)
    console = Console(file=io.StringIO(), width=200)
    counts = difference.run(data, folder, console, json_file=tmp_path / "diff.json", xml=tmp_path / "xml")
    dataset = cache.load(data, "all")
    objects = sum(int((dataset[place].flags & DIFFICULT == 0).sum()) for place in range(3))
    assert counts == {"matched": objects - 6, "other class": 3, "missed": 3, "extra": 3}
    assert "3 of 3 photos differ" in console.file.getvalue()
    assert f"{len(dataset) - 3} of {len(dataset)} photos are not in" in console.file.getvalue()
    rows = json.loads((tmp_path / "diff.json").read_text(encoding="utf-8"))
    for place, name in enumerate(names):
        own = {row["kind"]: row for row in rows if row["image"] == name}
        record = dataset[place]
        assert own["missed"]["box"] == [round(side, 2) for side in record.boxes[0]]
        assert (own["missed"]["label"], own["missed"]["found"]) == (dataset.classes[record.labels[0]], "")
        assert own["other class"]["label"] == dataset.classes[record.labels[1]]
        assert own["other class"]["found"] != own["other class"]["label"]
        assert own["other class"]["iou"] == pytest.approx(1)
        assert (own["extra"]["box"], own["extra"]["label"], own["extra"]["score"]) == ([0, 0, 3, 3], "", 0.6)
    files = sorted((tmp_path / "xml").rglob("*.xml"))
    assert [path.stem for path in files] == sorted(Path(name).stem for name in names)
    for path, name in zip(files, sorted(names), strict=True):
        items = ET.parse(path).getroot().findall("object")
        noted = [item.findtext("comment") for item in items if item.findtext("comment")]
        assert noted == ["score 0.9000", "score 0.6000"]
        assert len(items) == len(dataset[names.index(name)].labels) + 2
        assert all(item.findtext("bndbox/xmin").isdigit() for item in items[-2:])
        assert len(voc.read(path).names) == len(items)


def test_the_command_and_what_it_refuses(tmp_path: Path, run) -> None:
    folder, _, _ = told(tmp_path)
    code, out, err = run("data", "diff", SHELF, folder, "--score", "0.7")
    assert code == 0, err
    assert "other class" in out
    (tmp_path / "none").mkdir()
    for what, words in (
        (tmp_path / "none", "--format jsonl"),
        (tmp_path / "gone", "no such file"),
        (SHELF / "classes.txt", "are read from"),
    ):
        with pytest.raises(UserError, match=words):
            difference.run(Data(root=SHELF), what, Console(quiet=True))
    with pytest.raises(UserError, match=r"not empty|holds"):
        difference.run(Data(root=SHELF), folder, Console(quiet=True), xml=SHELF)


def test_a_class_without_any_label_is_extra(tmp_path: Path) -> None:
    """As of a model of more classes than have been labelled yet."""
    folder, data, names = told(tmp_path, 1)
    rows = [{"label": "new \u2028 class", "score": 0.8, "box": [1, 1, 9, 9]}]
    with (folder / "detections.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"image": names[0], "detections": rows}, ensure_ascii=False) + "\n")
    counts = difference.run(data, folder, Console(quiet=True), xml=tmp_path / "xml")
    assert counts["extra"] == 2
    assert [
        item.findtext("name") for path in (tmp_path / "xml").rglob("*.xml") for item in ET.parse(path).iter("object")
    ].count("new \u2028 class") == 1


def pooled(flag: int, *found: tuple[tuple[float, ...], int, float]) -> matches.Pool:
    record = Record("a.jpg", (100, 100), OBJECT, np.array([0]), np.array([flag], np.uint8))
    boxes, labels, scores = zip(*found, strict=True)
    seen = Detections(np.array(boxes, np.float32), np.array(scores, np.float32), np.array(labels), (100, 100))
    return matches.pool([record], [seen], ("a", "b"))


def test_an_object_is_one_thing_only() -> None:
    on, off, far = (10.0, 10.0, 50.0, 60.0), (12.0, 10.0, 50.0, 60.0), (60.0, 60.0, 90.0, 90.0)
    kinds = [one.kind for one in difference.compare(pooled(0, (on, 0, 0.9), (off, 1, 0.8)))]
    assert kinds == ["matched", "extra"]
    kinds = [one.kind for one in difference.compare(pooled(0, (on, 1, 0.9), (off, 1, 0.8)))]
    assert kinds == ["other class", "extra"]
    assert [one.kind for one in difference.compare(pooled(DIFFICULT, (on, 0, 0.9)))] == []
    assert [one.kind for one in difference.compare(pooled(0, (far, 0, 0.9)))] == [
        "missed",
        "extra",
    ]


@given(st.integers(0, 2**32 - 1))
def test_every_detection_and_object_once(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def boxes(count: int) -> np.ndarray:
        low = rng.integers(0, 5, (count, 2)) * 10
        return np.concatenate([low, low + rng.integers(2, 5, (count, 2)) * 10], 1).astype(float)

    count, found = rng.integers(0, 8, 2).tolist()
    record = Record("a", (100, 100), boxes(count), rng.integers(0, 2, count), np.zeros(count, np.uint8))
    scores = np.sort(rng.uniform(0.1, 1, found))[::-1].astype(np.float32)
    seen = Detections(boxes(found).astype(np.float32), scores, rng.integers(0, 2, found), (100, 100))
    result = difference.compare(matches.pool([record], [seen], ("a", "b")))
    assert sum(one.kind != "missed" for one in result) == found
    assert sum(one.kind != "extra" for one in result) == count
    for one in result:
        assert (one.said == one.seen) == (one.kind == "matched")
        assert one.iou >= 0.5 or one.kind in ("missed", "extra")
