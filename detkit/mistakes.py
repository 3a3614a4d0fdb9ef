"""What goes wrong: the kinds of error and what each costs, classes taken for each other, the worst photos, and labels
that may be wrong. All at one IoU, from detections in a `Pool`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detkit import formats, matches, metrics
from detkit.files import whole_folder
from detkit.matches import FALSE, HIT, IGNORED, Bools, Floats, Ints, Pool
from detkit.types import Record

KINDS = ("class", "localisation", "both", "duplicate", "background", "missed")
_CLASS, _LOCALISATION, _BOTH, _DUPLICATE, _BACKGROUND = range(5)
IOU, APART = 0.5, 0.1  # from which IoU an object is found, and up to which a detection has nothing to do with it


class Tide(NamedTuple):
    """TIDE's split of the errors at IoU 0.5 (Bolya 2020). ap: COCO's, float. kind: int64 [N], the kind of each
    detection, an index into KINDS, -1 where it is right or ignored. object: int64 [N], the object that it is an error
    about, -1 for none. missed: bool [G], objects that no detection is about. costs: by kind, the AP that is
    gained were all its errors mended. numbers: by kind, how many there are."""

    ap: float
    kind: Ints
    object: Ints
    missed: Bools
    costs: dict[str, float]
    numbers: dict[str, int]


def tide(pool: Pool) -> Tide:
    """The kinds of error. A wrong detection is, the first of these that fits: badly localised (IoU from 0.1 to 0.5
    with an object of its class), of the wrong class (0.5 or more with one of another), a duplicate (of an object that
    is found already), on the background (at most 0.1 with any), or both badly localised and of the wrong class."""
    found = matches.match(pool, (IOU,))
    state, counted = found.state[0, 0], found.counted[0]
    wrong = state == FALSE
    near = matches.pairs(pool, 1e-6, across=True)
    near = near.take(wrong[near.detection] & counted[near.object])
    same = pool.label[near.detection] == pool.object_label[near.object]
    (own, own_object), (other, other_object) = (_largest(pool, near.take(which)) for which in (same, ~same))
    conditions = [
        (own >= APART) & (own < IOU), other >= IOU, own >= IOU, np.maximum(own, other) <= APART, np.ones_like(wrong)
    ]  # fmt: skip
    kind = np.select(conditions, [_LOCALISATION, _CLASS, _DUPLICATE, _BACKGROUND, _BOTH])
    kind = np.where(wrong, kind, -1)
    target = np.select([kind == _CLASS, np.isin(kind, (_LOCALISATION, _DUPLICATE))], [other_object, own_object], -1)
    free = counted.copy()
    free[found.object[0][state == HIT]] = False
    mendable = np.isin(kind, (_CLASS, _LOCALISATION)) & free[target]
    about = np.zeros_like(free)
    about[target[mendable]] = True
    missed = free & ~about
    surest = _surest(pool.score, mendable, target)
    objects = pool.objects().sum(0)
    ap = _ap(pool.label, pool.score, state, objects)
    costs, numbers = {}, {}
    for place, name in enumerate(KINDS):
        if name == "missed":
            left = objects - np.bincount(pool.object_label[missed], minlength=len(objects))
            mended, numbers[name] = _ap(pool.label, pool.score, state, left, objects > 0), int(missed.sum())
        else:
            mended = _ap(*_mended(pool, state, kind == place, surest, target), objects)
            numbers[name] = int((kind == place).sum())
        costs[name] = mended - ap
    return Tide(ap, kind, target, missed, costs, numbers)


def _largest(pool: Pool, near: matches.Pairs) -> tuple[Floats, Ints]:
    """Of each detection the largest IoU, 0 where there is none, and the object."""
    order = np.lexsort((-near.object, near.iou, near.detection))
    iou, there = np.zeros(len(pool.score)), np.full(len(pool.score), -1)
    iou[near.detection[order]] = near.iou[order]  # of several, the last counts
    there[near.detection[order]] = near.object[order]
    return iou, there


def _surest(score: Floats, mendable: Bools, target: Ints) -> Bools:
    """Of the errors about each object, whatever their kind, the one that mending it makes a hit, as in Bolya's code."""
    rows = np.flatnonzero(mendable)
    rows = rows[np.argsort(-score[rows], kind="stable")]
    result = np.zeros_like(mendable)
    result[rows[np.unique(target[rows], return_index=True)[1]]] = True
    return result


