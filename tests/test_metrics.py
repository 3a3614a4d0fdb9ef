"""AP against pycocotools used directly, the VOC devkit's rules written plainly, a published example, and by hand."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detkit import matches, metrics
from detkit.types import CROWD, DIFFICULT, OCCLUDED, Detections, Record

NAMES = ("tin", "box", "bag")
Truth = Sequence[tuple[Sequence[float], int, int]]
Found = Sequence[tuple[Sequence[float], int, float]]


def record(*objects: tuple[Sequence[float], int, int], hw: tuple[int, int] = (100, 100)) -> Record:
    boxes = np.array([box for box, _, _ in objects], np.float64).reshape(-1, 4)
    labels = np.array([label for _, label, _ in objects], np.int64)
    return Record("photo.jpg", hw, boxes, labels, np.array([flag for _, _, flag in objects], np.uint8))


def found(*rows: tuple[Sequence[float], int, float], hw: tuple[int, int] = (100, 100)) -> Detections:
    rows = tuple(sorted(rows, key=lambda row: -row[2]))
    boxes = np.array([box for box, _, _ in rows], np.float32).reshape(-1, 4)
    scores = np.array([score for _, _, score in rows], np.float32)
    return Detections(boxes, scores, np.array([label for _, label, _ in rows], np.int64), hw)


def random_photos(
    seed: int, flags: Sequence[int] = (0,), count: int = 12, scale: int = 1
) -> tuple[list[Record], list[Detections]]:
    """Objects of three classes; of most a detection nearby, sometimes two or of another class; and false ones. With a
    scale, boxes are in whole pixels and scores in tenths."""
    rng = np.random.default_rng(seed)
    records, detections = [], []
    for _ in range(count):
        number = int(rng.integers(0, 9))
        size = rng.uniform(8, 40, (number, 2))
        corner = rng.uniform(0, 1, (number, 2)) * (200 - size)
        boxes = np.concatenate([corner, corner + size], 1)
        labels = rng.integers(0, 3, number)
        there = (scale * boxes).round() if scale > 1 else boxes
        flagged = rng.choice(flags, number).tolist()
        hw = (200 * scale, 200 * scale)
        records.append(record(*zip(there.tolist(), labels.tolist(), flagged, strict=True), hw=hw))
        near = np.repeat(boxes, 2, 0)[rng.random(2 * number) < 0.7]
        what = np.repeat(labels, 2)[: len(near)]
        what = np.where(rng.random(len(near)) < 0.2, rng.integers(0, 3, len(near)), what)
        near = near + rng.normal(0, 3, near.shape)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        scores = rng.permutation(np.linspace(0.05, 0.95, len(near)) + rng.uniform(0, 0.04))
        if scale > 1:
            scores, near = scores.round(1), (near * scale).round()
        detections.append(found(*zip(near.tolist(), what.tolist(), scores.tolist(), strict=True), hw=hw))
    return records, detections


def direct(
    records: Sequence[Record], detections: Sequence[Detections], ious: Sequence[float] = (), most: int = 0
) -> COCOeval:
    """pycocotools as its users use it: annotations as dicts, loadRes, default parameters but for `ious` and `most`.
    Difficult objects get an area that it looks for nowhere."""

    def xywh(box: np.ndarray) -> list[float]:
        x1, y1, x2, y2 = map(float, box)
        return [x1, y1, x2 - x1, y2 - y1]

    annotations, results = [], []
    for image, (r, f) in enumerate(zip(records, detections, strict=True), 1):
        for box, label, flag in zip(r.boxes, r.labels, r.flags, strict=True):
            x, y, w, h = xywh(box)
            row = {"image_id": image, "category_id": int(label) + 1, "bbox": [x, y, w, h], "area": w * h}
            row["area"] = 1e12 if flag & DIFFICULT else w * h
            annotations.append({**row, "id": len(annotations) + 1, "iscrowd": int(bool(flag & CROWD))})
        for box, label, score in zip(f.boxes, f.labels, f.scores, strict=True):
            row = {"image_id": image, "category_id": int(label) + 1, "bbox": xywh(box), "score": float(score)}
            results.append(row)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i + 1} for i in range(len(records))],
            "annotations": annotations,
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        if ious:
            evaluation.params.iouThrs, evaluation.params.maxDets = np.array(ious), [most]
        evaluation.evaluate()
        evaluation.accumulate()
        if not ious:
            evaluation.summarize()
    return evaluation


NAMED = (
    "mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("flags", [(0,), (0, 0, CROWD), (0, OCCLUDED)])
@pytest.mark.parametrize("scale", [1, 3])
def test_coco_is_pycocotools(seed: int, flags: tuple[int, ...], scale: int) -> None:
    """All twelve figures; objects of every size, some on the border between two, scores and overlaps that are equal."""
    records, detections = random_photos(seed, flags, scale=scale)
    assert max(map(len, detections)) <= 100  # or its default limits would apply
    got, wanted = metrics.coco_ap(records, detections, NAMES), direct(records, detections)
    assert 0.01 < got["mAP"] < 0.95
    figures = [-1 if got[name] is None else got[name] for name in NAMED]
    assert figures == pytest.approx(wanted.stats, abs=1e-9)
    assert got["AR"] == pytest.approx(wanted.stats[8], abs=1e-9)
    precision = wanted.eval["precision"][:, :, :, 0, -1]
    for label, name in enumerate(NAMES):
        curve = precision[:, :, label]
        assert got["per_class"][name] == pytest.approx([curve.mean(), curve[0].mean()], abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_difficult_objects_are_pycocotools_ignored_ones(seed: int) -> None:
    """pycocotools ignores what lies outside the area range; so a difficult object of such an area is ignored by it."""
    records, detections = random_photos(seed, (0, 0, DIFFICULT, CROWD))
    got, wanted = metrics.coco_ap(records, detections, NAMES), direct(records, detections)
    assert [got[name] for name in ("mAP", "mAP50", "mAP75", "AR1", "AR10", "AR")] == pytest.approx(
        wanted.stats[[0, 1, 2, 6, 7, 8]], abs=1e-9
    )


def test_other_ious_and_limits_are_pycocotools() -> None:
    records, detections = random_photos(1)
    ious, most = (0.3, 0.6, 0.7), 2
    got = metrics.coco_ap(records, detections, NAMES, ious, most)
    wanted = direct(records, detections, ious, most)
    assert got["most"] == most
    assert got["mAP"] == pytest.approx(wanted.eval["precision"][..., 0, -1].mean(), abs=1e-9)
    assert got["AR"] == pytest.approx(wanted.eval["recall"][..., 0, -1].mean(), abs=1e-9)


@pytest.mark.parametrize("scale", [1, 3])
def test_each_iou_by_itself_is_pycocotools_by_class_and_size_too(scale: int) -> None:
    records, detections = random_photos(1, scale=scale)
    ious = (0.3, 0.5, 0.62, 0.95)
    wanted = direct(records, detections, ious, 100).eval
    for place, row in enumerate(metrics.by_iou(matches.pool(records, detections, NAMES), ious)):
        assert row["iou"] == ious[place]
        for area, size in enumerate(("", "_small", "_medium", "_large")):
            for name, table in (
                ("AP", wanted["precision"][place, :, :, area]),
                ("AR", wanted["recall"][place, :, area]),
            ):
                known = table[table > -1]
                assert row[f"{name}{size}"] == (pytest.approx(known.mean(), abs=1e-9) if known.size else None)
        own = wanted["precision"][place, :, :, 0, -1].mean(0)
        assert list(row["per_class"].values()) == pytest.approx(own.tolist(), abs=1e-9)
        voc = metrics.voc_ap(records, detections, NAMES, ious[place])
        assert row["VOC_AP"] == metrics.pooled_mean(voc)


def test_pairs_are_looked_at_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    records, detections = random_photos(2, (0, CROWD))
    whole = metrics.coco_ap(records, detections, NAMES)
    monkeypatch.setattr(matches, "_ROOM", 7)
    assert metrics.coco_ap(records, detections, NAMES) == whole


def test_more_than_100_detections_count() -> None:
    boxes = [[x, y, x + 8, y + 8] for x in range(0, 150, 10) for y in range(0, 100, 10)]
    photo = record(*((box, 0, 0) for box in boxes), hw=(100, 150))
    all_found = found(*((box, 0, 0.9 - i / 1000) for i, box in enumerate(boxes)))
    assert metrics.coco_ap([photo], [all_found], NAMES)["mAP"] == pytest.approx(1)


A, B, C = (0.0, 0.0, 20.0, 20.0), (50.0, 50.0, 80.0, 80.0), (30.0, 0.0, 45.0, 10.0)


@pytest.mark.parametrize("flag", [DIFFICULT, DIFFICULT | CROWD, DIFFICULT | OCCLUDED])
def test_difficult_objects_do_not_count(flag: int) -> None:
    """Neither missed nor found: the figures are those without them."""
    photo, plain = record((A, 0, 0), (B, 0, flag)), record((A, 0, 0))
    for rows, same in (
        ([(A, 0, 0.5), (B, 0, 0.9)], [(A, 0, 0.5)]),
        ([(A, 0, 0.5)], [(A, 0, 0.5)]),
        ([(A, 0, 0.5), (B, 0, 0.9), (C, 0, 0.8)], [(A, 0, 0.5), (C, 0, 0.8)]),
    ):
        got, wanted = (metrics.evaluate([one], [found(*some)], NAMES) for one, some in ((photo, rows), (plain, same)))
        for figures in (got, wanted):  # COCO's limits are on what was found, counted or not
            for name in ("most", "AR1"):
                del figures[name]
        assert got == wanted


def test_a_crowd_takes_any_number_of_detections_and_a_difficult_object_one() -> None:
    inside = [(x, 50.0, x + 10.0, 80.0) for x in (50.0, 60.0, 70.0)]
    rows = found((A, 0, 0.5), *((box, 0, 0.9) for box in inside))
    assert metrics.coco_ap([record((A, 0, 0), (B, 0, CROWD))], [rows], NAMES)["mAP50"] == pytest.approx(1)
    # A third of a difficult object is no detection of it.
    assert metrics.coco_ap([record((A, 0, 0), (B, 0, DIFFICULT))], [rows], NAMES)["mAP50"] < 0.3


def test_a_class_with_only_difficult_objects_has_no_figure() -> None:
    got = metrics.coco_ap([record((A, 0, 0), (B, 1, DIFFICULT))], [found((A, 0, 0.9), (B, 1, 0.9))], NAMES)
    assert got["per_class"] == {"tin": pytest.approx([1, 1]), "box": None, "bag": None}
    assert got["mAP"] == pytest.approx(1)
    assert metrics.voc_ap([record((B, 1, DIFFICULT))], [found((B, 1, 0.9))], NAMES)["box"] is None


def test_nothing_found() -> None:
    got = metrics.evaluate([record((A, 0, 0)), record()], [found(), found()], NAMES)
    assert got["per_class"] == {"tin": [0, 0], "box": None, "bag": None}
    assert [got[name] for name in ("mAP", "mAP50", "mAP75", "AR", "VOC_AP50", "score")] == [0] * 6
    assert metrics.voc_ap([record((A, 0, 0))], [found()], NAMES) == {"tin": 0, "box": None, "bag": None}


@pytest.mark.parametrize("photos", [0, 1])
def test_nothing_there(photos: int) -> None:
    got = metrics.evaluate([record()] * photos, [found((A, 0, 0.9))] * photos, NAMES)
    assert got["per_class"] == dict.fromkeys(NAMES)
    assert [got[name] for name in ("mAP", "mAP50", "VOC_AP50")] == [0] * 3


def test_a_missing_photo_is_an_error() -> None:
    for measure in (metrics.coco_ap, metrics.voc_ap):
        with pytest.raises(ValueError, match="zip"):
            measure([record(), record()], [found()], NAMES)


# VOC


def share(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU of two boxes."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = a, b
    common = max(0.0, min(x2, u2) - max(x1, u1)) * max(0.0, min(y2, v2) - max(y1, v1))
    return common / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - common)


def devkit_ap(
    records: Sequence[Record], detections: Sequence[Detections], label: int, least: float, *, eleven: bool = False
) -> float | None:
    """VOCevaldet.m, step by step (its boxes are of whole pixels, here they have edges)."""
    objects = 0
    used: list[list[bool]] = []
    for r in records:
        used.append([False] * len(r.labels))
        objects += sum(int(k == label and not f & (DIFFICULT | CROWD)) for k, f in zip(r.labels, r.flags, strict=True))
    if objects == 0:
        return None
    rows = [
        (float(score), image, box)
        for image, f in enumerate(detections)
        for box, k, score in zip(f.boxes.astype(float), f.labels, f.scores, strict=True)
        if k == label
    ]
    hits: list[int] = []
    for _, image, box in sorted(rows, key=lambda row: -row[0]):
        r = records[image]
        shares = [(share(box, other), j) for j, other in enumerate(r.boxes) if r.labels[j] == label]
        best, which = max(shares, default=(-1.0, -1))
        if best < least:
            hits.append(0)
        elif not r.flags[which] & (DIFFICULT | CROWD):
            hits.append(int(not used[image][which]))
            used[image][which] = True
    points = []
    for i in range(len(hits)):
        right = sum(hits[: i + 1])
        points.append((right / objects, right / (i + 1)))
    if eleven:
        bests = [max((p for r, p in points if r >= tenth / 10), default=0.0) for tenth in range(11)]
        return sum(bests) / 11
    area, before = 0.0, 0.0
    for i, (recall, _) in enumerate(points):
        area += (recall - before) * max(precision for _, precision in points[i:])
        before = recall
    return area


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("flags", [(0,), (0, 0, DIFFICULT, CROWD)])
@pytest.mark.parametrize("least", [0.5, 0.75])
def test_voc_is_the_devkits(seed: int, flags: tuple[int, ...], least: float) -> None:
    records, detections = random_photos(seed + 10, flags)
    got = metrics.voc_ap(records, detections, NAMES, least)
    for label, name in enumerate(NAMES):
        assert got[name] == pytest.approx(devkit_ap(records, detections, label, least), abs=1e-9)
        points = metrics.voc_ap(records, detections, NAMES, least, eleven=True)[name]
        assert points == pytest.approx(devkit_ap(records, detections, label, least, eleven=True), abs=1e-9)
    known = [value for value in metrics.voc_ap(records, detections, NAMES).values() if value is not None]
    assert metrics.evaluate(records, detections, NAMES)["VOC_AP50"] == pytest.approx(sum(known) / len(known))


SHIFTED = (0.0, 0.0, 20.0, 11.0)  # IoU 0.55 with A


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([(A, 0, 0.9), (B, 0, 0.8)], 1.0),
        ([(A, 0, 0.9)], 0.5),
        ([(A, 0, 0.9), (C, 0, 0.85), (B, 0, 0.8)], 0.5 + 0.5 * 2 / 3),
        ([(C, 0, 0.95), (A, 0, 0.9)], 0.25),
        ([(A, 0, 0.9), (A, 0, 0.8), (B, 0, 0.7)], 0.5 + 0.5 * 2 / 3),  # found twice: once right
        ([(A, 1, 0.9), (B, 0, 0.8)], 0.5),  # another class's
        ([(SHIFTED, 0, 0.9), (B, 0, 0.8)], 1.0),
        ([(C, 0, 0.9)], 0.0),
    ],
)
def test_voc_by_hand(rows: Found, wanted: float) -> None:
    photo = record((A, 0, 0), (B, 0, 0))
    assert metrics.voc_ap([photo], [found(*rows)], NAMES)["tin"] == pytest.approx(wanted)


# The worked example of Padilla, Netto and da Silva, A Survey on Performance Metrics for Object-Detection Algorithms
# (2020): each photo's people, and what was found there, as left, top, width and height in whole pixels.
PUBLISHED = (
    ("25 16 38 56, 129 123 41 62", ".88 5 67 31 48, .70 119 111 40 67, .80 124 9 49 67"),
    ("123 11 43 55, 38 132 59 45", ".71 64 111 64 58, .54 26 140 60 47, .74 19 18 43 35"),
    (
        "16 14 35 48, 123 30 49 44, 99 139 47 47",
        ".18 109 15 77 39, .67 86 63 46 45, .38 160 62 36 53, .91 105 131 47 47, .44 18 148 40 44",
    ),
    ("53 42 40 52, 154 43 31 34", ".35 83 28 28 26, .78 28 68 42 67, .45 87 89 25 39, .14 10 155 60 26"),
    ("59 31 44 51, 48 128 34 52", ".62 50 38 28 46, .44 95 11 53 28, .95 29 131 72 29, .23 29 163 72 29"),
    ("36 89 52 76, 62 58 44 67", ".45 43 48 74 38, .84 17 155 29 35, .43 95 110 25 42"),
    ("28 31 55 63, 58 67 50 58", ".48 16 20 101 88, .95 33 116 37 49"),
)


def test_voc_of_a_published_example() -> None:
    """At IoU 0.3: 24.57 % by the area, 26.84 % by eleven points; in the end 7 of 24 detections are right, of 15."""

    def rows(text: str) -> list[list[float]]:
        return [[float(word) for word in row.split()] for row in text.split(", ")]

    def edges(x: float, y: float, width: float, height: float) -> tuple[float, ...]:
        return x, y, x + width + 1, y + height + 1  # their last pixel belongs to the box

    hw = (250, 250)
    records = [record(*((edges(*box), 0, 0) for box in rows(there)), hw=hw) for there, _ in PUBLISHED]
    detections = [found(*((edges(*box), 0, score) for score, *box in rows(seen)), hw=hw) for _, seen in PUBLISHED]
    assert metrics.voc_ap(records, detections, NAMES[:1], 0.3)["tin"] == pytest.approx(0.2457, abs=5e-5)
    assert metrics.voc_ap(records, detections, NAMES[:1], 0.3, eleven=True)["tin"] == pytest.approx(0.2684, abs=5e-5)
    pool = matches.pool(records, detections, NAMES[:1])
    state = matches.match(pool, (0.3,)).state[0, 0]
    assert ((state == matches.HIT).sum(), len(state), pool.objects().sum()) == (7, 24, 15)


def test_coco_by_hand() -> None:
    # IoU 0.55 is enough for thresholds 0.5 and (just) 0.55 of the ten.
    got = metrics.coco_ap([record((A, 0, 0))], [found(((0.0, 0.0, 20.0, 11.2), 0, 0.9))], NAMES)
    assert got["mAP50"] == pytest.approx(1)
    assert got["mAP75"] == 0
    assert got["mAP"] == pytest.approx(0.2)
    assert got["AR"] == pytest.approx(0.2)


# The threshold


def best_f1(records: Sequence[Record], detections: Sequence[Detections]) -> Any:
    return metrics.evaluate(records, detections, NAMES)["score"]


def test_the_score_is_that_of_the_best_f1() -> None:
    photo = record((A, 0, 0), (B, 1, 0))
    rows = [(A, 0, 0.9), (B, 1, 0.6), (C, 0, 0.5), (C, 1, 0.4)]
    assert best_f1([photo], [found(*rows)]) == pytest.approx(0.6, abs=1e-4)
    assert best_f1([photo], [found(*rows[:1])]) == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize("score", [0.12345, 0.98766, 1.0, 0.00004])
def test_a_detection_at_the_threshold_is_shown(score: float) -> None:
    rows = found((A, 0, score))
    assert len(rows.above(best_f1([record((A, 0, 0))], [rows]))) == 1


def test_what_shares_a_score_is_shown_together() -> None:
    """A threshold can't stand between equal scores, so they count together: here all four or none."""
    photo = record((A, 0, 0), (B, 0, 0))
    rows = found((A, 0, 0.9), (B, 0, 0.3), *(((i * 3.0, 90.0, i * 3.0 + 2, 95.0), 0, 0.3) for i in range(8)))
    assert best_f1([photo], [rows]) == pytest.approx(0.9, abs=1e-4)


