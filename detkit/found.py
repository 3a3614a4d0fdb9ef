"""Detections from a file: what `detkit predict` writes (JSON, JSON lines, COCO, CSV), or COCO's results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detkit.data.convert import plain
from detkit.data.convert.common import finite
from detkit.data.labels import DataSet
from detkit.errors import UserError, nearest
from detkit.types import Detections

SUFFIXES = (".csv", ".json", ".jsonl")
_COLUMNS = ("image", "label", "score", "x1", "y1", "x2", "y2")
_IDS = "; name the file that its ids are of by --ids"


class Found(NamedTuple):
    """One Detections a photo of the split; what of the file was of no use, in words; the places in the split of the
    photos that the file names; and the classes that labels are indices into."""

    detections: list[Detections]
    remarks: list[str]
    named: frozenset[int] = frozenset()
    classes: tuple[str, ...] = ()


class _Row(NamedTuple):
    """One detection: the photo and the class as the file has them, x1 y1 x2 y2, score."""

    photo: object
    label: object
    box: Sequence[float]
    score: float


def read(path: Path, dataset: DataSet, ids: Path | None = None, *, more: bool = False) -> Found:
    """What a file says was found in the photos of a split.

    JSON lines, or a JSON list of the same: {"image", "detections": [{"label", "score", "box": [x1, y1, x2, y2]}]}. CSV:
    a row a detection, with the columns image, label, score, x1, y1, x2, y2. COCO annotations with scores; or COCO
    results: [{"image_id", "category_id", "bbox": [x, y, w, h], "score"}], whose ids are those of the annotation file
    `ids`, or the names of photos and classes themselves. A photo is known by its path in the data set, its file's name,
    or that without suffix. more: classes that the data set lacks come after its own; else they are an error. Raises
    UserError, one line, where the file can't be read so.
    """
    photos, labels, seen, rows, by_id = _content(path, ids)
    places = _places(dataset)
    known = {name: label for label, name in enumerate(dataset.classes)}
    of: list[list[tuple[Sequence[float], float, int]]] = [[] for _ in range(len(dataset))]
    at = {photo: _place(photos[photo], places) for photo in seen}
    for row in rows:
        name = labels[row.label]
        if more and isinstance(name, str):
            known.setdefault(name, len(known))
        if name not in known:
            advice = _IDS if by_id else nearest(str(name), known)
            raise UserError(f"{path}: the data set has no class '{name}'{advice}")
        x1, y1, x2, y2 = row.box
        if not 0 <= row.score <= 1 or x2 < x1 or y2 < y1:
            told = f"score {row.score:g} and box {x1:g} {y1:g} {x2:g} {y2:g} in '{photos[row.photo]}'"
            raise UserError(f"{path}: {told}; scores are from 0 to 1, and boxes left, top, right, bottom")
        place = at[row.photo]
        if place is not None:
            of[place].append((row.box, row.score, known[name]))
    named = frozenset(place for place in at.values() if place is not None)
    strange = sorted(str(photos[photo]) for photo, place in at.items() if place is None)
    missing = len(dataset) - len(named)
    remarks = []
    if strange and not named:
        raise UserError(f"{path}: none of its photos, such as '{strange[0]}', is in the split{_IDS * by_id}")
    if strange:
        remarks.append(f"{path}: {len(strange)} photos are not in the split, such as '{strange[0]}'")
    if missing:
        remarks.append(
            f"{path}: says nothing of {missing} of the {len(dataset)} photos; they count as without detections"
        )
    return Found([_detections(each, dataset, place) for place, each in enumerate(of)], remarks, named, tuple(known))


class _Content(NamedTuple):
    """What a file says. photos, labels: the names of what its rows speak of. seen: the photos that it speaks of. by_id:
    it has COCO's results, and nothing that says what their ids are."""

    photos: _Names
    labels: _Names
    seen: Sequence[Any]
    rows: list[_Row]
    by_id: bool


def _content(path: Path, ids: Path | None) -> _Content:
    """Raises UserError."""
    entries = _rows_of_table(path) if path.suffix.lower() == ".csv" else _entries(path)
    first = entries[0] if entries and isinstance(entries[0], dict) else {}
    try:
        if len(entries) == 1 and "annotations" in first:
            photos, labels = _told(first)
            of_rows, rows = _of_coco(first["annotations"])
            return _Content(photos, labels, [*dict.fromkeys([*photos, *of_rows])], rows, by_id=False)
        if "image_id" not in first:
            return _Content(_Names(), _Names(), *_of_photos(entries), by_id=False)
        return _Content(*(_ids(ids) if ids else (_Names(), _Names())), *_of_coco(entries), by_id=ids is None)
    except (KeyError, TypeError, ValueError) as error:
        lacking = f" (no {error.args[0]!r})" if isinstance(error, KeyError) else ""
        raise UserError(f"{path}: not detections as detkit or COCO write them{lacking}") from None


