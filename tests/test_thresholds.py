"""Thresholds against trying them all; calibration against what is known of made-up scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detkit import matches, metrics, thresholds
from detkit.errors import UserError
from detkit.manifest import Decision
from detkit.runtime import decide
from detkit.types import DIFFICULT, Detections
from tests.test_manifest import manifest
from tests.test_metrics import NAMES, found, random_photos, record


def pooled(seed: int) -> tuple[matches.Pool, np.ndarray]:
    pool = matches.pool(*random_photos(seed, (0, 0, 0, DIFFICULT), count=20), NAMES)
    return pool, matches.match(pool, (0.5,)).state[0, 0]


def share(pool: matches.Pool, state: np.ndarray, label: int, least: float) -> tuple[float, float]:
    """Precision and recall of a class at a threshold."""
    kept = (pool.label == label) & (pool.score >= least) & (state != matches.IGNORED)
    hit = (state[kept] == matches.HIT).sum()
    return hit / max(1, kept.sum()), hit / pool.objects()[:, label].sum()


@pytest.mark.parametrize("seed", range(3))
def test_thresholds_reach_what_they_aim_for(seed: int) -> None:
    pool, state = pooled(seed)
    for label in range(3):
        tried = [share(pool, state, label, each) for each in pool.score[pool.label == label]]
        for text, place in (("precision=0.2", 0), ("recall=0.3", 1)):
            least = thresholds.choose(pool, state, thresholds.aim(text), 0)[label]
            got = share(pool, state, label, least)
            good = [each for each in tried if each[place] >= float(text.partition("=")[2])]
            assert good
            assert got[place] >= float(text.partition("=")[2])
            assert got[1 - place] >= max(each[1 - place] for each in good) - 1e-9
        precision, recall = share(pool, state, label, thresholds.choose(pool, state, thresholds.aim("f1"), 0)[label])
        f1 = max(2 * p * r / max(p + r, 1e-9) for p, r in tried)
        assert 2 * precision * recall / (precision + recall) == pytest.approx(f1)


@pytest.mark.parametrize("seed", range(3))
def test_checkout_thresholds_are_those_of_f1_moved_to_where_most_counts_are_right(seed: int) -> None:
    pool, state = pooled(seed)

    def right(levels: np.ndarray) -> float:
        return float(metrics.counts(pool, state, levels).checkout.sum())

    chosen, start = (thresholds.choose(pool, state, thresholds.aim(name)) for name in ("cacc", "f1"))
    assert right(chosen) >= max(right(start + move) for move in (-0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3))


def test_what_can_not_be_reached_shows_nothing_or_all() -> None:
    box = (0.0, 0.0, 20.0, 20.0)
    pool = matches.pool([record((box, 0, 0), (box, 1, 0))], [found(((50.0, 0.0, 60.0, 10.0), 0, 0.7))], NAMES)
    state = matches.match(pool, (0.5,)).state[0, 0]
    assert thresholds.choose(pool, state, thresholds.aim("precision=0.5"))[0] == 1
    assert thresholds.choose(pool, state, thresholds.aim("recall=0.5"))[0] == 0


def test_few_objects_say_little_against_many_of_other_classes() -> None:
    pool, state = pooled(0)
    common = thresholds.choose(pool, state, thresholds.aim("f1"), 1e9)
    assert common == pytest.approx(np.full(3, metrics.best_score(pool, state)))
    own = thresholds.choose(pool, state, thresholds.aim("f1"), 0)
    assert len(set(own)) == 3
    nobody = matches.pool(*random_photos(0), (*NAMES, "never there"))
    state = matches.match(nobody, (0.5,)).state[0, 0]
    assert thresholds.choose(nobody, state, thresholds.aim("f1"), 0)[3] == metrics.best_score(nobody, state)


@pytest.mark.parametrize("text", ["", "f2", "precision", "precision=", "precision=2", "recall=x", "f1=0.5", "cacc=1"])
def test_other_aims_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match="--aim"):
        thresholds.aim(text)


# Calibration


def made_up(temperature: float, count: int = 20000) -> tuple[np.ndarray, np.ndarray]:
    """Scores that are too sure by that temperature, and whether they are right."""
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 1.5, count)
    hit = rng.random(count) < 1 / (1 + np.exp(-logit))
    return 1 / (1 + np.exp(-logit * temperature)), hit.astype(np.int8)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_found_and_mends_the_scores(temperature: float) -> None:
    score, state = made_up(temperature)
    decision = thresholds.fit(score, state, "temperature")
    assert decision.temperature == pytest.approx(temperature, rel=0.05)
    assert thresholds.reliability(decide.calibrated(score, decision), state).error < 0.01


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_isotonic_mends_the_scores(temperature: float) -> None:
    score, state = made_up(temperature)
    decision = thresholds.fit(score, state, "isotonic")
    assert len(decision.knots) <= thresholds.KNOTS
    before = thresholds.reliability(score, state).error
    assert thresholds.reliability(decide.calibrated(score, decision), state).error < min(0.02, before / 3)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_calibration_keeps_apart_what_is_apart(method: Any) -> None:
    """Of 50,000 detections the surest 500 are most that are right, as in a detector: they are not to become equal."""
    rng = np.random.default_rng(0)
    score = np.sort(np.append(rng.uniform(0.01, 0.4, 49500), rng.uniform(0.4, 0.99, 500)).round(6))
    state = (rng.random(50000) < np.where(score < 0.4, 0.004, score)).astype(np.int8)
    decision = thresholds.fit(score, state, method)
    after = decide.calibrated(score, decision)
    assert ((np.diff(after) > 0) == (np.diff(score) > 0)).all()
    if method == "isotonic":
        sure = score > 0.4
        assert thresholds.reliability(after[sure], state[sure]).error < 0.08


@given(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.sampled_from([-1, 0, 1])), max_size=40),
    st.sampled_from(["none", "temperature", "isotonic"]),
)
def test_calibrated_scores_keep_their_order_and_stay_shares(rows: list[tuple[float, int]], method: str) -> None:
    score = np.array([row[0] for row in rows], np.float64)
    state = np.array([row[1] for row in rows], np.int8)
    decision = thresholds.fit(score, state, method)  # type: ignore[arg-type]
    decision = Decision.model_validate_json(decision.model_dump_json())
    after = decide.calibrated(np.sort(score), decision)
    assert (np.diff(after) >= 0).all()
    assert ((after >= 0) & (after <= 1)).all()


def test_reliability_by_hand() -> None:
    score, state = np.array([0.05, 0.93, 0.97, 0.92, 0.5]), np.array([0, 1, 1, 0, -1], np.int8)
    rows = thresholds.reliability(score, state)
    assert rows.number.tolist() == [1, *[0] * 8, 3]
    assert rows.score[9] == pytest.approx(0.94)
    assert rows.right[9] == pytest.approx(2 / 3)
    assert rows.error == pytest.approx((0.05 + 3 * (0.94 - 2 / 3)) / 4)


# What is shown


ROWS = found(((0, 0, 9, 9), 0, 0.9), ((0, 0, 9, 9), 1, 0.6), ((0, 0, 9, 9), 0, 0.5), ((0, 0, 9, 9), 1, 0.2))


@pytest.mark.parametrize(
    "decision",
    [
        None,
        Decision(thresholds=(0.3, 1.0, 0.0)),
        Decision(calibration="temperature", temperature=2.3, thresholds=(0.3, 1.0, 0.71)),
        Decision(
            calibration="isotonic", knots=((0, 0), (0.2, 0.4), (0.9, 0.41), (1, 0.8)), thresholds=(0.4, 0.81, 0.405)
        ),
        Decision(calibration="temperature", temperature=0.4),
    ],
)
def test_thresholds_for_scores_before_calibration_show_the_same(decision: Decision | None) -> None:
    said = manifest(classes=("a", "b", "c"), decision=decision)
    lowest = decide.lowest(said)
    near = [np.nextafter(lowest, np.float32(side)) for side in (0, 2)]
    scores = np.concatenate([*near, lowest, np.linspace(0, 1, 300, dtype=np.float32)]).clip(0, 1)
    labels = np.tile(np.arange(3), len(scores) // 3)
    kept = decide.are_shown(Detections(np.zeros((len(scores), 4), np.float32), scores, labels, (1, 1)), said)
    assert np.array_equal(kept, scores >= lowest[labels])
    assert lowest.max() <= np.nextafter(np.float32(1), np.float32(2))
    assert kept.any()


def test_a_model_shows_what_it_decides_unless_the_user_says() -> None:
    plain = manifest(score=0.55)
    assert decide.shown(ROWS, plain).scores.tolist() == pytest.approx([0.9, 0.6])
    by_class = plain.model_copy(update={"decision": Decision(thresholds=(0.7, 0.1, 0.5))})
    assert decide.shown(ROWS, by_class).scores.tolist() == pytest.approx([0.9, 0.6, 0.2])
    assert decide.shown(ROWS, by_class, 0.6).scores.tolist() == pytest.approx([0.9, 0.6])
    softer = Decision(calibration="temperature", temperature=2, thresholds=(0.7, 0.1, 0.5))
    shown = decide.shown(ROWS, plain.model_copy(update={"decision": softer}))
    assert shown.scores.tolist() == pytest.approx([0.75, 1 / (1 + (2 / 3) ** 0.5), 1 / 3])
    knots = Decision(calibration="isotonic", knots=((0, 0), (0.5, 0.2), (1, 0.8)))
    shown = decide.shown(ROWS, plain.model_copy(update={"decision": knots}))
    assert shown.scores.tolist() == pytest.approx([0.68])