# Counts


def test_counts_by_hand() -> None:
    records = [record((A, 0, 0), (B, 1, 0)), record((A, 0, 0), (C, 0, DIFFICULT)), record(), record((A, 1, 0))]
    detections = [
        found((A, 0, 0.9), (B, 2, 0.8)),  # two, but one under a wrong name
        found((A, 0, 0.9), (C, 0, 0.9)),  # the difficult one is not counted, whether found or not
        found((A, 0, 0.4)),  # below the threshold
        found((A, 1, 0.9), (B, 1, 0.9), (C, 0, 0.7)),  # two too many
    ]
    pool = matches.pool(records, detections, NAMES)
    got = metrics.count_figures(metrics.counts(pool, matches.match(pool, (0.5,)).state[0, 0], np.full(3, 0.5)))
    assert got == pytest.approx(
        {"precision": 3 / 6, "recall": 3 / 4, "f1": 6 / 10, "count_MAE": 2 / 4, "count_exact": 3 / 4, "cAcc": 2 / 4}
    )


def test_the_sweep_is_precision_and_recall_at_every_threshold() -> None:
    pool = matches.pool(*random_photos(3, (0, DIFFICULT), scale=3), NAMES)
    state = matches.match(pool, (0.5,)).state[0, 0]
    swept = metrics.sweep(pool.score, state, int((~pool.ignored).sum()))
    assert len(swept.score) == len(np.unique(pool.score[state != matches.IGNORED]))
    for place, score in enumerate(swept.score):
        got = metrics.count_figures(metrics.counts(pool, state, np.full(3, score)))
        said = swept.precision[place], swept.recall[place], swept.f1[place]
        assert [got[name] for name in ("precision", "recall", "f1")] == pytest.approx(list(said))


