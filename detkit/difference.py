"""`detkit data diff`: what was found beside the labels that are there, object by object."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from detkit import found, matches, mistakes
from detkit.config import Data
from detkit.data import cache
from detkit.errors import UserError
from detkit.files import atomic_write, require_free
from detkit.matches import FALSE, HIT, Pool

Kind = Literal["matched", "other class", "missed", "extra"]
KINDS: tuple[Kind, ...] = ("matched", "other class", "missed", "extra")
_DOUBTS: dict[Kind, mistakes.Doubt] = {"other class": "another class", "extra": "no label"}


class Difference(NamedTuple):
    """An object, a detection, or both in one place.

    photo: its place in the data set. box: x1 y1 x2 y2, of the detection, but for what is missed, of the object. said:
    the class by the label, '' for none. seen: by the detection, '' for none. score, iou: 0 for none.
    """

    photo: int
    kind: Kind
    box: tuple[float, float, float, float]
    said: str
    seen: str
    score: float
    iou: float


def compare(pool: Pool, iou: float = 0.5) -> list[Difference]:
    """Every detection and every object once, photo by photo: first those of one class that overlap by `iou`, as COCO
    matches them; then, of those left, such of different classes, the largest overlap first. Difficult objects and
    crowds are not missed, nor is what lies on them extra."""
    match = matches.match(pool, (iou,))
    state, partner = match.state[0, 0], match.object[0].copy()
    free = match.counted[0].copy()
    free[partner[state == HIT]] = False
    near = matches.pairs(pool, iou, across=True)
    overlap = {(d, o): v for d, o, v in zip(near.detection.tolist(), near.object.tolist(), near.iou, strict=True)}
    other = np.zeros(len(state), bool)
    for row in np.argsort(-near.iou, kind="stable").tolist():
        detection, thing = int(near.detection[row]), int(near.object[row])
        if state[detection] == FALSE and not other[detection] and free[thing]:
            other[detection], free[thing], partner[detection] = True, False, thing
    result = []
    for row in np.flatnonzero((state == HIT) | (state == FALSE)).tolist():
        kind: Kind = "matched" if state[row] == HIT else "other class" if other[row] else "extra"
        thing = int(partner[row]) if kind != "extra" else -1
        said = pool.classes[pool.object_label[thing]] if thing >= 0 else ""
        result.append(_difference(pool, row, kind, said, float(overlap.get((row, thing), 0.0))))
    for row in np.flatnonzero(free).tolist():
        x1, y1, x2, y2 = pool.object_box[row].tolist()
        said = pool.classes[pool.object_label[row]]
        result.append(Difference(int(pool.object_photo[row]), "missed", (x1, y1, x2, y2), said, "", 0.0, 0.0))
    return sorted(result, key=lambda one: (one.photo, KINDS.index(one.kind), -one.score))


def _difference(pool: Pool, row: int, kind: Kind, said: str, iou: float) -> Difference:
    x1, y1, x2, y2 = pool.box[row].tolist()
    seen = pool.classes[pool.label[row]]
    return Difference(int(pool.photo[row]), kind, (x1, y1, x2, y2), said, seen, float(pool.score[row]), iou)


def run(
    data: Data,
    detections: Path,
    console: Console,
    *,
    split: str = "all",
    score: float = 0.0,
    iou: float = 0.5,
    ids: Path | None = None,
    json_file: Path | None = None,
    xml: Path | None = None,
) -> Counter[Kind]:
    """Print how the detections in a file, or in a folder of `detkit predict`, differ from the labels of the photos that
    they are of. Returns how many there are of each kind.

    score: the lowest that counts. ids: as found.read has it. json_file: gets every difference, photo by photo. xml: a
    new folder for VOC XML of the photos that differ: their labels, and beside them the detections without label or with
    another class, with their scores as comments. Raises UserError.
    """
    if xml:
        require_free(xml)
    dataset = cache.load_split(data, split, console)
    told = found.read(_file(detections), dataset, ids, more=True)
    places = np.array(sorted(told.named), np.int64)
    if len(places) < len(dataset):
        console.print(f"{len(dataset) - len(places)} of {len(dataset)} photos are not in {detections}: left out")
    records = [dataset[place] for place in places.tolist()]
    names = [dataset.name(place) for place in places.tolist()]
    pool = matches.pool(records, [told.detections[place].above(score) for place in places.tolist()], told.classes)
    all_of_them = compare(pool, iou)
    console.print(_table(all_of_them, told.classes))
    differ = [one for one in all_of_them if one.kind != "matched"]
    console.print(f"{len({one.photo for one in differ})} of {len(records)} photos differ", highlight=False)
    if json_file:
        tree = [_tree(one, names[one.photo]) for one in all_of_them]
        atomic_write(json_file, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    if xml:
        doubts = [
            mistakes.Suspect(one.photo, _DOUBTS.get(one.kind, "nothing there"), one.box, one.said, one.seen, one.score)
            for one in differ
        ]
        written = mistakes.write_suspects(xml, doubts, records, names, told.classes)
        console.print(Text(f"{xml}: XML of {written} photos, with what was found beside the labels"), soft_wrap=True)
    return Counter(one.kind for one in all_of_them)


def _file(detections: Path) -> Path:
    """The file of detections that is meant. Raises UserError."""
    if detections.is_dir():
        detections = detections / "detections.jsonl"
        if not detections.is_file():
            raise UserError(f"{detections}: no such file; make it with  detkit predict PHOTOS --format jsonl")
    if not detections.is_file():
        raise UserError(f"{detections}: no such file or folder of detections")
    if detections.suffix.lower() not in found.SUFFIXES:
        raise UserError(f"{detections}: detections are read from {', '.join(found.SUFFIXES)} files")
    return detections


def _tree(one: Difference, name: str) -> dict[str, Any]:
    tree: dict[str, Any] = {"image": name, "kind": one.kind, "label": one.said, "found": one.seen}
    tree |= {"box": [round(side, 2) for side in one.box], "score": round(one.score, 4), "iou": round(one.iou, 4)}
    return tree


def _table(differences: Sequence[Difference], classes: Sequence[str]) -> Table:
    """How many of each kind, by the label's class, or that of a detection without one."""
    counts = Counter((one.said or one.seen, one.kind) for one in differences)
    table = Table("class", title="detections beside labels", title_justify="left")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    for name in classes:
        if any(counts[name, kind] for kind in KINDS):
            table.add_row(Text(name), *(str(counts[name, kind]) for kind in KINDS))
    table.add_section()
    table.add_row("total", *(str(sum(one.kind == kind for one in differences)) for kind in KINDS))
    return table
