"""How good detections are: COCO AP by pycocotools, and Pascal-VOC AP. Boxes in pixels of the original photo."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detkit import geometry
from detkit.types import CROWD, DIFFICULT, Detections, Record

# pycocotools ignores what lies outside the area range; difficult objects are put there, so that, unlike a crowd, one
# of them takes one detection out of the count, by plain IoU.
_BEYOND = 1e12
RECALLS = 101  # at which a curve is sampled, from 0 to 1


def _coco(images: list[dict[str, Any]], annotations: list[dict[str, Any]], classes: Sequence[str]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label, "name": name} for label, name in enumerate(classes)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _rows(image: int, boxes: NDArray[Any], labels: NDArray[Any], first: int) -> list[dict[str, Any]]:
    sides = boxes[:, 2:] - boxes[:, :2]
    return [
        {
            "id": first + i,
            "image_id": image,
            "category_id": int(labels[i]),
            "bbox": [*boxes[i, :2].tolist(), *sides[i].tolist()],
            "area": float(sides[i].prod()),
            "iscrowd": 0,
        }
        for i in range(len(labels))
    ]


def coco_ap(records: Sequence[Record], found: Sequence[Detections], classes: Sequence[str]) -> dict[str, Any]:
    """COCO's AP of one Detections a Record.

    Returns mAP (IoU 0.50 to 0.95), mAP50, mAP75, AR (mean recall), and `per_class`: name -> [AP, AP50], None where a
    class has no object. All detections count, however many an image has. Difficult and crowd objects are ignored.
    """
    truth: list[dict[str, Any]] = []
    detected: list[dict[str, Any]] = []
    for image, (record, detections) in enumerate(zip(records, found, strict=True)):
        # pycocotools takes annotation id 0 for "no match".
        rows = _rows(image, record.boxes, record.labels, len(truth) + 1)
        for row, flag in zip(rows, record.flags.tolist(), strict=True):
            row["iscrowd"] = int(bool(flag & CROWD))
            if flag & DIFFICULT:
                row["area"] = _BEYOND
        truth += rows
        rows = _rows(image, detections.boxes, detections.labels, len(detected) + 1)
        for row, score in zip(rows, detections.scores.tolist(), strict=True):
            row["score"] = score
        detected += rows
    images = [{"id": i, "height": r.hw[0], "width": r.hw[1]} for i, r in enumerate(records)]
    evaluation = COCOeval(_coco(images, truth, classes), _coco(images, detected, classes), "bbox")
    most = max((len(detections) for detections in found), default=1)
    evaluation.params.maxDets = [max(1, most)]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]  # IoU, recall, class; -1 where a class has no object
    recall = evaluation.eval["recall"][:, :, 0, 0]
    per_class: dict[str, list[float] | None] = {}
    for label, name in enumerate(classes):
        curve = precision[:, :, label]
        per_class[name] = None if curve.max() < 0 else [float(curve.mean()), float(curve[0].mean())]
    return {
        "mAP": _mean(precision),
        "mAP50": _mean(precision[0]),
        "mAP75": _mean(precision[5]),
        "AR": _mean(recall),
        "per_class": per_class,
    }


def _mean(values: NDArray[Any]) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else 0.0


def _voc_hits(record: Record, found: Detections, label: int, iou: float) -> NDArray[np.int8]:
    """For each detection of a class in one photo, best first: 1 a hit, 0 a false positive, -1 not counted."""
    mine = record.labels == label
    ignored = (record.flags[mine] & (DIFFICULT | CROWD)) > 0
    boxes = found.boxes[found.labels == label]
    hits = np.zeros(len(boxes), np.int8)
    if not mine.any():
        return hits
    overlap = geometry.iou(boxes.astype(np.float64), record.boxes[mine])
    taken = np.zeros(int(mine.sum()), bool)
    for i, best in enumerate(overlap.argmax(1)):
        if overlap[i, best] < iou:
            continue
        if ignored[best]:
            hits[i] = -1
        elif not taken[best]:
            hits[i], taken[best] = 1, True
    return hits


class _Ranked(NamedTuple):
    """A class's detections in all photos, best first: scores, whether each is a hit; and the number of objects."""

    scores: NDArray[np.float64]
    hits: NDArray[np.bool_]
    objects: int


