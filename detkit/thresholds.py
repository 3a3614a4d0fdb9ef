"""How sure is sure enough: thresholds of each class for an aim, and scores that say how often they are right."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detkit import matches, metrics
from detkit.errors import UserError
from detkit.manifest import Decision
from detkit.matches import HIT, IGNORED, Floats, Pool
from detkit.metrics import floored
from detkit.runtime import decide

BINS = 10  # of the reliability diagram
KNOTS = 100  # of an isotonic calibration, at most
_RISE = 1e-3  # of an isotonic calibration, above the surest detections that it is known of
PRIOR = 100.0  # objects of all classes, beside each class's own
SHIFT = 0.3  # by which thresholds are moved at most, for cacc
Method = Literal["none", "temperature", "isotonic"]


class Aim(NamedTuple):
    """What thresholds are chosen for: 'f1' and 'cacc', to be high; 'precision' and 'recall', to be at least `least`."""

    figure: Literal["f1", "precision", "recall", "cacc"]
    least: float = 0.0

    def __str__(self) -> str:
        return f"{self.figure}={self.least:g}" if self.least else self.figure


def aim(text: str) -> Aim:
    """'f1', 'cacc', 'precision=0.9' or 'recall=0.9' as an Aim. Raises UserError."""
    figure, _, least = text.partition("=")
    if figure in ("f1", "cacc") and not least:
        return Aim(figure)  # type: ignore[arg-type]
    if figure in ("precision", "recall"):
        try:
            if 0 < float(least) <= 1:
                return Aim(figure, float(least))  # type: ignore[arg-type]
        except ValueError:
            pass
    raise UserError(f"--aim {text}: f1, cacc, precision=P or recall=R with a share, such as precision=0.9")


def choose(pool: Pool, state: NDArray[np.int8], wanted: Aim, prior: float = PRIOR) -> Floats:
    """A threshold for each class, float64 [C], at IoU 0.5. state: int8 [N].

    f1: the highest. precision: the most objects found with at least so much. recall: the fewest false ones, in
    proportion, with at least so much. cacc: those of f1, all moved by as much, where every class's count is right
    in most photos. prior: so many objects of all classes, with the detections that go with them, are added to each
    class's own, for a threshold that rests on few objects is worth little on other photos. An aim that no threshold
    reaches gives 1, for precision, or 0, for recall.
    """
    objects = pool.objects().sum(0)
    everything = metrics.sweep(pool.score, state, int(objects.sum()))
    result = np.zeros(len(pool.classes))
    for label, count in enumerate(objects.tolist()):
        own = pool.of_class(label)
        result[label] = _best(_mixed(metrics.sweep(pool.score[own], state[own], count), everything, prior), wanted)
    if wanted.figure == "cacc":
        result = _checkout(pool, state, result)
    return np.array([floored(each) for each in result])


def _mixed(own: metrics.Sweep, everything: metrics.Sweep, prior: float) -> metrics.Sweep:
    """A class's sweep with those of all classes, scaled to `prior` objects, added to it."""
    if not prior and own.objects and len(own.score):
        return own
    score = everything.score
    weight = max(prior, 1e-9) / max(1, everything.objects)
    place = np.searchsorted(-own.score, -score, "right")  # how many of its thresholds are as high
    hit, passed = (np.append(0, column)[place] for column in (own.hit, own.passed))
    total = own.objects + weight * everything.objects
    return metrics.Sweep(score, hit + weight * everything.hit, passed + weight * everything.passed, total)


def _best(swept: metrics.Sweep, wanted: Aim) -> float:
    if not len(swept.score):
        return 0.0
    if wanted.figure == "precision":
        good = np.flatnonzero(swept.precision >= wanted.least)
        return float(swept.score[good[-1]]) if len(good) else 1.0
    if wanted.figure == "recall":
        good = np.flatnonzero(swept.recall >= wanted.least)
        return float(swept.score[good[swept.precision[good].argmax()]]) if len(good) else 0.0
    return float(swept.score[swept.f1.argmax()])


def _checkout(pool: Pool, state: NDArray[np.int8], start: Floats) -> Floats:
    """The thresholds, all moved by as much, where every class's count is right in most photos. Moving each by itself
    was tried: on groceries it is right in more of the photos that it was found on, and in fewer of others."""
    moves = sorted(np.arange(-SHIFT, SHIFT + 0.005, 0.01), key=abs)
    right = [metrics.counts(pool, state, start + move).checkout.sum() for move in moves]
    return np.clip(start + moves[int(np.argmax(right))], 0, 1)


