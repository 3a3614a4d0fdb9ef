"""How good detections are: COCO's and Pascal VOC's AP, counts, intervals, and whether one model is better than another.

Boxes in pixels of the original photo. COCO's figures are pycocotools' own to 1e-6 (tests/test_metrics.py), many times
as fast (benchmarks/metrics.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detkit import matches
from detkit.matches import AREAS, FALSE, HIT, IGNORED, Bools, Floats, Ints, Match, Pairs, Pool
from detkit.types import Detections, Record

IOUS = tuple(np.linspace(0.5, 0.95, 10).tolist())
RECALLS = 101  # at which a curve is sampled, from 0 to 1
_GRID = np.linspace(0, 1, RECALLS)
_MOST = (1, 10, 100)  # detections a photo and class, of COCO's recalls
RESAMPLES = 1000
_TOGETHER = 2_000_000  # weights of detections held at a time


# --- COCO -------------------------------------------------------------------------------------------------------------


def precisions(state: NDArray[np.int8], objects: int) -> Floats:
    """COCO's precision at `RECALLS` recalls of a class's detections, best first, with so many objects."""
    places = np.flatnonzero(state == HIT)
    hit = np.arange(1, len(places) + 1.0)
    envelope = np.maximum.accumulate((hit / np.cumsum(state != IGNORED)[places])[::-1])[::-1]
    reached = np.searchsorted(_GRID, hit / objects, side="right")  # how many of the recalls, at each hit
    curve = np.zeros(RECALLS)
    known = np.repeat(envelope, np.diff(reached, prepend=0))
    curve[: len(known)] = known
    return curve


class Coco(NamedTuple):
    """COCO's evaluation. precision: float64 [A, T, RECALLS, C] at A areas and T IoUs; recall: float64 [A, T, C], of all
    detections; recall_of: by number of detections, float64 [T, C]; NaN where a class has no object that counts."""

    precision: Floats
    recall: Floats
    recall_of: dict[int, Floats]


def coco(pool: Pool, found: Match, most: Sequence[int] = ()) -> Coco:
    """COCO's evaluation of detections that were matched. most: numbers of detections a photo and class."""
    areas, ious = found.state.shape[:2]
    shape = areas, ious, len(pool.classes)
    precision, recall = np.full((*shape[:2], RECALLS, shape[2]), np.nan), np.full(shape, np.nan)
    recall_of = {number: np.full(shape[1:], np.nan) for number in most}
    for area in range(areas):
        objects = np.bincount(pool.object_label[found.counted[area]], minlength=shape[2])
        for label in np.flatnonzero(objects).tolist():
            own = pool.of_class(label)
            state = found.state[area][:, own]
            recall[area, :, label] = (state == HIT).sum(1) / objects[label]
            for iou in range(ious):
                precision[area, iou, :, label] = precisions(state[iou], objects[label])
            for number, table in recall_of.items() if area == 0 else ():
                table[:, label] = (state[:, pool.rank[own] < number] == HIT).sum(1) / objects[label]
    return Coco(precision, recall, recall_of)


