"""Boxes of one photo that overlap, made fewer after the network: NMS, soft-NMS and weighted boxes fusion.

For a network that leaves its candidates as they are (``select.nms: none``), and for what several detectors, or looks at
a photo, have found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from detkit.config import Select
from detkit.errors import UserError
from detkit.geometry import iou as overlaps
from detkit.types import Detections

Kind = Literal["none", "hard", "soft", "weighted"]
Array = NDArray[np.float64]


def check(kind: Kind, rule: Select, source: object) -> None:
    """Raise UserError, naming `source`, where a network with that rule has done NMS that `kind` is to be instead of."""
    if kind != "hard" and rule.nms != "none":
        raise UserError(
            f"{source}: has NMS inside, so nothing is left for --nms {kind}; run  detkit export --nms none  first"
        )


def merge(found: Detections, kind: Kind, rule: Select) -> Detections:
    """What the network with that rule found in one photo, merged; as it is where the network has done its NMS.

    soft: Gaussian soft-NMS. weighted: fusion in which a box keeps the score of the best that it is made of: the mean
    over the candidates of one network says how many there were, and nothing about the object.
    """
    if rule.nms != "none" or kind == "none":
        return found
    if kind == "hard":
        return hard(found, rule.iou, rule.keep, rule.agnostic)
    if kind == "soft":
        return soft(found, floor=rule.score, keep=rule.keep, agnostic=rule.agnostic)
    fused = weighted([found], iou=rule.iou, score="max", agnostic=rule.agnostic)
    return _first(fused, rule.keep)


def hard(found: Detections, iou: float = 0.45, keep: int | None = None, agnostic: bool = False) -> Detections:
    """NMS: a box that overlaps a better one of its class, or of any with `agnostic`, by an IoU above `iou` goes."""
    return _greedy(found, lambda overlap: (overlap <= iou).astype(np.float64), 0.0, keep, agnostic)


def soft(
    found: Detections,
    method: Literal["gaussian", "linear"] = "gaussian",
    *,
    sigma: float = 0.5,
    iou: float = 0.3,
    floor: float = 0.001,
    keep: int | None = None,
    agnostic: bool = False,
) -> Detections:
    """Soft-NMS (Bodla 2017): what overlaps a better box of its class, or of any with `agnostic`, loses score.

    Its score is multiplied by exp(-IoU^2 / sigma) (gaussian), or by 1 - IoU from an IoU of `iou` on (linear), for each
    better box; it goes where less than `floor` is left. Returns the best `keep`, or all.
    """

    def decay(overlap: Array) -> Array:
        if method == "gaussian":
            return np.exp(-(overlap**2) / sigma)
        return np.where(overlap >= iou, 1 - overlap, 1.0)

    return _greedy(found, decay, floor, keep, agnostic)


def _greedy(
    found: Detections, decay: Callable[[Array], Array], floor: float, keep: int | None, agnostic: bool
) -> Detections:
    """Take the best box left and let the scores of the others decay with their IoU with it, until none is left."""
    boxes, scores = found.boxes.astype(np.float64), found.scores.astype(np.float64)
    taken: list[int] = []
    values: list[float] = []
    while len(taken) < min(len(scores), keep or len(scores)):
        best = int(scores.argmax())
        if scores[best] <= 0 or scores[best] < floor:
            break
        taken.append(best)
        values.append(scores[best])
        rivals = slice(None) if agnostic else found.labels == found.labels[best]
        scores[rivals] *= decay(overlaps(boxes[best, None], boxes[rivals])[0])
        scores[best] = 0
    return Detections(found.boxes[taken], np.array(values, np.float32), found.labels[taken], found.hw)


def weighted(
    several: Sequence[Detections],
    weights: Sequence[float] | None = None,
    *,
    iou: float = 0.55,
    score: Literal["mean", "max"] = "mean",
    agnostic: bool = False,
) -> Detections:
    """Weighted boxes fusion (Solovyev 2019) of what several detectors, or looks, found in one photo.

    From the best box on, each joins the fused box of its class (with `agnostic`: of any) that it overlaps most, by an
    IoU above `iou`, or begins one; a fused box is the mean of its members, weighted by their scores. weights: of the
    detectors; default: alike. score: of a fused box, the mean of its members' scores times the share of detectors that
    took part (mean), or the best of them (max). Returns the fused boxes, best first. Raises ValueError where there is
    no weight for each of `several`, or nothing to fuse.
    """
    shares = np.ones(len(several)) if weights is None else np.asarray(weights, np.float64)
    if not several or len(shares) != len(several) or not (shares > 0).all():
        raise ValueError(f"{len(several)} detectors need as many weights above 0, not {shares.tolist()}")
    boxes = np.concatenate([one.boxes for one in several]).astype(np.float64)
    scores = np.concatenate([one.scores * share for one, share in zip(several, shares, strict=True)])
    labels = np.concatenate([one.labels for one in several])
    order = np.argsort(-scores, kind="stable")
    # Of the fused boxes: the first `count` rows are in use.
    count, total = 0, len(order)
    fused, sums, weight = np.zeros((total, 4)), np.zeros((total, 4)), np.zeros(total)
    members, firsts = np.zeros(total, np.int64), np.zeros(total, np.int64)
    for i in order:
        overlap = overlaps(boxes[i, None], fused[:count])[0]
        if not agnostic:
            overlap[labels[firsts[:count]] != labels[i]] = 0
        place = int(overlap.argmax()) if count else 0
        if not count or overlap[place] <= iou:
            place, count = count, count + 1
            firsts[place] = i
        sums[place] += scores[i] * boxes[i]
        weight[place] += scores[i]
        members[place] += 1
        fused[place] = sums[place] / weight[place]
    firsts, members = firsts[:count], members[:count]
    if score == "max":
        values = scores[firsts] / shares.max()
    else:
        values = weight[:count] / members * np.minimum(members, len(several)) / shares.sum()
    best = np.argsort(-values, kind="stable")
    certain = np.minimum(values[best], 1).astype(np.float32)  # weights can lift the mean above 1
    return Detections(fused[best].astype(np.float32), certain, labels[firsts[best]], several[0].hw)


def _first(found: Detections, keep: int) -> Detections:
    return Detections(found.boxes[:keep], found.scores[:keep], found.labels[:keep], found.hw)
