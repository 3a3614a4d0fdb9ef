"""Which detection is of which object, by the rules of COCO's evaluation, for all photos at once; numpy alone.

All that is measured rests on this: AP, counts, thresholds, kinds of error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detkit.types import CROWD, DIFFICULT, Detections, Record

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

HIT, FALSE, IGNORED = 1, 0, -1
# COCO's areas in square pixels of the photo, both ends included.
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
_ROOM = 1_000_000  # pairs of boxes looked at together: some 100 MB


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The objects and detections of P photos in flat columns: G objects, photo by photo; N detections, class by class,
    each class's best first, equal scores in the order of the photos.

    object_photo, object_label: int64 [G]. object_box: float64 [G, 4]. ignored: bool [G], difficult or crowd. crowd:
    bool [G]. photo, label: int64 [N]. score: float64 [N]. box: float64 [N, 4]. rank: int64 [N], the place among the
    photo's detections of that class. source: int64 [N], the place in the photo's Detections.
    """

    photos: int
    classes: tuple[str, ...]
    object_photo: Ints
    object_label: Ints
    object_box: Floats
    ignored: Bools
    crowd: Bools
    photo: Ints
    label: Ints
    score: Floats
    box: Floats
    rank: Ints
    source: Ints

    def of_class(self, label: int) -> slice:
        """Where a class's detections stand."""
        return slice(*np.searchsorted(self.label, [label, label + 1]).tolist())

    def objects(self) -> Ints:
        """How many objects that count each photo has of each class: int64 [P, C]."""
        return self._counts(self.object_photo, self.object_label, ~self.ignored)

    def found(self, kept: Bools) -> Ints:
        """How many of the detections `kept`, bool [N], each photo has of each class: int64 [P, C]."""
        return self._counts(self.photo, self.label, kept)

    def _counts(self, photo: Ints, label: Ints, kept: Bools) -> Ints:
        shape = self.photos, len(self.classes)
        flat = photo[kept] * shape[1] + label[kept]
        return np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)

    def only(self, kept: Bools) -> Pool:
        """With those detections alone, bool [N]; `rank` stays."""
        columns = {name: getattr(self, name)[kept] for name in ("photo", "label", "score", "box", "rank", "source")}
        return replace(self, **columns)

    def of_photos(self, kept: Bools) -> Pool:
        """Of those photos alone, bool [P], numbered anew."""
        number = np.cumsum(kept) - 1
        part = self.only(kept[self.photo])
        objects = kept[self.object_photo]
        columns = {name: getattr(self, name)[objects] for name in ("object_label", "object_box", "ignored", "crowd")}
        return replace(
            part,
            photos=int(kept.sum()),
            photo=number[part.photo],
            object_photo=number[self.object_photo[objects]],
            **columns,
        )


def pool(records: Sequence[Record], found: Sequence[Detections], classes: Sequence[str]) -> Pool:
    """One Detections a Record, in columns. Raises ValueError where their numbers differ."""
    if len(records) != len(found):
        raise ValueError(f"{len(records)} photos and detections of {len(found)}: zip needs as many of each")
    photo = np.repeat(np.arange(len(found)), [len(each) for each in found])
    label = _joined([each.labels for each in found], np.int64)
    score = _joined([each.scores for each in found], np.float64)
    order = np.lexsort((-score, label))
    # lexsort is stable, so equal scores keep the order of photos. A photo's rank within the class:
    group = photo[order] * len(classes) + label[order]
    by_group = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    rank = np.empty(len(order), np.int64)
    rank[by_group] = np.arange(len(order)) - starts
    flags = _joined([each.flags for each in records], np.uint8)
    return Pool(
        photos=len(records),
        classes=tuple(classes),
        object_photo=np.repeat(np.arange(len(records)), [len(each.labels) for each in records]),
        object_label=_joined([each.labels for each in records], np.int64),
        object_box=_joined([each.boxes for each in records], np.float64).reshape(-1, 4),
        ignored=(flags & (DIFFICULT | CROWD)) > 0,
        crowd=(flags & CROWD) > 0,
        photo=photo[order],
        label=label[order],
        score=score[order],
        box=_joined([each.boxes for each in found], np.float64).reshape(-1, 4)[order],
        rank=rank,
        source=(_joined([np.arange(len(each)) for each in found], np.int64))[order],
    )


def _joined(parts: Sequence[NDArray[Any]], kind: type) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, kind), *(part.reshape(-1) for part in parts)]).astype(kind, copy=False)


class Pairs(NamedTuple):
    """Detections and objects of one photo that overlap: detection and object int64 [L], by detection, then by object;
    iou float64 [L]; share float64 [L], the IoU but with a crowd, where it is the share of the detection inside."""

    detection: Ints
    object: Ints
    iou: Floats
    share: Floats

    def take(self, kept: Bools | Ints) -> Pairs:
        """Some of them."""
        columns: list[Any] = [column[kept] for column in self]
        return Pairs(*columns)