# Chance


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("flags", [(0,), (0, 0, DIFFICULT, CROWD)])
def test_photos_weighted_are_photos_copied(seed: int, flags: tuple[int, ...]) -> None:
    records, detections = random_photos(seed, flags)
    pool = matches.pool(records, detections, NAMES)
    state = matches.match(pool, metrics.IOUS).state[0]
    weights = np.random.default_rng(seed).multinomial(12, np.full(12, 1 / 12), size=4)
    for row, got in zip(weights, metrics.weighted_ap(pool, state, weights), strict=True):
        # Equal scores of copies stand together only where no other detection has them.
        copies = [i for i, times in enumerate(row) for _ in range(times)]
        wanted = metrics.coco_ap([records[i] for i in copies], [detections[i] for i in copies], NAMES)
        assert got.mean() == pytest.approx(wanted["mAP"], abs=1e-6)
        assert got[0] == pytest.approx(wanted["mAP50"], abs=1e-6)


def compared(first: list[Detections], second: list[Detections], records: list[Record]) -> metrics.Comparison:
    models = [metrics.scored(matches.pool(records, each, NAMES), np.full(3, 0.5)) for each in (first, second)]
    a, b = metrics.resamples(models, 400)
    apart = [metrics.of_pool(model.pool)["mAP50"] for model in models]
    return metrics.compare("mAP50", a, b, apart[0] - apart[1])