# --- calibration ------------------------------------------------------------------------------------------------------


class Reliability(NamedTuple):
    """Detections by score, in `BINS` of equal width: float64 [BINS] each, mean score, share of them that are right (NaN
    in both where there is none) and their number; error: the mean distance of the two, weighted by numbers (ECE)."""

    score: Floats
    right: Floats
    number: Floats
    error: float


def reliability(score: Floats, state: NDArray[np.int8]) -> Reliability:
    """How often detections are right, at IoU 0.5, that say so of themselves."""
    counts = state != IGNORED
    score, hit = score[counts], (state[counts] == HIT).astype(np.float64)
    place = np.minimum((score * BINS).astype(int), BINS - 1)
    number = np.bincount(place, minlength=BINS).astype(np.float64)
    with np.errstate(invalid="ignore"):
        mean, right = (np.bincount(place, values, BINS) / number for values in (score, hit))
    apart = np.nansum(np.abs(mean - right) * number) / max(1, len(score))
    return Reliability(mean, right, number, float(apart))


def fit(score: Floats, state: NDArray[np.int8], method: Method) -> Decision:
    """A calibration of the scores, by whether detections are right at IoU 0.5.

    temperature: one number by which logits are divided (Guo 2017), of the least log loss. isotonic: any rising curve,
    of the least squared error (Zadrozny and Elkan 2002), as up to `KNOTS` points with straight lines between. Both rise
    everywhere, so detections keep their order.
    """
    counts = state != IGNORED
    score, hit = score[counts], (state[counts] == HIT).astype(np.float64)
    if method == "none" or not len(score):
        return Decision()
    if method == "temperature":
        from scipy import optimize

        def loss(log_temperature: float) -> float:
            said = decide.calibrated(score, Decision(calibration="temperature", temperature=np.exp(log_temperature)))
            return float(-np.mean(np.log(np.where(hit > 0, said, 1 - said))))

        best = optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded")
        return Decision(calibration="temperature", temperature=float(np.exp(best.x)))
    return Decision(calibration="isotonic", knots=_isotonic(score, hit))


def _isotonic(score: Floats, hit: Floats) -> tuple[tuple[float, float], ...]:
    from scipy import optimize

    order = np.argsort(score, kind="stable")
    # As much of all detections and of the right ones in each part: by numbers alone, half of these were in the last.
    weight = 1 / len(score) + hit[order] / max(1.0, hit.sum())
    middle = (np.cumsum(weight) - weight / 2) / weight.sum()
    parts = np.split(order, np.flatnonzero(np.diff((middle * (KNOTS - 2)).astype(int))) + 1)
    weights = np.array([len(part) for part in parts], np.float64)
    levels = optimize.isotonic_regression([hit[part].mean() for part in parts], weights=weights).x
    levels = levels.clip(1e-6, 1 - _RISE)  # what lies below the first point and above the last one rises too
    places = np.array([score[part].mean() for part in parts])
    # A level's parts as one point, in their middle: between points the curve rises, so detections keep their order.
    knots = []
    for level in np.unique(levels):
        same = levels == level
        knots.append((float(np.average(places[same], weights=weights[same])), float(level)))
    ends = [(0.0, 0.0), *(knot for knot in knots if 0 < knot[0] < 1), (1.0, knots[-1][1] + _RISE)]
    return tuple((round(x, 6), round(y, 6)) for x, y in ends)


def decided(pool: Pool, method: Method, wanted: Aim) -> Decision:
    """Calibration and thresholds from the detections of a split."""
    state = matches.match(pool, (0.5,)).state[0, 0]
    decision = fit(pool.score, state, method)
    thresholds = choose(rescored(pool, decision), state, wanted)
    return decision.model_copy(update={"thresholds": tuple(thresholds.tolist()), "aim": str(wanted)})


def rescored(pool: Pool, decision: Decision) -> Pool:
    """With calibrated scores, as `detkit predict` has them (in float32)."""
    scores = decide.calibrated(pool.score.astype(np.float32), decision).astype(np.float32)
    return replace(pool, score=scores.astype(np.float64))