def pairs(pool: Pool, least: float, *, across: bool = False) -> Pairs:
    """The pairs of one photo and class, or with `across` of any classes, with an IoU or share of at least `least`."""
    classes = 1 if across else len(pool.classes)
    found = pool.photo * classes + (0 if across else pool.label)
    there = pool.object_photo * classes + (0 if across else pool.object_label)
    order = np.argsort(there, kind="stable")
    first, last = (np.searchsorted(there[order], found, side) for side in ("left", "right"))
    kept = [_overlapping(pool, order, first[part], last[part], part, least) for part in _parts(last - first)]
    columns: list[Any] = [np.concatenate(each) for each in zip(_NONE, *kept, strict=True)]
    return Pairs(*columns)


_NONE = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0))


def _parts(counts: Ints) -> Iterator[slice]:
    """The detections a few at a time, by how many pairs each is in."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _ROOM, "right")))
        yield slice(start, stop)
        start = stop


def _overlapping(pool: Pool, order: Ints, first: Ints, last: Ints, part: slice, least: float) -> Pairs:
    counts = last - first
    detection = np.repeat(np.arange(part.start, part.start + len(counts)), counts)
    place = np.arange(len(detection)) - np.repeat(np.cumsum(counts) - counts, counts)
    there = order[np.repeat(first, counts) + place]
    a, b = pool.box[detection], pool.object_box[there]
    # In pycocotools' own arithmetic, from corner and sides: what lies on a threshold lies there for both.
    sides_a, sides_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
    common = np.minimum(a[:, :2] + sides_a, b[:, :2] + sides_b) - np.maximum(a[:, :2], b[:, :2])
    inside = np.where((common > 0).all(1), common[:, 0] * common[:, 1], 0.0)
    area_a, area_b = sides_a[:, 0] * sides_a[:, 1], sides_b[:, 0] * sides_b[:, 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = inside / (area_a + area_b - inside)
        share = np.where(pool.crowd[there], inside / area_a, iou)
    near = np.flatnonzero((iou >= least) | (share >= least))
    return Pairs(detection[near], there[near], iou[near], share[near])


class Match(NamedTuple):
    """What became of each detection: state int8 [A, T, N], HIT, FALSE or IGNORED, at each of A areas and T IoUs; and at
    the first area the object that it is of: object int64 [T, N], -1 for none. counted: bool [A, G], objects that count.
    """

    state: NDArray[np.int8]
    object: Ints
    counted: Bools


def match(pool: Pool, ious: Sequence[float], areas: Sequence[tuple[float, float]] = (AREAS["all"],)) -> Match:
    """COCO's matching: a photo's detections of a class, best first, each take the object that they overlap most among
    those left, by an IoU of at least so much; one that counts before one that is ignored.

    An ignored object, difficult or outside the area, makes the detection that takes it ignored; a crowd, all that it
    holds. A detection without object and outside the area is ignored too.
    """
    sides = pool.object_box[:, 2:] - pool.object_box[:, :2]
    counted = ~pool.ignored & _within(sides[:, 0] * sides[:, 1], areas)
    limits = np.minimum(np.array(ious), 1 - 1e-10)
    near = pairs(pool, float(limits.min()))
    # A detection's pairs, the least overlap first: of those that may be taken, the last is.
    near = near.take(np.lexsort((near.object, near.share, near.detection, pool.rank[near.detection])))
    state = np.zeros((len(areas), len(limits), len(pool.score)), np.int8)
    partner = np.full(state.shape[1:], -1)
    taken = np.zeros((len(areas), len(limits), len(pool.ignored)), bool)
    ranks = pool.rank[near.detection]
    bounds = [*np.flatnonzero(np.diff(ranks, prepend=-1)).tolist(), len(ranks)]
    for start, stop in pairwise(bounds):  # each photo's best of a class, then its second, ...
        one = near.take(np.arange(start, stop))
        firsts = np.flatnonzero(np.diff(one.detection, prepend=-1))
        free = ~taken[:, :, one.object] | pool.crowd[one.object]
        free &= one.share >= limits[:, None]
        value = np.arange(1, 1 + stop - start) + counted[:, one.object][:, None] * (stop - start)
        best = np.maximum.reduceat(np.where(free, value, 0), firsts, axis=2)
        area, iou, place = np.nonzero(best)
        there = one.object[(best[area, iou, place] - 1) % (stop - start)]
        which = one.detection[firsts[place]]
        state[area, iou, which] = np.where(counted[area, there], HIT, IGNORED)
        taken[area, iou, there] = True
        partner[iou[area == 0], which[area == 0]] = there[area == 0]
    sides = pool.box[:, 2:] - pool.box[:, :2]
    outside = ~_within(sides[:, 0] * sides[:, 1], areas)
    for each, beyond in zip(state, outside, strict=True):
        each[:, beyond] = np.where(each[:, beyond] == HIT, HIT, IGNORED)
    return Match(state, partner, counted)


def _within(sizes: Floats, areas: Sequence[tuple[float, float]]) -> Bools:
    return np.array([(sizes >= low) & (sizes <= high) for low, high in areas]).reshape(len(areas), len(sizes))