def _mended(
    pool: Pool, state: NDArray[np.int8], errors: Bools, surest: Bools, target: Ints
) -> tuple[Ints, Floats, NDArray[np.int8]]:
    """Labels, scores and state once the errors are mended: the surest about an object that no detection has becomes a
    hit, in the object's class; the others go."""
    chosen = errors & surest
    label, after = pool.label.copy(), state.copy()
    after[errors] = IGNORED
    after[chosen] = HIT
    label[chosen] = pool.object_label[target[chosen]]
    return label, pool.score, after


def _ap(label: Ints, score: Floats, state: NDArray[np.int8], objects: Ints, classes: Bools | None = None) -> float:
    """COCO's AP: mean over `classes`, default: those with objects."""
    order = np.lexsort((-score, label))
    known = np.flatnonzero(objects > 0 if classes is None else classes)
    bounds = np.searchsorted(label[order], [known, known + 1])
    curves = [
        metrics.precisions(state[order[first:last]], int(objects[k]))
        for k, first, last in zip(known, *bounds, strict=True)
        if objects[k]
    ]
    return float(np.sum([curve.mean() for curve in curves]) / max(1, len(known)))


# --- at thresholds ----------------------------------------------------------------------------------------------------


class Confusion(NamedTuple):
    """What objects are taken for. table: int64 [C + 1, C + 1], object's class by detection's; the last row is for
    detections without object, the last column for objects without detection. taken: int64 [N], the object of each
    detection, -1 for none. shown: bool [N], detections that count: from their class's threshold on, and not ignored."""

    table: Ints
    taken: Ints
    shown: Bools


def confusion(pool: Pool, thresholds: Floats) -> Confusion:
    """The confusion matrix at IoU 0.5 and a threshold a class, float64 [C]: detections first take objects of their own
    class, as in `matches.match`; what is left of both is paired by the largest overlap."""
    kept = np.flatnonzero(pool.score >= thresholds[pool.label])
    part = pool.only(pool.score >= thresholds[pool.label])
    found = matches.match(part, (IOU,))
    state, taken = found.state[0, 0], found.object[0].copy()
    taken[state != HIT] = -1
    free = found.counted[0].copy()
    free[taken[state == HIT]] = False
    near = matches.pairs(part, IOU, across=True)
    near = near.take((state[near.detection] == FALSE) & free[near.object] & (near.iou >= IOU))
    for place in np.argsort(-near.iou, kind="stable").tolist():
        detection, there = near.detection[place], near.object[place]
        if free[there] and taken[detection] < 0:
            taken[detection], free[there] = there, False
    size = len(pool.classes) + 1
    counts = state != IGNORED
    true = np.where(taken >= 0, np.append(pool.object_label, size - 1)[taken], size - 1)[counts]
    table = np.bincount(true * size + part.label[counts], minlength=size * size).reshape(size, size)
    table[:-1, -1] = np.bincount(pool.object_label[free], minlength=size - 1)
    everywhere, shown = np.full(len(pool.score), -1), np.zeros(len(pool.score), bool)
    everywhere[kept], shown[kept] = taken, counts
    return Confusion(table, everywhere, shown)


class LookAlike(NamedTuple):
    """Two classes that are taken for each other: how often the one for the other, and the reverse; share: of all
    objects of both."""

    first: str
    second: str
    times: int
    reverse: int
    share: float


def look_alikes(table: Ints, classes: Sequence[str], most: int = 20) -> list[LookAlike]:
    """The pairs of classes that are confused most often."""
    core, objects = table[:-1, :-1], table[:-1].sum(1)
    both = np.triu(core + core.T, 1)
    result = []
    for place in np.argsort(-both, axis=None, kind="stable")[:most].tolist():
        a, b = divmod(place, len(classes))
        if not both[a, b]:
            break
        if core[b, a] > core[a, b]:
            a, b = b, a
        share = (core[a, b] + core[b, a]) / (objects[a] + objects[b])
        result.append(LookAlike(classes[a], classes[b], int(core[a, b]), int(core[b, a]), float(share)))
    return result


class Photo(NamedTuple):
    """A photo's errors: its place in the split; detections that are right; those without an object of their class;
    objects that are not found; hits over hits, false ones and missed ones."""

    place: int
    right: int
    false: int
    missed: int
    share: float


