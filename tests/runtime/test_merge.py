"""What merges boxes after the network, against loops written from the papers, torchvision and ensemble-boxes."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from ensemble_boxes import weighted_boxes_fusion
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.ops import batched_nms, nms

from detkit.config import Select
from detkit.errors import UserError
from detkit.runtime import merge
from detkit.runtime.session import Session
from detkit.types import Detections
from tests.runtime.conftest import BOXES, LABELS, SCORES, Make

HW = (400, 600)


def found(count: int, classes: int = 3, seed: int = 0, objects: int = 6, levels: int = 0) -> Detections:
    """Boxes around a few objects, best first; levels: so many different scores, or all different."""
    rng = np.random.default_rng(seed)
    centres, sides = rng.uniform(50, 350, (objects, 2)), rng.uniform(20, 120, (objects, 2))
    which = rng.integers(0, objects, count)
    middle = centres[which] + rng.normal(0, 8, (count, 2))
    half = sides[which] * rng.uniform(0.7, 1.4, (count, 2)) / 2
    boxes = np.concatenate([middle - half, middle + half], 1).clip(0, 400)
    scores = np.sort(rng.integers(1, levels + 1, count) / levels if levels else rng.uniform(0.01, 1, count))[::-1]
    labels = (which + (rng.random(count) < 0.2)) % classes
    return Detections(boxes.astype(np.float32), scores.astype(np.float32), labels.astype(np.int64), HW)


def iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = (tuple(map(float, box)) for box in (a, b))
    overlap = max(min(ax2, bx2) - max(ax1, bx1), 0) * max(min(ay2, by2) - max(ay1, by1), 0)
    return overlap / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap)


Method = Literal["gaussian", "linear"]


def bodla(one: Detections, method: Method, sigma: float, limit: float, floor: float) -> list[tuple[int, float]]:
    """Soft-NMS as the paper's figure 2 and equations (linear) and (Gaussian) have it, class by class."""
    result = []
    for label in set(one.labels.tolist()):
        B = [i for i in range(len(one)) if one.labels[i] == label]
        S = {i: float(one.scores[i]) for i in B}
        while B:
            m = max(B, key=lambda i: S[i])
            result.append((m, S[m]))
            B.remove(m)
            for i in B:
                overlap = iou(one.boxes[m], one.boxes[i])
                if method == "gaussian":
                    S[i] *= math.exp(-(overlap**2) / sigma)
                elif overlap >= limit:
                    S[i] *= 1 - overlap
            B = [i for i in B if S[i] >= floor]
    return sorted(result, key=lambda pair: -pair[1])


@pytest.mark.parametrize("method", ["gaussian", "linear"])
@pytest.mark.parametrize("seed", range(12))
def test_soft_nms_is_the_papers(method: Method, seed: int) -> None:
    one = found(5 + 12 * seed, seed=seed)
    sigma, limit, floor = (0.5, 0.3, 0.001) if seed % 2 else (0.2, 0.5, 0.05)
    got = merge.soft(one, method, sigma=sigma, iou=limit, floor=floor)
    wanted = bodla(one, method, sigma, limit, floor)
    np.testing.assert_array_equal(got.boxes, one.boxes[[i for i, _ in wanted]])
    np.testing.assert_array_equal(got.labels, one.labels[[i for i, _ in wanted]])
    np.testing.assert_allclose(got.scores, [score for _, score in wanted], rtol=1e-6)
    few = merge.soft(one, method, sigma=sigma, iou=limit, floor=floor, keep=3)
    np.testing.assert_array_equal(few.boxes, got.boxes[:3])


@given(
    count=st.integers(0, 80), classes=st.integers(1, 4), seed=st.integers(0, 2**32), levels=st.integers(0, 9),
    limit=st.integers(3, 61).map(lambda part: part / 64), agnostic=st.booleans(),
)  # fmt: skip
def test_hard_nms_is_torchvisions(
    count: int, classes: int, seed: int, levels: int, limit: float, agnostic: bool
) -> None:
    one = found(count, classes, seed, levels=levels)
    # Whole pixels, so that every IoU is on the same side of the limit in float32 as in float64.
    one = Detections(np.rint(one.boxes), one.scores, one.labels, HW)
    boxes, scores, labels = (torch.from_numpy(part) for part in (one.boxes, one.scores, one.labels))
    kept = (nms(boxes, scores, limit) if agnostic else batched_nms(boxes, scores, labels, limit)).numpy()
    got = merge.hard(one, limit, agnostic=agnostic)
    np.testing.assert_array_equal(got.boxes, one.boxes[kept])
    np.testing.assert_array_equal(got.scores, one.scores[kept])
    np.testing.assert_array_equal(got.labels, one.labels[kept])