def _rank(records: Sequence[Record], found: Sequence[Detections], label: int, iou: float) -> _Ranked:
    objects = sum(int(((r.labels == label) & ((r.flags & (DIFFICULT | CROWD)) == 0)).sum()) for r in records)
    scores = np.concatenate([np.zeros(0), *(f.scores[f.labels == label] for f in found)])
    rows = [_voc_hits(record, detections, label, iou) for record, detections in zip(records, found, strict=True)]
    hits = np.concatenate([np.zeros(0, np.int8), *rows])
    order = np.argsort(-scores, kind="stable")
    order = order[hits[order] >= 0]
    return _Ranked(scores[order], hits[order] == 1, objects)


def _area(ranked: _Ranked) -> float:
    """The area under the precision envelope."""
    hit = np.cumsum(ranked.hits)
    recall = np.concatenate([[0], hit / ranked.objects])
    precision = hit / np.arange(1, len(hit) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * envelope).sum())


def _best_score(classes: Sequence[_Ranked]) -> float:
    """The score threshold of the highest F1 over all classes together."""
    scores = np.concatenate([ranked.scores for ranked in classes])
    if not len(scores):
        return 0.0
    order = np.argsort(-scores, kind="stable")
    hit = np.cumsum(np.concatenate([ranked.hits for ranked in classes])[order])
    f1 = 2 * hit / (np.arange(1, len(hit) + 1) + sum(ranked.objects for ranked in classes))
    ranked_scores = scores[order]
    last = np.append(np.diff(ranked_scores) < 0, True)  # equal scores pass a threshold together
    return float(ranked_scores[last][f1[last].argmax()])


def voc_ap(
    records: Sequence[Record], found: Sequence[Detections], classes: Sequence[str], iou: float = 0.5
) -> dict[str, float | None]:
    """Pascal-VOC AP of each class (devkit 2010 and later: area under the precision envelope), difficult objects not
    counted; None where a class has no object. Differs from COCO's: a detection is only ever compared with the object
    that it overlaps most, and the curve is not sampled."""
    ranked = {name: _rank(records, found, label, iou) for label, name in enumerate(classes)}
    return {name: _area(rows) if rows.objects else None for name, rows in ranked.items()}


def curves(
    records: Sequence[Record], found: Sequence[Detections], classes: Sequence[str], iou: float = 0.5
) -> dict[str, NDArray[np.float64]]:
    """The precision of each class that has objects, by the envelope, at `RECALLS` recalls: float64 [RECALLS]."""
    result = {}
    for label, name in enumerate(classes):
        ranked = _rank(records, found, label, iou)
        if ranked.objects:
            hit = np.cumsum(ranked.hits)
            envelope = np.maximum.accumulate((hit / np.arange(1, len(hit) + 1))[::-1])[::-1]
            places = np.searchsorted(hit / ranked.objects, np.linspace(0, 1, RECALLS) - 1e-9)
            result[name] = np.append(envelope, 0.0)[places]
    return result


def evaluate(records: Sequence[Record], found: Sequence[Detections], classes: Sequence[str]) -> dict[str, Any]:
    """COCO's figures (see `coco_ap`); VOC_AP50, the mean of `voc_ap` over classes that have objects; and `score`, the
    threshold of the best F1 at IoU 0.5."""
    ranked = [_rank(records, found, label, 0.5) for label in range(len(classes))]
    voc = [_area(rows) for rows in ranked if rows.objects]
    return {
        **coco_ap(records, found, classes),
        "VOC_AP50": float(np.mean(voc)) if voc else 0.0,
        "score": math.floor(_best_score(ranked) * 1e4) / 1e4,  # rounded up, it would drop the detection it comes from
    }