def worst(pool: Pool, confused: Confusion, most: int = 24, of_class: int = 2) -> list[Photo]:
    """The photos with the most errors, of equal ones that with the smaller share of right ones first, none without:
    `most` of all, and of each class `of_class` in which it is missed or falsely detected."""
    label = np.append(pool.object_label, -1)[confused.taken]
    hit = confused.shown & (confused.taken >= 0) & (label == pool.label)
    false_of, right_of = pool.found(confused.shown & ~hit), pool.found(hit)
    missed_of = pool.objects() - right_of
    right, false, missed = (table.sum(1) for table in (right_of, false_of, missed_of))
    share = right / np.maximum(right + false + missed, 1)
    order = np.lexsort((share, -(false + missed)))
    wrong = (false_of + missed_of)[order] > 0
    chosen = (np.arange(pool.photos) < most) & wrong.any(1)
    chosen |= (wrong & (np.cumsum(wrong, 0) <= of_class)).any(1)
    return [Photo(i, int(right[i]), int(false[i]), int(missed[i]), float(share[i])) for i in order[chosen].tolist()]


# --- labels -----------------------------------------------------------------------------------------------------------

Doubt = Literal["no label", "another class", "box", "nothing there"]
SEEN = 0.3  # IoU: what overlaps an object so much has seen it
FAINT = 0.05  # a score below which a detection is none


class Suspect(NamedTuple):
    """A label that may be wrong.

    photo: its place in the split. box: x1 y1 x2 y2, of the detection, but for 'nothing there', of the object. said: the
    class by the label, '' for none. seen: that of the detection, '' for none. score: the detection's; for 'nothing
    there', the best that any near it has.
    """

    photo: int
    doubt: Doubt
    box: tuple[float, float, float, float]
    said: str
    seen: str
    score: float


def suspects(pool: Pool, split: Tide, thresholds: Floats, most: int = 100) -> list[Suspect]:
    """Labels worth a look, the surest of each kind first, up to `most` of a kind: detections from their class's
    threshold on, without label, on one of another class, or on a box that fits badly; and objects that the detector
    hasn't seen with any score."""
    names = dict(zip((_BACKGROUND, _CLASS, _LOCALISATION), ("no label", "another class", "box"), strict=True))
    result: list[Suspect] = []
    sure = pool.score >= thresholds[pool.label]
    for kind, doubt in names.items():
        rows = np.flatnonzero(sure & (split.kind == kind))
        for row in rows[np.argsort(-pool.score[rows], kind="stable")][:most].tolist():
            said = pool.classes[pool.object_label[split.object[row]]] if split.object[row] >= 0 else ""
            seen = pool.classes[pool.label[row]]
            box = tuple(pool.box[row].tolist())
            result.append(Suspect(int(pool.photo[row]), doubt, box, said, seen, float(pool.score[row])))  # type: ignore[arg-type]
    near = matches.pairs(pool, SEEN, across=True)
    best = np.zeros(len(pool.object_label))
    np.maximum.at(best, near.object, pool.score[near.detection])
    unseen = np.flatnonzero(~pool.ignored & (best < FAINT))
    for row in unseen[np.argsort(best[unseen], kind="stable")][:most].tolist():
        box = tuple(pool.object_box[row].tolist())
        said = pool.classes[pool.object_label[row]]
        result.append(Suspect(int(pool.object_photo[row]), "nothing there", box, said, "", float(best[row])))
    return result


def write_suspects(
    folder: Path, found: Sequence[Suspect], records: Sequence[Record], names: Sequence[str], classes: Sequence[str]
) -> int:
    """Write VOC XML of the photos with doubtful labels into a new folder, to be mended in a labelling tool: the labels
    as they are, and the detections beside them, in whole pixels, with their score as a comment. Returns how many files.

    names: of the photos, paths relative to the data set. Raises UserError where the folder holds something.
    """
    doubts: dict[int, list[Suspect]] = {}
    for suspect in found:
        doubts.setdefault(suspect.photo, []).append(suspect)
    with whole_folder(folder) as out:
        for place, own in doubts.items():
            record, more = records[place], [suspect for suspect in own if suspect.seen]
            seen = formats.whole_pixels(np.array([suspect.box for suspect in more]).reshape(-1, 4), record.hw)
            boxes = np.concatenate([record.boxes, seen])
            text = formats.voc_xml(
                Path(names[place]).name,
                record.hw,
                boxes,
                [*(classes[label] for label in record.labels), *(suspect.seen for suspect in more)],
                [*record.flags.tolist(), *(0 for _ in more)],
                [*(None for _ in record.labels), *(suspect.score for suspect in more)],
            )
            path = (out / names[place].removeprefix("JPEGImages/")).with_suffix(".xml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    return len(doubts)