def test_a_better_model_is_said_to_be_better_and_the_same_one_is_not() -> None:
    records, detections = random_photos(0, count=60)
    worse = [found(*zip(d.boxes[::2].tolist(), d.labels[::2], d.scores[::2], strict=True), hw=d.hw) for d in detections]
    verdict = compared(detections, worse, records)
    assert verdict.p < 0.01
    assert 0 < verdict.low < verdict.difference < verdict.high
    back = compared(worse, detections, records)
    assert back[:3] == pytest.approx([-verdict.difference, -verdict.high, -verdict.low])
    assert compared(detections, detections, records) == (0, 0, 0, 1)


def test_chance_alone_is_seldom_significant() -> None:
    """Two models that are each as good, by luck of the draw: p is small as often as it should be, and no more."""
    small = 0
    for seed in range(20):
        records, one = random_photos(seed, count=40)
        flip = np.random.default_rng(seed).random(40) < 0.5
        none = found(hw=(200, 200))
        first = [none if away else each for each, away in zip(one, flip, strict=True)]
        second = [each if away else none for each, away in zip(one, flip, strict=True)]
        small += compared(first, second, records).p < 0.05
    assert small <= 4


def test_intervals_hold_the_figure_of_all_photos_as_often_as_they_say() -> None:
    """30 of 600 photos, drawn 40 times. AP is too high in few photos, and higher yet in photos drawn from these."""
    pool = matches.pool(*random_photos(5, count=600), NAMES)
    truth = metrics.of_pool(pool) | metrics.count_figures(metrics.scored(pool, np.full(3, 0.5)).counted)
    held: dict[str, int] = dict.fromkeys(("mAP", "mAP50", "f1", "count_MAE"), 0)
    rng = np.random.default_rng(0)
    for _ in range(40):
        model = metrics.scored(pool.of_photos(rng.permutation(600) < 30), np.full(3, 0.5))
        figures = metrics.of_pool(model.pool) | metrics.count_figures(model.counted)
        found = metrics.intervals(metrics.resamples([model], 200)[0], figures)
        for name in held:
            held[name] += found[name][0] <= truth[name] <= found[name][1]
    assert min(held.values()) >= 36, held  # 38 of 40 are 95 %


def test_intervals_hold_the_figure_and_shrink_with_the_photos() -> None:
    widths = []
    for count in (30, 270):
        records, detections = random_photos(5, count=count)
        model = metrics.scored(matches.pool(records, detections, NAMES), np.full(3, 0.5))
        figures = metrics.of_pool(model.pool) | metrics.count_figures(model.counted)
        low, high = metrics.intervals(metrics.resamples([model], 400)[0], figures)["recall"]
        assert low < figures["recall"] < high
        widths.append(high - low)
    assert 2 < widths[0] / widths[1] < 4.5  # nine times the photos: a third