@pytest.mark.parametrize("models", [1, 2, 4])
@pytest.mark.parametrize("score", ["mean", "max"])
@pytest.mark.parametrize("seed", range(6))
def test_weighted_boxes_fusion_is_ensemble_boxes(models: int, score: Literal["mean", "max"], seed: int) -> None:
    several = [found(10 + 15 * seed, seed=seed * 10 + i) for i in range(models)]
    weights = None if seed % 2 else np.random.default_rng(seed).uniform(0.5, 3, models).tolist()
    limit = 0.55 if seed % 3 else 0.3
    boxes, scores, labels = weighted_boxes_fusion(
        [one.boxes / 400 for one in several], [one.scores for one in several], [one.labels for one in several],
        weights=weights, iou_thr=limit, conf_type={"mean": "avg", "max": "max"}[score],
    )  # fmt: skip
    got = merge.weighted(several, weights, iou=limit, score=score)
    assert len(got) == len(scores) < sum(map(len, several))
    np.testing.assert_allclose(got.scores, np.minimum(scores, 1), rtol=1e-5)
    # The best first, both; where scores are equal, in any order.
    mine, theirs = (np.lexsort((b[:, 0], np.round(-s, 4))) for b, s in ((got.boxes, got.scores), (boxes, scores)))
    np.testing.assert_allclose(got.boxes[mine], boxes[theirs] * 400, rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(got.labels[mine], labels[theirs])


def test_weighted_boxes_fusion_by_hand() -> None:
    a = Detections(np.array([[0, 0, 10, 10]], np.float32), np.array([0.9], np.float32), np.array([1]), HW)
    b = Detections(np.array([[0, 0, 10, 16]], np.float32), np.array([0.3], np.float32), np.array([1]), HW)
    got = merge.weighted([a, b])
    np.testing.assert_allclose(got.boxes, [[0, 0, 10, 11.5]])
    np.testing.assert_allclose(got.scores, [0.6])
    np.testing.assert_allclose(merge.weighted([a, b, merge.hard(a)], [1, 1, 2]).scores, [(0.9 + 0.3 + 1.8) / 3 * 3 / 4])
    alone = merge.weighted([a, b], iou=0.9)
    np.testing.assert_allclose(alone.scores, [0.45, 0.15])  # half of the detectors found each


def test_fusion_across_classes_takes_the_best_ones() -> None:
    one = Detections(
        np.array([[0, 0, 10, 10], [0, 0, 10, 11]], np.float32), np.array([0.8, 0.4], np.float32), np.array([2, 0]), HW
    )
    assert len(merge.weighted([one])) == 2
    got = merge.weighted([one], agnostic=True, score="max")
    assert got.labels.tolist() == [2]
    np.testing.assert_allclose(got.scores, [0.8])


def test_nothing_to_merge() -> None:
    none = found(0)
    for got in (merge.hard(none), merge.soft(none), merge.weighted([none]), merge.weighted([none, none], [1, 2])):
        assert len(got) == 0
        assert got.hw == HW
    for several, weights in (([], None), ([none], [1, 2]), ([none, none], [1, 0])):
        with pytest.raises(ValueError, match="need as many weights"):
            merge.weighted(several, weights)


@given(seed=st.integers(0, 2**32), count=st.integers(1, 60))
def test_what_holds_for_each(seed: int, count: int) -> None:
    one = found(count, seed=seed)
    rule = Select(nms="none", score=0.02, iou=0.5, keep=8)
    inside = one.above(0.02)
    for kind in ("hard", "soft", "weighted"):
        got = merge.merge(inside, kind, rule)
        assert len(got) <= min(8, len(inside))
        assert (np.diff(got.scores) <= 0).all()
        assert (got.scores >= np.float32(0.02)).all()
        assert set(got.labels.tolist()) <= set(inside.labels.tolist())
        if len(inside):
            assert got.scores[0] == inside.scores[0]
            assert (got.boxes >= inside.boxes.min(0) - 1e-3).all()
            assert (got.boxes <= inside.boxes.max(0) + 1e-3).all()
    assert merge.merge(inside, "none", rule) is inside
    done = rule.model_copy(update={"nms": "hard"})
    assert merge.merge(inside, "hard", done) is inside


def test_a_session_merges_what_the_network_left(make_model: Make) -> None:
    # The third box is put where it overlaps none; the canvas is the photo.
    path = make_model(size=(64, 96), resize="stretch", nms=Select(nms="none", iou=0.01, agnostic=True))
    image = np.full((64, 96, 3), 255, np.uint8)
    raw = Session(path, "cpu", nms="none").detect([image])[0]
    assert len(raw) == 3
    assert sorted(raw.scores.tolist()) == sorted(SCORES[1:].tolist())
    assert {tuple(box) for box in raw.boxes.tolist()} == {tuple(box) for box in BOXES[1:].tolist()}
    assert set(raw.labels.tolist()) == set(LABELS[1:].tolist())
    for kind in ("hard", "soft", "weighted"):
        wanted = merge.merge(raw, kind, Select(nms="none", iou=0.01, agnostic=True))
        got = Session(path, "cpu", nms=kind).detect([image])[0]
        np.testing.assert_array_equal(got.boxes, wanted.boxes)
        np.testing.assert_array_equal(got.scores, wanted.scores)


@pytest.mark.parametrize("kind", ["none", "soft", "weighted"])
def test_a_network_with_nms_inside_is_refused(kind: merge.Kind, make_model: Make) -> None:
    path = make_model()
    with pytest.raises(UserError, match=rf"model\.onnx: has NMS inside, .*--nms {kind}; run  detkit export --nms none"):
        Session(path, "cpu", nms=kind)
    assert Session(path, "cpu", nms="hard").nms == "hard"
