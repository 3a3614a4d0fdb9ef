"""Kinds of error by hand and by TIDE's own code (Bolya 2020); confusion, look-alikes, worst photos, doubtful labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from detkit import matches, metrics, mistakes
from detkit.errors import UserError
from detkit.types import CROWD, DIFFICULT
from tests.test_metrics import NAMES, Found, Truth, found, random_photos, record

A, B, C = (0.0, 0.0, 20.0, 20.0), (50.0, 50.0, 80.0, 80.0), (30.0, 0.0, 45.0, 10.0)
HALF = (0.0, 0.0, 20.0, 8.0)  # IoU 0.4 with A
NEAR = (0.0, 0.0, 20.0, 16.0)  # 0.8
FAR = (90.0, 0.0, 100.0, 10.0)
LEVEL = np.full(3, 0.5)


def pooled(truth: Truth, rows: Found) -> matches.Pool:
    return matches.pool([record(*truth)], [found(*rows)], NAMES)


@pytest.mark.parametrize(
    ("rows", "kinds"),
    [
        ([(A, 0, 0.9)], [-1]),
        ([(A, 1, 0.9)], [mistakes._CLASS]),
        ([(NEAR, 1, 0.9)], [mistakes._CLASS]),
        ([(HALF, 0, 0.9)], [mistakes._LOCALISATION]),
        ([(HALF, 1, 0.9)], [mistakes._BOTH]),
        ([(A, 0, 0.9), (NEAR, 0, 0.8)], [-1, mistakes._DUPLICATE]),
        ([(FAR, 0, 0.9)], [mistakes._BACKGROUND]),
        ([(NEAR, 0, 0.9), (A, 0, 0.8)], [-1, mistakes._DUPLICATE]),  # the surer one has it
    ],
)
def test_each_kind(rows: Found, kinds: Sequence[int]) -> None:
    pool = pooled([(A, 0, 0), (B, 0, 0)], rows)
    assert mistakes.tide(pool).kind.tolist() == kinds


def test_what_each_kind_costs_by_hand() -> None:
    # One object of two is found; the one of class 1 is taken for class 0, with a higher score.
    pool = pooled([(A, 0, 0), (B, 1, 0)], [(A, 0, 0.8), (B, 0, 0.9)])
    split = mistakes.tide(pool)
    # Class 0: precision 1/2 at recall 1; class 1: nothing.
    assert split.ap == pytest.approx(0.25)
    assert split.costs["class"] == pytest.approx(1 - 0.25)
    assert split.costs["missed"] == pytest.approx(0)  # the error is about it, so it is not missed
    assert split.numbers == dict.fromkeys(mistakes.KINDS, 0) | {"class": 1}


def test_of_two_errors_about_an_object_the_surer_one_is_mended_and_the_other_goes() -> None:
    pool = pooled([(A, 0, 0)], [(HALF, 0, 0.9), ((0.0, 0.0, 8.0, 20.0), 0, 0.8)])
    split = mistakes.tide(pool)
    assert split.numbers["localisation"] == 2
    assert (split.ap, split.costs["localisation"]) == (0, pytest.approx(1))


def test_that_holds_between_kinds_too() -> None:
    pool = pooled([(A, 0, 0)], [(HALF, 0, 0.9), (A, 1, 0.8)])
    costs = mistakes.tide(pool).costs
    assert (costs["class"], costs["localisation"]) == (0, pytest.approx(1))


def test_missed_objects_are_those_that_no_error_is_about() -> None:
    pool = pooled([(A, 0, 0), (B, 0, 0), (C, 0, DIFFICULT)], [(A, 0, 0.9), (FAR, 0, 0.1)])
    split = mistakes.tide(pool)
    assert split.missed.tolist() == [False, True, False]
    # 51 of the 101 recalls are reached with one of two, all with one of one.
    assert split.ap == pytest.approx(51 / 101)
    assert split.costs["missed"] == pytest.approx(50 / 101)
    assert split.costs["background"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("seed", "numbers", "costs"),
    [
        (0, [54, 27, 16, 17, 1, 20], [0.3101, 0.0983, 0.0168, 0.0113, 0.0002, 0.0471]),
        (1, [70, 14, 12, 17, 0, 16], [0.4373, 0.0572, 0.0116, 0.0089, 0.0, 0.0332]),
        (2, [69, 28, 14, 24, 2, 21], [0.3411, 0.0966, 0.0137, 0.0221, 0.0041, 0.0298]),
        (7, [73, 33, 8, 19, 0, 14], [0.3957, 0.1228, 0.0099, 0.0058, 0.0, 0.0217]),
    ],
)
def test_the_kinds_are_those_of_tides_own_code(seed: int, numbers: list[int], costs: list[float]) -> None:
    """What tidecv 1.0.1 says of these photos."""
    split = mistakes.tide(matches.pool(*random_photos(seed, count=30), NAMES))
    assert list(split.numbers.values()) == numbers
    assert list(split.costs.values()) == pytest.approx(costs, abs=6e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("flags", [(0,), (0, 0, DIFFICULT, CROWD)])
def test_the_kinds_share_out_what_is_wrong_and_mending_never_costs(seed: int, flags: Sequence[int]) -> None:
    records, detections = random_photos(seed, flags)
    pool = matches.pool(records, detections, NAMES)
    state = matches.match(pool, (0.5,)).state[0, 0]
    split = mistakes.tide(pool)
    assert split.ap == pytest.approx(metrics.of_pool(pool)["mAP50"])
    assert ((split.kind >= 0) == (state == matches.FALSE)).all()
    assert all(cost >= -1e-12 for cost in split.costs.values())
    assert sum(split.numbers[name] for name in mistakes.KINDS[:-1]) == (state == matches.FALSE).sum()


def test_confusion_has_every_object_and_every_detection_once() -> None:
    truth = [(A, 0, 0), (B, 1, 0), (C, 2, 0)]
    rows = [(A, 0, 0.9), (B, 2, 0.8), (FAR, 1, 0.7), (C, 2, 0.4)]
    confused = mistakes.confusion(pooled(truth, rows), LEVEL)
    wanted = np.zeros((4, 4), int)
    wanted[0, 0] = wanted[1, 2] = wanted[3, 1] = wanted[2, 3] = 1  # right, taken for 2, made up, missed
    assert (confused.table == wanted).all()
    (pair,) = mistakes.look_alikes(confused.table, NAMES)
    assert pair == ("box", "bag", 1, 0, 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_the_rows_of_the_confusion_are_the_objects(seed: int) -> None:
    records, detections = random_photos(seed, (0, 0, DIFFICULT))
    pool = matches.pool(records, detections, NAMES)
    confused = mistakes.confusion(pool, LEVEL)
    assert confused.table[:-1].sum(1).tolist() == pool.objects().sum(0).tolist()
    assert confused.table[:, :-1].sum() == confused.shown.sum()
    counted = metrics.counts(pool, matches.match(pool, (0.5,)).state[0, 0], LEVEL)
    assert np.trace(confused.table) == counted.hit.sum()
    photos = mistakes.worst(pool, confused, most=99)
    assert sum(each.false for each in photos) == confused.shown.sum() - counted.hit.sum()
    assert sum(each.missed for each in photos) == counted.objects.sum() - counted.hit.sum()
    errors = [each.false + each.missed for each in photos]
    assert errors == sorted(errors, reverse=True)


def test_the_worst_photos_are_those_of_each_class_too() -> None:
    """Class 2 is missed in one photo, with fewer errors than all others."""
    many = [record((A, 0, 0), (B, 0, 0), (C, 1, 0))] * 3
    records = [*many, record((A, 2, 0)), record((A, 0, 0))]
    pool = matches.pool(records, [found()] * 4 + [found((A, 0, 0.9))], NAMES)
    confused = mistakes.confusion(pool, LEVEL)
    assert [each.place for each in mistakes.worst(pool, confused, 2, 0)] == [0, 1]
    assert [each.place for each in mistakes.worst(pool, confused, 1, 2)] == [0, 1, 3]
    assert [each.place for each in mistakes.worst(pool, confused)] == [0, 1, 2, 3]


def test_doubtful_labels_and_their_xml(tmp_path: Path) -> None:
    records = [record((A, 0, 0), (B, 1, 0)), record((C, 2, 0)), record((A, 0, 0))]
    detections = [
        found((A, 0, 0.95), (B, 2, 0.9), ((90.2, 0.0, 100.0, 9.7), 0, 0.8), (C, 1, 0.3)),
        found(),
        found((A, 0, 0.9)),
    ]
    pool = matches.pool(records, detections, NAMES)
    suspects = mistakes.suspects(pool, mistakes.tide(pool), LEVEL)
    assert [(each.photo, each.doubt, each.said, each.seen) for each in suspects] == [
        (0, "no label", "", "tin"),
        (0, "another class", "box", "bag"),
        (1, "nothing there", "bag", ""),
    ]
    names = ["JPEGImages/a.jpg", "JPEGImages/more/b.jpg", "JPEGImages/c.jpg"]
    assert mistakes.write_suspects(tmp_path / "out", suspects, records, names, NAMES) == 2
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.xml"))
    assert files == ["a.xml", "more/b.xml"]
    objects = ET.parse(tmp_path / "out" / "a.xml").getroot().findall("object")
    assert [(each.findtext("name"), each.findtext("comment")) for each in objects] == [
        ("tin", None),
        ("box", None),
        ("tin", "score 0.8000"),
        ("bag", "score 0.9000"),
    ]
    assert [objects[2].findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")] == [
        "90",
        "0",
        "100",
        "10",
    ]
    with pytest.raises(UserError, match="not empty"):
        mistakes.write_suspects(tmp_path / "out", suspects, records, names, NAMES)
