"""Detections from a file: JSON lines as `detkit predict` writes JSON, or COCO's results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detkit.data.convert.common import finite
from detkit.data.labels import DataSet
from detkit.errors import UserError, nearest
from detkit.types import Detections

SUFFIXES = (".json", ".jsonl")


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

    JSON lines, or a JSON list of the same: {"image", "detections": [{"label", "score", "box": [x1, y1, x2, y2]}]}. COCO
    results: [{"image_id", "category_id", "bbox": [x, y, w, h], "score"}], whose ids are those of the annotation file
    `ids`, or the names of photos and classes themselves. A photo is known by its path in the data set, its file's name,
    or that without suffix. more: classes that the data set lacks come after its own; else they are an error. Raises
    UserError, one line, where the file can't be read so.
    """
    entries = _entries(path)
    coco = bool(entries) and isinstance(entries[0], dict) and "image_id" in entries[0]
    try:
        seen, rows = _of_coco(entries) if coco else _of_photos(entries)
    except (KeyError, TypeError, ValueError) as error:
        lacking = f" (no {error.args[0]!r})" if isinstance(error, KeyError) else ""
        raise UserError(f"{path}: not detections as detkit or COCO write them{lacking}") from None
    photos, labels = (_ids(ids) if ids else (_Names(), _Names())) if coco else (_Names(), _Names())
    places = _places(dataset)
    known = {name: label for label, name in enumerate(dataset.classes)}
    of: list[list[tuple[Sequence[float], float, int]]] = [[] for _ in range(len(dataset))]
    strange = {photo for photo in seen if _place(photos[photo], places) is None}
    for row in rows:
        name = labels[row.label]
        if more and isinstance(name, str):
            known.setdefault(name, len(known))
        if name not in known:
            advice = "; name the file that its ids are of by --ids" if coco and not ids else nearest(str(name), known)
            raise UserError(f"{path}: the data set has no class '{name}'{advice}")
        place = _place(photos[row.photo], places)
        if place is not None:
            of[place].append((row.box, row.score, known[name]))
    named = frozenset(place for photo in seen if (place := _place(photos[photo], places)) is not None)
    missing = len(dataset) - len(named)
    remarks = []
    if strange and len(strange) == len(seen):
        advice = "; name the file that its ids are of by --ids" if coco and not ids else ""
        raise UserError(
            f"{path}: none of its photos, such as '{sorted(map(str, strange))[0]}', is in the split{advice}"
        )
    if strange:
        remarks.append(f"{path}: {len(strange)} photos are not in the split, such as '{sorted(map(str, strange))[0]}'")
    if missing:
        remarks.append(
            f"{path}: says nothing of {missing} of the {len(dataset)} photos; they count as without detections"
        )
    return Found([_detections(each, dataset, place) for place, each in enumerate(of)], remarks, named, tuple(known))


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
        tree = json.loads(path.read_text("utf-8"))
        photos = {each["id"]: each["file_name"] for each in tree["images"]}
        return _Names(photos), _Names({each["id"]: each["name"] for each in tree["categories"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: can't be read as COCO annotations ({error})") from None


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