def _mean(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else 0.0


def coco_ap(
    records: Sequence[Record],
    found: Sequence[Detections],
    classes: Sequence[str],
    ious: Sequence[float] = IOUS,
    most: int | None = None,
) -> dict[str, Any]:
    """COCO's figures of one Detections a Record: `of_pool` of them all; difficult and crowd objects are ignored."""
    return of_pool(matches.pool(records, found, classes), ious, most)


def of_pool(pool: Pool, ious: Sequence[float] = IOUS, most: int | None = None) -> dict[str, Any]:
    """COCO's figures: mAP over `ious`, mAP50, mAP75, mAP_small and so on by area; AR, the mean recall, by area too, and
    AR1, AR10, AR100 with so many detections a photo and class; `per_class`: name -> [AP, AP50], None where it has no
    object; `most`, the detections a photo and class that count: as many as there are, unless it is given.
    """
    limit = int(pool.rank.max(initial=0)) + 1 if most is None else most
    if most is not None:
        pool = pool.only(pool.rank < most)
    asked = tuple(dict.fromkeys((*ious, 0.5, 0.75)))
    result = coco(pool, matches.match(pool, asked, tuple(AREAS.values())), _MOST)
    means, half = slice(len(ious)), asked.index(0.5)
    figures: dict[str, Any] = {
        "mAP": _mean(result.precision[0, means]),
        "mAP50": _mean(result.precision[0, half]),
        "mAP75": _mean(result.precision[0, asked.index(0.75)]),
        "AR": _mean(result.recall[0, means]),
    }
    for place, name in enumerate(AREAS):
        if place:
            figures[f"mAP_{name}"] = _known(result.precision[place, means])
            figures[f"AR_{name}"] = _known(result.recall[place, means])
    figures |= {f"AR{number}": _mean(table[means]) for number, table in result.recall_of.items()}
    ap = np.stack([result.precision[0, means].mean((0, 1)), result.precision[0, half].mean(0)], 1)
    per_class = {
        name: pair.tolist() if np.isfinite(pair[0]) else None for name, pair in zip(pool.classes, ap, strict=True)
    }
    return {**figures, "per_class": per_class, "most": limit}


def _known(values: Floats) -> float | None:
    """The mean, None where there is nothing to measure."""
    return _mean(values) if np.isfinite(values).any() else None


def by_iou(pool: Pool, ious: Sequence[float] = IOUS) -> list[dict[str, Any]]:
    """The same at each IoU alone: `iou`; AP and AR, AP_small and so on by area, None where it has no object; VOC_AP, as
    `voc` has it; per_class: name -> AP, None where it has no object."""
    result = coco(pool, matches.match(pool, ious, tuple(AREAS.values())))
    near, rows = matches.pairs(pool, min(ious)), []
    for place, iou in enumerate(ious):
        row: dict[str, Any] = {"iou": round(iou, 4)}
        for area, name in enumerate(AREAS):
            size = f"_{name}" if area else ""
            row[f"AP{size}"], row[f"AR{size}"] = (
                _known(each[area, place]) for each in (result.precision, result.recall)
            )
        ap = result.precision[0, place].mean(0)
        per_class = {name: _known(value) for name, value in zip(pool.classes, ap, strict=True)}
        rows.append({**row, "VOC_AP": pooled_mean(voc(pool, iou, near=near)), "per_class": per_class})
    return rows


def curves(pool: Pool, state: NDArray[np.int8]) -> dict[str, Floats]:
    """COCO's precision of each class that has objects at `RECALLS` recalls: float64 [RECALLS]. state: int8 [N]."""
    objects = pool.objects().sum(0)
    return {
        name: precisions(state[pool.of_class(label)], objects[label])
        for label, name in enumerate(pool.classes)
        if objects[label]
    }


# --- Pascal VOC -------------------------------------------------------------------------------------------------------


def voc_ap(
    records: Sequence[Record],
    found: Sequence[Detections],
    classes: Sequence[str],
    iou: float = 0.5,
    *,
    eleven: bool = False,
) -> dict[str, float | None]:
    """`voc` of one Detections a Record."""
    return voc(matches.pool(records, found, classes), iou, eleven=eleven)


def voc(pool: Pool, iou: float = 0.5, *, eleven: bool = False, near: Pairs | None = None) -> dict[str, float | None]:
    """Pascal VOC's AP of each class, difficult objects not counted; None where it has no object.

    The area under the precision envelope (devkit 2010 and later), or with `eleven` the mean of the best precisions from
    recalls 0, 0.1, ... 1 on (2007). Differs from COCO's: a detection is only ever compared with the object that it
    overlaps most. near: `matches.pairs` of that IoU, or of a lower one.
    """
    state = _voc_state(pool, iou, near)
    objects = pool.objects().sum(0)
    result: dict[str, float | None] = dict.fromkeys(pool.classes)
    for label in np.flatnonzero(objects).tolist():
        own = state[pool.of_class(label)]
        own = own[own != IGNORED]
        hit = np.cumsum(own == HIT)
        recall, precision = hit / objects[label], hit / np.arange(1, len(own) + 1)
        if eleven:
            # In whole numbers: 3 of 10 reach a recall of 0.3.
            bests = [precision[10 * hit >= tenth * objects[label]].max(initial=0) for tenth in range(11)]
            result[pool.classes[label]] = float(np.mean(bests))
        else:
            envelope = np.maximum.accumulate(precision[::-1])[::-1]
            result[pool.classes[label]] = float((np.diff(recall, prepend=0) * envelope).sum())
    return result


def _voc_state(pool: Pool, iou: float, near: Pairs | None) -> NDArray[np.int8]:
    near = matches.pairs(pool, iou) if near is None else near
    near = near.take(near.iou >= iou)
    # The largest overlap of each detection, of equal ones the first; of each object's, the best detection.
    near = near.take(np.lexsort((near.object, -near.iou, near.detection)))
    near = near.take(np.unique(near.detection, return_index=True)[1])
    state = np.zeros(len(pool.score), np.int8)
    state[near.detection] = np.where(pool.ignored[near.object], IGNORED, FALSE)
    near = near.take(~pool.ignored[near.object])  # in the order of detections: best first
    state[near.detection[np.unique(near.object, return_index=True)[1]]] = HIT
    return state


# --- thresholds, counts -----------------------------------------------------------------------------------------------


def pooled_mean(values: Mapping[str, float | None]) -> float:
    """The mean over the classes that have a figure."""
    known = [value for value in values.values() if value is not None]
    return float(np.mean(known)) if known else 0.0


class Sweep(NamedTuple):
    """What thresholds give, from the highest down: at each, float64 [L], the detections from it on (`passed`), how many
    of them are hits; and how many objects there are."""

    score: Floats
    hit: Floats
    passed: Floats
    objects: float

    @property
    def precision(self) -> Floats:
        """Share of detections that are right."""
        return self.hit / np.maximum(self.passed, 1e-9)

    @property
    def recall(self) -> Floats:
        """Share of objects that are found."""
        return self.hit / max(self.objects, 1e-9)

    @property
    def f1(self) -> Floats:
        """Their harmonic mean."""
        return 2 * self.hit / np.maximum(self.passed + self.objects, 1e-9)


def sweep(score: Floats, state: NDArray[np.int8], objects: float) -> Sweep:
    """Thresholds at each score that detections, in any order, have: what shares a score passes a threshold together."""
    counts = state != IGNORED
    order = np.argsort(-score[counts], kind="stable")
    scores, hits = score[counts][order], np.cumsum(state[counts][order] == HIT)
    last = np.flatnonzero(np.append(np.diff(scores) < 0, True))[: len(scores)]
    return Sweep(scores[last], hits[last].astype(np.float64), (last + 1).astype(np.float64), objects)


def best_score(pool: Pool, state: NDArray[np.int8]) -> float:
    """The threshold of the highest F1 over all classes together; 0 where nothing is found."""
    swept = sweep(pool.score, state, int((~pool.ignored).sum()))
    if not len(swept.score):
        return 0.0
    return floored(float(swept.score[swept.f1.argmax()]))


def floored(score: float) -> float:
    """A threshold in four digits; rounded up, it would drop the detection that it comes from."""
    return math.floor(score * 1e4) / 1e4


class Counts(NamedTuple):
    """By photo, float64 [P]: detections that are hits, those that count, objects that count; by how much the number of
    objects is off; whether it is exact; whether that of each class is."""

    hit: Floats
    found: Floats
    objects: Floats
    off: Floats
    exact: Floats
    checkout: Floats


def counts(pool: Pool, state: NDArray[np.int8], thresholds: Floats) -> Counts:
    """What is counted in each photo with a threshold a class, float64 [C]. state: int8 [N], at IoU 0.5."""
    return counted(pool, state, pool.score >= thresholds[pool.label])


def counted(pool: Pool, state: NDArray[np.int8], shown: Bools) -> Counts:
    """What is counted in each photo of the detections shown, bool [N]. state: int8 [N], at IoU 0.5."""
    kept = shown & (state != IGNORED)
    found, objects = pool.found(kept), pool.objects()
    hit = pool.found(kept & (state == HIT))
    off = np.abs(found.sum(1) - objects.sum(1))
    parts = (hit.sum(1), found.sum(1), objects.sum(1), off, off == 0, (found == objects).all(1))
    return Counts(*(part.astype(np.float64) for part in parts))


def count_figures(counted: Counts) -> dict[str, float]:
    """precision, recall and f1 of all photos together; count_MAE, the mean error of a photo's number of objects;
    count_exact, the share of photos where it is right; cAcc, where that of every class is (checkout accuracy)."""
    one = np.ones((1, len(counted.hit)))
    return {name: float(values[0]) for name, values in _count_figures(counted, one).items()}


def _count_figures(counted: Counts, weights: Floats) -> dict[str, Floats]:
    """`count_figures` of photos weighted, float64 [B, P] -> float64 [B]."""
    hit, found, objects, off, exact, checkout = (weights @ np.stack(counted, 1)).T
    photos = np.maximum(weights.sum(1), 1)
    return {
        "precision": hit / np.maximum(found, 1),
        "recall": hit / np.maximum(objects, 1),
        "f1": 2 * hit / np.maximum(found + objects, 1),
        "count_MAE": off / photos,
        "count_exact": exact / photos,
        "cAcc": checkout / photos,
    }


def evaluate(records: Sequence[Record], found: Sequence[Detections], classes: Sequence[str]) -> dict[str, Any]:
    """What training asks for: COCO's figures (see `of_pool`); VOC_AP50, the mean of `voc_ap` over classes that have
    objects; and `score`, the threshold of the best F1 at IoU 0.5."""
    return brief(matches.pool(records, found, classes))


def brief(pool: Pool) -> dict[str, Any]:
    """`evaluate` of a pool."""
    return {
        **of_pool(pool),
        "VOC_AP50": pooled_mean(voc(pool)),
        "score": best_score(pool, matches.match(pool, (0.5,)).state[0, 0]),
    }


# --- chance -----------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """A model's detections, how they match at `IOUS`, and what is counted with its thresholds: what is resampled."""

    pool: Pool
    state: NDArray[np.int8]
    counted: Counts


def scored(pool: Pool, thresholds: Floats) -> Scored:
    """Match the detections, and count those from the thresholds [C] on."""
    state = matches.match(pool, IOUS).state[0]
    return Scored(pool, state, counts(pool, state[0], thresholds))


def weighted_ap(pool: Pool, state: NDArray[np.int8], weights: NDArray[np.int64]) -> Floats:
    """The mean AP over classes with each photo counted so many times: weights int64 [B, P], state int8 [T, N] ->
    float64 [B, T]; equal to that of as many copies of the photos. NaN where no class has an object."""
    weight = np.ascontiguousarray(weights.T, np.float32)  # numbers of detections are exact in it up to 16 million
    total, classes = np.zeros((len(state), len(weights))), np.zeros(len(weights))
    objects = pool.objects()
    for label in np.flatnonzero(objects.sum(0)).tolist():
        own = pool.of_class(label)
        there = weights @ objects[:, label]
        hits = np.flatnonzero((state[:, own] == HIT).any(0))
        stop = int(hits[-1]) + 1 if len(hits) else 0  # false ones below the last hit cost nothing
        photo, rows = pool.photo[own][:stop], state[:, own][:, :stop]
        for part in _batches(len(weights), stop):
            total[:, part] += _weighted(weight[:, part][photo], rows, there[part])
        classes += there > 0
    with np.errstate(invalid="ignore"):
        return (total / classes).T


def _batches(count: int, each: int) -> Iterator[slice]:
    step = max(1, _TOGETHER // max(1, each))
    return (slice(start, min(count, start + step)) for start in range(0, count, step))


def _weighted(weight: NDArray[np.float32], state: NDArray[np.int8], objects: Ints) -> Floats:
    """AP of one class: weight [n, B] of each detection, state [T, n], objects [B] -> [T, B]."""
    passed = np.cumsum(weight, axis=0)
    there = np.maximum(objects, 1)
    result = np.zeros((len(state), len(objects)))
    for iou, row in enumerate(state):
        places = np.flatnonzero(row == HIT)
        if not len(places):
            continue
        ignored = row == IGNORED
        counted = passed - np.cumsum(weight * ignored[:, None], axis=0) if ignored.any() else passed
        hit = np.cumsum(weight[places], axis=0)
        precision = hit / np.maximum(counted[places], 1)
        envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        # How many of the recalls 0, 0.01, ... 1 have been reached at each hit, as `precisions` has it, and faster.
        recall = hit.astype(np.float64) / there
        last = (recall * (RECALLS - 1) + 1e-6).astype(np.int64)
        reached = last + (_GRID[last] <= recall)
        result[iou] = (envelope * np.diff(reached, prepend=0, axis=0)).sum(0) / RECALLS
    return result * (objects > 0)


def resamples(models: Sequence[Scored], count: int = RESAMPLES, seed: int = 0) -> list[dict[str, Floats]]:
    """The figures of each model on the same resamples of photos, drawn with replacement: name -> float64 [count]."""
    photos = models[0].pool.photos
    weights = np.random.default_rng(seed).multinomial(photos, np.full(photos, 1 / max(photos, 1)), size=count)
    return [_figures(model, weights) for model in models]


def _figures(model: Scored, weights: NDArray[np.int64]) -> dict[str, Floats]:
    ap = weighted_ap(model.pool, model.state, weights)
    more = {"mAP": ap.mean(1), "mAP50": ap[:, 0], "mAP75": ap[:, IOUS.index(0.75)]}
    return more | _count_figures(model.counted, weights.astype(np.float64))


def unbiased(drawn: Floats, figure: float) -> Floats:
    """Resamples of a figure, those that have one, without their bias. Chance lifts the envelope of precision, so AP is
    higher in few photos than in many: in resamples than in the photos, and in these than in all that could have been
    taken, by about as much each. Counts have no bias, and stay where they are."""
    known = drawn[np.isfinite(drawn)]
    return known - 2 * (known.mean() - figure) if len(known) else known


def intervals(drawn: Mapping[str, Floats], figures: Mapping[str, Any], share: float = 0.95) -> dict[str, list[float]]:
    """The bounds between which that share of the resamples lies, without their bias (bootstrap over photos). figures:
    of all the photos."""
    ends = 50 * (1 - share), 50 * (1 + share)
    return {
        name: np.percentile(known, ends).clip(0).tolist()
        for name, values in drawn.items()
        if len(known := unbiased(values, figures[name]))
    }


class Comparison(NamedTuple):
    """How a figure of one model differs from another's on the same photos: the difference, its 95 % interval, and p,
    two-sided: how often photos drawn again would show no difference, or one the other way."""

    difference: float
    low: float
    high: float
    p: float


def compare(name: str, first: Mapping[str, Floats], second: Mapping[str, Floats], difference: float) -> Comparison:
    """The paired bootstrap: both models' `resamples` of a figure, and its difference on all photos."""
    apart = unbiased(first[name] - second[name], difference)
    low, high = np.percentile(apart, (2.5, 97.5)).tolist() if len(apart) else (math.nan, math.nan)
    tail = min(int((apart <= 0).sum()), int((apart >= 0).sum()))
    return Comparison(difference, low, high, min(1.0, 2 * (tail + 1) / (len(apart) + 1)))
