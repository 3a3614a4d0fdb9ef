"""Which detections are shown: calibrated scores and a threshold for each class, as the manifest has them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from detkit.manifest import Decision, Manifest
from detkit.types import Detections

_EDGE = 1e-6  # scores are held so far from 0 and 1, whose logits are infinite


def calibrated(scores: NDArray[np.floating], decision: Decision) -> NDArray[np.float64]:
    """Scores, of any shape, as the shares of such detections that are right; higher ones never become lower ones."""
    if decision.calibration == "temperature":
        inside = np.clip(scores.astype(np.float64), _EDGE, 1 - _EDGE)
        result: NDArray[np.float64] = 1 / (1 + (1 / inside - 1) ** (1 / decision.temperature))
        return result
    if decision.calibration == "isotonic":
        before, after = zip(*decision.knots, strict=True)
        return np.asarray(np.interp(scores, before, after))
    return scores.astype(np.float64)


def thresholds(manifest: Manifest) -> tuple[float, ...]:
    """The lowest calibrated score of each class that is shown."""
    chosen = manifest.decision.thresholds if manifest.decision else ()
    return chosen or (manifest.score,) * len(manifest.classes)


def lowest(manifest: Manifest) -> NDArray[np.float32]:
    """Of each class, the lowest score of the network, before calibration, that `shown` leaves: float32 [C]. More than 1
    where none is enough."""
    decision, wanted = manifest.decision or Decision(), np.array(thresholds(manifest), np.float32)
    # Floats from 0 on are ordered as their bits are.
    low, high = np.zeros(len(wanted), np.int32), np.full(len(wanted), np.float32(1).view(np.int32) + 1)
    while (low < high).any():
        middle = (low + high) // 2
        enough = calibrated(middle.view(np.float32), decision).astype(np.float32) >= wanted
        low, high = np.where(enough, low, np.minimum(middle + 1, high)), np.where(enough, middle, high)
    return low.view(np.float32)


def scored(found: Detections, manifest: Manifest) -> Detections:
    """The detections with calibrated scores, where the manifest has a calibration."""
    if manifest.decision is None:
        return found
    return replace(found, scores=calibrated(found.scores, manifest.decision).astype(np.float32))


def are_shown(found: Detections, manifest: Manifest, score: float | None = None) -> NDArray[np.bool_]:
    """bool [K]: which detections `shown` leaves."""
    scores = scored(found, manifest).scores
    limits = np.array(thresholds(manifest), np.float32)[found.labels] if score is None else score
    return np.asarray(scores >= limits)


def shown(found: Detections, manifest: Manifest, score: float | None = None) -> Detections:
    """The detections that are to be shown, with calibrated scores where the manifest has a calibration.

    score: the lowest, instead of the manifest's thresholds.
    """
    kept = are_shown(found, manifest, score)
    found = scored(found, manifest)
    return Detections(found.boxes[kept], found.scores[kept], found.labels[kept], found.hw)


def fills(kept: Detections, manifest: Manifest) -> bool:
    """Whether what `shown` leaves of one look is as much as the network can say: there may be more."""
    return len(kept) >= manifest.nms.keep