def _entries(path: Path) -> list[Any]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    try:
        whole = json.loads(text)
        return whole if isinstance(whole, list) else [whole]
    except ValueError:
        pass
    entries = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at U+2028 within a name
        if line.strip():
            try:
                entries.append(json.loads(line))
            except ValueError:
                raise UserError(f"{path}, line {number}: not JSON") from None
    return entries


def _rows_of_table(path: Path) -> list[dict[str, Any]]:
    """A table's rows, each as a photo with one detection."""
    (_, head), *rows = [*plain.rows(path)] or [(1, [])]
    if not set(_COLUMNS) <= set(head):
        raise UserError(f"{path}: its first line doesn't name the columns {', '.join(_COLUMNS)}")
    entries = []
    for line, cells in rows:
        row = dict(zip(head, cells, strict=False))
        try:
            score, *box = (plain.decimal(row[name]) for name in _COLUMNS[2:])
        except (KeyError, ValueError):
            raise UserError(f"{path}, line {line}: not a score and four sides in numbers") from None
        entries.append({"image": row["image"], "detections": [{"label": row["label"], "score": score, "box": box}]})
    return entries


def _of_photos(entries: Iterable[Mapping[str, Any]]) -> tuple[list[Any], list[_Row]]:
    photos: list[Any] = []
    rows = []
    for entry in entries:
        if "error" in entry:  # a photo that could not be read
            continue
        photos.append(_plain(entry["image"]))
        for each in entry["detections"]:
            x1, y1, x2, y2 = map(finite, each["box"])
            rows.append(_Row(entry["image"], _plain(each["label"]), (x1, y1, x2, y2), finite(each["score"])))
    return photos, rows


def _of_coco(entries: Iterable[Mapping[str, Any]]) -> tuple[list[Any], list[_Row]]:
    rows = []
    for entry in entries:
        x, y, width, height = map(finite, entry["bbox"])
        box = (x, y, x + width, y + height)
        rows.append(_Row(_plain(entry["image_id"]), _plain(entry["category_id"]), box, finite(entry["score"])))
    return list(dict.fromkeys(row.photo for row in rows)), rows


def _plain(value: object) -> object:
    if not isinstance(value, str | int):
        raise TypeError("a name or an id")
    return value


class _Names(dict[Any, Any]):
    """Gives what is asked for, where it stands for itself."""

    def __missing__(self, key: object) -> object:
        return key


def _ids(path: Path) -> tuple[_Names, _Names]:
    """Photos' names and classes' by the ids of a COCO annotation file."""
    try:
        return _told(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: can't be read as COCO annotations ({error})") from None


def _told(tree: Mapping[str, Any]) -> tuple[_Names, _Names]:
    """The same of its content. Raises KeyError or TypeError where it is none."""
    photos = {each["id"]: each["file_name"] for each in tree["images"]}
    return _Names(photos), _Names({each["id"]: each["name"] for each in tree["categories"]})


def _places(dataset: DataSet) -> dict[str, int]:
    """The place of each photo by path, name and stem; none where two photos share a name."""
    result: dict[str, int] = {}
    paths = [Path(dataset.name(place)) for place in range(len(dataset))]
    for names in ([p.stem for p in paths], [p.name for p in paths], [p.as_posix() for p in paths]):
        of: dict[str, int] = {}
        for place, name in enumerate(names):
            of[name] = -1 if name in of else place
        result |= of
    return result


def _place(photo: object, places: Mapping[str, int]) -> int | None:
    path = Path(str(photo))
    for name in (path.as_posix(), path.name, path.stem):
        place = places.get(name, -1)
        if place >= 0:
            return place
    return None


def _detections(rows: list[tuple[Sequence[float], float, int]], dataset: DataSet, place: int) -> Detections:
    height, width = dataset.hw[place].tolist()
    rows = sorted(rows, key=lambda row: -row[1])
    boxes = np.array([box for box, _, _ in rows], np.float32).reshape(-1, 4)
    scores, labels = (np.array([row[i] for row in rows]) for i in (1, 2))
    return Detections(boxes, scores.astype(np.float32), labels.astype(np.int64), (height, width))
